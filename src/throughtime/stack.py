"""A stack: layers × directions over the operator, token ids, masks, and the choice of backend."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear, one_hot
from torch.nn.functional import embedding as look_up

from throughtime import operator, transforms, watching
from throughtime.arguments import check_token_ids
from throughtime.backend import check_backend, fused, native, triton
from throughtime.kernels import native as kernels
from throughtime.request import Direction, Request, Sequences, Stack, check_variants, split
from throughtime.spec import Masks, Parameters

_NO_RULE = "they have no rule for torch.func's transforms and forward-mode differentiation"


def choose_backend(backend: str, request: Request) -> str:
    """Return the fastest backend that is right for a stack, or the named one.

    Where that is because the native module isn't there, a `MissingKernelsWarning` says so, once in a process.

    Args:
        backend: "auto", or the one that is insisted on.
        request: What the stack's first layer is asked, one way; what backends refuse is the same for all of them.

    Raises:
        InputError: The named backend is unknown, or not in this installation.
        NotImplementedError: The named backend can't serve the request.
    """
    is_auto, is_transformed = backend == "auto", watching.is_transformed()
    refusals = {"native": (transforms.refusal(request) if is_transformed else None) or native.refusal(request)}
    if is_auto and not refusals["native"]:
        return "native"
    if is_auto and refusals["native"] == kernels.missing:
        kernels.warn_of_absence()
    if watching.is_exported_to_onnx():  # a file names no backend: it is the operator that is translated
        return "reference" if refusals["native"] else "native"
    is_ragged = request.lengths is not None or request.batch_sizes is not None
    is_traced = torch.compiler.is_compiling() or (is_ragged and not watching.has_values(request.input))
    if is_auto and is_traced:
        # torch's fused calls don't trace with a dynamic T.
        return "reference" if triton.refusal(request) else "triton"
    if is_auto and is_transformed:
        return "reference"
    refusals |= {"triton": _NO_RULE if is_transformed else triton.refusal(request), "torch": fused.refusal(request)}
    if is_auto and not refusals["triton"] and (refusals["torch"] or triton.is_faster(request)):
        return "triton"
    if is_auto:
        return "reference" if refusals["torch"] else "torch"
    check_backend(backend)
    if reason := refusals.get(backend):
        raise NotImplementedError(f"backend {backend!r} can't serve this request: {reason}; use backend='auto'")
    return backend


def run(
    stack: Stack, weights: Sequence[Parameters], sequences: Sequences, state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a stack. The arguments have been checked.

    Args:
        stack: What to run.
        weights: Parameters of each layer and direction, in torch's order (layer 0, layer 0 reverse, layer 1, …).
        sequences: What it reads. Floats have the dtype of the results; with token ids the state has it.
        state: (h_0,) or (h_0, c_0), each (L · directions, B, ·); the rows of packed input in its order.

    Returns:
        The output (T, B, directions · P), or packed (N, directions · P), and the final state, shaped like `state`.
    """
    if state[0].dtype == torch.float16 and _computes_float16_wide(stack.backend, state[0].device):
        return _run_wide(stack, weights, sequences, state)
    if state[0].dtype == torch.bfloat16 and weights[0].weight_ih.dtype == torch.float16:
        weights = [_widened(p) for p in weights]  # under autocast: neither is a part of the other
    for own in weights:
        check_variants(stack.spec, own)
    if len({bias is None for p in weights for bias in (p.bias_ih, p.bias_hh)}) > 1:
        weights = [_with_both_biases(p) for p in weights]
    states = zip(*(s.unbind() for s in state), strict=True)
    each = enumerate(zip(states, weights, strict=True))
    directions = [Direction(*given, reverse=row % stack.directions == 1) for row, given in each]
    when = sequences.lengths, sequences.reset, sequences.batch_sizes
    asked = Request(stack.spec, sequences.input, (directions[0],), *when, recompute_every=stack.recompute_every)
    backend = choose_backend(stack.backend, asked)
    if not sequences.input.is_floating_point():
        input, directions = _read_tokens(stack, backend, directions, sequences)
        sequences = sequences._replace(input=input)
    if backend == "torch":
        return fused.forward(stack, weights, sequences, state)
    return _run_layers(stack, backend, directions, sequences)


def _computes_float16_wide(backend: str, device: torch.device) -> bool:
    """Whether kernels take float16 as float32: CPUs have no products of it, so that it is a format to keep numbers in."""
    return device.type == "cpu" and backend in ("auto", "native") and kernels.missing is None


