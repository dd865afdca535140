"""The boundary between Python and the kernels, fuzzed: a right answer or a clear exception, never a crash, never a wrong answer.

A valid request is spoilt in one to three places and sent through every door: the operator, its backward pass, the kernels'
functions, the layers. `make sanitize` runs the same under AddressSanitizer.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import suppress

import passes
import pytest
import torch
from comparison import HAS_NATIVE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from variants import COMBINATIONS, mask_names, random_masks, random_parameters

import throughtime
from throughtime.cells import CELLS, Masks, Parameters, find, sequence
from throughtime.request import split

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")

CLEAR = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError)  # InputError is a ValueError
NAMES = (
    *("input", "h_0", "c_0", "hx", "state", "parameters", "weight", "bias", "lengths", "reset", "projection", "cell"),
    *(
        "grad_output",
        "grad_final",
        "output",
        "saved",
        "backend",
        "keep",
        "initial",
        "argument",
        "device",
        "sequence length",
        "token id",
        "mask",
        "zoneout",
        "recurrent_dropout",
        "gain",
        "shift_c",
        "batch_sizes",
    ),
)


class Plain(Tensor):
    """A subclass that changes nothing."""


class Request:
    """Arguments of the operator, by name, all of them valid at first."""

    def __init__(self, cell: str, steps: int, batch: int, hidden: int, projection: int, bias: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        self.cell = cell
        projection = projection if cell == "lstm" else 0
        width, rows = projection or hidden, CELLS[cell].spec.gates * hidden
        self.tensors: dict[str, object] = {"input": draw(steps, batch, 4)}
        self.tensors |= {"h_0": draw(batch, width)} | ({"c_0": draw(batch, hidden)} if cell == "lstm" else {})
        self.tensors |= {"weight_ih": draw(rows, 4) / 2, "weight_hh": draw(rows, width) / width**0.5}
        if bias:
            self.tensors |= {"bias_ih": draw(rows), "bias_hh": draw(rows)}
        if projection:
            self.tensors["weight_hr"] = draw(projection, hidden) / hidden**0.5
        self.tensors["lengths"] = torch.randint(0, steps + 1, (batch,), generator=generator)
        self.tensors["reset"] = torch.rand(steps, batch, generator=generator) < 0.3
        self.kept = {"grad_output": draw(steps, batch, width), "grad_h": draw(batch, width)}
        if cell == "lstm":
            self.kept["grad_c"] = draw(batch, hidden)

    def group(self, *names: str) -> list:
        return [self.tensors[name] for name in names if name in self.tensors]

    @property
    def arguments(self) -> list:
        """Input, initial state, parameters, lengths, reset."""
        parameters = self.group("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        optional = [self.tensors.get("lengths"), self.tensors.get("reset")]
        return [self.tensors["input"], self.group("h_0", "c_0"), parameters, *optional]

    @property
    def gradients(self) -> tuple:
        return self.kept["grad_output"], [self.kept[name] for name in ("grad_h", "grad_c") if name in self.kept]


def overlapping(tensor: Tensor) -> Tensor:
    """Rows that share all but one of their elements."""
    if tensor.dim() < 2 or not tensor.numel():
        return tensor
    size = tensor.shape[-1] + tensor.shape[-2]
    strides = [0] * (tensor.dim() - 2) + [1, 1]
    return tensor.flatten()[:1].repeat(size).add(torch.arange(size)).to(tensor.dtype).as_strided(tensor.shape, strides)


def with_gaps(tensor: Tensor) -> Tensor:
    """The same values, far apart in memory."""
    wide = tensor.new_zeros([2 * size + 1 for size in tensor.shape])
    view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def negated_lazily(tensor: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag if tensor.dtype == torch.float32 else tensor


SPOILERS: dict[str, Callable[[Tensor], object]] = {
    "half": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "double": lambda t: t.double(),
    "int64": lambda t: t.long(),
    "int32": lambda t: t.int(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.to_sparse_csr() if t.dim() == 2 else t,
    "none": lambda t: None,
    "number": lambda t: 3,
    "list": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "row less": lambda t: t[:-1],
    "column less": lambda t: t[..., :-1],
    "row more": lambda t: torch.cat([t, t[:1]]),
    "columns doubled": lambda t: torch.cat([t, t], -1),
    "no rows": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "one row": lambda t: t[:1],
    "one column": lambda t: t[..., :1],
    "an axis more": lambda t: t[None],
    "an axis less": lambda t: t[0],
    "a scalar": lambda t: t.flatten()[0] if t.numel() else t,
    "flat": lambda t: t.flatten(),
    "turned": lambda t: t.transpose(0, -1),
    "column-major": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "with gaps": with_gaps,
    "backwards": lambda t: t.flip(0),
    "expanded rows": lambda t: t[:1].expand(t.shape),
    "expanded columns": lambda t: t[..., :1].expand(t.shape),
    "overlapping": overlapping,
    "subclass": lambda t: t.as_subclass(Plain),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
    "requires grad": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    "nan": lambda t: t * torch.nan if t.is_floating_point() else t,
    "large": lambda t: t * 100 if t.is_floating_point() else t * 2**40,
    "negative": lambda t: -t if t.dtype != torch.bool else ~t,
    "negated lazily": negated_lazily,
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}


requests = st.builds(
    Request,
    cell=st.sampled_from(list(CELLS)),
    steps=st.sampled_from([1, 2, 5]),
    batch=st.sampled_from([1, 2, 3, 6]),
    hidden=st.sampled_from([1, 5, 17]),
    projection=st.sampled_from([0, 3]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
spoilt_by = st.lists(
    st.tuples(st.integers(0, 20), st.sampled_from([*SPOILERS, "absent"])),
    min_size=0,
    max_size=3,
    unique_by=lambda s: s[0],
)


def spoil(tensors: dict, spoilers: list[tuple[int, str]]) -> None:
    names = list(tensors)
    for index, kind in spoilers:
        name = names[index % len(names)]
        tensor = tensors.get(name)
        if kind == "absent" and name != "input":
            tensors.pop(name, None)
        elif isinstance(tensor, Tensor) and tensor.dim() and kind != "absent":
            with suppress(RuntimeError, TypeError, IndexError), warnings.catch_warnings(action="ignore"):
                tensors[name] = SPOILERS[kind](tensor)  # some can't be made of every tensor


def answer_or_message(compute: Callable[[], object]) -> object:
    """Return the answer; an exception must be of a clear kind and name an argument, and then there is none."""
    try:
        return compute()
    except CLEAR as error:
        if not any(name in str(error) for name in NAMES):
            raise AssertionError("the message names no argument") from error
        return None


def exact(request: Request, reverse: bool) -> list[Tensor] | None:
    """The equations' answer in float64, where the arguments mean what they should."""
    input, initial, parameters, lengths, reset = request.arguments
    doubles = [t.detach().as_subclass(Tensor).to_dense().double() for t in (input, *initial, *parameters)]
    state = tuple(doubles[1 : 1 + len(initial)])
    weights = Parameters.from_list(doubles[1 + len(initial) :])
    result = sequence.forward(CELLS[request.cell], doubles[0], state, weights, lengths, reset, reverse)
    return [result.outputs, *result.final_state]


