"""A forward pass of a recurrent layer with everything kept that the instruments read.

`record` reads a layer of ours or of torch.nn; `record_model` finds the layer inside a model and takes the gradient that each
step's loss sends into it along. Weights are read, nothing is changed. What is recorded is the layer in eval mode: dropout between
layers is left out, and a layer whose training mode changes its recurrence is refused.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from throughtime.arguments import check_token_ids
from throughtime.cells import CELLS, Cell, Linearised, Parameters, find, sequence
from throughtime.errors import InputError
from throughtime.insight.threads import step_threads
from throughtime.layers import Recurrent
from throughtime.shapes import Inputs, Lengths, Outputs, Reset, StepState
from throughtime.training.denormals import flush_denormals

_ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Lane:
    """One layer in one direction: its weights and what each of its steps saved.

    Attributes:
        cell: Its equations.
        parameters: Its weights, detached.
        layer: Counted from 0.
        reverse: Whether it runs from the last step to the first.
        saved: What each step kept for its derivative, in order of t.
        states: The state after each step: (h,), or (h, c) of an LSTM, each (T, B, ·).
        begins: Where its state starts anew (T, B), or `None`.
        active: Which steps lie within a row's length (T, B), or `None`.
    """

    cell: Cell
    parameters: Parameters
    layer: int
    reverse: bool
    saved: list[tuple[Tensor, ...]]
    states: StepState
    begins: Reset | None
    active: Reset | None

    @property
    def steps(self) -> int:
        """T."""
        return self.states[0].shape[0]

    @property
    def batch(self) -> int:
        """B."""
        return self.states[0].shape[1]

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each part of the state."""
        return tuple(s.shape[2] for s in self.states)

    @property
    def name(self) -> str:
        """What a reader calls it: "layer 0", "layer 0, reverse"."""
        return f"layer {self.layer}{', reverse' if self.reverse else ''}"

    def part(self, rows: slice = _ALL, steps: slice = _ALL) -> "Lane":
        """Return the lane of some rows of the batch alone, and of some steps, as if nothing came before and after them."""
        return replace(
            self,
            saved=[type(step)(*(field[rows] for field in step)) for step in self.saved[steps]],
            states=tuple(s[steps, rows] for s in self.states),
            begins=None if self.begins is None else self.begins[steps, rows],
            active=None if self.active is None else self.active[steps, rows],
        )

    @cached_property
    def saved_fields(self) -> dict[str, Tensor]:
        """What the steps saved, by name, each (T, B, ·)."""
        names = self.cell.saved._fields  # type: ignore[attr-defined]
        columns = zip(*self.saved, strict=True)
        return {name: torch.stack(column) for name, column in zip(names, columns, strict=True)}

    @cached_property
    @step_threads()
    def linearised(self) -> Linearised | None:
        """The steps' derivative as factors, each (T, B, ·); `None` where the cell has no such form."""
        if self.cell.linearise is None or self.parameters.weight_hr is not None:
            return None
        rows = self.cell.saved(*(field.flatten(0, 1) for field in self.saved_fields.values()))
        factors = self.cell.linearise(rows)

        def by_step(factor: Tensor) -> Tensor:
            return factor.unflatten(0, (self.steps, self.batch))

        return Linearised(
            tuple(map(by_step, factors.recurrent)),
            None if factors.inputs is None else tuple(map(by_step, factors.inputs)),
            tuple(tuple(None if f is None else by_step(f) for f in row) for row in factors.direct),
        )

    @cached_property
    def passes_on(self) -> Reset | None:
        """Whether a gradient at step t goes on to the step before it in the lane's order, (T, B); `None`: always."""
        passes = None if self.begins is None else ~self.begins
        if self.active is not None and self.reverse:  # the step before the row's last, in this order, is padding
            inside = torch.cat([self.active[1:], torch.zeros_like(self.active[:1])])
            passes = inside if passes is None else passes & inside
        return passes

    @cached_property
    def episodes(self) -> Tensor:
        """Which sequence of its row each step belongs to (T, B), −1 in the padding."""
        if self.begins is None:
            episodes = torch.zeros(self.steps, self.batch, dtype=torch.int64)
        elif self.reverse:
            episodes = self.begins.flip(0).long().cumsum(0).flip(0)
        else:
            episodes = self.begins.long().cumsum(0)
        return episodes if self.active is None else torch.where(self.active, episodes, -1)


