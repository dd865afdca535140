"""Resets to another state than a row begins with: as a loop over steps of the same layer that exchanges its state at each."""

import comparison
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
    "gru_reset_before": lambda *a, **k: throughtime.GRU(*a, reset_after=False, **k),
    "mgu": throughtime.MGU,
    "layer_norm": lambda *a, **k: throughtime.LSTM(*a, layer_norm=True, peepholes=True, **k),
}
T, B = 7, 6


def as_tuple(state) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def some_state(layer, rows: int = B, grad: bool = True):
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.output_size, layer.hidden_size] if isinstance(layer, throughtime.LSTM) else [layer.hidden_size]
    made = tuple(torch.randn(count, rows, w, dtype=torch.float64, requires_grad=grad) for w in widths)
    return made if len(made) == 2 else made[0]


def some_resets() -> Tensor:
    """None, at the first step, in the midst, at the last, at all, and by chance."""
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[0, 1] = reset[3, 2] = reset[T - 1, 3] = True
    reset[:, 4] = True
    reset[[2, 5], 5] = True
    return reset


def loop(layer, x: Tensor, hx, reset: Tensor, fresh):
    """What is to be computed, for one direction: the PPO of CleanRL does it so, with zeros for `fresh`."""
    state, outputs = hx, []
    for x_t, begins in zip(x, reset, strict=True):
        state = tuple(torch.where(begins[:, None], f, s) for s, f in zip(as_tuple(state), as_tuple(fresh), strict=True))
        y, state = layer(x_t[None], state if len(state) == 2 else state[0])
        outputs.append(y)
    return torch.cat(outputs), state


def by_segments(layer, x: Tensor, hx, reset: Tensor, fresh, lengths: list[int]):
    """What is to be computed, for any direction: each sequence by itself, the first and the last with the state of their row."""
    outputs, finals = torch.zeros(T, B, layer.output_size * (1 + layer.bidirectional), dtype=x.dtype), []
    for row, length in enumerate(lengths):
        begins = [0, *(t for t in range(1, length) if reset[t, row])]
        is_fresh = length > 0 and bool(reset[0, row])
        pieces, own = list(zip(begins, [*begins[1:], length], strict=True)), []
        for number, (begin, end) in enumerate(pieces):
            initial = []
            for h, f in zip(as_tuple(hx), as_tuple(fresh), strict=True):
                h, f = h[:, row : row + 1].clone(), f[:, row : row + 1].expand(-1, 1, -1)
                ways = slice(0, None, 2) if layer.bidirectional else slice(None)
                h[ways] = f[ways] if number > 0 or is_fresh else h[ways]
                if layer.bidirectional and number < len(pieces) - 1:
                    h[1::2] = f[1::2]
                initial.append(h)
            if begin == end:
                own.append(initial)
                continue
            y, state = layer(x[begin:end, row : row + 1], tuple(initial) if len(initial) == 2 else initial[0])
            outputs[begin:end, row] = y[:, 0]
            own.append(as_tuple(state))
        final = [part.clone() for part in own[-1]]
        for part, first in zip(final, own[0], strict=True):
            if layer.bidirectional:
                part[1::2] = first[1::2]
        finals.append(final)
    return outputs, tuple(torch.cat(parts, 1) for parts in zip(*finals, strict=True))


