"""A stream that writes: what it refuses, and what it keeps of a text that ends badly."""

import numpy as np
import pytest
import torch
from torch import nn

import throughtime
from throughtime import InputError
from throughtime.kernels import native
from throughtime.streaming import Stream
from throughtime.streaming.writing import NoNumberError, Writer

pytestmark = pytest.mark.skipif(native.module is None, reason="streams need the kernels")


def reader(inputs: int = 30, outputs: int = 30) -> Stream:
    return throughtime.stream(nn.Sequential(throughtime.GRU(inputs, 8), nn.Linear(8, outputs)), ids=True)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(throughtime.GRU(30, 8), nn.Linear(8, 200_000)),
        nn.Sequential(nn.Embedding(3_000_000, 4), throughtime.GRU(4, 8), nn.Linear(8, 5)),
        throughtime.GRU(30, 8),
    ],
    ids=["more outputs than ids", "more ids than outputs", "no readout"],
)
def test_there_must_be_an_output_for_each_token_id(model):
    with pytest.raises(InputError, match="expected an output for each token id"):
        Writer(throughtime.stream(model, ids=True), end=None)


def test_the_kernels_refuse_it_too():
    stream = reader(outputs=50)
    choice = Writer(reader(50, 50), end=None)._choice
    with pytest.raises(ValueError, match="outputs are 50; expected 30"):
        stream._engine.write(choice, np.zeros(3), np.zeros(50, np.bool_), -1, np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="tokens to choose from are 50; expected 30"):
        reader()._engine.write(choice, np.zeros(3), np.zeros(30, np.bool_), -1, np.zeros(3, np.int64))
    with pytest.raises(IndexError, match="token 50; expected one from 0 to 49"):
        choice.see(np.array([3, 50]))
    with pytest.raises(IndexError, match="token -1"):
        choice.see(np.array([-1]))
    with pytest.raises(ValueError, match="logits are 49; expected 50"):
        choice.take(np.zeros(49, np.float32))
    with pytest.raises(ValueError, match="forbidden tokens are of another kind"):
        choice.choose(np.zeros(50), 0.5)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0; expected a number above 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_k": -1}, "top_k = -1; expected a number of tokens"),
        ({"top_p": 1.5}, "top_p = 1.5; expected a probability"),
        ({"min_p": -0.1}, "min_p = -0.1"),
        ({"typical_p": float("nan")}, "typical_p = nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0;"),
        ({"no_repeat_ngram": -3}, "no_repeat_ngram = -3; expected a number of tokens"),
        ({"topk": 3}, "unknown limit 'topk'; did you mean 'top_k'"),
    ],
    ids=str,
)
def test_limits_out_of_their_range_are_refused(limits, message):
    with pytest.raises(InputError, match=message):
        Writer(reader(), end=None, **limits)


@pytest.mark.parametrize(
    "forbidden", [np.zeros(29, np.bool_), np.zeros(3_000_000, np.bool_), np.zeros(30), np.zeros((1, 30), np.bool_)]
)
def test_forbidden_tokens_have_one_shape(forbidden):
    writer = Writer(reader(), end=None)
    writer.read([1])
    with pytest.raises(InputError, match=r"expected bool \[30\]"):
        writer.write(np.zeros(3), forbidden)


def test_tokens_that_are_read_are_ids():
    writer = Writer(reader(), end=None)
    with pytest.raises(InputError, match="expected token ids: integers"):
        writer.read([1.5])
    with pytest.raises(IndexError, match="token id 30; expected one from 0 to 29"):
        writer.read([1, 30])


def test_what_was_written_before_a_number_was_none_is_kept():
    """The model's output is NaN behind token 3, which comes after 0, 1 and 2."""
    layer = throughtime.RNN(5, 5, nonlinearity="relu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.weight_ih_l0.copy_(torch.eye(5).roll(1, 0))  # one-hot id to the next one
        layer.weight_ih_l0[4, 3] = torch.nan
    writer = Writer(throughtime.stream(layer, ids=True), end=None, greedy=True)
    writer.read([0])
    with pytest.raises(NoNumberError, match="no number") as raised:
        writer.write(np.zeros(10))
    assert raised.value.tokens.tolist() == [1, 2, 3]
