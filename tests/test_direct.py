"""Calls without gradient in one native call: the same bits as every other way, and not taken where more must be asked."""

import itertools

import pytest
import torch
from comparison import HAS_NATIVE
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import throughtime
from throughtime import direct
from throughtime.kernels import native
from throughtime.spec import Parameters, read

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")

KINDS = {
    "rnn": (throughtime.RNN, {}),
    "rnn_relu": (throughtime.RNN, {"nonlinearity": "relu"}),
    "lstm": (throughtime.LSTM, {}),
    "lstm_projected": (throughtime.LSTM, {"proj_size": 3}),
    "lstm_varied": (throughtime.LSTM, {"peepholes": True, "coupled": True}),
    "gru": (throughtime.GRU, {}),
    "gru_reset_before": (throughtime.GRU, {"reset_after": False}),
    "mgu": (throughtime.MGU, {}),
}
OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "batch_first": True},
    {"layer_norm": True},
]


def make(kind: str, input: int, hidden: int, **options) -> throughtime.RNN:
    layer, own = KINDS[kind]
    torch.manual_seed(0)
    return layer(input, hidden, **own, **options)


def initial(layer, rows: int, dtype: torch.dtype = torch.float32):
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(count, rows, layer.output_size, dtype=dtype)
    return (h, torch.randn(count, rows, layer.hidden_size, dtype=dtype)) if isinstance(layer, throughtime.LSTM) else h


def tensors(result) -> list[Tensor]:
    output, final = result
    return [output, *(final if isinstance(final, tuple) else (final,))]


@pytest.fixture
def calls(monkeypatch) -> list:
    """Whether each call from now on was served."""
    made, forward = [], direct.forward

    def noted(*given) -> bool:
        made.append(forward(*given))
        return made[-1]

    monkeypatch.setattr(direct, "forward", noted)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_bits_of_a_call_with_gradients(kind, options, dtype, calls):
    # 1 to 4 rows at once, blocks of depth that end within a vector or at it, steps enough to pack, stretches
    for (steps, rows), (input, hidden) in itertools.product(
        [(1, 1), (1, 3), (2, 6), (7, 1), (40, 5)], [(5, 7), (16, 32), (70, 133)]
    ):
        layer = make(kind, input, hidden, dtype=dtype, **options)
        x = torch.randn(rows, steps, input, dtype=dtype)
        x = x if layer.batch_first else x.transpose(0, 1)
        for state in (None, initial(layer, rows, dtype)):
            with torch.no_grad():
                found = tensors(layer(x, state))
            assert calls == [True]
            calls.clear()
            expected = tensors(layer(x, state))
            assert not calls
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_bits_depend_on_neither_its_neighbours_nor_the_cutting(kind, dtype):
    layer, x = make(kind, 37, 83, dtype=dtype).requires_grad_(False), torch.randn(24, 19, 37, dtype=dtype)
    whole = layer(x)[0]
    alone = torch.cat([layer(x[:, row : row + 1])[0] for row in range(19)], 1)
    assert torch.equal(alone, whole)
    if dtype == torch.bfloat16:  # whose state is rounded from call to call
        assert torch.equal(layer(x[:1])[0], whole[:1])
        return
    state, steps = None, []
    for count in (1, 1, 2, 3, 1, 4, 12):
        begin = sum(map(len, steps))
        output, state = layer(x[begin : begin + count], state)
        steps.append(output)
    assert torch.equal(torch.cat(steps), whole)


@pytest.mark.parametrize("hidden", [48, 800])
def test_its_bits_dont_depend_on_threads(hidden):
    layer, x, threads = make("lstm", 40, hidden).requires_grad_(False), torch.randn(3, 2, 40), torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(layer(x)[0])
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@torch.no_grad()
def test_nothing_is_kept_between_calls(calls):
    layer, x = make("gru", 3, 4), torch.randn(1, 2, 3)
    before = layer(x)[0]
    layer.weight_hh_l0.mul_(2)
    state = torch.ones(1, 2, 4)
    doubled = layer(x, state)[0]
    layer.weight_hh_l0.data = layer.weight_hh_l0 / 2
    assert not torch.equal(layer(x, state)[0], doubled)
    layer.weight_hh_l0 = torch.nn.Parameter(layer.weight_hh_l0 * 2)
    assert torch.equal(layer(x, state)[0], doubled)
    assert torch.equal(state, torch.ones(1, 2, 4))
    assert torch.equal(layer(x)[0], before)
    assert calls == [True] * 5