def assert_right(output: Tensor, final: list[Tensor], request: Request, reverse: bool) -> None:
    if output.device.type == "meta":
        return
    tolerance = 0.1 if output.dtype == torch.bfloat16 else 1e-4
    for actual, right in zip([output, *final], exact(request, reverse), strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=tolerance, atol=tolerance, equal_nan=True)


@given(request=requests, spoilers=spoilt_by, reverse=st.booleans(), keep=st.booleans(), native=st.booleans())
@settings(max_examples=300)
def test_the_operator_answers_rightly_or_clearly(request, spoilers, reverse, keep, native):
    spoil(request.tensors, spoilers)
    backend = "native" if native else "reference"
    rest = (request.cell, reverse, keep, backend)
    answer = answer_or_message(lambda: torch.ops.throughtime.recurrence(*request.arguments, [], *rest))
    if answer is not None:
        assert_right(*answer[:2], request, reverse)


@given(request=requests, spoilers=spoilt_by, reverse=st.booleans(), keep=st.booleans(), threads=st.sampled_from([1, 2]))
@settings(max_examples=300)
def test_the_kernels_functions_answer_rightly_or_clearly(request, spoilers, reverse, keep, threads):
    spoil(request.tensors, spoilers)
    torch.set_num_threads(threads)
    answer = answer_or_message(lambda: passes.forward(request.cell, *request.arguments, reverse, keep))
    torch.set_num_threads(1)
    if answer is not None:
        assert_right(*answer[:2], request, reverse)


