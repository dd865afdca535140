"""Tokens in a file are those that were written, and an array to whoever asks."""

import hashlib
import os

import numpy as np
import pytest

from throughtime.lm import stored_tokens
from throughtime.lm.stored_tokens import StoredTokens
from throughtime.training.files import CheckpointError


@pytest.fixture
def ids():
    return np.random.default_rng(1).integers(0, 300, 1000).astype(np.uint16)


@pytest.fixture
def path(tmp_path, ids):
    ids.tofile(tmp_path / "tokens.bin")
    return tmp_path / "tokens.bin"


def opened(path, ids, vocabulary_size=300):
    return StoredTokens(path, ids.dtype, len(ids), vocabulary_size, hashlib.sha256(ids.tobytes()).hexdigest())


def test_it_is_an_array_to_whoever_asks(path, ids, monkeypatch):
    monkeypatch.setattr(stored_tokens, "_CHUNK", 64)
    stored = opened(path, ids)
    assert len(stored) == 1000
    assert stored.shape == (1000,)
    assert np.array_equal(stored, ids)
    for place in (
        slice(3, 9),
        slice(-5, None),
        slice(None),
        slice(9, 3),
        slice(None, None, -2),
        7,
        -1,
        [3, 1],
        ids > 9,
    ):
        assert np.array_equal(stored[place], ids[place])
    assert np.array_equal(stored == 5, ids == 5)
    assert np.array_equal(2 * stored + 1, 2 * ids + 1)
    assert list(stored) == list(ids)
    part = stored.part(10, 20)
    del stored
    assert np.array_equal(part, ids[10:20])
    assert np.array_equal(part[2:], ids[12:20])


def test_every_flipped_bit_is_refused(path, ids):
    data = path.read_bytes()
    for place in range(0, 8 * len(data), 37):
        spoilt = bytearray(data)
        spoilt[place // 8] ^= 1 << place % 8
        path.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match=r"tokens\.bin: altered since it was encoded"):
            opened(path, ids)


def test_another_size_and_ids_beyond_the_vocabulary_are_refused(path, ids):
    with pytest.raises(CheckpointError, match="holds the id 299, but the vocabulary has 299"):
        opened(path, ids, 299)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="1998 bytes, expected 2000"):
        opened(path, ids)


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(path, ids):
    """Of a memory-mapped one the process died of SIGBUS."""
    stored = opened(path, ids)
    os.truncate(path, 100)
    assert np.array_equal(stored[:50], ids[:50])
    with pytest.raises(CheckpointError, match="cut short while it was being read"):
        _ = stored[40:60]


def test_a_file_that_is_replaced_while_it_is_read_stays_what_it_was(path, ids, tmp_path):
    stored = opened(path, ids)
    (tmp_path / "other").write_bytes(b"")
    (tmp_path / "other").replace(path)
    assert np.array_equal(stored, ids)