def _run_wide(
    stack: Stack, weights: Sequence[Parameters], sequences: Sequences, state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a stack in float32, and round output and final state to float16."""
    input, embedding = sequences.input, sequences.embedding
    with torch.autocast("cpu", enabled=False):
        sequences = sequences._replace(
            input=input.float() if input.is_floating_point() else input,
            embedding=None if embedding is None else embedding.float(),
        )
        output, final = run(stack, [_widened(p) for p in weights], sequences, tuple(s.float() for s in state))
    return output.half(), tuple(s.half() for s in final)


def _widened(parameters: Parameters) -> Parameters:
    """Return parameters in float32, which float16 and bfloat16 are parts of."""
    return parameters._replace(**{name: tensor.float() for name, tensor in parameters.there().items()})


def _with_both_biases(parameters: Parameters) -> Parameters:
    """Return parameters with zeros for a bias that somebody has set to `None`."""
    zeros = parameters.weight_ih.new_zeros(parameters.weight_ih.shape[:1])
    return parameters._replace(**{name: zeros for name in ("bias_ih", "bias_hh") if getattr(parameters, name) is None})


def _read_tokens(
    stack: Stack, backend: str, directions: list[Direction], sequences: Sequences
) -> tuple[Tensor, list[Direction]]:
    """Return what the first layer reads instead of ids, and with which weights.

    The operator takes ids as one-hot vectors: they choose columns of `weight_ih`. Of embedded tokens these are W_ih Eᵀ,
    a product of V columns in place of one of T · B rows, so it is done where V is the smaller.
    """
    ids, lengths, embedding = sequences.input, sequences.lengths, sequences.embedding
    is_real = None if lengths is None else torch.arange(ids.shape[0], device=ids.device)[:, None] < lengths
    if embedding is not None and backend in ("native", "triton") and _is_small(embedding, ids):
        first, others = directions[: stack.directions], directions[stack.directions :]
        read = _only_read(embedding, ids, is_real)
        return ids, [*(_with_table(direction, read) for direction in first), *others]
    if embedding is None and backend != "torch":
        return ids, directions
    vocabulary_size = directions[0].parameters.weight_ih.shape[1] if embedding is None else embedding.shape[0]
    if not watching.is_mapped(ids):
        check_token_ids(ids, vocabulary_size, is_real)
    if is_real is not None:
        ids = torch.where(is_real, ids, 0)
    x = one_hot(ids, vocabulary_size) if embedding is None else look_up(ids, embedding)
    return x.to(directions[0].initial[0].dtype), directions


def _only_read(embedding: Tensor, ids: Tensor, is_real: Tensor | None) -> Tensor:
    """Return the embedding with zeros in rows that no real id names: what stands there is to reach no gradient, not even a NaN."""
    rows = embedding.shape[0]
    named = ids.clamp(0, rows - 1)  # one that names no row is met later
    if is_real is not None:
        named = torch.where(is_real, named, rows)
    is_read = torch.zeros(rows + 1, dtype=torch.bool, device=ids.device).scatter(0, named.flatten(), True)
    return torch.where(is_read[:rows, None], embedding, 0)


def _with_table(direction: Direction, embedding: Tensor) -> Direction:
    """Return the direction with W_ih Eᵀ for W_ih."""
    weight_ih = direction.parameters.weight_ih
    table = linear(embedding, weight_ih).to(weight_ih.dtype).t()
    return direction._replace(parameters=direction.parameters._replace(weight_ih=table))


def _is_small(embedding: Tensor, ids: Tensor) -> bool:
    """Whether a table of all tokens is made faster than the rows of those that are there; unknown in a graph that is exported.

    Of many embeddings under `vmap` each would make a layer with weights of its own: rows are inputs.
    """
    serves_others = torch.compiler.is_exporting() or watching.is_jit_traced()
    if serves_others or (watching.is_transformed() and watching.is_mapped(embedding)):
        return False
    return embedding.shape[0] <= ids.numel()


def _run_layers(
    stack: Stack, backend: str, directions: list[Direction], sequences: Sequences
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a stack layer by layer over the operator: both ways at once where the backend can, else one after the other."""
    input, lengths, reset, batch_sizes, order, _ = sequences
    # In a graph that is being traced the number of segments would fix the number of steps: there all is kept.
    recompute_every = 0 if torch.compiler.is_compiling() else stack.recompute_every
    is_node = watching.is_jit_traced() and watching.is_exported_to_onnx()  # which has both ways, whoever computes
    runs_both = (backend in ("native", "triton") or is_node) and not stack.spec.masks
    at_once = 2 if stack.bidirectional and runs_both else 1
    finals: list[list[Tensor]] = []
    for layer in range(stack.num_layers):
        outputs: list[Tensor] = []
        for way in range(0, stack.directions, at_once):
            row = layer * stack.directions + way
            own = tuple(directions[row : row + at_once])
            request = Request(stack.spec, input, own, lengths, reset, batch_sizes, recompute_every=recompute_every)
            if stack.spec.masks:
                request = request._replace(masks=_draw_masks(stack, request.steps, own[0].initial, order))
            output, final = operator.run(request, backend)
            outputs.append(output)
            finals += split(final, at_once)
        input = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        if stack.dropout and layer < stack.num_layers - 1:
            input = dropout(input, stack.dropout)
    return input, tuple(torch.stack(tensors) for tensors in zip(*finals, strict=True))


def _draw_masks(stack: Stack, steps: int, initial: tuple[Tensor, ...], order: Tensor | None) -> Masks:
    """Draw the masks that one layer takes in one direction, from torch's generator and in the order of `Masks`."""
    h, c = initial[0], initial[-1]
    of_c, of_h = stack.zoneout
    zoneout_h = _draw_zoneout(stack, of_h, steps, h)
    zoneout_c = _draw_zoneout(stack, of_c, steps, c)
    recurrent_dropout = dropout(torch.ones_like(h), stack.recurrent_dropout) if stack.recurrent_dropout else None
    masks = Masks(zoneout_h, zoneout_c, recurrent_dropout)
    if order is None:
        return masks
    return Masks(*(m if m is None or m.dim() == 0 else m.index_select(m.dim() - 2, order) for m in masks))


def _draw_zoneout(stack: Stack, probability: float, steps: int, state: Tensor) -> Tensor | None:
    if not probability:
        return None
    if stack.zoneout_is_expected:
        return torch.full((), probability, dtype=state.dtype, device=state.device)
    return draw_mask(probability, (steps, *state.shape), state.device)


def draw_mask(probability: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a mask that is true with `probability`, to 1/65,536: four elements a random number, as drawing them is slow."""
    count, levels = math.prod(shape), 1 << 16
    numbers = torch.randint(-(1 << 63), (1 << 63) - 1, ((count + 3) // 4,), device=device)
    below = min(round(probability * levels), levels - 1) - levels // 2
    return (numbers.view(torch.int16)[:count] < below).view(shape)
