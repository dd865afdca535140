"""Streams cover the sequence in order, and a detached state is cut off its graph."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from throughtime import InputError
from throughtime.training import Streams, detach


@given(batch=st.integers(1, 5), window=st.integers(1, 7), extra=st.integers(0, 40))
def test_each_stream_is_read_in_order_and_targets_are_one_ahead(batch, window, extra):
    tokens = np.arange(batch * window + 1 + extra, dtype=np.uint16)
    streams = Streams(tokens, batch, window)
    windows = [streams.window_at(step) for step in range(len(streams))]
    inputs = torch.cat([w[0] for w in windows])
    targets = torch.cat([w[1] for w in windows])
    length = (len(tokens) - 1) // batch
    for row in range(batch):
        assert inputs[:, row].tolist() == list(range(row * length, row * length + len(inputs)))
    assert torch.equal(targets, inputs + 1)
    assert length - len(inputs) < window
    assert inputs.dtype == torch.int64


def test_epochs_begin_anew():
    streams = Streams(np.arange(21), batch=2, window=5)
    assert [streams.begins_epoch(step) for step in range(5)] == [True, False, True, False, True]
    assert torch.equal(streams.window_at(2)[0], streams.window_at(0)[0])


def test_too_little_text_says_what_is_needed():
    with pytest.raises(
        InputError, match="10 tokens to train on, but a batch of 2 windows of 5 steps needs at least 11; give more"
    ):
        Streams(np.arange(10), batch=2, window=5)


@pytest.mark.parametrize(("batch", "window", "said"), [(0, 5, "batch = 0"), (2, -1, "window = -1")])
def test_sizes_must_be_above_zero(batch, window, said):
    with pytest.raises(InputError, match=said):
        Streams(np.arange(100), batch, window)


def test_detach_reaches_nested_states():
    h = torch.zeros(2, requires_grad=True) * 2
    state = detach((h, (h, h)))
    assert not state[0].requires_grad
    assert not state[1][1].requires_grad
    assert detach(None) is None