def other_ways() -> dict:
    x, state = torch.randn(2, 3, 5), torch.randn(1, 3, 4)
    return {
        "gradients": lambda layer: layer.requires_grad_()(x),
        "the input's gradient": lambda layer: layer(x.clone().requires_grad_()),
        "the state's gradient": lambda layer: layer(x, state.clone().requires_grad_()),
        "lengths": lambda layer: layer(x, lengths=torch.tensor([2, 1, 2])),
        "reset": lambda layer: layer(x, reset=torch.zeros(2, 3, dtype=torch.bool)),
        "token ids": lambda layer: layer(torch.zeros(2, 3, dtype=torch.int64)),
        "another dtype": lambda layer: layer.bfloat16()(x.bfloat16()),
        "autocast": lambda layer: autocast(layer, x),
        "a wrapper": lambda layer: layer(x.as_subclass(type("Wrapper", (Tensor,), {}))),
        "a negated view": lambda layer: layer(torch._neg_view(x)),
        "no rows": lambda layer: layer(x[:, :0]),
        "another backend": lambda layer: with_attribute(layer, "backend", "reference")(x),
        "zoneout": lambda layer: with_attribute(layer, "zoneout", 0.1)(x),
        "dropping": lambda layer: with_attribute(layer, "weight_drop", 0.5)(x),
        "a parametrization": lambda layer: parametrized(layer)(x),
        "vmap": lambda layer: torch.func.vmap(lambda x: layer(x)[0], in_dims=1)(x[:, :, None]),
        "a dual number": lambda layer: torch.func.jvp(lambda x: layer(x)[0], (x,), (x,)),
        "dispatch modes": lambda layer: beneath(TorchDispatchMode, "__torch_dispatch__", layer, x),
        "function modes": lambda layer: beneath(TorchFunctionMode, "__torch_function__", layer, x),
    }


def with_attribute(layer, name: str, value):
    setattr(layer, name, value)
    return layer


def autocast(layer, x: Tensor):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(x)


def parametrized(layer):
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    return layer.requires_grad_(False)


def beneath(mode: type, name: str, layer, x: Tensor):
    def call(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

    with type("Mode", (mode,), {name: call})():
        return layer(x)


@pytest.mark.parametrize("way", other_ways())
def test_what_must_be_asked_goes_another_way(way, calls):
    layer = make("gru", 5, 4).requires_grad_(False)
    other_ways()[way](layer)
    assert True not in calls


@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "state", "error"),
    [
        (torch.zeros(2, 3, 6), None, RuntimeError),
        (torch.zeros(2, 3, 5), torch.zeros(1, 2, 4), RuntimeError),
        (torch.zeros(2, 3, 5), torch.zeros(1, 3, 4).double(), RuntimeError),
        (torch.zeros(2, 3, 5), [1.0], TypeError),
        (torch.zeros(2, 3, 5).double(), None, ValueError),
        (torch.zeros(0, 3, 5), None, RuntimeError),
        (torch.zeros(2, 3, 5).to_sparse(), None, (ValueError, RuntimeError)),
    ],
)
def test_what_is_wrong_is_refused_as_ever(x, state, error):
    with pytest.raises(error):
        make("gru", 5, 4)(x, state)


@torch.no_grad()
@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l0", "bias_hh_l0"])
def test_a_parameter_of_another_shape_is_refused(name):
    layer = make("gru", 5, 4)
    parameter = getattr(layer, name)
    parameter.data = parameter.data.reshape(-1, 2)
    with pytest.raises((ValueError, RuntimeError), match=r"expected|shape"):
        layer(torch.randn(1, 1, 5))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("kind", ["rnn", "lstm", "lstm_projected", "gru"])
def test_rows_that_all_end_at_the_last_step_are_served_too(kind, options, calls):
    layer, steps, rows = make(kind, 5, 7, **options), 9, 3
    x, lengths = torch.randn(steps, rows, 5), torch.full((rows,), steps)
    given, state = x.transpose(0, 1) if layer.batch_first else x, initial(layer, rows)
    packed = [pack_padded_sequence(x, lengths, enforce_sorted=is_sorted) for is_sorted in (True, False)]
    with torch.no_grad():
        expected = [tensors(layer(given, hx)) for hx in (None, state)]
        calls.clear()
        by_lengths = [tensors(layer(given, hx, lengths=lengths)) for hx in (None, state)]
        by_lengths += [tensors(layer(given, lengths=lengths.int()))]
        by_packing = [layer(packed[0]), layer(packed[0], state), layer(packed[1])]
    assert calls == [True] * 6
    first, last = expected
    for found, wanted in zip(by_lengths, [first, last, first], strict=True):
        assert all(map(torch.equal, found, wanted))
    for found, wanted, own in zip(by_packing, [first, last, first], [*packed[:1] * 2, packed[1]], strict=True):
        output, lengths_found = pad_packed_sequence(found[0], batch_first=layer.batch_first)
        assert all(map(torch.equal, [output, *tensors(found)[1:]], wanted))
        assert torch.equal(lengths_found, lengths)
        assert found[0].batch_sizes is own.batch_sizes


