"""What is asked of a backend: one layer, in one direction or in both, over a batch of sequences; and what it answers.

The tensors have their names from the layer on. Only torch.library's schema and autograd want them in a row: `Request.read` and
`Request.tensors` are the ways from such a row and to it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughtime import spec
from throughtime.arguments import check_tensor, check_token_ids, describe
from throughtime.spec import NO_MASKS, Masks, Parameters, Spec

_NAMES_OF_STATE = ("h_0", "c_0")


class Sequences(NamedTuple):
    """What a layer, or a stack of them, reads.

    Attributes:
        input: (T, B, I), or token ids (T, B), int64; packed, (N, I) or (N,).
        lengths: Steps of each row (B,), int64, or `None` for T.
        reset: Where a new sequence begins (T, B), bool, or `None`.
        batch_sizes: Of packed input, how many rows take part in each step (T,), int64, as in torch's PackedSequence.
        order: Of packed input, which row of the caller's batch each row is (B,), or `None` where they are the same.
        embedding: (V, I), of which an id chooses a row; or `None`, and it stands for a one-hot vector.
    """

    input: Tensor
    lengths: Tensor | None = None
    reset: Tensor | None = None
    batch_sizes: Tensor | None = None
    order: Tensor | None = None
    embedding: Tensor | None = None


class Stack(NamedTuple):
    """Layers on top of each other, apart from their tensors.

    Attributes:
        spec: What the cell's name says.
        num_layers: L.
        bidirectional: Whether each layer runs both ways.
        dropout: Probability with which an output of any layer but the last is dropped; 0 outside training.
        backend: "auto" or a key of `throughtime.backends()`.
        zoneout: Probabilities (of c, of h) with which a unit keeps its old value.
        zoneout_is_expected: Whether zoneout's expectation stands for its masks: outside training.
        recurrent_dropout: Probability with which a unit of h_{t−1} is hidden from W_hh all along; 0 outside training.
        recompute_every: As in `Request`.
    """

    spec: Spec
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    backend: str = "auto"
    zoneout: tuple[float, float] = (0.0, 0.0)
    zoneout_is_expected: bool = False
    recurrent_dropout: float = 0.0
    recompute_every: int = 0

    @property
    def directions(self) -> int:
        """1, or 2 when bidirectional."""
        return 2 if self.bidirectional else 1


class Direction(NamedTuple):
    """One way through the sequences: the state that it begins with, (h_0,) or (h_0, c_0), and its weights."""

    initial: tuple[Tensor, ...]
    parameters: Parameters
    reverse: bool = False


class Result(NamedTuple):
    """A forward pass: output, final state of each direction after the other's, and what the backward pass needs."""

    output: Tensor
    final: list[Tensor]
    saved: list[Tensor]


class Gradient(NamedTuple):
    """A backward pass: gradients of the input (or `None`), the initial state and the parameters, in the request's order."""

    input: Tensor | None
    initial: list[Tensor]
    parameters: list[Tensor]