@given(request=requests, spoilers=spoilt_by, keep=st.booleans(), threads=st.sampled_from([1, 2]))
@settings(max_examples=200)
def test_both_directions_at_once_answer_rightly_or_clearly(request, spoilers, keep, threads):
    """What is spoilt is the reverse pass's, or both's."""
    reverse = copy.deepcopy(request)
    spoil(reverse.tensors, spoilers)
    (_, states, weights, *_), (input, *others, lengths, reset) = request.arguments, reverse.arguments
    torch.set_num_threads(threads)
    given = (request.cell, input, states + others[0], weights + others[1], lengths, reset, False, keep)
    answer = answer_or_message(lambda: passes.forward(*given, bidirectional=True))
    torch.set_num_threads(1)
    if answer is None:
        return
    output, final, _ = answer
    shared = ("input", "lengths", "reset")
    request.tensors = {n: t for n, t in request.tensors.items() if n not in shared}
    request.tensors |= {n: t for n, t in reverse.tensors.items() if n in shared}
    own = zip((request, reverse), output.chunk(2, -1), split(final, 2), (False, True), strict=True)
    for direction, half, state, is_reverse in own:
        assert_right(half, state, direction, is_reverse)


def is_same(tensor: object, other: Tensor) -> bool:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device != other.device:
        return False
    return tensor.dtype == other.dtype and torch.equal(tensor, other)


@given(
    request=requests,
    spoilers=spoilt_by,
    reverse=st.booleans(),
    door=st.sampled_from(["native", "reference", "kernels"]),
)
@settings(max_examples=300)
def test_a_backward_pass_answers_rightly_or_clearly(request, spoilers, reverse, door):
    """Called by hand, with an output and kept values that don't belong to the request."""
    backend = "reference" if door == "reference" else "native"
    output, _, saved = torch.ops.throughtime.recurrence(*request.arguments, [], request.cell, reverse, True, backend)
    tensors = request.kept | {"output": output} | {f"saved {index}": tensor for index, tensor in enumerate(saved)}
    right = copy.deepcopy(tensors)
    spoil(tensors, spoilers)
    state = [tensors[name] for name in ("grad_h", "grad_c") if name in tensors]
    given = (tensors.get("grad_output"), state, *request.arguments[:3], tensors.get("output"))
    kept = [tensor for name, tensor in tensors.items() if name.startswith("saved")]

    def compute() -> object:
        if door == "kernels":
            return passes.backward((request.cell, *request.arguments, reverse), *given[:2], given[-1], kept)
        rest = (*request.arguments[3:], [], request.cell, reverse, True, backend, None, 0, False)
        return torch.ops.throughtime.recurrence_backward(*given, kept, *rest)

    answer = answer_or_message(compute)
    same = set(tensors) == set(right) and all(map(is_same, tensors.values(), right.values()))
    if answer is None:
        assert spoilers
    elif same:  # other values, or other strides for the same ones
        expected = torch.ops.throughtime.recurrence_backward(
            *request.gradients,
            *request.arguments[:3],
            right["output"],
            [t for n, t in right.items() if n[:5] == "saved"],
            *(*request.arguments[3:], [], request.cell, reverse, True, backend, None, 0, False),
        )
        for a, e in zip([answer[0], *answer[1], *answer[2]], [expected[0], *expected[1], *expected[2]], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


class VariantRequest(Request):
    """As Request, of a cell with variants and their masks, of floats or token ids, padded or packed."""

    def __init__(self, cell: str, steps: int, batch: int, hidden: int, form: str, seed: int) -> None:
        super().__init__(cell.split("+")[0], steps, batch, hidden, 0, True, seed)
        torch.manual_seed(seed)
        self.cell, self.form = cell, form
        draw = random_parameters(cell, 4, hidden, dtype=torch.float32)
        parameters = Parameters.from_list(draw, find(cell).spec.variant_parameters).there()
        self.parameters, self.masks = list(parameters), list(find(cell).spec.masks)
        masks = [t.float() if t.is_floating_point() else t for t in random_masks(cell, steps, batch, hidden)]
        self.tensors |= dict(zip(self.parameters, draw, strict=True)) | dict(zip(self.masks, masks, strict=True))
        shape: tuple[int, ...] = (steps, batch)
        if "packed" in form:
            del self.tensors["lengths"], self.tensors["reset"]
            sizes = torch.randint(1, batch + 1, (steps,)).sort(descending=True)[0]
            sizes[0] = batch
            self.tensors["batch_sizes"] = sizes
            shape = (int(sizes.sum()),)
        self.tensors["input"] = torch.randint(4, shape) if "ids" in form else torch.randn(*shape, 4)

    def run(self, reverse: bool, keep: bool, backend: str, recompute_every: int) -> object:
        optional = [self.tensors.get("lengths"), self.tensors.get("reset")]
        given = (self.tensors["input"], self.group("h_0", "c_0"), self.group(*self.parameters), *optional)
        rest = (self.group(*self.masks), self.cell, reverse, keep, backend)
        more = (self.tensors.get("batch_sizes"), recompute_every)
        return torch.ops.throughtime.recurrence(*given, *rest, *more)

    def exact(self, reverse: bool) -> list[Tensor]:
        """The equations' answer in float64, of padded vectors."""
        kind, there = find(self.cell), {n: t for n, t in self.tensors.items() if isinstance(t, Tensor)}
        plain = {n: t.detach().as_subclass(Tensor).to_dense() for n, t in there.items()}
        plain = {n: t.double() if t.is_floating_point() else t for n, t in plain.items()}
        input, lengths = plain["input"], plain.get("lengths")
        if self.packs:
            input, lengths = pad_packed_sequence(PackedSequence(input, plain["batch_sizes"]))
        if not input.is_floating_point():
            input = one_hot(input.clamp(0, 3), 4).double()  # ids in the padding may be anything
        parameters = Parameters.from_list(
            [plain[name] for name in self.parameters if name in plain], kind.spec.variant_parameters
        )
        state = tuple(plain[name] for name in ("h_0", "c_0") if name in plain)
        masks = Masks.from_list([plain[name] for name in self.masks], kind.spec.masks)
        result = sequence.forward(kind, input, state, parameters, lengths, plain.get("reset"), reverse, masks=masks)
        outputs = pack_padded_sequence(result.outputs, lengths).data if self.packs else result.outputs
        return [outputs, *result.final_state]

    @property
    def packs(self) -> bool:
        return isinstance(self.tensors.get("batch_sizes"), Tensor)


VARIANTS = [*CELLS, *(f"{cell}+{'+'.join(mask_names(cell))}" for cell in COMBINATIONS)]


@given(
    options=st.fixed_dictionaries(
        {
            "cell": st.sampled_from(VARIANTS),
            "steps": st.sampled_from([1, 2, 5]),
            "batch": st.sampled_from([1, 2, 3, 6]),
            "hidden": st.sampled_from([1, 5, 17]),
            "form": st.sampled_from(["padded", "padded ids", "packed", "packed ids"]),
            "seed": st.integers(0, 99),
        }
    ),
    spoilers=spoilt_by,
    reverse=st.booleans(),
    keep=st.booleans(),
    native=st.booleans(),
    recompute_every=st.sampled_from([0, 2]),
)
@settings(max_examples=400)
def test_variants_masks_ids_and_packed_rows_are_answered_rightly_or_clearly(
    options, spoilers, reverse, keep, native, recompute_every
):
    request = VariantRequest(**options)  # here: hypothesis wants no seeding while it draws
    spoil(request.tensors, spoilers)
    backend = "native" if native else "reference"
    answer = answer_or_message(lambda: request.run(reverse, keep, backend, recompute_every))
    if answer is None:
        assert spoilers
    elif answer[0].device.type != "meta":
        tolerance = 0.1 if answer[0].dtype == torch.bfloat16 else 1e-3  # a normalisation amplifies rounding
        for a, e in zip([answer[0], *answer[1]], request.exact(reverse), strict=True):
            torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance, equal_nan=True)


