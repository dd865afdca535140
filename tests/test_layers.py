"""The layers against torch.nn: outputs, final states and every gradient, over a grid of options; and what they add to it."""

import copy
import io
import warnings
from functools import partial

import comparison
import numpy as np
import pytest
import torch
from comparison import GRADIENT_FACTOR, HAS_NATIVE, OUTPUT_FACTOR, assert_as_accurate, gradients, least_accurate, moved
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import throughtime
from throughtime.kernels import layout

PAIRS = {
    "rnn": (throughtime.RNN, nn.RNN, {}),
    "rnn_relu": (throughtime.RNN, nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (throughtime.LSTM, nn.LSTM, {}),
    "lstm_projected": (throughtime.LSTM, nn.LSTM, {"proj_size": 3}),
    "gru": (throughtime.GRU, nn.GRU, {}),
}
BACKENDS = ["auto", *comparison.BACKENDS]
OWN = {
    "gru_reset_before": partial(throughtime.GRU, reset_after=False),
    "mgu": throughtime.MGU,
}  # which torch doesn't have


def flat(result: tuple) -> list[Tensor]:
    """Return output and final states as one list."""
    output, final = result
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *final] if isinstance(final, tuple) else [output, final]


def pair(name: str, hidden: int = 4, **options) -> tuple[nn.Module, nn.Module, dict]:
    ours, peer, extra = PAIRS[name]
    extra = dict(extra)
    if "proj_size" in extra:
        extra["proj_size"] = min(extra["proj_size"], hidden - 1)
    backend = options.pop("backend", "auto")
    theirs = peer(5, hidden, **extra, **options)
    layer = ours(5, hidden, **extra, **options, backend=backend)
    layer.load_state_dict(theirs.state_dict())
    return layer, theirs, extra


def random_hx(layer: nn.Module, batch: int, dtype: torch.dtype) -> Tensor | tuple[Tensor, Tensor]:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(rows, batch, layer.output_size, dtype=dtype)
    return (h, torch.randn(rows, batch, layer.hidden_size, dtype=dtype)) if isinstance(layer, throughtime.LSTM) else h


