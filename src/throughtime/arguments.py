"""What the operator's arguments must be, checked in one place before anybody reads them, whoever computes.

Each message names the argument, says what it is and what was expected.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_PARAMETERS = "weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr]"
_STATE = ("h_0", "c_0")


def check_forward(
    cell: str,
    gates: int,
    state_size: int,
    input: Tensor,
    initial: Sequence[Tensor],
    parameters: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    lengths: Tensor | None,
    reset: Tensor | None,
    extra: Sequence[str] = (),
    masks: Sequence[Tensor] = (),
    mask_names: Sequence[str] = (),
    batch_sizes: Tensor | None = None,
) -> None:
    """Check the arguments of a pass through one layer in one direction.

    Args:
        cell: For the message.
        gates: How many it has.
        state_size: How many tensors its state has; a cell with two may have a projection.
        input: (T, B, I), floating, or token ids (T, B), int64; packed, (N, I) or (N,).
        initial: [h_0] or [h_0, c_0], each (B, ·), of the input's dtype, or any where that is token ids.
        parameters: As torch has them.
        dtypes: What theirs may be, the likeliest first; empty for any. It is one for all of them.
        lengths: (B,) int64, 0 to T, or `None`.
        reset: (T, B) bool, or `None`.
        extra: Names of the parameters of a variant, which come last.
        masks: A variant's masks.
        mask_names: Their names.
        batch_sizes: (T,) int64 of packed input, or `None`.

    Raises:
        TypeError: An argument isn't a tensor, or not one of numbers that can be differentiated.
        ValueError: Shape, dtype, device or value don't fit.
    """
    check_input(input, batch_sizes)
    own = len(parameters) - len(extra)
    if not 2 <= own <= 5:
        expected = ", ".join([_PARAMETERS, *extra])
        raise ValueError(f"there are {len(parameters)} parameters; expected {expected}")
    names = ["weight_ih", "weight_hh", *["bias_ih", "bias_hh"][: own // 2 * 2 - 2], *["weight_hr"] * (own % 2), *extra]
    for name, tensor in zip(names, parameters, strict=True):
        dims = 2 if name in ("weight_ih", "weight_hh", "weight_hr") else 1
        _check_kind(name, tensor, dims, f"{dims} dimensions")
    if len(initial) != state_size:
        raise ValueError(
            f"there are {len(initial)} state tensors; expected {', '.join(_STATE[:state_size])} of a {cell}"
        )
    if "weight_hr" in names and state_size < 2:
        raise ValueError(f"weight_hr is given; a {cell} has no projection")
    steps, batch = steps_and_batch(input, batch_sizes)
    if batch_sizes is not None and (lengths is not None or reset is not None):
        raise ValueError("lengths or reset are given; packed input takes neither, its batch_sizes tell the lengths")
    features = input.shape[-1] if input.is_floating_point() else parameters[0].shape[1]
    dtype = parameters[0].dtype if not dtypes or parameters[0].dtype in dtypes else dtypes[0]
    rows = parameters[1].shape[0]
    if rows == 0 or rows % gates:
        raise ValueError(f"weight_hh has {rows} rows; expected {gates} · H, with H at least 1, for a {cell}")
    hidden = rows // gates
    width = parameters[own - 1].shape[0] if "weight_hr" in names else hidden
    if width == 0:
        raise ValueError("weight_hr has no rows; expected at least 1, the width of h")
    shapes = {"weight_ih": (rows, features), "weight_hh": (rows, width), "weight_hr": (width, hidden)}
    shapes |= {"weight_ch": ((gates - 1) * hidden,), "gain_c": (hidden,), "shift_c": (hidden,)}
    for name, tensor in zip(names, parameters, strict=True):
        check_tensor(name, tensor, shapes.get(name, (rows,)), dtype, input.device)
    for name, tensor, shape in zip(_STATE, initial, ((batch, width), (batch, hidden)), strict=False):
        check_tensor(name, tensor, shape, input.dtype if input.is_floating_point() else initial[0].dtype, input.device)
    if lengths is not None:
        check_tensor("lengths", lengths, (batch,), torch.int64, input.device)
        if batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= steps:
            raise ValueError(f"lengths must lie in 0 ... {steps}, the number of steps; {lengths.tolist()} don't")
    if not input.is_floating_point():
        is_real = None if lengths is None else torch.arange(steps, device=input.device)[:, None] < lengths
        check_token_ids(input, features, is_real)
    if reset is not None:
        check_tensor("reset", reset, (steps, batch), torch.bool, input.device)
    if len(masks) != len(mask_names):
        raise ValueError(f"there are {len(masks)} masks; expected {', '.join(mask_names) or 'none'} of a {cell}")
    for name, mask in zip(mask_names, masks, strict=True):
        every_step = (steps, batch, hidden if name == "zoneout_c" else width)
        shape = (batch, width) if name == "recurrent_dropout" else every_step
        if mask.dim() or name == "recurrent_dropout":  # a zoneout's expectation is one number
            dtype = initial[0].dtype if name == "recurrent_dropout" else mask.dtype
            check_tensor(name, mask, shape, dtype, input.device)


def check_directions(reverse: bool, initial: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Check that state and parameters of both directions are alike, before each is checked by itself.

    Args:
        reverse: Must be false.
        initial: The forward pass's tensors, then the reverse one's.
        parameters: Likewise.

    Raises:
        TypeError: An argument isn't a tensor.
        ValueError: They don't fit.
    """
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
                    f"{name}[{half + index}] of the reverse pass is {_described(other)}; expected {_described(one)}, as the "
                    "forward pass has"
                )


