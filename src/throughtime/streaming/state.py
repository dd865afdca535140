r"""A saved state: of one or several streams, in bytes that are checked before any of them is believed.

    b"ttstate\0"   version, u16   0, u16   streams, u32   numbers a stream, u64   fingerprint of the model, 16 bytes
    the numbers, float32          the first 16 bytes of the SHA-256 of all before

Integers and numbers are little-endian.
"""

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray

from throughtime.errors import InputError

_HEAD = struct.Struct("<8sHHIQ16s")
_MAGIC, _VERSION, _DIGEST = b"ttstate\0", 1, 16


def pack(states: NDArray[np.float32], fingerprint: bytes) -> bytes:
    """Return states (streams, numbers) as bytes.

    Example:
        >>> import numpy as np
        >>> blob = pack(np.zeros((1, 3), np.float32), b"of a model, here")
        >>> len(blob), unpack(blob, b"of a model, here", 3)
        (68, array([[0., 0., 0.]], dtype=float32))
    """
    head = _HEAD.pack(_MAGIC, _VERSION, 0, len(states), states.shape[1], fingerprint)
    body = head + states.astype("<f4", copy=False).tobytes()
    return body + _digest(body)


def unpack(blob: bytes, fingerprint: bytes, size: int) -> NDArray[np.float32]:
    """Return the states (streams, numbers) that bytes hold.

    Args:
        blob: What `pack` returned.
        fingerprint: Of the model that they have to belong to.
        size: How many numbers a stream of it has.

    Raises:
        InputError: They are no state, an altered or a newer one, or another model's.
    """
    if not isinstance(blob, bytes | bytearray | memoryview):
        raise InputError(f"a state is bytes, as state() returns them; got {type(blob).__name__}")
    blob = bytes(blob)
    if len(blob) < _HEAD.size + _DIGEST or not blob.startswith(_MAGIC):
        raise InputError(f"these {len(blob):,} bytes are no state; expected what state() returned")
    _, version, _, count, given, of_model = _HEAD.unpack_from(blob)
    if version != _VERSION:
        raise InputError(f"the state is of version {version}, which this throughtime doesn't know; expected {_VERSION}")
    body = blob[:-_DIGEST]
    if _digest(body) != blob[-_DIGEST:]:
        raise InputError("the state is damaged: it isn't what was saved; expected what state() returned")
    if of_model != fingerprint:
        raise InputError("the state is another model's: its weights or sizes differ; expected a state of this model")
    if given != size or len(body) != _HEAD.size + 4 * count * size:
        raise InputError(f"the state has {given} numbers a stream; expected {size}")
    return np.frombuffer(body, "<f4", offset=_HEAD.size).reshape(count, size).astype(np.float32)


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_DIGEST]