@dataclass(frozen=True, eq=False)
class Recording:
    """A forward pass of a stack of layers.

    Attributes:
        lanes: Each layer and direction, in torch's order: layer 0, layer 0 reverse, layer 1, …
        outputs: What the stack put out (T, B, directions · P), zero after each row's end.
    """

    lanes: tuple[Lane, ...]
    outputs: Outputs

    @property
    def bidirectional(self) -> bool:
        """Whether each layer runs both ways."""
        return self.lanes[-1].reverse

    @property
    def layers(self) -> list[tuple[Lane, ...]]:
        """The lanes of each layer, from the bottom."""
        width = 2 if self.bidirectional else 1
        return [self.lanes[i : i + width] for i in range(0, len(self.lanes), width)]

    def part(self, rows: slice = _ALL, steps: slice = _ALL) -> "Recording":
        """Return the recording of some rows of the batch alone, and of some steps, as if nothing came before and after them."""
        return Recording(tuple(lane.part(rows, steps) for lane in self.lanes), self.outputs[steps, rows])


class ModelRecording(NamedTuple):
    """A recording inside a model, and what the model's losses send into it.

    Attributes:
        recording: The forward pass of the recurrent layer.
        grad_outputs: ∂L_t/∂(output of the layer at t), (T, B, directions · P).
    """

    recording: Recording
    grad_outputs: Outputs

    def part(self, rows: slice = _ALL, steps: slice = _ALL) -> "ModelRecording":
        """Return what was recorded of some rows of the batch, and of some steps."""
        return ModelRecording(self.recording.part(rows, steps), self.grad_outputs[steps, rows])


