"""What arguments must be: those of a layer and of its call, and what any tensor must be.

Each message names the argument, says what it is and what was expected. What a request must be stands in `request.py`.
"""

import numbers
import warnings
from typing import TypeGuard

import torch
from torch import Tensor

from throughtime import watching

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_sizes(**sizes: int) -> list[int]:
    """Return sizes as ints greater than zero; numpy's integers are some."""
    return [_size(name, value, 1) for name, value in sizes.items()]


def check_projection(proj_size: int, hidden_size: int) -> int:
    """Return the width of a projection, 0 for none."""
    size = _size("proj_size", proj_size, 0)
    if size >= hidden_size:
        raise ValueError(f"proj_size = {size}; expected 0 (no projection) to hidden_size − 1 = {hidden_size - 1}")
    return size


def check_no_projection(proj_size: object) -> None:
    """Refuse a projection, as torch.nn's RNN and GRU do, whatever its width."""
    if proj_size is not None:
        raise ValueError(f"proj_size = {proj_size!r}; only an LSTM has a projection, no RNN or GRU: leave it out")


def _size(name: str, value: object, least: int) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be {'greater than zero' if least else 'zero or more'}, got {value}")
    return int(value)


def check_flags(**flags: bool) -> list[bool]:
    """Return flags as bools; numpy's are some."""
    for name, value in flags.items():
        if not isinstance(value, bool) and not _is_numpy_bool(value):
            raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    return [bool(value) for value in flags.values()]


def _is_numpy_bool(value: object) -> bool:
    return (
        type(value).__module__ == "numpy"
        and str(getattr(value, "dtype", "")) == "bool"
        and not getattr(value, "ndim", 1)
    )


def check_dropout(dropout: float, num_layers: int) -> None:
    """Check the probability of dropping an output; warn where there is no layer but the last."""
    if not isinstance(dropout, numbers.Real) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
        raise ValueError(
            f"dropout should be a number in range [0, 1], the probability of an element being zeroed, got {dropout!r}"
        )
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            f"dropout={dropout} acts on the outputs of every layer but the last, so with num_layers=1 it does nothing",
            stacklevel=4,
        )


def check_probabilities(**probabilities: float) -> None:
    """Check that these are probabilities below 1."""
    for name, value in probabilities.items():
        if not _is_probability(value):
            raise ValueError(f"{name} should be a probability, a number from 0 to below 1, got {value!r}")


def check_zoneout(zoneout: float | tuple[float, float], has_pair: bool) -> float | tuple[float, float]:
    """Return the probability, or an LSTM's pair of them for c and h."""
    if _is_probability(zoneout):
        return float(zoneout)
    if has_pair and isinstance(zoneout, tuple | list) and len(zoneout) == 2 and all(map(_is_probability, zoneout)):
        return float(zoneout[0]), float(zoneout[1])
    pair = ", or a pair of them for c and h" if has_pair else ""
    raise ValueError(f"zoneout should be a probability, a number from 0 to below 1{pair}, got {zoneout!r}")


def check_recompute_every(every: int) -> int:
    """Return the number of steps as an int."""
    if isinstance(every, bool) or not isinstance(every, numbers.Integral):
        raise TypeError(f"recompute_every is {describe_value(every)}; expected an integer")
    if every < 0:
        raise ValueError(f"recompute_every = {every}; expected a number of steps, or 0 to recompute nothing")
    return int(every)