def run(module: nn.Module, names: list[str], form, x: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Call `module` with its parameters replaced, its state given and its input in the form that `form` makes."""
    states, parameters = tensors[: -len(names)], tensors[-len(names) :]
    hx = states if len(states) == 2 else states[0]
    return flat(torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (form(x), hx)))


@given(
    name=st.sampled_from(list(PAIRS)),
    backend=st.sampled_from(BACKENDS),
    hidden=st.sampled_from([2, 7, 63]),
    steps=st.sampled_from([1, 2, 9]),
    batch=st.sampled_from([1, 3]),
    num_layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    ragged=st.sampled_from([None, "sorted", "any order"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150)
def test_parity_with_torch(
    *, name, backend, hidden, steps, batch, num_layers, bidirectional, bias, batch_first, ragged, dtype, seed
):
    torch.manual_seed(seed)
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "bias": bias, "batch_first": batch_first}
    layer, theirs, _ = pair(name, hidden, backend=backend, **options)
    layer, theirs, exact = layer.to(dtype), theirs.to(dtype), copy.deepcopy(theirs).double()
    x = torch.randn((batch, steps, 5) if batch_first else (steps, batch, 5), dtype=dtype)
    hx = random_hx(layer, batch, dtype)

    def form(x: Tensor) -> Tensor | PackedSequence:
        if ragged is None:
            return x
        lengths = torch.randint(1, steps + 1, (batch,), generator=torch.Generator().manual_seed(seed))
        lengths = lengths.sort(descending=True).values if ragged == "sorted" else lengths
        return pack_padded_sequence(x, lengths, batch_first, enforce_sorted=ragged == "sorted")

    names = [n for n, _ in layer.named_parameters()]
    tensors = [x, *(hx if isinstance(hx, tuple) else [hx]), *(p.detach() for p in layer.parameters())]
    # In float64 torch.nn's own result is what is exact: there only moved arguments tell how much an honest one errs.
    others = [(theirs, moved(tensors, dtype, seed)) for seed in range(3)]
    calls = [(layer, tensors), (exact, [t.double() for t in tensors]), (theirs, tensors), *others]
    output, *outputs = [run(module, names, form, *given) for module, given in calls]
    assert_as_accurate(
        *(output, least_accurate(*outputs), outputs[0], OUTPUT_FACTOR), ["output", "h", "c"][: len(output)]
    )
    grad, *grads = [gradients(lambda *a, module=module: run(module, names, form, *a), given) for module, given in calls]
    assert_as_accurate(
        *(grad, least_accurate(*grads), grads[0], GRADIENT_FACTOR),
        ["input", *["hx"] * (len(tensors) - 1 - len(names)), *names],
    )


def test_a_mutant_with_permuted_gates_is_caught():
    """The comparison above must fail for an LSTM whose forget and input gates are exchanged."""
    layer, theirs, _ = pair("lstm", 7)
    with torch.no_grad():
        for parameter in layer.parameters():
            i, f, g, o = parameter.chunk(4)
            parameter.copy_(torch.cat([f, i, g, o]))
    x = torch.randn(9, 3, 5)
    exact = copy.deepcopy(theirs).double()
    with pytest.raises(AssertionError, match="output: errs by"):
        assert_as_accurate(
            flat(layer(x)), flat(theirs(x)), flat(exact(x.double())), OUTPUT_FACTOR, ["output", "h", "c"]
        )


@pytest.mark.parametrize("name", [*PAIRS, *OWN])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_are_each_row_alone(name, backend, batch_first):
    """Any order, zero included, garbage in the padding: each row equals a run of that row alone, gradients included."""
    layer = make(name, num_layers=2, bidirectional=True, batch_first=batch_first, backend=backend).double()
    lengths = torch.tensor([4, 0, 9, 1])
    x = torch.randn(9, 4, 5, dtype=torch.float64)
    for row, length in enumerate(lengths):
        x[length:, row] = torch.nan
    hx = random_hx(layer, 4, torch.float64)
    output, final = layer(x.transpose(0, 1) if batch_first else x, hx, lengths=lengths)
    output = output.transpose(0, 1) if batch_first else output
    weights = torch.randn(output.shape, dtype=torch.float64)
    together = torch.autograd.grad((output * weights).sum(), list(layer.parameters()), allow_unused=True)
    apart = [torch.zeros_like(p) for p in layer.parameters()]
    for row, length in enumerate(map(int, lengths)):
        mine = tuple(h[:, row : row + 1] for h in hx) if isinstance(hx, tuple) else hx[:, row : row + 1]
        assert not output[length:, row].any()
        last = mine
        if length:
            one = x[:length, row : row + 1]
            alone, last = layer(one.transpose(0, 1) if batch_first else one, mine)
            alone = alone.transpose(0, 1) if batch_first else alone
            torch.testing.assert_close(output[:length, row], alone[:, 0], rtol=1e-11, atol=1e-12)
            grads = torch.autograd.grad((alone[:, 0] * weights[:length, row]).sum(), list(layer.parameters()))
            apart = [a + g for a, g in zip(apart, grads, strict=True)]
        for whole, single in zip(as_tuple(final), as_tuple(last), strict=True):
            torch.testing.assert_close(whole[:, row], single[:, 0], rtol=1e-11, atol=1e-12)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", [*PAIRS, *OWN])
def test_resets_are_sequences_apart(name):
    """Random episode ends in a one-way stack: the same as running each episode on its own from the initial state."""
    layer = make(name, num_layers=2).double()
    x, reset = torch.randn(12, 3, 5, dtype=torch.float64), torch.rand(12, 3) < 0.3
    hx = random_hx(layer, 3, torch.float64)
    output, final = layer(x, hx, reset=reset, reset_to=hx)
    for row in range(3):
        mine = tuple(h[:, row : row + 1] for h in hx) if isinstance(hx, tuple) else hx[:, row : row + 1]
        begins = sorted({0, *reset[:, row].nonzero().flatten().tolist()})
        for begin, end in zip(begins, [*begins[1:], 12], strict=True):
            alone, last = layer(x[begin:end, row : row + 1], mine)
            torch.testing.assert_close(output[begin:end, row], alone[:, 0], rtol=1e-11, atol=1e-12)
        for whole, single in zip(as_tuple(final), as_tuple(last), strict=True):
            torch.testing.assert_close(whole[:, row], single[:, 0], rtol=1e-11, atol=1e-12)


def test_reset_follows_batch_first_and_unbatched_input():
    layer = throughtime.GRU(5, 4)
    x, reset = torch.randn(6, 3, 5), torch.rand(6, 3) < 0.4
    expected, _ = layer(x, reset=reset)
    layer.batch_first = True
    actual, _ = layer(x.transpose(0, 1), reset=reset.T)
    torch.testing.assert_close(actual.transpose(0, 1), expected)
    alone, _ = layer(x[:, 1], reset=reset[:, 1])
    torch.testing.assert_close(alone, expected[:, 1])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_unbatched_input_is_a_batch_of_one(name, backend):
    layer, theirs, _ = pair(name, num_layers=2, bidirectional=True, backend=backend)
    x = torch.randn(6, 5)
    hx = random_hx(layer, 1, torch.float32)
    hx = tuple(h[:, 0] for h in hx) if isinstance(hx, tuple) else hx[:, 0]
    for a, e in zip(flat(layer(x, hx)), flat(theirs(x, hx)), strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a, e)
    short, _ = layer(x, hx, lengths=torch.tensor(4))
    assert not short[4:].any()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences_come_back_packed(name, backend, enforce_sorted):
    layer, theirs, _ = pair(name, num_layers=2, bidirectional=True, backend=backend)
    lengths = torch.tensor([6, 3, 1] if enforce_sorted else [3, 6, 1])
    packed = pack_padded_sequence(torch.randn(6, 3, 5), lengths, enforce_sorted=enforce_sorted)
    (actual, final), (expected, expected_final) = layer(packed), theirs(packed)
    torch.testing.assert_close(actual.data, expected.data)
    assert torch.equal(pad_packed_sequence(actual)[1], lengths)
    for a, e in zip(as_tuple(final), as_tuple(expected_final), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", [*PAIRS, *OWN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")
def test_a_packed_sequence_gives_the_bits_that_lengths_give(name, dtype, tokens):
    """Output, state, and every gradient, two layers both ways, with a given state."""
    layer = make(name, num_layers=2, bidirectional=True, backend="native").to(dtype)
    lengths = torch.tensor([3, 6, 1, 6])
    x = torch.randint(0, 5, (6, 4)) if tokens else torch.randn(6, 4, 5, dtype=dtype, requires_grad=True)
    widths = [layer.output_size, layer.hidden_size][: 1 + ("lstm" in name)]
    hx = [torch.randn(4, 4, width, dtype=dtype, requires_grad=True) for width in widths]
    state = tuple(hx) if len(hx) == 2 else hx[0]
    leaves = [*hx, *layer.parameters()] + [x] * (not tokens)
    results = []
    for is_packed in (True, False):
        if is_packed:
            output, final = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), state)
            output = pad_packed_sequence(output)[0]
        else:
            output, final = layer(x, state, lengths=lengths)
        loss = output.square().sum() + sum(s.cos().sum() for s in as_tuple(final))
        results.append([output, *as_tuple(final), *torch.autograd.grad(loss, leaves)])
    for index, (a, e) in enumerate(zip(*results, strict=True)):
        assert torch.equal(a, e), index


@pytest.mark.parametrize("name", [*PAIRS, *OWN])
@pytest.mark.parametrize(
    "backend", [name for name in comparison.BACKENDS if name != "torch"]
)  # which recomputes nothing
def test_recomputing_changes_no_bit(name, backend, monkeypatch):
    monkeypatch.setattr(layout, "_STRETCH", 600)  # so that there are segments of a few steps
    layer = make(name, num_layers=2, bidirectional=True, dropout=0.3, backend=backend)
    x, lengths = torch.randn(23, 4, 5), torch.tensor([11, 23, 0, 17])
    results = []
    for every in (0, 5):
        layer.recompute_every = every
        torch.manual_seed(1)
        layer.zero_grad()
        output, final = layer(x, lengths=lengths)
        (output.sum() + sum(s.sum() for s in as_tuple(final))).backward()
        results.append([output.detach(), *(p.grad for p in layer.parameters())])
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)


@pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")
def test_recomputing_keeps_a_fraction(monkeypatch):
    kept = []
    monkeypatch.setattr(layout, "_STRETCH", 10000)
    for every in (0, 10):
        layer = throughtime.LSTM(5, 16, recompute_every=every)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            layer(torch.randn(200, 2, 5))
        kept.append(sum(sizes))
    inputs = 200 * 2 * (5 + 16) + sum(p.numel() for p in layer.parameters())
    assert kept[0] > inputs + 200 * 2 * 5 * 16
    assert kept[1] < inputs + 200 * 2 * 5 * 16 / 10


@pytest.mark.parametrize(("every", "error"), [(-1, ValueError), (2.5, TypeError), (True, TypeError), (None, TypeError)])
def test_recompute_every_must_be_a_number_of_steps(every, error):
    with pytest.raises(error, match="recompute_every"):
        throughtime.LSTM(5, 4, recompute_every=every)


def test_torchs_fused_call_does_not_recompute():
    with pytest.raises(NotImplementedError, match="it keeps all that its backward pass needs"):
        throughtime.LSTM(5, 4, recompute_every=2, backend="torch")(torch.randn(6, 3, 5))


def as_one_hot(ids: Tensor, embedding: Tensor | None) -> Tensor:
    return nn.functional.one_hot(ids, 5).double() if embedding is None else embedding[ids]


@pytest.mark.parametrize("name", [*PAIRS, *OWN])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [None, 4, 90])  # none: one-hot; a table of 4, or rows looked up in 90
@pytest.mark.parametrize("form", ["padded", "batch_first", "lengths", "lengths and resets", "unbatched", "packed"])
def test_token_ids_are_one_hot_or_embedded_vectors(name, backend, vocabulary, form):
    """Outputs, states and every gradient, E's included, equal those of the vectors that the ids stand for."""
    layer = make(name, num_layers=2, bidirectional=True, batch_first=form == "batch_first", backend=backend).double()
    embedding = None if vocabulary is None else torch.randn(vocabulary, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, vocabulary or 5, (9,) if form == "unbatched" else (9, 4), dtype=torch.int32)
    x, options = as_one_hot(ids.long(), embedding), {}
    if form.startswith("lengths"):
        options["lengths"] = torch.tensor([4, 0, 9, 1])
        ids[torch.arange(9)[:, None] >= options["lengths"]] = -7
    if form == "lengths and resets" and backend != "torch":
        options["reset"] = torch.rand(9, 4) < 0.3
    if form == "packed":
        lengths = torch.tensor([4, 2, 9, 1])
        ids, x = (pack_padded_sequence(t, lengths, enforce_sorted=False) for t in (ids, x))
    leaves = [*layer.parameters()] + [embedding] * (embedding is not None)
    results = [flat(layer(ids, embedding=embedding, **options)), flat(layer(x, **options))]
    weights = [torch.randn_like(r) for r in results[0]]
    grads = [torch.autograd.grad(r, leaves, weights) for r in results]
    for a, e in zip([*results[0], *grads[0]], [*results[1], *grads[1]], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int64])
