"""A cell is known everywhere: what CONTRIBUTING.md lists, of which these name the place that is missing."""

import pytest
import variants
from comparison import HAS_NATIVE

import throughtime
from throughtime import layers, spec
from throughtime.cells import CELLS
from throughtime.kernels import native

LAYERS = {  # of each cell, the layer that has it
    "rnn_tanh": lambda: throughtime.RNN(2, 3),
    "rnn_relu": lambda: throughtime.RNN(2, 3, nonlinearity="relu"),
    "lstm": lambda: throughtime.LSTM(2, 3),
    "gru": lambda: throughtime.GRU(2, 3),
    "gru_reset_before": lambda: throughtime.GRU(2, 3, reset_after=False),
    "mgu": lambda: throughtime.MGU(2, 3),
}


def places() -> dict[str, set[str]]:
    """Where there are cells, and which."""
    kinds = [kind for kind in vars(layers).values() if isinstance(kind, type) and issubclass(kind, layers.Recurrent)]
    own = {kind(2, 3).cell for kind in kinds if kind is not layers.Recurrent}
    found = {
        "src/throughtime/spec.py": set(spec.names()),
        "src/throughtime/cells/__init__.py": set(CELLS),
        "src/throughtime/layers.py": own | {make().cell for make in LAYERS.values()},
        "tests/variants.py": set(variants.STEPS),
    }
    return {**found, "csrc/cells.h": set(native.module.cells())} if HAS_NATIVE else found


@pytest.mark.parametrize("place", places())
def test_a_place_knows_every_cell(place):
    found = places()
    missing = set().union(*found.values()) - found[place]
    assert not missing, f"{place} doesn't have {', '.join(sorted(missing))}, which {sorted(set(found) - {place})} have"


@pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")
def test_both_sides_count_gates_and_states_alike():
    for name in spec.names():
        said, saved = spec.read(name), {it.name: it for it in native.cell(spec.read(name + "+layer_norm")).saved}
        assert saved["gates"].hiddens == said.gates, name
        assert saved["norms"].others == 2 * (3 if "c" in said.states or CELLS[name].linearise is None else 2), name


def test_layers_are_exported():
    kinds = [kind for kind in vars(layers).values() if isinstance(kind, type) and issubclass(kind, layers.Recurrent)]
    for kind in kinds:
        assert kind is layers.Recurrent or getattr(throughtime, kind.__name__) is kind, (
            f"src/throughtime/__init__.py: {kind}"
        )
