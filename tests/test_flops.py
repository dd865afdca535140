"""What torch's FlopCounterMode counts of the layers: what it counts of loops of torch.nn's cells, which compute the same."""

import subprocess
import sys

import pytest
import torch
from comparison import BACKENDS, HAS_NATIVE
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import throughtime

CELLS = {
    "RNN": (throughtime.RNN, nn.RNNCell),
    "LSTM": (throughtime.LSTM, nn.LSTMCell),
    "GRU": (throughtime.GRU, nn.GRUCell),
}
OWN = [name for name in BACKENDS if name != "torch"]  # whose call torch counts, or doesn't: on a CPU it is nothing


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def loop(name: str, layers: int, directions: int, rows: list[int], *, x_needs_grad: bool = True) -> tuple[int, int]:
    """Operations of loops of torch's cells, forward and both ways, where everything has a gradient: a loop for each row."""

    def run(lengths: list[int], backward: bool) -> None:
        for length in lengths:
            x = torch.randn(length, 1, 5, requires_grad=x_needs_grad)
            for layer in range(layers):
                ways = []
                for way in range(directions):
                    cell = CELLS[name][1](5 if layer == 0 else 4 * directions, 4)
                    h, hs = torch.zeros(1, 4, requires_grad=True), []
                    state = (h, torch.zeros(1, 4, requires_grad=True)) if name == "LSTM" else h
                    for x_t in x.unbind() if way == 0 else reversed(x.unbind()):
                        state = cell(x_t, state)
                        hs.append(state[0] if isinstance(state, tuple) else state)
                    ways.append(torch.stack(hs if way == 0 else hs[::-1]))
                x = torch.cat(ways, -1)
            if backward:
                x.sum().backward()

    return counted(lambda: run(rows, False)), counted(lambda: run(rows, True))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("form", ["padded", "lengths", "packed", "reset", "no input gradient"])
def test_it_is_that_of_a_loop_of_torchs_cells(name, backend, layers, directions, form):
    layer = CELLS[name][0](5, 4, layers, bidirectional=directions == 2, backend=backend)
    x, rows, options = torch.randn(6, 3, 5, requires_grad=form != "no input gradient"), [6, 6, 6], {}
    if form in ("lengths", "packed"):
        rows = [6, 2, 3]
    if form == "lengths":
        options["lengths"] = torch.tensor(rows)
    if form == "reset":
        options["reset"] = torch.rand(6, 3) < 0.5
    given = pack_padded_sequence(x, torch.tensor(rows), enforce_sorted=False) if form == "packed" else x

    def run(backward: bool) -> None:
        output, _ = layer(given, **options)
        if backward:
            (output.data if form == "packed" else output).sum().backward()

    both = loop(name, layers, directions, rows, x_needs_grad=form != "no input gradient")
    assert (counted(lambda: run(False)), counted(lambda: run(True))) == both
    assert both[0] > 0
    with torch.no_grad():
        assert counted(lambda: run(False)) == both[0]


@pytest.mark.parametrize("backend", OWN)
def test_a_projection_token_ids_and_what_is_recomputed(backend):
    projected = throughtime.LSTM(5, 4, proj_size=3, backend=backend)
    x = torch.randn(6, 3, 5)
    assert counted(lambda: projected(x)) == 2 * 6 * 3 * (16 * 5 + 16 * 3 + 3 * 4)
    gru, ids = throughtime.GRU(5, 4, backend=backend), torch.randint(0, 5, (6, 3))
    assert counted(lambda: gru(ids)) == 2 * 6 * 3 * 12 * 4
    frugal = throughtime.GRU(5, 4, backend=backend, recompute_every=2)
    forward = counted(lambda: frugal(x))
    assert counted(lambda: frugal(x)[0].sum().backward()) == 2 * forward + 2 * 6 * 3 * (12 * 5 + 2 * 12 * 4)


def test_counts_name_the_layer_and_nothing_is_computed_otherwise():
    model = nn.Sequential(nn.Linear(5, 5), throughtime.LSTM(5, 4))
    x = torch.randn(6, 3, 5)
    expected = model(x)[0]
    with FlopCounterMode(display=False) as counter:
        actual = model(x)[0]
    assert torch.equal(actual, expected)
    assert counter.get_flop_counts()["Sequential.1"] == {torch.ops.throughtime.recurrence: 2 * 6 * 3 * 16 * 9}


@pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")
def test_gradients_by_sample_are_counted():
    layer = throughtime.LSTM(5, 4)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x[:, None],))[0].sum()

    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))
    forward = 2 * 6 * 3 * 16 * 9
    assert counted(lambda: by_sample(parameters, torch.randn(6, 3, 5))) >= 2 * forward


def test_tensors_without_values_count_as_padded():
    layer = throughtime.GRU(5, 4, device="meta")
    x = torch.randn(6, 3, 5, device="meta")
    assert counted(lambda: layer(x)) == 2 * 6 * 3 * 12 * 9


def test_layers_do_not_import_the_counter_which_imports_triton():
    code = (
        "import sys, throughtime; throughtime.LSTM; assert 'torch.utils.flop_counter' not in sys.modules;"
        "from torch.utils.flop_counter import FlopCounterMode, flop_registry; import torch;"
        "assert torch.ops.throughtime.recurrence in flop_registry;"
        "assert not [finder for finder in sys.meta_path if 'WhenImported' in repr(finder)]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_counter_that_was_imported_before_knows_the_layers_too():
    code = (
        "from torch.utils.flop_counter import flop_registry; import torch, throughtime; throughtime.LSTM;"
        "assert torch.ops.throughtime.recurrence in flop_registry"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