LAYERS = {"rnn": throughtime.RNN, "lstm": throughtime.LSTM, "gru": throughtime.GRU}


@given(
    name=st.sampled_from(list(LAYERS)),
    batch=st.sampled_from([1, 3]),
    options=st.fixed_dictionaries(
        {"batch_first": st.booleans(), "bidirectional": st.booleans(), "bias": st.booleans()}
    ),
    backend=st.sampled_from(["auto", "native", "reference"]),
    spoilers=spoilt_by,
    seed=st.integers(0, 99),
)
@settings(max_examples=200)
def test_the_layers_answer_rightly_or_clearly(name, batch, options, backend, spoilers, seed):
    torch.manual_seed(seed)
    layer = LAYERS[name](4, 5, backend=backend, **options)
    x = torch.randn(3, batch, 4)
    lengths, reset = torch.randint(0, 4, (batch,)), torch.rand(3, batch) < 0.3
    tensors = {"input": x.transpose(0, 1) if options["batch_first"] else x}
    tensors |= {"lengths": lengths, "reset": reset.T if options["batch_first"] else reset}
    tensors |= {
        name: torch.randn(2 if options["bidirectional"] else 1, batch, 5) for name in ("h", "c")[: 1 + (name == "lstm")]
    }
    spoil(tensors, spoilers)
    state = [tensors[name] for name in ("h", "c") if name in tensors]
    hx = None if not state else tuple(state) if name == "lstm" else state[0]

    def run(with_layer: torch.nn.Module, *cast: torch.dtype) -> list[Tensor]:
        as_is = lambda t: t.to(*cast) if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
        output, final = with_layer(
            as_is(tensors["input"]),
            tuple(map(as_is, hx)) if isinstance(hx, tuple) else as_is(hx),
            lengths=tensors.get("lengths"),
            reset=tensors.get("reset"),
        )
        return [output, *(final if isinstance(final, tuple) else [final])]

    answer = answer_or_message(lambda: run(layer))
    if answer is not None and answer[0].device.type != "meta":
        double = copy.deepcopy(layer).double()
        double.backend = "reference"
        for a, e in zip(answer, run(double, torch.float64), strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4, equal_nan=True)


