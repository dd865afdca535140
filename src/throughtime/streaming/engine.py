"""A model that is stepped: `stream(model)` packs its weights once and owns the states of its streams."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from throughtime.arguments import check_flags, check_sizes
from throughtime.errors import InputError, unknown_name
from throughtime.kernels import native
from throughtime.streaming import state
from throughtime.streaming.reading import LinearStage, RecurrentStage, Snapshot, snapshot

PRECISIONS = ("float32", "bfloat16", "int8")
_LARGEST_TABLE = 64 << 20  # bytes; more is read as embeddings, and multiplied at each step
_BEYOND_MEMORY, _MOST_THREADS = 1 << 60, 1 << 30  # what the kernels' integers hold
_LARGEST_ID = (1 << 63) - 1

Which = int | Sequence[int] | NDArray[Any] | Tensor | None
Floats = TypeVar("Floats", NDArray[np.float32], Tensor)


def stream(
    model: Any, *, streams: int = 1, precision: str = "float32", ids: bool | None = None, threads: int = 1
) -> "Stream":
    """Return a model to be stepped, one input at a time.

    The weights are copied and packed once: it is a snapshot, and what becomes of the model later doesn't change it. It computes
    as the model does in `eval()`: dropout is off and zoneout is its expectation. There are no gradients.

    Args:
        model: A recurrent layer (throughtime's or torch.nn's), an `nn.Sequential` of an `nn.Embedding` (or none), recurrent layers
            and `nn.Linear`, a `LanguageModel`, or a run that `throughtime.load` returned. Any device.
        streams: How many streams there are, each with a state of its own, zeros at first.
        precision: What products multiply: "float32"; "bfloat16", with half the memory traffic; or "int8", with a quarter: weights
            are rounded to 127 steps with a scale for each output, and inputs and h likewise at every step. Sums, states,
            biases, the nonlinearities and the rows that token ids choose are float32 always.
        ids: Whether it reads token ids, as a model with an embedding does. `True` for a recurrent layer has ids stand for one-hot
            vectors.
        threads: How many threads step the streams; they never wait for each other within a step. A single stream is stepped by one.

    Raises:
        InputError: The model has a part that can't be streamed, such as a bidirectional layer, or, in int8, a layer that reads
            more than 133,144 numbers; or there are no kernels.

    Example:
        >>> import torch, throughtime
        >>> layer = throughtime.LSTM(input_size=3, hidden_size=8)
        >>> one = throughtime.stream(layer)
        >>> x = torch.randn(100, 3)
        >>> h = torch.stack([one.step(x_t) for x_t in x])  # a few microseconds each
        >>> torch.equal(h, layer(x)[0])
        True
        >>> many = throughtime.stream(torch.nn.Sequential(layer, torch.nn.Linear(8, 2)), streams=10_000)
        >>> many.step(torch.randn(2, 3), which=[7, 4711]).shape
        torch.Size([2, 2])
    """
    if native.module is None:
        raise InputError(f"{native.missing}, which streams need; {native.ADVICE}")
    streams, threads = check_sizes(streams=streams, threads=threads)
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    seen = snapshot(model, ids)
    packed = _Packed(
        seen.stages[0].input_size,
        seen.stages[-1].output_size,
        seen.reads_ids,
        seen.vocabulary_size,
        seen.fingerprint(),
        precision,
    )
    return Stream(packed, _new_engine(_pack(seen, precision), streams, threads), streams)


def _new_engine(weights: Any, streams: int, threads: int) -> Any:
    """Return an engine with its states, of which there may be more than memory holds."""
    try:
        return native.module.StreamEngine(weights, min(streams, _BEYOND_MEMORY), min(threads, streams, _MOST_THREADS))
    except MemoryError:
        raise MemoryError(f"streams = {streams:,}: there is no memory for the states of so many") from None


class _Packed(NamedTuple):
    """What is known of packed weights."""

    input_size: int
    output_size: int
    reads_ids: bool
    vocabulary_size: int
    fingerprint: bytes
    precision: str


class Memory(NamedTuple):
    """Bytes: of the packed weights, which clones share; of buffers, whatever the number of streams; and of each stream."""

    weights: int
    buffers: int
    a_stream: int


class Stream:
    """A model with the states of its streams; `stream` makes one.

    Inputs are arrays: what is given as a tensor is answered with a tensor, anything else with a NumPy array, float32 always.
    Where token ids are read they stand in place of x, without the axis I.

    Where there is one stream, or `which` names one by its number, there is no axis of streams. With several it comes before I, and
    after T: (N, I), (T, N, I). `which` may be numbers, each once, or a mask (streams,); not given, it is all of them.

    Calls of several threads come one after the other, and the GIL is free meanwhile. A signal's handler may come in between two
    steps of a long `feed`; where it raises, as Ctrl-C's does, the steps before have been made.

    `clone` has states and buffers of its own, so that clones run at the same time. A stream's numbers depend neither on
    its neighbours nor on how its input is cut in calls. A call that is refused changes no state.

    Attributes:
        streams: How many streams there are.
        precision: What products multiply.
        input_size: I, the width of x; 1 for token ids.
        output_size: O, the width of what comes out: of the last layer.
        reads_ids: Whether token ids are read.
    """

    def __init__(self, packed: _Packed, engine: Any, streams: int) -> None:
        self._packed = packed
        self._engine = engine
        self._out_shape = packed.output_size if streams == 1 else (streams, packed.output_size)
        self._in_shape = (packed.input_size,) if streams == 1 else (streams, packed.input_size)
        self.streams = streams
        self.precision = packed.precision
        self.input_size = 1 if packed.reads_ids else packed.input_size
        self.output_size = packed.output_size
        self.reads_ids = packed.reads_ids

    def step(self, input: Any, which: Which = None) -> Any:
        """Advance one step: x_t (I,), or of several streams (N, I), gives y_t (O,) or (N, O).

        Args:
            input: x_t, or token ids.
            which: The streams that take part; the others keep their states.

        Raises:
            InputError: The shape or the type doesn't fit, or a stream is named twice.
            IndexError: There is no such stream or token id.
        """
        if which is None:
            kind = type(input)
            if kind is np.ndarray and input.shape == self._in_shape:
                out = np.empty(self._out_shape, np.float32)
                if self._engine.step(input, out):
                    return out
            elif kind is int and 0 <= input <= _LARGEST_ID:
                out = np.empty(self._out_shape, np.float32)
                if self._engine.step_id(input, out):
                    return out
            elif kind is Tensor and not input.requires_grad and input.shape == self._in_shape and input.is_cpu:
                out = np.empty(self._out_shape, np.float32)
                if self._engine.step(_memory_of(input), out):
                    return torch.from_numpy(out)
        return self._run(input, which, has_time=False, last=False)

    def feed(self, sequence: Any, which: Which = None, *, last: bool = False) -> Any:
        """Advance many steps: x (T, I), or (T, N, I), gives y (T, O) or (T, N, O), to the bit what as many calls of `step` give.

        Args:
            sequence: x, or token ids; T may be 0.
            which: The streams that take part.
            last: Return only the last step's output, (O,) or (N, O): what comes after the recurrent layers isn't computed before.

        Raises:
            InputError: As of `step`; or `last` of no steps is asked for.
            IndexError: There is no such stream or token id.
        """
        (last,) = check_flags(last=last)
        return self._run(sequence, which, has_time=True, last=last)

    def reset(self, which: Which = None) -> None:
        """Begin anew: the states of those streams, or of all, become zeros."""
        chosen = _Chosen.of(which, self.streams)
        self._engine.reset(chosen.address, chosen.rows)

    def state(self, which: Which = None) -> bytes:
        """Return the states of those streams, or of all, as bytes for `restore`: 4 for each number, and 56.

        A state belongs to the model's weights; precision, threads and number of streams may be others where it is restored.
        """
        chosen = _Chosen.of(which, self.streams)
        states = np.empty((chosen.rows, self._engine.state_size), np.float32)
        self._engine.read_states(chosen.address, chosen.rows, states.ctypes.data)
        return state.pack(states, self._packed.fingerprint)

    def restore(self, blob: bytes, which: Which = None) -> None:
        """Put saved states back, in those streams or in all; a state of one stream goes in each of them.

        Raises:
            InputError: It is no state, is damaged, is another model's, or of another number of streams. Then nothing changes.
        """
        states = state.unpack(blob, self._packed.fingerprint, self._engine.state_size)
        chosen = _Chosen.of(which, self.streams)
        if len(states) not in (1, chosen.rows):
            counts = "1" if chosen.rows == 1 else f"1 or of {chosen.rows}"
            raise InputError(f"the state is of {len(states)} streams; expected one of {counts}")
        states = np.ascontiguousarray(np.broadcast_to(states, (chosen.rows, self._engine.state_size)))
        self._engine.write_states(chosen.address, chosen.rows, states.ctypes.data)

    def clone(self) -> "Stream":
        """Return the same streams again, with states of their own, over the same packed weights."""
        return Stream(self._packed, self._engine.clone(), self.streams)

    @property
    def memory(self) -> Memory:
        """How much memory the streams take."""
        return Memory(*self._engine.memory())

    def __repr__(self) -> str:
        reads = f"{self._packed.vocabulary_size} token ids" if self.reads_ids else f"{self.input_size} numbers"
        count = "1 stream" if self.streams == 1 else f"{self.streams:,} streams"
        return f"<throughtime {count}, {self.precision}: {reads} to {self.output_size}>"

    def __reduce__(self) -> Any:
        raise TypeError("a Stream isn't pickled; save state(), and make it again with stream(model)")

    def _run(self, input: Any, which: Which, *, has_time: bool, last: bool) -> Any:
        chosen = _Chosen.of(which, self.streams)
        is_tensor = isinstance(input, Tensor)
        array = self._array(input)
        axes = (("T",) if has_time else ()) + (() if chosen.is_one else ("N",))
        expected = array.shape[:1] * has_time + (() if chosen.is_one else (chosen.rows,)) + self._widths
        if array.ndim != len(expected) or array.shape != expected:
            names = ", ".join([*axes, *(() if self.reads_ids else ("I",))])
            sizes = {"N": chosen.rows, "I": self._packed.input_size, "T": "any"}
            told = ", ".join(f"{name} = {sizes[name]}" for name in names.split(", ") if name)
            raise InputError(f"input has shape {array.shape}; expected ({names}): {told or 'one token id'}")
        steps = array.shape[0] if has_time else 1
        if last and not steps:
            raise InputError("last=True of a sequence of no steps; expected at least one")
        lead = () if chosen.is_one else (chosen.rows,)
        lead = (steps, *lead) if has_time and not last else lead
        out = np.empty((*lead, self.output_size), np.float32)
        self._feed(array, chosen, steps, out, last)
        return torch.from_numpy(out) if is_tensor else out

    @property
    def _widths(self) -> tuple[int, ...]:
        return () if self.reads_ids else (self._packed.input_size,)

    def _feed(self, array: NDArray[Any], chosen: "_Chosen", steps: int, out: NDArray[np.float32], last: bool) -> None:
        if chosen.rows and steps:
            address = array.ctypes.data
            x, ids = (0, address) if self.reads_ids else (address, 0)
            self._engine.feed(steps, chosen.rows, chosen.address, x, ids, out.ctypes.data, last)

    def _array(self, input: Any) -> NDArray[Any]:
        """Return input without gaps: float32, or int64 of token ids, which nobody else can change when they have been checked."""
        if isinstance(input, Tensor):
            if input.requires_grad and torch.is_grad_enabled():
                raise InputError("a stream has no gradients, and the input asks for some; expected input.detach()")
            if not input.is_cpu:
                raise InputError(f"input is on {input.device}; a stream is on the CPU: expected input.cpu()")
        array = _as_array("input", input)
        if self.reads_ids:
            return np.array(self._within_64_bits(array), np.int64, order="C")
        if array.dtype.kind != "f":
            raise InputError(
                f"input is {array.dtype}; expected floats: this model reads no token ids (ids=True has it do so)"
            )
        return np.asarray(array, np.float32, order="C")

    def _within_64_bits(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Return token ids, of which the kernels check those that they can hold."""
        is_object = ids.dtype == object and all(isinstance(each, int) for each in ids.flat)
        if ids.dtype.kind not in "iu" and ids.size and not is_object:
            raise InputError(f"input is {ids.dtype}; expected token ids: integers")
        if ids.dtype.kind in "uO" and ids.size and not -_LARGEST_ID <= ids.min() <= ids.max() <= _LARGEST_ID:
            raise IndexError(
                f"a token id has more than 64 bits; expected one from 0 to {self._packed.vocabulary_size - 1}"
            )
        return ids