@torch.no_grad()
@flush_denormals()
def record(
    layer: nn.Module,
    input: Inputs | PackedSequence,
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    lengths: Lengths | None = None,
    mask: Reset | None = None,
    reset: Reset | None = None,
    reset_to: Tensor | tuple[Tensor, Tensor] | None = None,
    embedding: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Recording:
    """Run a layer over a batch of sequences and keep what the instruments need.

    Args:
        layer: RNN, LSTM or GRU, of throughtime or of torch.nn; any depth, either direction, with or without projection.
        input: (T, B, I), or (B, T, I) where the layer is `batch_first`, or a PackedSequence; or token ids, as the layers
            take them.
        hx: The initial state, zeros if not given.
        lengths: Steps in each row (B,), as the layers take them.
        mask: Which steps are read (T, B), or (B, T) where the layer is `batch_first`; they must be the first ones of each row.
        reset: Where a sequence begins (T, B), or (B, T) where the layer is `batch_first`.
        reset_to: With `reset`, the state that it goes to, as the layers take it; it must be `hx`.
        embedding: (V, I), with token ids that aren't one-hot.
        dtype: What to compute in; `None` is the layer's own. float64 suits spectra and comparisons.

    Returns:
        The recording; its arrays are (T, B, ·) always. Cost: one forward pass of plain torch, and its saved values in memory.

    Raises:
        InputError: The module is no recurrent layer, the input doesn't fit it, it has zoneout, it is in training mode and has
            recurrent dropout or weight drop, resets go to another state than the rows begin with, or rows pass over steps.

    Example:
        >>> import torch
        >>> layer = torch.nn.LSTM(5, 8, num_layers=2)
        >>> recording = record(layer, torch.randn(20, 3, 5))
        >>> [lane.name for lane in recording.lanes], recording.outputs.shape
        (['layer 0', 'layer 1'], torch.Size([20, 3, 8]))
    """
    cell = _cell_of(layer)
    if reset is not None and not (hx is reset_to or _are_zeros(hx, reset_to)):
        raise InputError(
            "resets that go to another state than the rows begin with can't be recorded; expected no hx, or reset_to=hx"
        )
    if isinstance(input, PackedSequence):
        x, lengths = pad_packed_sequence(input)
    else:
        if input.dim() != (3 if input.is_floating_point() else 2):
            raise InputError(
                f"input has {input.dim()} dimensions; expected 3, (T, B, I) or (B, T, I): add a batch of one with unsqueeze"
            )
        batch_first = bool(layer.batch_first)
        x = input.transpose(0, 1) if batch_first else input
        mask, reset = (m.T if batch_first and m is not None else m for m in (mask, reset))
        if mask is not None:
            if (mask[1:] & ~mask[:-1]).any():
                raise InputError(
                    "a mask that passes over steps can't be recorded; expected one that is true up to each row's end"
                )
            lengths = mask.sum(0)
    weights = [[w.detach() for w in row] for row in layer.all_weights]  # type: ignore[union-attr]
    dtype = dtype or weights[0][0].dtype
    if not x.is_floating_point():
        x = _as_vectors(layer, x, lengths, embedding)
    _check_input(layer, x, lengths, reset)
    x = x.detach().to(dtype)
    directions = 2 if layer.bidirectional else 1
    lanes: list[Lane] = []
    for depth in range(len(weights) // directions):
        outputs = []
        for direction in range(directions):
            row = depth * directions + direction
            parameters = Parameters.from_list([w.to(dtype) for w in weights[row]], cell.spec.variant_parameters)
            initial = _initial_state(cell, hx, row, x, parameters)
            lane, output = _record_lane(cell, x, initial, parameters, lengths, reset, depth, direction == 1)
            lanes.append(lane)
            outputs.append(output)
        x = torch.cat(outputs, dim=2)
    return Recording(tuple(lanes), x)


def record_model(
    model: nn.Module,
    arguments: tuple[Any, ...],
    losses: Callable[[Any], Tensor],
    *,
    layer: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> ModelRecording:
    """Record the recurrent layer inside a model, with the gradient that each step's loss sends into it.

    What comes after the layer must work on each step by itself, as an output layer does: then ∂(Σ_s L_s)/∂output_t is
    ∂L_t/∂output_t, and one backward pass over that part finds all of them.

    Args:
        model: Any module that calls a recurrent layer once, or several, each of which reads the output of the one before. It
            is put in eval mode for the call, and back.
        arguments: What `model` is called with.
        losses: Takes what the model returns and gives the losses, one for each step, whatever their shape; they are summed.
        layer: Which layer, where the model has several that are no stack; what follows it must then work on each step by itself.
        dtype: As in `record`.

    Returns:
        The recording and the gradients (T, B, directions · P). No gradient of the model is touched.

    Raises:
        InputError: The model has no recurrent layer, several that are no stack, or calls one more than once.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Tagger(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.recurrent, self.output = nn.GRU(5, 8), nn.Linear(8, 3)
        ...     def forward(self, x):
        ...         return self.output(self.recurrent(x)[0])
        >>> x, tags = torch.randn(20, 4, 5), torch.randint(3, (20, 4))
        >>> cross_entropy = nn.CrossEntropyLoss(reduction="none")
        >>> recorded = record_model(Tagger(), (x,), lambda y: cross_entropy(y.flatten(0, 1), tags.flatten()))
        >>> recorded.grad_outputs.shape
        torch.Size([20, 4, 8])
    """
    layers = [m for m in model.modules() if isinstance(m, nn.RNNBase)] if layer is None else [layer]
    calls: list[_Call] = []

    def cut(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        output, final = result
        packed = isinstance(output, PackedSequence)
        leaf = (output.data if packed else output).detach().requires_grad_()
        calls.append(_Call(called, args, kwargs, output._replace(data=leaf) if packed else leaf))
        return calls[-1].output, final

    was_training = model.training
    handles = [found.register_forward_hook(cut, with_kwargs=True) for found in layers]
    try:
        with torch.enable_grad():
            total = losses(model.eval()(*arguments)).sum()
        for handle in handles:
            handle.remove()
        _check_stack(calls, model)
        called, _, _, output = calls[-1]
        (grad,) = torch.autograd.grad(total, output.data if isinstance(output, PackedSequence) else output)
        parts = [record(call.layer, *call.args, **call.kwargs, dtype=dtype) for call in calls]
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    lanes: list[Lane] = []
    for part in parts:
        below = len({lane.layer for lane in lanes})
        lanes += [replace(lane, layer=below + lane.layer) for lane in part.lanes]
    recording = Recording(tuple(lanes), parts[-1].outputs)
    if isinstance(output, PackedSequence):
        grad, _ = pad_packed_sequence(output._replace(data=grad))
    elif called.batch_first:
        grad = grad.transpose(0, 1)
    return ModelRecording(recording, grad.to(recording.outputs.dtype))


class _Call(NamedTuple):
    """A call of a recurrent layer inside a model; its output is a leaf of the graph."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor | PackedSequence


def _check_stack(calls: list[_Call], model: nn.Module) -> None:
    """See that each layer that was called read what the one before it put out."""
    if not calls:
        raise InputError(f"{type(model).__name__} called no recurrent layer; expected RNN, LSTM or GRU in it")
    if len({id(call.layer) for call in calls}) < len(calls):
        raise InputError(f"{type(model).__name__} calls a layer more than once; expected one call for a whole sequence")
    for before, after in itertools.pairwise(calls):
        read, written = (t.data if isinstance(t, PackedSequence) else t for t in (after.args[0], before.output))
        if read.shape != written.shape or not torch.equal(read, written):
            raise InputError(
                f"{type(model).__name__} has several recurrent layers that are no stack; say which one with layer="
            )
    if len({bool(call.layer.bidirectional) for call in calls}) > 1:
        raise InputError("some layers of the stack run both ways and some don't; say which one with layer=")


def _record_lane(
    cell: Cell,
    x: Tensor,
    initial: StepState,
    parameters: Parameters,
    lengths: Lengths | None,
    reset: Reset | None,
    layer: int,
    reverse: bool,
) -> tuple[Lane, Tensor]:
    """Run one layer in one direction over the plain time loop, and note the state after each step."""
    after: list[StepState] = []

    def step(*arguments: Any) -> tuple[StepState, tuple[Tensor, ...]]:
        state, saved = cell.step(*arguments)
        after.append(state)
        return state, saved

    with step_threads(x.shape[1] * (parameters.weight_ih.numel() + parameters.weight_hh.numel())):
        result = sequence.forward(cell._replace(step=step), x, initial, parameters, lengths, reset, reverse)
    if reverse:
        after.reverse()
    states = tuple(torch.stack(part) for part in zip(*after, strict=True))
    active = None if lengths is None else sequence.is_active(lengths, x.shape[0])
    begins = sequence.beginnings(reset, lengths, reverse)
    return Lane(cell, parameters, layer, reverse, result.saved, states, begins, active), result.outputs


def _cell_of(layer: nn.Module) -> Cell:
    if isinstance(layer, Recurrent):
        if layer.zoneout not in (0.0, (0.0, 0.0)):
            raise InputError(
                f"a layer with zoneout={layer.zoneout} can't be recorded, since instruments don't follow what it carries past the "
                "cell; measure one trained without zoneout"
            )
        for name in ("recurrent_dropout", "weight_drop"):
            if layer.training and getattr(layer, name):
                raise InputError(
                    f"a layer with {name}={getattr(layer, name)} in training mode draws anew in each call, which a recording can't "
                    "know of; call its eval() first"
                )
        return find(layer.cell)
    if isinstance(layer, nn.RNNBase) and layer.mode.lower() in CELLS:
        return CELLS[layer.mode.lower()]
    raise InputError(
        f"a {type(layer).__name__} can't be recorded; expected RNN, LSTM or GRU of throughtime or torch.nn "
        "(record_model finds the one inside a model)"
    )


def _are_zeros(*states: Tensor | tuple[Tensor, Tensor] | None) -> bool:
    """Whether states are zeros, as those that aren't given are."""
    parts = [
        part for state in states if state is not None for part in ((state,) if isinstance(state, Tensor) else state)
    ]
    return not any(bool(part.any()) for part in parts)


def _as_vectors(layer: nn.Module, ids: Tensor, lengths: Lengths | None, embedding: Tensor | None) -> Tensor:
    """Return the vectors (T, B, I) that token ids (T, B) stand for; in the padding, those of id 0."""
    rows = int(layer.input_size) if embedding is None else len(embedding)  # type: ignore[arg-type]
    is_real = None if lengths is None else sequence.is_active(lengths, len(ids))
    check_token_ids(ids, rows, is_real)
    ids = ids.long() if is_real is None else torch.where(is_real, ids.long(), 0)
    return one_hot(ids, rows).float() if embedding is None else embedding[ids]


def _check_input(layer: nn.Module, x: Tensor, lengths: Lengths | None, reset: Reset | None) -> None:
    steps, batch, width = x.shape
    if width != layer.input_size:
        raise InputError(f"input has width {width}; expected input_size = {layer.input_size}, the last of (T, B, I)")
    if steps == 0:
        raise InputError("input has no time steps; expected at least one")
    if lengths is not None and (lengths.shape != (batch,) or not ((lengths >= 0) & (lengths <= steps)).all()):
        raise InputError(f"lengths {lengths.tolist()}: expected one for each of {batch} rows, from 0 to T = {steps}")
    if reset is not None and (reset.shape != (steps, batch) or reset.dtype != torch.bool):
        raise InputError(f"reset is {reset.dtype} {list(reset.shape)}; expected bool (T, B) = ({steps}, {batch})")


def _initial_state(
    cell: Cell, hx: Tensor | tuple[Tensor, Tensor] | None, row: int, x: Tensor, parameters: Parameters
) -> StepState:
    if hx is not None:
        return tuple(part[row].detach().to(x.dtype) for part in ((hx,) if isinstance(hx, Tensor) else hx))
    width = parameters.weight_hh.shape[1]
    hidden = parameters.weight_hh.shape[0] // cell.spec.gates
    return tuple(x.new_zeros(x.shape[1], w) for w in (width, hidden)[: len(cell.spec.states)])
