"""Files that are whole or refused: tensors with a JSON state in one safetensors file, and plain JSON. Never pickle.

A save is atomic: the file is written beside its place, synced, renamed, and the folder is synced, so that a crash at any moment
leaves the earlier file or the new one. The safetensors file carries the SHA-256 of itself (with the digest's own place filled with
zeros) in its metadata, so that a truncated or altered file is refused; any safetensors reader can open it. The same tensors and
state are the same bytes, wherever and whenever they are written, so that the digest names them.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from throughtime.training.files import SMALL, CheckpointError, open_to_read, read, reading, write_atomically

_BLANK = "0" * 64
_DIGEST_KEY = b'"sha256":"'
_LONGEST_HEADER = 100_000_000  # bytes, as in safetensors
_SEAL = b'{\n  "sha256": "'  # how a sealed JSON object begins


def save(path: str | Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> str:
    """Write tensors and a JSON state, atomically.

    Args:
        path: Where; the folder must be there.
        tensors: By name; moved to the CPU, shared storage written once for each name.
        state: Whatever JSON can express.

    Returns:
        The SHA-256 by which the file verifies itself.

    Raises:
        CheckpointError: The file can't be written. What was there before still is.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = _with_metadata(safetensors.torch.save(on_cpu), {"sha256": _BLANK, "state": json.dumps(state)})
    digest = hashlib.sha256(data).hexdigest()
    at = _digest_place(data)
    assert at is not None
    data[at : at + 64] = digest.encode()
    write_atomically(path, bytes(data))
    return digest


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote: the tensors, on the CPU, and the state.

    Raises:
        CheckpointError: The file is missing, truncated, altered, was not written by `save`, or needs more memory than there is.
    """
    path = Path(path)
    data = _read_whole(path)
    at = _digest_place(data)
    if at is None:
        raise _no_checkpoint(path)
    given = bytes(data[at : at + 64])
    data[at : at + 64] = _BLANK.encode()
    if hashlib.sha256(data).hexdigest().encode() != given:
        raise CheckpointError(f"{path}: truncated or altered (its SHA-256 doesn't match); restore it or train anew")
    try:
        with reading(path):
            tensors = safetensors.torch.load(bytes(data))
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        state = json.loads(header["__metadata__"]["state"])
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of throughtime ({error}); restore it or train anew") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: its state is a JSON {type(state).__name__}, expected an object; train anew")
    return tensors, state


def save_json(path: str | Path, value: dict[str, Any], *, sealed: bool = False) -> str:
    """Write a JSON object, atomically; return the SHA-256 of the file.

    Args:
        path: Where.
        value: The object.
        sealed: Whether the file carries the SHA-256 of itself, as its first entry; else something else must vouch for it.

    Raises:
        CheckpointError: The file can't be written. What was there before still is.
    """
    whole = {"sha256": _BLANK, **value} if sealed else value
    data = (json.dumps(whole, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "surrogatepass")
    if sealed:
        at = data.index(_BLANK.encode())
        data = data[:at] + hashlib.sha256(data).hexdigest().encode() + data[at + 64 :]
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def load_json(
    path: str | Path, sha256: str | None = None, *, sealed: bool = False, most: int = SMALL
) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        sha256: What the file's SHA-256 must be, if it is known.
        sealed: Whether the file must carry the SHA-256 of itself.
        most: Bytes that it may hold.

    Raises:
        CheckpointError: The file is missing, larger, is not a JSON object, or is not the one that was meant.
    """
    path = Path(path)
    data = read(path, most)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(
            f"{path}: altered since it was written (its SHA-256 doesn't match); restore it or train anew"
        )
    if sealed:
        _check_seal(path, data)
    try:
        with reading(path):
            value = json.loads(data.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); restore it or train anew") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}; expected an object")
    if sealed:
        del value["sha256"]
    return value


def _with_metadata(data: bytes, metadata: dict[str, str]) -> bytearray:
    """Return a safetensors file with metadata in the order given; the library's own order is another in each process."""
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(data[8:begin])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors begin where any of their numbers may
    return bytearray(len(header).to_bytes(8, "little") + header) + data[begin:]


def _read_whole(path: Path) -> bytearray:
    """Return a safetensors file; no more than its header is read where that doesn't tell of as many bytes as there are."""
    with open_to_read(path) as file, reading(path):
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(_LONGEST_HEADER, size - 8):
            raise _no_checkpoint(path)
        try:
            entries = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise _no_checkpoint(path) from error
        if size != expected:
            raise CheckpointError(
                f"{path}: truncated or altered ({size:,} bytes, its header tells of {expected:,}); restore it or train anew"
            )
        data = bytearray(size)
        file.seek(0)
        del data[file.readinto(data) :]
        return data


def _no_checkpoint(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a checkpoint of throughtime, or its header is damaged; restore it or train anew"
    )


def _check_seal(path: Path, data: bytes) -> None:
    at = len(_SEAL)
    blank = data[:at] + _BLANK.encode() + data[at + 64 :]
    if not data.startswith(_SEAL) or hashlib.sha256(blank).hexdigest().encode() != data[at : at + 64]:
        raise CheckpointError(
            f"{path}: truncated or altered (its SHA-256 doesn't match); restore it, or delete it to make it anew"
        )


def _digest_place(data: bytearray) -> int | None:
    """Return where the 64 digits of the digest stand in the header, if it has one that fits in the file."""
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or end > len(data):
        return None
    at = data.find(_DIGEST_KEY, 8, end)
    start = at + len(_DIGEST_KEY)
    return start if at >= 0 and start + 64 <= end else None