class Request(NamedTuple):
    """One layer, in one direction or in both.

    Attributes:
        spec: What the cell's name says.
        input: As in `Sequences`.
        directions: One; or two, the forward one and the reverse one, and then the output is (T, B, 2 P).
        lengths: As in `Sequences`.
        reset: As in `Sequences`.
        batch_sizes: As in `Sequences`. The rows of state and masks are in the order of the packed ones.
        masks: Those that the cell takes.
        recompute_every: Keep for the backward pass only the state, in every so many steps, rounded up to whole stretches; 0
            keeps all that it needs.
    """

    spec: Spec
    input: Tensor
    directions: tuple[Direction, ...]
    lengths: Tensor | None = None
    reset: Tensor | None = None
    batch_sizes: Tensor | None = None
    masks: Masks = NO_MASKS
    recompute_every: int = 0

    @classmethod
    def read(
        cls,
        cell: str,
        input: Tensor,
        initial: Sequence[Tensor],
        parameters: Sequence[Tensor],
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        batch_sizes: Tensor | None = None,
        masks: Sequence[Tensor] = (),
        reverse: bool = False,
        bidirectional: bool = False,
        recompute_every: int = 0,
    ) -> "Request":
        """Read a request whose tensors stand in flat lists.

        Args:
            cell: Its name, with variants.
            input: As in `Sequences`.
            initial: [h_0] or [h_0, c_0]; with `bidirectional`, then the reverse one's.
            parameters: weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr], as torch has them, then those of the variants;
                with `bidirectional`, then the reverse one's.
            lengths: As in `Sequences`.
            reset: As in `Sequences`.
            batch_sizes: As in `Sequences`.
            masks: Those that the cell takes, in the order of `Masks`.
            reverse: Run from the last step to the first.
            bidirectional: Run both ways.
            recompute_every: As in `Request`.

        Raises:
            InputError: There is no such cell.
            TypeError: Of two directions, an argument isn't a tensor.
            ValueError: There are too few tensors or too many, or those of two directions aren't alike.
        """
        said = spec.read(cell)
        if bidirectional:
            _check_alike(reverse, initial, parameters)
        ways = (False, True) if bidirectional else (bool(reverse),)
        shares = zip(split(initial, len(ways)), split(parameters, len(ways)), ways, strict=True)
        return cls(
            said,
            input,
            tuple(_direction(said, own, weights, way) for own, weights, way in shares),
            lengths,
            reset,
            batch_sizes,
            Masks.from_list(list(masks), said.masks),
            recompute_every,
        )

    @property
    def reads_ids(self) -> bool:
        """Whether the input is token ids."""
        return not self.input.is_floating_point()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of output and state."""
        return self.like.dtype

    @property
    def like(self) -> Tensor:
        """A tensor of that dtype, on the device of all."""
        return self.directions[0].initial[0] if self.reads_ids else self.input

    @property
    def steps(self) -> int:
        """T."""
        return (self.input if self.batch_sizes is None else self.batch_sizes).shape[0]

    @property
    def batch(self) -> int:
        """B."""
        return self.input.shape[1] if self.batch_sizes is None else int(self.batch_sizes[0])

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(T, B, directions · P), or packed (N, directions · P)."""
        places = self.input.shape[:-1] if self.input.is_floating_point() else self.input.shape
        return (*places, len(self.directions) * self.directions[0].initial[0].shape[1])

    @property
    def initial(self) -> list[Tensor]:
        """The initial states, each direction's after the other's."""
        return [state for direction in self.directions for state in direction.initial]

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that are there, each direction's after the other's."""
        return [p for direction in self.directions for p in direction.parameters if p is not None]

    def tensors(self) -> list[Tensor | None]:
        """Return all tensors in a row: input, initial states, parameters, masks, lengths, reset, batch sizes."""
        return [
            self.input,
            *self.initial,
            *self.parameters,
            *self.masks.to_list(),
            self.lengths,
            self.reset,
            self.batch_sizes,
        ]

    def form(self) -> "Form":
        """Return the request without its tensors."""
        names = tuple(
            [name for name, p in zip(Parameters._fields, self.directions[0].parameters, strict=True) if p is not None]
        )
        return Form(self.spec, tuple([d.reverse for d in self.directions]), names, self.recompute_every)


class Form(NamedTuple):
    """A request without its tensors.

    Attributes:
        spec: As in `Request`.
        ways: Of each direction, whether it is the reverse one.
        names: The parameters that are there in a direction.
        recompute_every: As in `Request`.
    """

    spec: Spec
    ways: tuple[bool, ...]
    names: tuple[str, ...]
    recompute_every: int

    @property
    def states(self) -> int:
        """How many tensors the state has, both directions together."""
        return len(self.ways) * len(self.spec.states)

    @property
    def differentiable(self) -> int:
        """How many of the tensors in a row may have a gradient: input, initial states, parameters."""
        return 1 + self.states + len(self.ways) * len(self.names)

    @property
    def total(self) -> int:
        """How many tensors stand in a row."""
        return self.differentiable + len(self.spec.masks) + 3

    def request(self, tensors: Sequence[Any]) -> Request:
        """Return the request of these tensors, which stand in the order of `Request.tensors`."""
        input, *rest, lengths, reset, batch_sizes = tensors
        states, count = self.states, len(self.ways)
        weights = self.differentiable - 1 - states
        masks = dict(zip(self.spec.masks, rest[states + weights :], strict=True))
        each = zip(split(rest[:states], count), split(rest[states : states + weights], count), self.ways, strict=True)
        directions = [
            Direction(tuple(initial), Parameters(**dict(zip(self.names, parameters, strict=True))), reverse)
            for initial, parameters, reverse in each
        ]
        more = lengths, reset, batch_sizes, Masks(**masks) if masks else NO_MASKS, self.recompute_every
        return Request(self.spec, input, tuple(directions), *more)


def _direction(said: Spec, initial: Sequence[Tensor], parameters: Sequence[Tensor], reverse: bool) -> Direction:
    if len(initial) != len(said.states):
        expected = ", ".join(_NAMES_OF_STATE[: len(said.states)])
        raise ValueError(f"there are {len(initial)} state tensors; expected {expected} of a {said.name}")
    if any(parameter is None for parameter in parameters):  # in `Parameters` that one isn't there
        raise TypeError("parameters hold a NoneType; expected tensors, and fewer where there are no biases")
    return Direction(tuple(initial), Parameters.from_list(list(parameters), said.variant_parameters), reverse)


def split(tensors: Sequence[Any], count: int) -> list[Any]:
    """Cut a list of tensors in each direction's own."""
    if count == 1:
        return [tensors]
    own = len(tensors) // count
    return [tensors[first : first + own] for first in range(0, own * count, own)] if own else [[]] * count