def test_rows_in_an_order_of_their_own_keep_it(calls):
    layer, x, order = make("lstm", 5, 7), torch.randn(4, 3, 5), torch.tensor([2, 0, 1])
    packed = PackedSequence(x[:, order].flatten(0, 1), torch.full((4,), 3), order, order.argsort())
    state = initial(layer, 3)
    with torch.no_grad():
        for hx, is_served in ((None, True), (state, False)):
            calls.clear()
            output, *final = tensors(layer(packed, hx))
            assert calls == [True] * is_served
            wanted, *wanted_final = tensors(layer(x, hx))
            assert torch.equal(pad_packed_sequence(output)[0], wanted)
            assert all(map(torch.equal, final, wanted_final))


@pytest.mark.parametrize(
    ("lengths", "error"),
    [
        (torch.tensor([4, 5]), ValueError),
        (torch.tensor([5, 5, 5]), ValueError),
        (torch.tensor([5.0, 5.0]), TypeError),
        (torch.tensor([True, True]), TypeError),
    ],
)
def test_lengths_that_are_wrong_are_refused_as_ever(lengths, error):
    with torch.no_grad(), pytest.raises(error, match="lengths"):
        make("lstm", 5, 7)(torch.randn(4, 2, 5), lengths=lengths)


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize(
    ("order", "back", "said"),
    [
        (None, [0, 1], r"sorted_indices has shape None, unsorted_indices \[2\]; expected \(B,\) of both, or None"),
        ([0, 1, 2], [0, 1], r"sorted_indices has shape \[3\], unsorted_indices \[2\]"),
        ([0, 1], [0, 1], r"h_0 is \(2, 7\) .*; expected \(3, 7\)"),
    ],
)
def test_a_packed_order_of_other_rows_is_refused_on_both_ways(order, back, said, needs_gradient):
    places = [None if it is None else torch.tensor(it) for it in (order, back)]
    packed = PackedSequence(torch.randn(12, 5), torch.full((4,), 3), *places)
    with torch.set_grad_enabled(needs_gradient), pytest.raises(ValueError, match=said):
        make("gru", 5, 7)(packed)


def test_packed_rows_that_are_wrong_are_refused_as_ever():
    layer, packed = make("lstm", 5, 7), pack_padded_sequence(torch.randn(4, 2, 5), torch.tensor([4, 4]))
    with torch.no_grad():
        with pytest.raises(ValueError, match="carries its own lengths"):
            layer(packed, lengths=torch.tensor([4, 4]))
        with pytest.raises(ValueError, match="batch_sizes are"):
            layer(PackedSequence(packed.data, torch.tensor([2, 1, 3, 2])))
        with pytest.raises(RuntimeError, match="Expected hx"):
            layer(packed, initial(layer, 3))


@torch.no_grad()
def test_arrays_that_are_not_dense_are_read_right(calls):
    layer, x = make("lstm", 5, 4), torch.randn(3, 2, 10)[:, :, ::2]
    layer.weight_hh_l0.data = layer.weight_hh_l0.t().contiguous().t()
    state = tuple(torch.randn(1, 4, 2).transpose(1, 2) for _ in range(2))
    output, (h, c) = layer(x, state)
    assert calls == [False]
    layer.weight_hh_l0.data = layer.weight_hh_l0.contiguous()
    for found, expected in zip([output, h, c], tensors(layer(x, state)), strict=True):
        assert torch.equal(found, expected)
    assert calls == [False, True]


def test_weights_are_told_apart_by_the_kernels_own_names():
    assert Parameters._fields == direct._WEIGHTS
    layer = make("lstm", 5, 7)
    call, x, state = direct._CALLS[torch.float32], torch.zeros(1, 1, 5), torch.zeros(1, 1, 7)
    for count in (0, 9, 11):
        with pytest.raises(ValueError, match=f"{count} weights; expected 10 for each direction of each layer"):
            call(
                *(native.cell(read("lstm")).number, 4, False, 1, 1, 1, 1, 5, 7, 0, 1, x.data_ptr()),
                *([layer.weight_ih_l0.data_ptr()] * count, 0, state.data_ptr(), state.data_ptr()),
            )