def as_tensor(name: str, value: object, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return a tensor, or the tensor that a list or a numpy array stands for; `None` for none.

    Args:
        name: The argument's.
        value: What was given.
        dtype: Of a list without numbers, as of a batch without rows.
        device: Where a list's or an array's is made.
    """
    if value is None or isinstance(value, Tensor):
        return value
    if not isinstance(value, list | tuple) and type(value).__module__ != "numpy":
        raise TypeError(f"{name} is {describe_value(value)}; expected a tensor, a list or a numpy array")
    try:
        made = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} is {describe_value(value)} that makes no tensor ({error}); expected a tensor"
        ) from error
    return made if made.numel() or not isinstance(value, list | tuple) else made.to(dtype)


def check_lengths(
    lengths: Tensor | None, steps: int, rows: int, device: torch.device, batch_first: bool
) -> Tensor | None:
    """Return lengths as int64 on the input's device."""
    if lengths is None:
        return None
    if lengths.dtype == torch.bool:
        raise TypeError(
            f"lengths is a mask of shape {list(lengths.shape)}; expected the number of steps in each row, or give it as mask=, if "
            "it is true at the real steps"
        )
    if lengths.dtype not in _INTEGERS:
        raise TypeError(f"lengths has dtype {lengths.dtype}; expected integers, such as torch.int64")
    if lengths.shape != (rows,):
        meant = _other_order(steps, rows, batch_first) if lengths.shape == (steps,) else ""
        raise ValueError(
            f"lengths has shape {list(lengths.shape)}; expected ({rows},), one length for each batch row{meant}"
        )
    if lengths.device.type == "meta" != device.type:
        raise RuntimeError(f"lengths is on meta, where it has no values; expected them on {device}")
    lengths = lengths.to(device, torch.int64)
    all_lengths = watching.values(lengths)
    if watching.has_values(all_lengths):
        wrong = ((all_lengths < 0) | (all_lengths > steps)).nonzero().tolist()
        if wrong:
            place, length = ", ".join(map(str, wrong[0])), int(all_lengths[tuple(wrong[0])])
            problem = f"exceeds T = {steps}" if length > steps else "is negative"
            raise ValueError(
                f"lengths[{place}] = {length} {problem}; lengths are counts of time steps, from 0 to T = {steps}"
            )
    return lengths


def check_marks(
    name: str, marks: Tensor | None, steps: int, rows: int, device: torch.device, batch_first: bool
) -> None:
    """Check marks of steps, (T, B): where new sequences begin, or which steps are read."""
    if marks is None:
        return
    if marks.dtype != torch.bool:
        meant = "where a new sequence begins" if name == "reset" else "at the steps that are read"
        raise TypeError(f"{name} is {marks.dtype}; expected a bool tensor, true {meant}")
    if marks.shape != (steps, rows):
        shape = list(marks.T.shape if batch_first and marks.dim() == 2 else marks.shape)
        expected = f"(B, T) = ({rows}, {steps})" if batch_first else f"(T, B) = ({steps}, {rows})"
        meant = _other_order(steps, rows, batch_first) if marks.shape == (rows, steps) else ""
        raise ValueError(f"{name} has shape {shape}; expected {expected}{meant}")
    if marks.device != device:
        raise RuntimeError(f"{name} is on {marks.device}, but the input is on {device}; move one of them with .to()")


def check_order(there: Tensor | None, back: Tensor | None) -> None:
    """Check that a PackedSequence moves its rows, and moves as many back, or does neither."""
    shapes = [None if places is None else list(places.shape) for places in (there, back)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"PackedSequence: sorted_indices has shape {shapes[0]}, unsorted_indices {shapes[1]}; expected (B,) of both, or None; "
            "pack_padded_sequence makes them"
        )


def _other_order(steps: int, rows: int, batch_first: bool) -> str:
    """Say how the layer reads its input, of what would fit if time and batch were exchanged."""
    if batch_first:
        return f". The layer reads the input as (B, T) = ({rows}, {steps}), as batch_first=True says; is False meant?"
    return f". The layer reads the input as (T, B) = ({steps}, {rows}); is batch_first=True meant?"


def is_served(dtype: torch.dtype) -> bool:
    """Whether layers compute in a dtype."""
    return dtype in _FLOATS


def check_dtype(dtype: torch.dtype) -> None:
    """Check that parameters are of a dtype that layers compute in."""
    if not is_served(dtype):
        raise TypeError(
            f"the parameters are {dtype}; expected float32, float64, bfloat16 or float16: convert with layer.to(…)"
        )


def check_embedding(embedding: object, width: int, dtype: torch.dtype) -> None:
    """Check that token ids can choose rows of it."""
    if isinstance(embedding, torch.nn.Module):
        raise TypeError(
            f"embedding is a module, {type(embedding).__name__}; expected its weights, as embedding=embedding.weight"
        )
    if not isinstance(embedding, Tensor):
        raise TypeError(f"embedding is {describe_value(embedding)}; expected a tensor (V, input_size = {width})")
    if embedding.dim() != 2 or embedding.shape[1] != width:
        raise RuntimeError(f"embedding has shape {list(embedding.shape)}; expected (V, input_size = {width})")
    if embedding.dtype != dtype:
        raise ValueError(f"embedding is {embedding.dtype}; expected {dtype}, like the parameters")


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
    if not watching.has_values(ids) or ids.numel() == 0 or (int(ids.min()) >= 0 and int(ids.max()) < vocabulary_size):
        return
    wrong = (ids < 0) | (ids >= vocabulary_size)
    places = (wrong if is_real is None else wrong & is_real).nonzero()
    if len(places):
        place = tuple(places[0].tolist())
        in_batch = (
            f"at step {place[0]} of row {place[1]}" if ids.dim() == 2 else f"at {list(place)} of all that is mapped"
        )
        where = f"in row {place[0]} of the packed input" if ids.dim() == 1 else in_batch
        raise IndexError(
            f"token id {int(ids[place])} {where}; expected 0 to {vocabulary_size - 1}, "
            f"since there are {vocabulary_size} rows to choose from"
        )


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Check that a tensor is dense, and of a shape, a dtype and a device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if tensor.layout != torch.strided or tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(f"{name} is {describe(tensor)}; expected {shape} {dtype} on {device}")


def describe(tensor: Tensor) -> str:
    """Say what a tensor is, for a message."""
    layout = "" if tensor.layout == torch.strided else f" {tensor.layout}"
    return f"{tuple(tensor.shape)} {tensor.dtype}{layout} on {tensor.device}"


def describe_value(value: object) -> str:
    """Say what a value is, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else type(value).__name__


def _is_probability(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) < 1