def _check_alike(reverse: bool, initial: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Check that state and parameters of both directions are alike, before each is checked by itself."""
    if reverse:
        raise ValueError("reverse is true beside bidirectional; expected false, since both ways are run")
    for name, tensors in (("state tensors", initial), ("parameters", parameters)):
        half = len(tensors) // 2
        if len(tensors) % 2:
            raise ValueError(
                f"there are {len(tensors)} {name}; expected as many of the reverse pass as of the forward one"
            )
        for index, (one, other) in enumerate(zip(tensors[:half], tensors[half:], strict=True)):
            for tensor in (one, other):
                if not isinstance(tensor, Tensor):
                    raise TypeError(f"{name}[{index}] is a {type(tensor).__name__}; expected a tensor")
            if (one.shape, one.dtype) != (other.shape, other.dtype):
                raise ValueError(
                    f"{name}[{half + index}] of the reverse pass is {describe(other)}; expected {describe(one)}, as the "
                    "forward pass has"
                )


def check_kinds(request: Request) -> None:
    """Check that input and state are tensors of the right kind: what tells whether a backend can serve them.

    Raises:
        TypeError: One isn't a tensor, or not one of numbers that can be differentiated.
        ValueError: The input has the wrong number of dimensions, or its batch sizes don't fit.
    """
    input, batch_sizes = request.input, request.batch_sizes
    dims = 3 if batch_sizes is None else 2
    if not (isinstance(input, Tensor) and input.dtype == torch.int64 and input.dim() == dims - 1):
        _check_kind("input", input, dims, "(T, B, I)" if batch_sizes is None else "packed (N, I)")
    for name, state in zip(_NAMES_OF_STATE, request.directions[0].initial, strict=False):
        if not isinstance(state, Tensor):
            raise TypeError(f"{name} is a {type(state).__name__}; expected a tensor")
    if batch_sizes is None:
        return
    steps = batch_sizes.numel() if isinstance(batch_sizes, Tensor) else 0
    check_tensor("batch_sizes", batch_sizes, (steps,), torch.int64, torch.device("cpu"))
    check_batch_sizes(batch_sizes, len(input))


def check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    """Check the values of batch sizes, for so many rows of packed input."""
    is_sorted = bool((batch_sizes[1:] <= batch_sizes[:-1]).all())
    if len(batch_sizes) == 0 or not is_sorted or int(batch_sizes[-1]) < 1 or int(batch_sizes.sum()) != rows:
        raise ValueError(
            f"batch_sizes are {batch_sizes.tolist()}; expected a number for each step, none greater than the one before, "
            f"at least 1, and in sum {rows}, the rows of input"
        )


def check_lengths(lengths: Tensor, steps: int) -> None:
    """Check the values of lengths."""
    if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= steps:
        raise ValueError(f"lengths must lie in 0 ... {steps}, the number of steps; {lengths.tolist()} don't")


def check_variants(said: Spec, parameters: Parameters) -> None:
    """Check that the parameters are there that a cell's variants bring."""
    for name in said.variant_parameters:
        if getattr(parameters, name) is None:
            raise TypeError(f"{name} is None; expected a tensor, since a {said.name} has it")


def check(request: Request, dtypes: Sequence[torch.dtype] = ()) -> None:
    """Check all that `check_kinds` leaves open, before anybody reads the tensors.

    Args:
        request: What is checked.
        dtypes: What the parameters' may be, the likeliest first; empty for any. It is one for all of them.

    Raises:
        TypeError: An argument isn't a tensor, or not one of numbers that can be differentiated.
        ValueError: Shape, dtype, device or value don't fit.
        IndexError: A token id is negative or too large.
    """
    if request.recompute_every < 0:
        raise ValueError(
            f"recompute_every = {request.recompute_every}; expected a number of steps, or 0 to recompute nothing"
        )
    if request.batch_sizes is not None and (request.lengths is not None or request.reset is not None):
        raise ValueError("lengths or reset are given; packed input takes neither, its batch_sizes tell the lengths")
    for direction in request.directions:
        _check_direction(request, direction, dtypes)
    input, lengths, reset = request.input, request.lengths, request.reset
    steps, batch = request.steps, request.batch
    if lengths is not None:
        check_tensor("lengths", lengths, (batch,), torch.int64, input.device)
        check_lengths(lengths, steps)
    if request.reads_ids:
        is_real = None if lengths is None else torch.arange(steps, device=input.device)[:, None] < lengths
        check_token_ids(input, request.directions[0].parameters.weight_ih.shape[1], is_real)
    if reset is not None:
        check_tensor("reset", reset, (steps, batch), torch.bool, input.device)
    if request.spec.masks:
        _check_masks(request)


def _check_direction(request: Request, direction: Direction, dtypes: Sequence[torch.dtype]) -> None:
    said, parameters, device = request.spec, direction.parameters, request.input.device
    weight_ih, weight_hh, weight_hr = parameters.weight_ih, parameters.weight_hh, parameters.weight_hr
    _check_there(request, parameters)
    _check_kind("weight_ih", weight_ih, 2, "2 dimensions")
    _check_kind("weight_hh", weight_hh, 2, "2 dimensions")
    if weight_hr is not None:
        _check_kind("weight_hr", weight_hr, 2, "2 dimensions")
        if "c" not in said.states:
            raise ValueError(f"weight_hr is given; a {said.name} has no projection")
    features = weight_ih.shape[1] if request.reads_ids else request.input.shape[-1]
    dtype = weight_ih.dtype if not dtypes or weight_ih.dtype in dtypes else dtypes[0]
    rows = weight_hh.shape[0]
    if rows == 0 or rows % said.gates:
        raise ValueError(f"weight_hh has {rows} rows; expected {said.gates} · H, with H at least 1, for a {said.name}")
    hidden = rows // said.gates
    width = hidden if weight_hr is None else weight_hr.shape[0]
    if width == 0:
        raise ValueError("weight_hr has no rows; expected at least 1, the width of h")
    shapes = {"weight_ih": (rows, features), "weight_hh": (rows, width), "weight_hr": (width, hidden)}
    shapes |= {"weight_ch": (rows - hidden,), "gain_c": (hidden,), "shift_c": (hidden,)}
    for name, tensor in zip(Parameters._fields, parameters, strict=True):
        if tensor is not None:
            check_tensor(name, tensor, shapes.get(name, (rows,)), dtype, device)
    batch, dtype = request.batch, request.dtype
    for name, tensor, columns in zip(_NAMES_OF_STATE, direction.initial, (width, hidden), strict=False):
        check_tensor(name, tensor, (batch, columns), dtype, device)


def _check_there(request: Request, parameters: Parameters) -> None:
    """Check that the parameters are there that the cell reads: kernels take another number of them for another cell."""
    if (parameters.bias_ih is None) is not (parameters.bias_hh is None):
        raise ValueError("one of bias_ih and bias_hh is given; expected both, or neither")
    check_variants(request.spec, parameters)
    first = request.directions[0].parameters
    if parameters is not first and parameters.there().keys() != first.there().keys():
        raise ValueError(f"the reverse pass has {', '.join(parameters.there())}; expected {', '.join(first.there())}")


def _check_masks(request: Request) -> None:
    steps, batch, device, (direction, *_) = request.steps, request.batch, request.input.device, request.directions
    width, hidden = direction.initial[0].shape[1], direction.initial[-1].shape[1]
    zoneout_h, zoneout_c, recurrent_dropout = request.masks
    for name, mask, columns in (("zoneout_h", zoneout_h, width), ("zoneout_c", zoneout_c, hidden)):
        if mask is not None and mask.dim():  # an expectation is one number
            check_tensor(name, mask, (steps, batch, columns), torch.bool, device)
        elif mask is not None:
            check_tensor(name, mask, (), request.dtype, device)
    if recurrent_dropout is not None:
        check_tensor("recurrent_dropout", recurrent_dropout, (batch, width), request.dtype, device)


def check_backward(
    request: Request,
    grad_output: Tensor | None,
    grad_final: Sequence[Tensor | None],
    output: Tensor,
    saved: Sequence[Tensor],
    expected: Sequence[tuple[tuple[int, ...], torch.dtype]],
) -> None:
    """Check what a backward pass needs beyond the request, which has been checked.

    Args:
        request: What the forward pass was given.
        grad_output: Like output, or `None`.
        grad_final: Shaped like the initial state, each or `None`.
        output: What the forward pass returned.
        saved: What the forward pass kept.
        expected: Shapes and dtypes of what it keeps.

    Raises:
        TypeError: An argument isn't a tensor.
        ValueError: A shape, dtype or device doesn't fit.
    """
    shape, like, initial = request.output_shape, (request.dtype, request.input.device), request.initial
    check_tensor("output", output, shape, *like)
    if grad_output is not None:
        check_tensor("grad_output", grad_output, shape, *like)
    if len(grad_final) != len(initial):
        raise ValueError(f"grad_final has {len(grad_final)} tensors; expected {len(initial)}, as the state has")
    for index, (tensor, state) in enumerate(zip(grad_final, initial, strict=True)):
        if tensor is not None:
            check_tensor(f"grad_final[{index}]", tensor, tuple(state.shape), *like)
    if len(saved) != len(expected):
        raise ValueError(
            f"saved has {len(saved)} tensors; expected the {len(expected)} that a forward pass with keep=True returns"
        )
    for index, (tensor, (own_shape, dtype)) in enumerate(zip(saved, expected, strict=True)):
        check_tensor(f"saved[{index}]", tensor, own_shape, dtype, request.input.device)


def check_devices(request: Request, **others: Sequence[Tensor | None]) -> None:
    """Check that all are where the input is: on mixed devices torch may run the rule for tensors without values."""
    device = request.input.device
    own = {"initial": request.initial, "parameters": request.parameters, "masks": request.masks}
    for name, tensors in {**own, "lengths": [request.lengths], "reset": [request.reset], **others}.items():
        for tensor in tensors:
            if tensor is not None and tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}, but the input is on {device}")


def _check_kind(name: str, tensor: Tensor, dims: int, expected: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}; expected a floating dtype, such as torch.float32")
    if tensor.layout != torch.strided or tensor.dim() != dims:
        raise ValueError(f"{name} is {describe(tensor)}; expected a dense tensor, {expected}")