def _memory_of(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor's memory as an array, which is empty where NumPy has none like it."""
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError):
        return np.empty(0, np.float32)


def _as_array(name: str, value: Any) -> NDArray[Any]:
    """Return the array that a tensor, a list or an array stands for; numbers that NumPy lacks become float32."""
    try:
        if not isinstance(value, Tensor):
            return np.asarray(value)
        value = value.detach().cpu()
        is_known = not value.is_floating_point() or value.dtype in (torch.float16, torch.float64)
        return (value if is_known else value.float()).resolve_neg().resolve_conj().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} is a {type(value).__name__} that makes no array ({error}); expected a dense tensor, an array or a list"
        ) from None


class _Chosen(NamedTuple):
    """The streams that take part.

    Attributes:
        array: A copy of their numbers, int64; `None` are all.
        rows: How many they are.
        is_one: Whether it is a single one without an axis of its own.
    """

    array: NDArray[np.int64] | None
    rows: int
    is_one: bool

    @classmethod
    def of(cls, which: Which, streams: int) -> "_Chosen":
        """Read what a caller says."""
        if which is None:
            return cls(None, streams, streams == 1)
        array = _as_array("which", which)
        if array.dtype == bool and array.shape == (streams,):
            array = array.nonzero()[0]
        is_integer = array.dtype.kind in "iu" or (
            array.dtype == object and all(type(each) is int for each in array.flat)
        )
        if array.ndim == 0 and is_integer:
            number = operator.index(array[()])
            if not 0 <= number < streams:
                raise IndexError(f"which = {number}; expected a stream from 0 to {streams - 1}")
            return cls(np.array([number]), 1, True)
        if array.ndim != 1 or (array.size and not is_integer):
            raise InputError(
                f"which is {array.dtype} of shape {array.shape}; expected streams' numbers, or a mask of shape ({streams},)"
            )
        if array.dtype in (np.uint64, object):  # the kernels check those that they can hold
            for place, number in enumerate(array.tolist()):
                if not 0 <= number < streams:
                    raise IndexError(f"which[{place}] = {number}; expected a stream from 0 to {streams - 1}")
        return cls(np.array(array, np.int64), len(array), False)

    @property
    def address(self) -> int:
        """Where the numbers are; 0 for all."""
        return 0 if self.array is None else self.array.ctypes.data