def test_token_ids_of_any_width(backend, dtype):
    layer = throughtime.LSTM(5, 4, backend=backend)
    ids = torch.tensor([[0, 4], [3, 1]])
    assert torch.equal(layer(ids.to(dtype))[0], layer(ids)[0])


TOKENS = torch.tensor([[0, 4], [3, 1]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": TOKENS + 1}, IndexError, r"token id 5 at step 0 of row 1; expected 0 to 4, since there are 5 rows"),
        ({"input": -TOKENS}, IndexError, r"token id -4 at step 0 of row 1; expected 0 to 4"),
        ({"embedding": torch.zeros(3, 5)}, IndexError, r"token id 4 at step 0 of row 1; expected 0 to 2"),
        (
            {"embedding": torch.zeros(9, 4)},
            RuntimeError,
            r"embedding has shape \[9, 4\]; expected \(V, input_size = 5\)",
        ),
        ({"embedding": torch.zeros(9, 5).double()}, ValueError, "embedding is torch.float64; expected torch.float32"),
        ({"input": torch.zeros(2, 2, 5), "embedding": torch.zeros(9, 5)}, ValueError, "embedding= is for token ids"),
        ({"embedding": torch.zeros(9, 5, device="meta")}, RuntimeError, "embedding is on meta"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_tokens_are_named(backend, arguments, error, message):
    with pytest.raises(error, match=message):
        throughtime.LSTM(5, 4, backend=backend)(**{"input": TOKENS, **arguments})


@pytest.mark.parametrize("name", PAIRS)
def test_same_seed_same_weights_and_state_dicts_exchange(name):
    ours, peer, extra = PAIRS[name]
    options = {"num_layers": 2, "bidirectional": True, **extra}
    torch.manual_seed(7)
    layer = ours(5, 4, **options)
    torch.manual_seed(7)
    theirs = peer(5, 4, **options)
    assert list(layer.state_dict()) == list(theirs.state_dict())
    for a, e in zip(layer.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, e)
    theirs.load_state_dict(layer.state_dict())
    layer.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_torchs_under_the_same_seed(backend):
    layer, theirs, _ = pair("lstm", num_layers=3, dropout=0.5, backend=backend)
    x = torch.randn(6, 3, 5)
    torch.manual_seed(5)
    actual, _ = layer(x)
    torch.manual_seed(5)
    expected, _ = theirs(x)
    torch.testing.assert_close(actual, expected)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_copies_saves_and_moves_like_any_module():
    layer = throughtime.LSTM(5, 4, 2, bidirectional=True)
    x = torch.randn(6, 3, 5)
    for twin in (copy.deepcopy(layer), through_a_file(layer)):
        assert torch.equal(twin(x)[0], layer(x)[0])
    assert layer.double()(x.double())[0].dtype == torch.float64
    layer.flatten_parameters()


def through_a_file(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    twin = throughtime.LSTM(5, 4, 2, bidirectional=True)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    return twin


def test_repr_names_what_differs():
    layer = throughtime.GRU(5, 4, 2, batch_first=True, reset_after=False)
    assert repr(layer) == "GRU(5, 4, num_layers=2, batch_first=True, reset_after=False)"
    assert repr(throughtime.RNN(5, 4, nonlinearity="relu")) == "RNN(5, 4, nonlinearity=relu)"
    assert repr(throughtime.LSTM(5, 4, proj_size=2)) == "LSTM(5, 4, proj_size=2)"


CONSTRUCTION = {
    "size zero": lambda m: m.LSTM(0, 4),
    "hidden negative": lambda m: m.GRU(5, -1),
    "size a string": lambda m: m.RNN("5", 4),
    "no layers": lambda m: m.LSTM(5, 4, 0),
    "dropout above one": lambda m: m.LSTM(5, 4, 2, dropout=1.5),
    "dropout a bool": lambda m: m.LSTM(5, 4, 2, dropout=True),
    "bias a number": lambda m: m.LSTM(5, 4, bias=1),
    "batch_first a number": lambda m: m.LSTM(5, 4, batch_first=1),
    "projection too wide": lambda m: m.LSTM(5, 4, proj_size=4),
    "projection negative": lambda m: m.LSTM(5, 4, proj_size=-1),
    "nonlinearity unknown": lambda m: m.RNN(5, 4, nonlinearity="tan"),
}
CALLS = {
    "one dimension": lambda m: m.LSTM(5, 4)(torch.randn(5)),
    "four dimensions": lambda m: m.GRU(5, 4)(torch.randn(2, 2, 2, 5)),
    "wrong width": lambda m: m.LSTM(5, 4)(torch.randn(6, 3, 7)),
    "wrong dtype": lambda m: m.LSTM(5, 4)(torch.randn(6, 3, 5).double()),
    "integers": lambda m: m.RNN(5, 4)(torch.zeros(6, 3, 5, dtype=torch.int64)),
    "empty sequence": lambda m: m.LSTM(5, 4)(torch.randn(0, 3, 5)),
    "hx of another batch": lambda m: m.GRU(5, 4)(torch.randn(6, 3, 5), torch.zeros(1, 2, 4)),
    "hx 2-D for 3-D input": lambda m: m.GRU(5, 4)(torch.randn(6, 3, 5), torch.zeros(3, 4)),
    "hx 3-D for 2-D input": lambda m: m.RNN(5, 4)(torch.randn(6, 5), torch.zeros(1, 1, 4)),
    "c of another size": lambda m: m.LSTM(5, 4)(torch.randn(6, 3, 5), (torch.zeros(1, 3, 4), torch.zeros(1, 3, 5))),
}


@pytest.mark.parametrize("call", [*CONSTRUCTION, *CALLS])
def test_bad_input_raises_what_torch_raises(call):
    function = (CONSTRUCTION | CALLS)[call]
    with pytest.raises(Exception) as theirs:  # noqa: PT011 the type is compared below
        function(nn)
    with pytest.raises(type(theirs.value)) as ours:
        function(throughtime)
    assert "\n" not in str(ours.value)


X = torch.zeros(6, 3, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lengths": torch.tensor([6, 7, 1])}, ValueError, r"lengths\[1\] = 7 exceeds T = 6; lengths are counts"),
        ({"lengths": torch.tensor([6, 2, -1])}, ValueError, r"lengths\[2\] = -1 is negative"),
        ({"lengths": torch.tensor([6, 2])}, ValueError, r"lengths has shape \[2\]; expected \(3,\)"),
        ({"lengths": torch.tensor([6.0, 2, 1])}, TypeError, "lengths has dtype torch.float32; expected integers"),
        ({"lengths": "621"}, TypeError, "lengths is str; expected a tensor, a list or a numpy array"),
        ({"reset": torch.zeros(6, 3)}, TypeError, "reset is torch.float32; expected a bool tensor"),
        ({"reset": torch.zeros(3, 6, dtype=torch.bool)}, ValueError, r"reset has shape \[3, 6\]; expected \(T, B\)"),
        ({"hx": torch.zeros(1, 3, 4)}, TypeError, r"hx is a tensor of shape \[1, 3, 4\]; expected a pair"),
        ({"hx": (torch.zeros(1, 3, 4),)}, TypeError, "hx is a tuple of 1; expected a pair"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        throughtime.LSTM(5, 4)(X, **arguments)


def test_a_packed_sequence_takes_no_lengths():
    packed = pack_padded_sequence(X, torch.tensor([6, 3, 1]))
    with pytest.raises(ValueError, match="carries its own lengths"):
        throughtime.LSTM(5, 4)(packed, lengths=torch.tensor([6, 3, 1]))


@pytest.mark.parametrize(
    ("make_layer", "arguments"),
    [
        (lambda: throughtime.GRU(5, 4, reset_after=False, backend="torch"), {}),
        (lambda: throughtime.LSTM(5, 4, backend="torch"), {"reset": torch.zeros(6, 3, dtype=torch.bool)}),
    ],
)
def test_a_named_backend_that_cant_serve_raises(make_layer, arguments):
    with pytest.raises(NotImplementedError, match="backend 'torch' can't serve this request"):
        make_layer()(X, **arguments)


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(throughtime.InputError, match=r"unknown backend .referense.; did you mean .reference."):
        throughtime.LSTM(5, 4, backend="referense")


def test_dropout_on_one_layer_warns():
    with pytest.warns(UserWarning, match="with num_layers=1 it does nothing"):
        throughtime.LSTM(5, 4, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        throughtime.LSTM(5, 4, 2, dropout=0.5)


def make(name: str, **options) -> nn.Module:
    if name in OWN:
        return OWN[name](5, 4, **{k: v for k, v in options.items() if not unable(k, v)})
    ours, _, extra = PAIRS[name]
    return ours(5, 4, **extra, **options)


def unable(key: str, value: object) -> bool:
    """Torch has no call for these, so that backend is left to "auto" there."""
    return key == "backend" and value == "torch"


def as_tuple(state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def test_lengths_and_resets_may_be_lists_or_numpy_arrays():
    layer, x = throughtime.GRU(5, 4), torch.randn(6, 3, 5)
    reset = torch.rand(6, 3) < 0.3
    expected = flat(layer(x, lengths=torch.tensor([1, 6, 0]), reset=reset))
    for lengths in ([1, 6, 0], (1, 6, 0), np.array([1, 6, 0], np.uint16), [np.int64(1), 6, 0]):
        for where in (reset.tolist(), reset.numpy()):
            assert all(map(torch.equal, flat(layer(x, lengths=lengths, reset=where)), expected))
    one = layer(x[:, 0], lengths=[4])[0]
    assert torch.equal(one[:4], layer(x[:4, 0])[0])
    assert (one[4:] == 0).all()


def test_lists_and_arrays_are_made_where_the_input_is():
    layer, x, marks = throughtime.GRU(5, 4), torch.randn(6, 3, 5), torch.rand(6, 3) < 0.7
    expected = layer(x, lengths=torch.tensor([1, 6, 0]), reset=marks)[0], layer(x, mask=marks)[0]
    for device in ("cpu", "meta"):
        with torch.device(device):  # where torch makes what isn't told otherwise
            found = layer(x, lengths=[1, 6, 0], reset=marks.tolist())[0], layer(x, mask=marks.numpy())[0]
        assert all(map(torch.equal, found, expected))


def test_a_batch_without_rows_has_empty_lists():
    layer, x = throughtime.GRU(5, 4), torch.randn(6, 0, 5)
    for options in ({"lengths": []}, {"lengths": (), "reset": [[]] * 6}, {"mask": [[]] * 6}):
        assert layer(x, **options)[0].shape == (6, 0, 4)
    with pytest.raises(ValueError, match=r"lengths has shape \[0\]; expected \(3,\)"):
        layer(torch.randn(6, 3, 5), lengths=[])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.ones(6, 3, dtype=torch.bool), r"lengths is a mask of shape \[6, 3\]; .* give it as mask="),
        ([1.0, 2, 3], "lengths has dtype torch.float32; expected integers"),
        ([[1], [2, 3]], "lengths is a list of 2 that makes no tensor"),
        ("123", "lengths is str; expected a tensor, a list or a numpy array"),
        ({1, 2, 3}, "lengths is set; expected"),
    ],
)
def test_other_lengths_are_refused(lengths, message):
    with pytest.raises(TypeError, match=message):
        throughtime.GRU(5, 4)(torch.randn(6, 3, 5), lengths=lengths)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("option", ["lengths", "mask", "reset"])
def test_who_exchanged_time_and_batch_is_told_how_the_input_is_read(option, batch_first):
    x = torch.randn(6, 3, 5)
    fits_the_other_order = torch.ones(6, dtype=torch.int64) if option == "lengths" else torch.ones(3, 6).bool()
    given = x.transpose(0, 1) if batch_first else x
    if option != "lengths" and batch_first:
        fits_the_other_order = fits_the_other_order.T
    says = r"\(B, T\) = \(3, 6\).* False meant" if batch_first else r"\(T, B\) = \(6, 3\).*batch_first=True meant"
    with pytest.raises(ValueError, match=says):
        throughtime.LSTM(5, 4, batch_first=batch_first)(given, **{option: fits_the_other_order})


def test_numpys_numbers_are_sizes_and_flags():
    layer = throughtime.LSTM(
        *(np.int64(5), np.int32(4), np.int64(2)),
        bias=np.bool_(False),
        bidirectional=np.bool_(True),
        proj_size=np.int64(3),
    )
    expected = throughtime.LSTM(5, 4, 2, bias=False, bidirectional=True, proj_size=3)
    assert repr(layer) == repr(expected)
    assert {type(getattr(layer, name)) for name in ("input_size", "hidden_size", "num_layers", "proj_size")} == {int}
    assert layer.bidirectional is True
    with pytest.raises(TypeError, match="proj_size should be of type int, got: float"):
        throughtime.LSTM(5, 4, proj_size=2.0)
    with pytest.raises(TypeError, match="bias should be of type bool, got: int"):
        throughtime.LSTM(5, 4, bias=1)


def test_no_model_is_to_be_made_of_what_layers_do_not_compute_in():
    layer = throughtime.GRU(3, 4)
    for dtype, is_advised in ((torch.complex64, False), (torch.bool, False), (torch.float64, True)):
        with pytest.raises(ValueError, match="Convert input") as caught:
            layer(torch.zeros(5, 2, 3, dtype=dtype))
        assert ("convert model" in str(caught.value)) is is_advised


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_parameters_of_a_dtype_that_nothing_computes_in_are_refused(dtype):
    layer = throughtime.GRU(5, 4, dtype=dtype) if dtype.is_complex else throughtime.GRU(5, 4).to(dtype)
    with pytest.raises(TypeError, match=rf"the parameters are {dtype}; expected float32, float64, bfloat16 or float16"):
        layer(torch.zeros(6, 3, 5, dtype=dtype))


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (nn.Embedding(9, 5), "embedding is a module, Embedding; expected its weights, as embedding=embedding.weight"),
        (np.zeros((9, 5), np.float32), r"embedding is ndarray; expected a tensor \(V, input_size = 5\)"),
    ],
)
def test_an_embedding_that_is_no_tensor_is_refused(embedding, message):
    with pytest.raises(TypeError, match=message):
        throughtime.GRU(5, 4)(torch.zeros(6, 3, dtype=torch.int64), embedding=embedding)


@pytest.mark.parametrize("lengths", [None, [6, 2, 0]])
def test_rows_of_an_embedding_that_are_not_read_reach_no_gradient(lengths):
    """There are fewer rows than tokens, so that all of them are multiplied at once."""
    layer, ids = throughtime.GRU(5, 4), torch.randint(0, 3, (6, 3))
    if lengths is not None:
        ids[2:, 1] = 3  # in the padding
        ids[3:, 2] = 99
    embedding = torch.randn(4, 5)
    plain = embedding.clone().requires_grad_()
    spoilt = torch.cat([embedding[:3], torch.full((1, 5), torch.nan)]).requires_grad_()
    results = []
    for table in (plain, spoilt):
        output = layer(ids, embedding=table, lengths=lengths)[0]
        results.append([output, *torch.autograd.grad(output.sum(), [table, *layer.parameters()])])
    assert all(map(torch.equal, *results))
    assert (results[0][1][3] == 0).all()
