"""`import throughtime` is cheap: torch comes with the first name that needs it."""

import subprocess
import sys

import pytest

import throughtime


def _in_a_process(script: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    ).stdout.strip()


def test_the_package_is_imported_without_torch_and_brings_it_when_a_layer_is_asked_for():
    said = _in_a_process(
        "import sys, throughtime\n"
        "before = 'torch' in sys.modules\n"
        "layer = throughtime.LSTM(3, 4)\n"
        "print(before, 'torch' in sys.modules, type(layer).__name__)"
    )
    assert said == "False True LSTM"


@pytest.mark.parametrize(
    "statement", ["from throughtime import *", "from throughtime import GRU, LSTM, RNN, backends, init"]
)
def test_names_are_imported_as_from_any_package(statement):
    assert _in_a_process(f"{statement}\nprint(GRU.__name__, init.__name__, len(backends()) > 0)") == (
        "GRU throughtime.init True"
    )


def test_the_operator_is_there_once_ops_is_imported():
    said = _in_a_process("import torch, throughtime.ops\nprint(torch.ops.throughtime.recurrence.default is not None)")
    assert said == "True"


def test_dir_lists_what_is_not_imported_yet():
    assert set(throughtime.__all__) | {"lm", "insight", "layers"} <= set(dir(throughtime))
    for name in dir(throughtime):
        assert getattr(throughtime, name) is not None or name == "__doc__"


def test_an_unknown_name_is_said_as_pythons_own_modules_do():
    with pytest.raises(AttributeError, match="module 'throughtime' has no attribute 'LTSM'"):
        throughtime.LTSM  # noqa: B018