def _pack(seen: Snapshot, precision: str) -> Any:
    """Hand the weights to the kernels."""
    weights = native.module.StreamWeights(precision)
    first = seen.stages[0]
    table = _table(seen) if seen.reads_ids and isinstance(first, RecurrentStage) else None
    try:
        for place, stage in enumerate(seen.stages):
            if isinstance(stage, LinearStage):
                bias = native.address(stage.bias)
                weights.add_linear(stage.weight.data_ptr(), bias, stage.output_size, stage.input_size)
            else:
                _add_recurrent(weights, stage, has_table=place == 0 and table is not None)
    except ValueError as error:
        raise InputError(str(error)) from None
    if table is not None:
        weights.set_table(table.data_ptr(), *table.shape, True)
    elif seen.embedding is not None:
        weights.set_table(seen.embedding.data_ptr(), *seen.embedding.shape, False)
    return weights


def _add_recurrent(weights: Any, stage: RecurrentStage, *, has_table: bool) -> None:
    parameters = native.addresses(stage.parameters._asdict())
    if has_table:
        parameters["weight_ih"] = 0
    weights.add_recurrent(
        stage.spec.base,
        input=stage.input_size,
        hidden=stage.hidden_size,
        projected=stage.output_size if stage.parameters.weight_hr is not None else 0,
        is_variant=bool(stage.spec.variants),
        is_coupled=stage.spec.is_coupled,
        **parameters,
        kept_h=stage.share_h,
        kept_c=stage.share_c,
    )


def _table(seen: Snapshot) -> Tensor | None:
    """Return W_ih x of each token id (V, G·H), in float32; `None` where it would be too large."""
    first = seen.stages[0]
    assert isinstance(first, RecurrentStage)
    weight = first.parameters.weight_ih
    if seen.embedding is None:
        return weight.t().contiguous()
    if 4 * seen.vocabulary_size * weight.shape[0] > _LARGEST_TABLE:
        return None
    product = native.module.StreamWeights("float32")
    product.add_linear(weight.data_ptr(), 0, *weight.shape)
    table = torch.empty(seen.vocabulary_size, weight.shape[0])
    product.multiply(len(table), seen.embedding.data_ptr(), table.data_ptr())
    return table
