"""An installation without the native module, or with a part of it: what is said, once, and what still works."""

import subprocess
import sys
import warnings

import pytest
import torch
from comparison import HAS_NATIVE
from torch import nn

import throughtime
from throughtime import InputError, MissingKernelsWarning
from throughtime.kernels import native
from throughtime.request import Request
from throughtime.stack import choose_backend

REASON = "throughtime is installed without its C++ kernels"


@pytest.fixture
def no_kernels(monkeypatch):
    """Let this process be one without the native module that has computed nothing yet."""
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "missing", REASON)
    monkeypatch.setattr(native, "_has_warned", False)


def fresh_process(*lines: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", "\n".join(lines)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_first_use_of_a_layer_warns_and_no_other(is_compiled):
    layer = throughtime.LSTM(3, 4)
    run = torch.compile(layer, fullgraph=True, backend="eager") if is_compiled else layer
    with pytest.warns(MissingKernelsWarning) as caught:
        run(torch.zeros(5, 2, 3))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    message = str(caught[0].message)
    assert message.startswith(REASON)
    assert "up to several times longer" in message
    assert "install a C++17 compiler" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(torch.ones(5, 2, 3))
        throughtime.GRU(3, 4)(torch.zeros(5, 2, 3))


@pytest.mark.usefixtures("no_kernels")
def test_where_the_kernels_would_not_have_computed_nobody_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        throughtime.LSTM(3, 4, backend="reference")(torch.zeros(5, 2, 3))
        for x in (torch.zeros(5, 2, 3, dtype=torch.float16), torch.zeros(5, 2, 3, device="meta")):
            assert choose_backend("auto", Request.read("lstm", x, [x, x], [x, x])) == "torch"


@pytest.mark.usefixtures("no_kernels")
def test_what_cant_run_is_no_backend_and_says_why():
    assert sorted(throughtime.backends()) == ["reference", "torch"]
    layer = throughtime.LSTM(3, 4)
    layer.backend = "native"
    for ask in (lambda: throughtime.LSTM(3, 4, backend="native"), lambda: layer(torch.zeros(5, 2, 3))):
        with pytest.raises(
            InputError, match=f"backend 'native' can't be had: {REASON.replace('+', '.')}; use .*'auto'"
        ):
            ask()


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.filterwarnings("ignore::throughtime.MissingKernelsWarning")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_layers_compute_the_same_without(name):
    ours, theirs = getattr(throughtime, name)(3, 4), getattr(nn, name)(3, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def test_the_warning_is_a_line_that_points_to_the_call():
    ended = fresh_process(
        "import sys",
        "sys.modules['throughtime.kernels._native'] = None",
        "import torch, throughtime",
        "for _ in range(2):",
        "    throughtime.GRU(3, 4)(torch.zeros(5, 2, 3))",
    )
    assert ended.returncode == 0
    assert ended.stderr.startswith(f"<string>:5: MissingKernelsWarning: {REASON}")
    assert ended.stderr.count("MissingKernelsWarning") == 1


def test_a_module_that_cant_be_loaded_says_so(tmp_path):
    (tmp_path / "_native.so").write_bytes(b"no library")
    ended = fresh_process(
        "import sys",
        "from importlib.machinery import ExtensionFileLoader",
        "from importlib.util import spec_from_file_location",
        "class Finder:",
        "    def find_spec(self, name, path=None, target=None):",
        "        if name == 'throughtime.kernels._native':",
        f"            return spec_from_file_location(name, {str(tmp_path / '_native.so')!r})",
        "sys.meta_path.insert(0, Finder())",
        "import throughtime.operator",
        "print(throughtime.kernels.native.missing)",
    )
    assert ended.stdout.startswith("throughtime's C++ kernels can't be loaded (")
    assert "_native.so" in ended.stdout


@pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")
def test_a_build_that_leaves_this_cpu_unused_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(native, "_unbuilt_instruction_sets", list)
    whole = throughtime.backends()["native"]
    assert whole == f"C++ kernels for the CPU, {native.instruction_set()}"
    monkeypatch.setattr(native, "_unbuilt_instruction_sets", lambda: ["avx512_bf16", "avx512"])
    lost = "; this CPU has AVX512-BF16 and AVX512, which the compiler of this build didn't know"
    assert throughtime.backends()["native"] == whole + lost


@pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")
class TestInstructionSetOfTheEnvironment:
    """THROUGHTIME_INSTRUCTION_SET, as somebody sets it who looks for a fault or stands in for another CPU."""

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        return fresh_process(
            "import os",
            f"os.environ['THROUGHTIME_INSTRUCTION_SET'] = {name!r}",
            "import throughtime",
            "try:",
            "    print(throughtime.backends()['native'])",
            "except throughtime.InputError as error:",
            "    print(error)",
        )

    def test_it_is_used(self):
        for name in native.instruction_sets():
            assert self.run(name).stdout.startswith(f"C++ kernels for the CPU, {name}")

    def test_an_unknown_one_is_refused(self):
        expected = f"THROUGHTIME_INSTRUCTION_SET=avx9: expected one of {', '.join(native.instruction_sets())}\n"
        assert self.run("avx9").stdout == expected
