"""Masks: a row with steps that are passed over is that row without them, whatever stands there; and TorchRL's and Keras' masks."""

import comparison
import numpy as np
import pytest
import torch
from comparison import HAS_NATIVE
from torch import Tensor, nn

import throughtime

CELLS = {
    "rnn": throughtime.RNN,
    "lstm": throughtime.LSTM,
    "lstm_projected": lambda *a, **k: throughtime.LSTM(*a, proj_size=3, **k),
    "gru": throughtime.GRU,
    "mgu": throughtime.MGU,
}
T, B = 7, 6
BACKENDS = ["auto", *comparison.BACKENDS]


def as_tuple(state) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def some_mask() -> Tensor:
    """All, none, padding at the end, padding at the beginning, holes, and every other."""
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[:, 0] = mask[:4, 2] = mask[3:, 3] = mask[[0, 2, 3, 6], 4] = mask[::2, 5] = True
    return mask


def some_state(layer):
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.output_size, layer.hidden_size] if isinstance(layer, throughtime.LSTM) else [layer.hidden_size]
    made = tuple(torch.randn(count, B, w, dtype=torch.float64, requires_grad=True) for w in widths)
    return made if len(made) == 2 else made[0]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("how", ["plain", "reset", "reset_to"])
def test_each_row_is_that_without_what_it_passes_over(name, backend, bidirectional, how):
    if backend == "torch" and (how != "plain" or name == "mgu"):
        pytest.skip("torch's call has neither")
    layer = CELLS[name](5, 4, 2, bidirectional=bidirectional, backend=backend).double()
    mask, reset, hx, fresh = some_mask(), torch.rand(T, B) < 0.3, some_state(layer), some_state(layer)
    x = torch.where(mask[..., None], torch.randn(T, B, 5, dtype=torch.float64), torch.nan).requires_grad_()
    options = {} if how == "plain" else {"reset_to": hx if how == "reset" else fresh}
    output, final = layer(x, hx, mask=mask, **({} if how == "plain" else {"reset": reset}), **options)
    weights = torch.randn_like(output)
    leaves = [*as_tuple(hx), *layer.parameters()]
    loss = (output * weights).sum() + sum(s.sum() for s in as_tuple(final))
    together = torch.autograd.grad(loss, [*leaves, x])
    apart = torch.zeros((), dtype=torch.float64)
    for row in range(B):
        own, kept = mask[:, row], []
        hx_row, fresh_row = (tuple(s[:, row : row + 1] for s in as_tuple(state)) for state in (hx, fresh))
        begun, given = False, {}
        for t in range(T):  # a reset while nothing is read is that of the next step which is
            begun = begun or bool(reset[t, row])
            if own[t]:
                kept.append(begun)
                begun = False
        if not kept:
            assert not output[:, row].any()
            last = hx_row
        else:
            if how != "plain":
                goes_to = hx_row if how == "reset" else fresh_row
                given = {"reset": torch.tensor(kept)[:, None], "reset_to": goes_to if len(goes_to) == 2 else goes_to[0]}
                hx_row = goes_to if how == "reset" else hx_row
            alone, last = layer(x[own, row : row + 1], hx_row if len(hx_row) == 2 else hx_row[0], **given)
            torch.testing.assert_close(output[own, row], alone[:, 0], rtol=1e-11, atol=1e-12)
            assert not output[~own, row].any()
            apart = apart + (alone[:, 0] * weights[own, row]).sum()
        for whole, single in zip(as_tuple(final), as_tuple(last), strict=True):
            torch.testing.assert_close(whole[:, row], single[:, 0], rtol=1e-11, atol=1e-12)
            apart = apart + single.sum()
    for a, e in zip(together, torch.autograd.grad(apart, [*leaves, x]), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")
def test_a_mask_of_the_first_steps_gives_the_bits_of_lengths():
    layer, x, lengths = (
        throughtime.GRU(5, 4, 2, bidirectional=True),
        torch.randn(T, B, 5),
        torch.tensor([7, 0, 3, 1, 7, 2]),
    )
    mask = torch.arange(T)[:, None] < lengths
    for a, e in zip(layer(x, mask=mask), layer(x, lengths=lengths), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("form", ["batch_first", "unbatched", "token ids", "numpy", "list"])
def test_every_form_of_input(form):
    layer, mask, ids = throughtime.LSTM(5, 4), some_mask(), torch.randint(0, 5, (T, B))
    x = nn.functional.one_hot(ids, 5).float()
    expected = layer(x, mask=mask)[0]
    if form == "batch_first":
        layer.batch_first = True
        actual = layer(x.transpose(0, 1), mask=mask.T)[0].transpose(0, 1)
    elif form == "unbatched":
        actual, expected = layer(x[:, 4], mask=mask[:, 4])[0], expected[:, 4]
    elif form == "token ids":
        ids[~mask] = -7
        actual = layer(ids, mask=mask)[0]
    else:
        actual = layer(x, mask=mask.numpy() if form == "numpy" else mask.tolist())[0]
    torch.testing.assert_close(actual, expected)


def test_what_is_no_mask_is_refused():
    layer, x, mask = throughtime.LSTM(5, 4), torch.randn(T, B, 5), some_mask()
    with pytest.raises(
        TypeError, match=r"mask is torch\.int64; expected a bool tensor, true at the steps that are read"
    ):
        layer(x, mask=mask.long())
    with pytest.raises(ValueError, match=r"mask has shape \[6, 7\]; expected \(T, B\) = \(7, 6\)"):
        layer(x, mask=mask.T)
    with pytest.raises(ValueError, match="lengths= and mask= are both given"):
        layer(x, mask=mask, lengths=[1] * B)
    with pytest.raises(ValueError, match="a PackedSequence carries its own lengths"):
        layer(nn.utils.rnn.pack_sequence([x[:, 0]]), mask=mask[:, :1])
    with pytest.raises(TypeError, match="give it as mask="):
        layer(x, lengths=mask)


def test_it_is_transformed_and_compiled():
    layer, x = throughtime.GRU(5, 4).double(), torch.randn(3, T, B, 5, dtype=torch.float64)
    mask = some_mask()
    masks = torch.stack([mask, mask.roll(1, 1), torch.ones_like(mask)])
    expected = torch.stack([layer(one, mask=own)[0] for one, own in zip(x, masks, strict=True)])
    torch.testing.assert_close(torch.func.vmap(lambda x, m: layer(x, mask=m)[0])(x, masks), expected)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, m: layer(x, mask=m)[0], fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x[0], masks[0]), expected[0])
    assert torch.autograd.gradcheck(lambda x: layer(x, mask=mask)[0], x[0].requires_grad_())


def test_numpy_bools_of_keras_padding_mask():
    """As `keras.layers.Embedding(mask_zero=True)` makes it: (B, T), true where a token isn't 0, wherever that is."""
    ids = np.array([[0, 0, 3, 1], [2, 0, 4, 0]])
    layer = throughtime.GRU(5, 4, batch_first=True)
    _, h = layer(torch.tensor(ids), mask=ids != 0)
    for row, own in enumerate(([3, 1], [2, 4])):
        torch.testing.assert_close(h[:, row], layer(torch.tensor([own]))[1][:, 0])