def gradients(result, leaves) -> list[Tensor]:
    output, final = result
    torch.manual_seed(3)
    loss = sum((part * torch.randn_like(part)).sum() for part in (output, *as_tuple(final)))
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("backend", [name for name in comparison.BACKENDS if name != "torch"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("given", ["zeros", "state", "learned"])
def test_it_is_a_loop_whose_state_is_exchanged(name, backend, layers, given):
    """Outputs, final states and every gradient, those of both states included."""
    layer = CELLS[name](5, 4, layers, backend=backend).double()
    x, hx, reset = torch.randn(T, B, 5, dtype=torch.float64, requires_grad=True), some_state(layer), some_resets()
    fresh = some_state(layer, 1 if given == "learned" else B)
    leaves = [x, *as_tuple(hx), *layer.parameters()] + list(as_tuple(fresh)) * (given != "zeros")
    if given == "zeros":
        expected = loop(layer, x, hx, reset, tuple(torch.zeros_like(h) for h in as_tuple(hx)))
        actual = layer(x, hx, reset=reset)
    else:
        expected, actual = loop(layer, x, hx, reset, fresh), layer(x, hx, reset=reset, reset_to=fresh)
    for a, e in zip((actual[0], *as_tuple(actual[1])), (expected[0], *as_tuple(expected[1])), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)
    for a, e in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["lstm", "lstm_projected", "gru", "layer_norm"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [None, [7, 7, 4, 7, 5, 3], [0, 1, 2, 3, 7, 2]])
def test_each_sequence_is_alone_both_ways_and_with_lengths(name, layers, bidirectional, lengths):
    layer = CELLS[name](5, 4, 1, bidirectional=bidirectional).double()
    x, hx, fresh, reset = torch.randn(T, B, 5, dtype=torch.float64), some_state(layer), some_state(layer), some_resets()
    rows = lengths or [T] * B
    x = torch.where((torch.arange(T)[:, None] < torch.tensor(rows))[..., None], x, torch.nan).requires_grad_()
    leaves = [*as_tuple(hx), *as_tuple(fresh), *layer.parameters()]
    actual = layer(x, hx, reset=reset, reset_to=fresh, lengths=lengths)
    expected = by_segments(layer, x, hx, reset, fresh, rows)
    for a, e in zip(
        (actual[0], *actual[1:][0]) if isinstance(hx, tuple) else actual, (expected[0], *expected[1]), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)
    for a, e in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_going_back_to_the_initial_state_gives_the_same_bits_either_way(name, bidirectional):
    layer = CELLS[name](5, 4, 2, bidirectional=bidirectional)
    x, reset = torch.randn(T, B, 5), some_resets()
    hx = tuple(s.detach().float() for s in as_tuple(some_state(layer)))
    hx, copied = (hx, tuple(s.clone() for s in hx)) if len(hx) == 2 else (hx[0], hx[0].clone())
    natively, cut = layer(x, hx, reset=reset, reset_to=hx), layer(x, hx, reset=reset, reset_to=copied)
    for a, e in zip((natively[0], *as_tuple(natively[1])), (cut[0], *as_tuple(cut[1])), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("form", ["batch_first", "unbatched", "token ids", "embedded", "one step", "no reset"])
def test_every_form_of_input(form):
    layer = throughtime.LSTM(5, 4, batch_first=form == "batch_first").double()
    x, reset = torch.randn(T, B, 5, dtype=torch.float64), some_resets()
    hx, fresh = some_state(layer, grad=False), some_state(layer, grad=False)
    if form == "one step":
        x, reset = x[:1], reset[:1]
    if form == "no reset":
        reset = torch.zeros_like(reset)
    options, embedding = {"reset": reset, "reset_to": fresh}, torch.randn(9, 5, dtype=torch.float64)
    ids = torch.randint(0, 5, (T, B))
    if form == "token ids":
        x = nn.functional.one_hot(ids, 5).double()
    if form == "embedded":
        x = embedding[ids]
    expected, final = loop(layer, x, hx, reset, fresh) if form != "batch_first" else (None, None)
    if form == "batch_first":
        layer.batch_first = False
        expected, final = loop(layer, x, hx, reset, fresh)
        layer.batch_first = True
        actual, state = layer(x.transpose(0, 1), hx, reset=reset.T, reset_to=fresh)
        actual = actual.transpose(0, 1)
    elif form == "unbatched":
        own = [tuple(s[:, 5] for s in state) for state in (hx, fresh)]
        actual, state = layer(x[:, 5], own[0], reset=reset[:, 5], reset_to=own[1])
        expected, final = expected[:, 5], tuple(s[:, 5] for s in final)
        back = layer(x[:, 5], own[0], reset=reset[:, 5], reset_to=own[0])[0]
        assert torch.equal(back, layer(x, hx, reset=reset, reset_to=hx)[0][:, 5])
    elif form in ("token ids", "embedded"):
        actual, state = layer(ids, hx, **options, **({"embedding": embedding} if form == "embedded" else {}))
    else:
        actual, state = layer(x, hx, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    for a, e in zip(state, final, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


def test_without_a_state_a_reset_goes_to_zeros_by_the_fast_way(monkeypatch):
    layer, x, reset = throughtime.GRU(5, 4), torch.randn(T, B, 5), some_resets()
    expected = layer(x, torch.zeros(1, B, 4), reset=reset)[0]
    monkeypatch.setattr(throughtime.layers.episodes, "run", None)
    assert torch.equal(layer(x, reset=reset)[0], expected)
    layer(x, hx := torch.randn(1, B, 4), reset=reset, reset_to=hx)
    layer(x, hx, reset_to=torch.ones(1, B, 4))


def test_the_state_that_is_carried_on_from_window_to_window_is_that_of_a_long_call():
    """As in truncated BPTT: with zeros or with a learned state at each reset, however the steps are cut in windows."""
    layer = throughtime.LSTM(5, 4, 2).double()
    x, reset = torch.randn(40, B, 5, dtype=torch.float64), torch.rand(40, B) < 0.1
    for fresh in (None, some_state(layer, 1)):
        start = None if fresh is None else tuple(s.expand(-1, B, -1) for s in fresh)
        whole, final = layer(x, start, reset=reset, reset_to=fresh)
        state, outputs = start, []
        for begin, end in ((0, 1), (1, 13), (13, 39), (39, 40)):
            y, state = layer(x[begin:end], state, reset=reset[begin:end], reset_to=fresh)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs), whole, rtol=1e-11, atol=1e-12)
        for a, e in zip(state, final, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


def test_it_is_checked_like_the_initial_state():
    layer, gru = throughtime.LSTM(5, 4), throughtime.GRU(5, 4)
    x, reset, h = torch.randn(T, B, 5), some_resets(), torch.zeros(1, B, 4)
    with pytest.raises(TypeError, match=r"reset_to is a tensor of shape \[1, 6, 4\]; expected a pair"):
        layer(x, reset=reset, reset_to=h)
    with pytest.raises(RuntimeError, match=r"Expected reset_to\[1\] size \(1, 6, 4\), got \[1, 2, 4\]"):
        layer(x, reset=reset, reset_to=(h, h[:, :2]))
    with pytest.raises(RuntimeError, match=r"reset_to is torch\.float64 on cpu; expected torch\.float32"):
        gru(x, reset=reset, reset_to=h.double())
    with pytest.raises(RuntimeError, match=r"Expected hx size \(1, 6, 4\), got \[1, 1, 4\]"):
        gru(x, h[:, :1])
    with pytest.raises(RuntimeError, match="reset_to should also be 2-D but got 3-D"):
        gru(x[:, 0], reset=reset[:, 0], reset_to=h)
    packed = nn.utils.rnn.pack_sequence([x[:, 0]])
    with pytest.raises(ValueError, match="a PackedSequence carries its own lengths"):
        gru(packed, reset_to=h[:, :1])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_it_is_transformed_compiled_and_exported(bidirectional):
    layer = throughtime.GRU(5, 4, bidirectional=bidirectional).double()
    x, reset = torch.randn(3, T, B, 5, dtype=torch.float64), some_resets()
    hx, fresh = some_state(layer, grad=False), some_state(layer, grad=False)

    def call(x, hx, reset, fresh):
        return layer(x, hx, reset=reset, reset_to=fresh)[0]

    expected = torch.stack([call(one, hx, reset, fresh) for one in x])
    mapped = torch.func.vmap(call, in_dims=(0, None, None, None))(x, hx, reset, fresh)
    torch.testing.assert_close(mapped, expected)
    others = torch.stack([reset, reset.roll(1, 1), ~reset])
    mapped = torch.func.vmap(call, in_dims=(None, None, 0, None))(x[0], hx, others, fresh)
    torch.testing.assert_close(mapped, torch.stack([call(x[0], hx, one, fresh) for one in others]))
    assert torch.autograd.gradcheck(
        lambda x, hx, fresh: call(x, hx, reset, fresh),
        (x[0].requires_grad_(), hx.requires_grad_(), fresh.requires_grad_()),
    )
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x[0], hx, reset, fresh), expected[0])


@pytest.mark.parametrize("zoneout", [0.0, 0.3])
def test_the_masks_of_variants_are_drawn_for_it(zoneout):
    torch.manual_seed(1)
    layer = throughtime.LSTM(5, 4, 2, zoneout=zoneout, recurrent_dropout=0.3, dropout=0.2)
    hx = tuple(s.detach().float() for s in some_state(layer))
    output, _ = layer(torch.randn(T, B, 5), hx, reset=some_resets())
    assert output.isfinite().all()
    output.sum().backward()