def through_operator(cell: str, *rest) -> object:
    return torch.ops.throughtime.recurrence(*rest[:5], [], cell, *rest[5:])


@pytest.mark.parametrize("door", ["native", "reference", "kernels"])
@pytest.mark.parametrize("cell", ["", "lstn", "LSTM", "rnn"])
def test_unknown_cells_are_refused(cell, door):
    request = Request("lstm", 2, 3, 5, 0, True, 0)
    run = passes.forward if door == "kernels" else through_operator
    rest = () if door == "kernels" else (door,)
    with pytest.raises((ValueError, NotImplementedError), match="cell"):
        run(cell, *request.arguments, False, True, *rest)


def test_unknown_backends_are_refused():
    request = Request("lstm", 2, 3, 5, 0, True, 0)
    with pytest.raises(throughtime.InputError, match="unknown backend 'natvie'; did you mean 'native'"):
        torch.ops.throughtime.recurrence(*request.arguments, [], "lstm", False, True, "natvie")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_backward_after_a_forward_pass_that_kept_nothing_is_refused(backend):
    request = Request("lstm", 2, 3, 5, 0, True, 0)
    output, _, saved = torch.ops.throughtime.recurrence(*request.arguments, [], "lstm", False, False, backend)
    with pytest.raises(ValueError, match=r"saved has 0 tensors; expected the \d that a forward pass with keep=True"):
        torch.ops.throughtime.recurrence_backward(
            *(*request.gradients, *request.arguments[:3], output, saved, None, None, [], "lstm", False, True, backend),
            *(None, 0, False),
        )


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 7).t()[:, None],  # one row, its features apart
        torch.randn(4, 7).t()[None],  # one step
        torch.randn(7, 3, 1).expand(7, 3, 4),
        torch.randn(7, 3, 8)[:, :, ::2],
        torch.randn(7, 3, 8)[:, :, 3:7],
        torch.randn(7, 3, 4, dtype=torch.complex64).conj().imag,
    ],
    ids=["one row", "one step", "expanded", "every other", "part", "negated lazily"],
)
def test_an_input_of_any_strides_is_read_rightly(cell, x):
    steps, batch, _ = x.shape
    request = Request(cell, steps, batch, 5, 0, True, 0)
    request.tensors |= {"input": x, "lengths": None, "reset": None}
    output, final, saved = passes.forward(cell, *request.arguments)
    assert_right(output, final, request, False)
    gradient = passes.backward((cell, *request.arguments), *request.gradients, output, saved)
    request.tensors["input"] = x.resolve_neg().contiguous()
    expected = passes.backward((cell, *request.arguments), *request.gradients, output, saved)
    for a, e in zip(gradient.parameters, expected.parameters, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["lengths", "reset"])
def test_a_tensor_without_memory_of_its_own_is_refused_wherever_it_stands(name):
    """Torch's own way to say zero: its address is 0, which is how the native side is told that there is none."""
    zeros = torch._efficientzerotensor(
        (2,) if name == "lengths" else (5, 2), dtype=torch.int64 if name == "lengths" else torch.bool
    )
    x, state = torch.randn(5, 2, 3), [torch.zeros(2, 4)]
    parameters = [torch.randn(12, 3), torch.randn(12, 4)]
    lengths, reset = (zeros, None) if name == "lengths" else (None, zeros)
    with pytest.raises(TypeError, match=f"{name}: a Tensor without memory of its own"):
        passes.forward("gru", x, state, parameters, lengths, reset)
