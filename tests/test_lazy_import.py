"""`import throughtime` is cheap: torch comes with the first name that needs it."""

import ast
import importlib
import subprocess
import sys
import types
from pathlib import Path

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


def test_layers_bring_neither_onnx_nor_torchs_exporters():
    said = _in_a_process(
        "import sys, torch, throughtime\nthroughtime.LSTM(3, 4)(torch.randn(2, 1, 3))\n"
        "print([name for name in ('torch.onnx', 'onnx', 'onnxruntime', 'onnxscript') if name in sys.modules])"
    )
    assert said == "[]"


@pytest.mark.parametrize(
    "statement", ["from throughtime import *", "from throughtime import GRU, LSTM, RNN, backends, init"]
)
def test_names_are_imported_as_from_any_package(statement):
    assert _in_a_process(f"{statement}\nprint(GRU.__name__, init.__name__, len(backends()) > 0)") == (
        "GRU throughtime.init True"
    )


def test_the_operator_is_there_once_ops_is_imported():
    said = _in_a_process(
        "import torch, throughtime.operator\nprint(torch.ops.throughtime.recurrence.default is not None)"
    )
    assert said == "True"


def test_dir_lists_what_is_not_imported_yet():
    assert set(throughtime.__all__) | {"lm", "insight", "layers"} <= set(dir(throughtime))
    for name in dir(throughtime):
        assert getattr(throughtime, name) is not None or name == "__doc__"


def test_an_unknown_name_is_said_as_pythons_own_modules_do():
    with pytest.raises(AttributeError, match="module 'throughtime' has no attribute 'LTSM'"):
        throughtime.LTSM  # noqa: B018


@pytest.mark.parametrize("package", ["throughtime", "throughtime.lm"])
def test_what_is_imported_late_is_what_type_checkers_see(package):
    module = importlib.import_module(package)
    source = ast.parse(Path(module.__file__ or "").read_text())
    seen = [name for branch in source.body if isinstance(branch, ast.If) for name in _imported(branch)]
    late = [name for names in module._HOMES.values() for name in names]
    assert sorted({*seen} - {"init"}) == sorted(late)
    assert {*late} <= {*module.__all__}
    for name in module.__all__:
        assert not isinstance(getattr(module, name), types.ModuleType) or name == "init"


def _imported(branch: ast.If) -> list[str]:
    return [alias.name for each in branch.body if isinstance(each, ast.ImportFrom) for alias in each.names]


def test_the_options_of_training_need_no_torch():
    assert (
        _in_a_process(
            "import sys\nfrom throughtime.lm.options import Options\nOptions()\n"
            "print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
        )
        == "set()"
    )