def check_devices(input: Tensor, **others: Sequence[Tensor | None]) -> None:
    """Check that the others are where the input is: on mixed devices torch may run the rule for tensors without values."""
    for name, tensors in others.items():
        for tensor in tensors:
            if tensor is not None and tensor.device != input.device:
                raise ValueError(f"{name} is on {tensor.device}, but the input is on {input.device}")


def check_input(input: Tensor, batch_sizes: Tensor | None = None) -> None:
    """Check that the input is a dense floating tensor (T, B, I), or token ids (T, B); packed, (N, I) or (N,), and its sizes."""
    dims = 3 if batch_sizes is None else 2
    if not (isinstance(input, Tensor) and input.dtype == torch.int64 and input.dim() == dims - 1):
        _check_kind("input", input, dims, "(T, B, I)" if batch_sizes is None else "packed (N, I)")
    if batch_sizes is None:
        return
    steps = batch_sizes.numel() if isinstance(batch_sizes, Tensor) else 0
    check_tensor("batch_sizes", batch_sizes, (steps,), torch.int64, torch.device("cpu"))
    is_sorted = bool((batch_sizes[1:] <= batch_sizes[:-1]).all())
    if len(batch_sizes) == 0 or not is_sorted or int(batch_sizes[-1]) < 1 or int(batch_sizes.sum()) != len(input):
        raise ValueError(
            f"batch_sizes are {batch_sizes.tolist()}; expected a number for each step, none greater than the one before, "
            f"at least 1, and in sum {len(input)}, the rows of input"
        )


def steps_and_batch(input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int]:
    """Return T and B."""
    if batch_sizes is not None:
        return len(batch_sizes), int(batch_sizes[0])
    steps, batch = input.shape[:2]
    return steps, batch


def check_token_ids(ids: Tensor, vocabulary_size: int, is_real: Tensor | None = None) -> None:
    """Refuse ids that name no row of a table.

    Args:
        ids: (T, B), or packed (N,); on "meta" they have no values to be refused.
        vocabulary_size: V; ids must lie in 0 … V − 1.
        is_real: Which of them matter, or `None` for all.

    Raises:
        IndexError: There is such an id.

    Example:
        >>> import torch
        >>> check_token_ids(torch.tensor([[0, 7]]), 5)
        Traceback (most recent call last):
        IndexError: token id 7 at step 0 of row 1; expected 0 to 4, since there are 5 rows to choose from
    """
    if ids.is_meta or ids.numel() == 0 or (int(ids.min()) >= 0 and int(ids.max()) < vocabulary_size):
        return
    wrong = (ids < 0) | (ids >= vocabulary_size)
    places = (wrong if is_real is None else wrong & is_real).nonzero()
    if len(places):
        place = tuple(places[0].tolist())
        where = f"at step {place[0]} of row {place[1]}" if ids.dim() == 2 else f"in row {place[0]} of the packed input"
        raise IndexError(
            f"token id {int(ids[place])} {where}; expected 0 to {vocabulary_size - 1}, "
            f"since there are {vocabulary_size} rows to choose from"
        )


def check_backward(
    input: Tensor,
    initial: Sequence[Tensor],
    grad_output: Tensor | None,
    grad_final: Sequence[Tensor | None],
    output: Tensor,
    saved: Sequence[Tensor],
    saved_shapes: Sequence[tuple[int, ...]],
    saved_dtype: torch.dtype | None = None,
    directions: int = 1,
) -> None:
    """Check what a backward pass needs beyond the forward pass's arguments, which have been checked.

    Args:
        input: As in `check_forward`.
        initial: As in `check_forward`.
        grad_output: Like output, or `None`.
        grad_final: Shaped like `initial`, each or `None`.
        output: (T, B, directions · P), or of packed input (N, directions · P).
        saved: What the forward pass kept.
        saved_shapes: Their shapes.
        saved_dtype: Their dtype, if not the output's.
        directions: 1, or 2 whose tensors are in `initial`, `grad_final` and `saved`.

    Raises:
        TypeError: An argument isn't a tensor.
        ValueError: A shape, dtype or device doesn't fit.
    """
    like = initial[0].dtype, input.device
    places = input.shape[:-1] if input.is_floating_point() else input.shape
    shape = (*places, directions * initial[0].shape[1])
    check_tensor("output", output, shape, *like)
    if grad_output is not None:
        check_tensor("grad_output", grad_output, shape, *like)
    if len(grad_final) != len(initial):
        raise ValueError(f"grad_final has {len(grad_final)} tensors; expected {len(initial)}, as the state has")
    for index, (tensor, state) in enumerate(zip(grad_final, initial, strict=True)):
        if tensor is not None:
            check_tensor(f"grad_final[{index}]", tensor, tuple(state.shape), *like)
    if len(saved) != len(saved_shapes):
        raise ValueError(
            f"saved has {len(saved)} tensors; expected the {len(saved_shapes)} that a forward pass with keep=True returns"
        )
    for index, (tensor, expected) in enumerate(zip(saved, saved_shapes, strict=True)):
        check_tensor(f"saved[{index}]", tensor, expected, saved_dtype or output.dtype, input.device)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Check that a tensor is dense, and of a shape, a dtype and a device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if tensor.layout != torch.strided or tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(f"{name} is {_described(tensor)}; expected {shape} {dtype} on {device}")


def _check_kind(name: str, tensor: Tensor, dims: int, expected: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}; expected a floating dtype, such as torch.float32")
    if tensor.layout != torch.strided or tensor.dim() != dims:
        raise ValueError(f"{name} is {_described(tensor)}; expected a dense tensor, {expected}")


def _described(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" {tensor.layout}"
    return f"{tuple(tensor.shape)} {tensor.dtype}{layout} on {tensor.device}"
