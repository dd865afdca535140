"""Saved states: whole or refused."""

import struct

import numpy as np
import pytest
import torch
from torch import nn

import throughtime
from throughtime import GRU, LSTM, InputError
from throughtime.kernels import native
from throughtime.streaming import state as states

pytestmark = pytest.mark.skipif(native.module is None, reason="streams need the kernels")


@pytest.fixture
def layer():
    return LSTM(5, 17, num_layers=2, proj_size=3)


def test_a_state_is_what_the_layer_returns(layer):
    x = torch.randn(9, 5)
    stream = throughtime.stream(layer)
    stream.feed(x)
    with torch.no_grad():
        _, (h, c) = layer(x)
    expected = torch.cat([torch.cat([h[0], c[0]]), torch.cat([h[1], c[1]])]).numpy()
    blob = stream.state()
    assert len(blob) == 56 + 4 * expected.size == 56 + 4 * 2 * (3 + 17)
    assert np.array_equal(states.unpack(blob, stream._packed.fingerprint, expected.size)[0], expected)


def test_rewind_and_fork(layer):
    x = torch.randn(20, 5)
    stream = throughtime.stream(layer, streams=3)
    stream.feed(x[:10, None].repeat(1, 3, 1))
    saved, one = stream.state(), stream.state(1)
    twin = stream.clone()
    expected = stream.feed(x[10:], which=1)
    assert torch.equal(twin.feed(x[10:], which=1), expected)
    stream.restore(saved)
    assert torch.equal(stream.feed(x[10:], which=2), expected)
    stream.restore(one)  # in every stream
    assert all(stream.state(number) == one for number in range(3))
    stream.restore(saved, which=[2, 0, 1])
    assert stream.state() == saved
    with pytest.raises(InputError, match="3 streams; expected one of 1 or of 2"):
        stream.restore(saved, which=[0, 1])


def test_a_state_serves_every_precision_and_number_of_streams(layer):
    first = throughtime.stream(layer)
    first.feed(torch.randn(4, 5))
    blob = first.state()
    for precision in ("float32", "bfloat16", "int8"):
        other = throughtime.stream(layer, streams=4, precision=precision)
        other.restore(blob, which=3)
        assert other.state(3) == blob
        assert other.state(0) != blob


def test_another_model_refuses_it(layer):
    blob = throughtime.stream(layer).state()
    same_shape = LSTM(5, 17, num_layers=2, proj_size=3)
    slightly = LSTM(5, 17, num_layers=2, proj_size=3)
    slightly.load_state_dict(layer.state_dict())
    throughtime.stream(slightly).restore(blob)  # the same weights are the same model
    with torch.no_grad():
        slightly.weight_hh_l1[0, 0] += 1e-6
    others = [same_shape, slightly, nn.Sequential(layer, nn.Linear(3, 2)), GRU(5, 40), LSTM(5, 17, num_layers=2)]
    for other in others:
        with pytest.raises(InputError, match="another model's"):
            throughtime.stream(other).restore(blob)
    with pytest.raises(InputError, match="another model's"):
        throughtime.stream(layer, ids=True).restore(blob)


def test_what_is_no_state_is_refused(layer):
    stream = throughtime.stream(layer)
    stream.feed(torch.randn(4, 5))
    blob = stream.state()
    newer = blob[:8] + struct.pack("<H", 2) + blob[10:]
    for bad, said in [
        (b"", "no state"),
        (b"x" * 500, "no state"),
        (blob[:-1], "damaged"),
        (blob + b"\0", "damaged"),
        (newer, "version 2"),
        ("text", "str"),
        (None, "NoneType"),
    ]:
        with pytest.raises(InputError, match=said) as caught:
            stream.restore(bad)
        assert "\n" not in str(caught.value)
    assert stream.state() == blob
    stream.restore(bytearray(blob))
    stream.restore(memoryview(blob))


def test_a_hundred_thousand_altered_states_are_refused(layer):
    stream = throughtime.stream(layer, streams=2)
    stream.feed(torch.randn(4, 2, 5))
    blob, random = stream.state(), np.random.default_rng(0)
    bits, cuts = random.integers(len(blob) * 8, size=100_000), random.integers(len(blob), size=100_000)
    for number, (bit, cut) in enumerate(zip(bits.tolist(), cuts.tolist(), strict=True)):
        altered = bytearray(blob)
        altered[bit // 8] ^= 1 << bit % 8
        if number % 3 == 1:
            del altered[cut:]
        elif number % 3 == 2:
            altered[cut:cut] = blob[: bit % 90]
        with pytest.raises(InputError):
            states.unpack(bytes(altered), stream._packed.fingerprint, stream._engine.state_size)
    assert stream.state() == blob


def test_forged_sizes_are_refused(layer):
    """Whoever can renew the digest still can't have a state of another size."""
    stream = throughtime.stream(layer)
    size, fingerprint = stream._engine.state_size, stream._packed.fingerprint
    for count, given, numbers in [(1, size, size - 1), (2**32 - 1, size, size), (1, 2**64 - 1, size), (0, size, 5)]:
        head = struct.pack("<8sHHIQ16s", b"ttstate\0", 1, 0, count, given, fingerprint)
        body = head + b"\0" * (4 * numbers)
        with pytest.raises(InputError, match="numbers a stream"):
            stream.restore(body + states._digest(body))
    nothing = states.pack(np.zeros((0, size), np.float32), fingerprint)
    with pytest.raises(InputError, match="0 streams"):
        stream.restore(nothing)
