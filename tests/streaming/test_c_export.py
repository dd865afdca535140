"""Models as C files: compiled without a warning, and compared with the layers and the engine."""

import ctypes
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

import throughtime
from throughtime.errors import InputError
from throughtime.kernels import native

COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]
STRICT = [
    "-std=c99",
    "-Wall",
    "-Wextra",
    "-Wconversion",
    "-Wno-sign-conversion",
    "-Wno-float-conversion",
    "-Werror",
    "-pedantic",
]

needs_kernels = pytest.mark.skipif(native.module is None, reason="streams need the kernels")
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="there is no C compiler")


class Built:
    """A C file as a library, with a state of its own."""

    def __init__(self, path, name, reads_ids=False, compiler=COMPILERS[0] if COMPILERS else "", flags=("-O2",)):
        library = path.with_suffix(f".{compiler}.so")
        command = [compiler, *STRICT, *flags, "-shared", "-fPIC", str(path), "-o", str(library), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:2000]
        self.library, text = library, path.read_text()
        loaded = ctypes.CDLL(str(library))
        self.step_, self.reset_ = loaded[f"{name}_step"], loaded[f"{name}_reset"]
        self.outputs = int(re.search(r"_OUTPUTS (\d+)", text)[1])
        self.reads_ids = reads_ids
        fields = [
            int(count) * (1 if kind == "signed char" else 4)
            for kind, count in re.findall(r"^  (float|int|signed char) \w+\[(\d+)\];", text, re.MULTILINE)
        ]
        self.size = sum(-(-size // 4) * 4 for size in fields)
        self.state = ctypes.create_string_buffer(b"\xff" * (self.size + 64))  # NaNs, of which `reset` leaves none
        self.reset_(self.state)

    def step(self, x):
        y = np.full(self.outputs, np.nan, np.float32)
        given = (
            ctypes.c_long(int(x))
            if self.reads_ids
            else np.ascontiguousarray(x, np.float32).ctypes.data_as(ctypes.c_void_p)
        )
        assert self.step_(self.state, given, y.ctypes.data_as(ctypes.c_void_p)) == 0
        return y

    def feed(self, sequence):
        return np.stack([self.step(x) for x in sequence])


def layers():
    torch.manual_seed(0)
    kinds = {"RNN": {}, "LSTM": {}, "GRU": {}, "MGU": {}}
    made = {name: getattr(throughtime, name)(5, 13, num_layers=2) for name in kinds}
    made |= {
        "relu": throughtime.RNN(5, 13, nonlinearity="relu"),
        "no bias": throughtime.GRU(5, 13, bias=False),
        "reset before": throughtime.GRU(5, 13, reset_after=False),
        "projected": throughtime.LSTM(5, 13, proj_size=4, num_layers=2),
        "peepholes": throughtime.LSTM(5, 13, peepholes=True),
        "coupled": throughtime.LSTM(5, 13, coupled=True, peepholes=True),
        "torch": nn.LSTM(5, 13),
    }
    for name, options in {
        "RNN": {},
        "LSTM": {"peepholes": True, "proj_size": 4},
        "GRU": {},
        "MGU": {},
    }.items():
        made[f"normalised {name}"] = getattr(throughtime, name)(5, 13, layer_norm=True, zoneout=0.3, **options)
    made["normalised reset before"] = throughtime.GRU(5, 13, reset_after=False, layer_norm=True, zoneout=0.2)
    made["normalised coupled"] = throughtime.LSTM(5, 13, coupled=True, layer_norm=True, zoneout=(0.1, 0.4), bias=False)
    for layer in made.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.1 if layer is made["relu"] else 0.4)
    return {name: layer.eval() for name, layer in made.items()}


LAYERS = layers()


@needs_compiler
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_computes_as_it_does_in_python(name, tmp_path):
    layer, x = LAYERS[name], torch.randn(30, 5)
    done = throughtime.export_c(layer, tmp_path / "model.c")
    found = Built(done.path, "model").feed(x.numpy())
    double = {key: value.double() for key, value in layer.state_dict().items()}
    exact = type(layer)(*_arguments(layer)).double() if name == "torch" else layer.double()
    if name == "torch":
        exact.load_state_dict(double)
    with torch.no_grad():
        right = exact(x.double())[0].numpy()
        if name != "torch":
            layer.float()
        honest = layer(x)[0].numpy()
    errors = [np.abs(each - right).max() for each in (found, honest)]
    assert errors[0] <= 4 * max(errors[1], 1e-7)  # libm's functions and plain sums in place of fused ones


def _arguments(layer):
    return layer.input_size, layer.hidden_size


@needs_kernels
@needs_compiler
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("flags", [("-O0",), ("-O3", "-ffp-contract=fast")], ids=str)
def test_whole_models_in_both_precisions_with_every_compiler(compiler, precision, flags, tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(throughtime.GRU(3, 20, num_layers=2), nn.Dropout(0.5), nn.Linear(20, 7)).eval()
    done = throughtime.export_c(model, tmp_path / "m.c", precision=precision)
    built = Built(done.path, "m", compiler=compiler, flags=flags)
    x = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    x[7] = 0
    engine = throughtime.stream(model, precision=precision)
    np.testing.assert_allclose(built.feed(x), engine.feed(x), rtol=0, atol=2e-6 if precision == "float32" else 5e-3)
    assert done.state == built.size
    if precision == "int8":
        assert done.parameters < sum(p.nbytes for p in model.parameters()) / 2
        close = (
            np.abs(built.feed(x) - engine.feed(x)) < 2e-6
        )  # the same steps of 127, but for what rounding takes across a half
        assert close.mean() > 0.9


@needs_kernels
@needs_compiler
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("has_embedding", [False, True])
def test_token_ids(has_embedding, precision, tmp_path):
    torch.manual_seed(2)
    layer = throughtime.LSTM(6, 16) if has_embedding else throughtime.LSTM(11, 16)
    embedding = [nn.Embedding(11, 6)] if has_embedding else []
    model = nn.Sequential(*embedding, layer, nn.Linear(16, 11)).eval()
    done = throughtime.export_c(model, tmp_path / "text.c", precision=precision, ids=True)
    built, ids = Built(done.path, "text", reads_ids=True), torch.randint(0, 11, (40,)).numpy()
    expected = throughtime.stream(model, ids=True, precision=precision).feed(ids)
    np.testing.assert_allclose(built.feed(ids), expected, rtol=0, atol=2e-6 if precision == "float32" else 5e-3)
    before = built.state.raw
    y = np.zeros(11, np.float32)
    for wrong in (-1, 11, 2**40):
        assert built.step_(built.state, ctypes.c_long(wrong), y.ctypes.data_as(ctypes.c_void_p)) == -1
    assert built.state.raw == before


@needs_compiler
def test_a_reset_begins_anew_and_streams_are_apart(tmp_path):
    done = throughtime.export_c(throughtime.LSTM(2, 8), tmp_path / "one.c", name="other")
    built, x = Built(done.path, "other"), np.ones((5, 2), np.float32)
    first = built.feed(x)
    built.reset_(built.state)
    np.testing.assert_array_equal(built.feed(x), first)


@needs_compiler
def test_what_is_not_finite_stays_so_in_int8(tmp_path):
    built = Built(throughtime.export_c(throughtime.RNN(2, 4), tmp_path / "r.c", precision="int8").path, "r")
    assert np.isnan(built.step([np.inf, 1])).all()


@needs_compiler
def test_a_file_is_its_own_header(tmp_path):
    throughtime.export_c(throughtime.RNN(2, 4), tmp_path / "net.c")
    (tmp_path / "main.c").write_text(
        '#define NET_DECLARATIONS_ONLY\n#include "net.c"\n#include <stdio.h>\n'
        "int main(void) { struct net s; float x[NET_INPUTS] = {1, 2}, y[NET_OUTPUTS]; net_reset(&s); net_step(&s, x, y);"
        ' printf("%g", (double)y[0]); return 0; }\n'
    )
    command = [COMPILERS[0], *STRICT, "main.c", "net.c", "-o", "main", "-lm"]
    subprocess.run(command, cwd=tmp_path, check=True)
    printed = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True, check=True).stdout
    assert abs(float(printed)) < 1


def cross_compiled():
    """How to compile and run for another kind of processor, where that can be done here."""
    return (shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static"))


@needs_kernels
@pytest.mark.skipif(not all(cross_compiled()), reason="there is no compiler for aarch64, or no qemu-user")
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_another_kind_of_processor(precision, tmp_path):
    torch.manual_seed(4)
    layer = throughtime.LSTM(2, 12).eval()
    throughtime.export_c(layer, tmp_path / "net.c", precision=precision)
    (tmp_path / "main.c").write_text(
        '#define NET_DECLARATIONS_ONLY\n#include "net.c"\n#include <stdio.h>\n'
        "int main(void) { struct net s; float x[2], y[12]; int t, j; net_reset(&s);"
        " for (t = 0; t < 20; ++t) { x[0] = (float)t / 8; x[1] = 1; net_step(&s, x, y);"
        ' for (j = 0; j < 12; ++j) printf("%.9g ", (double)y[j]); } return 0; }\n'
    )
    compiler, emulator = cross_compiled()
    subprocess.run([compiler, *STRICT, "-static", "main.c", "net.c", "-o", "main", "-lm"], cwd=tmp_path, check=True)
    printed = subprocess.run([emulator, str(tmp_path / "main")], capture_output=True, text=True, check=True).stdout
    x = np.stack([np.arange(20) / 8, np.ones(20)], 1).astype(np.float32)
    expected = throughtime.stream(layer, precision=precision).feed(x)
    found = np.array([float(n) for n in printed.split()]).reshape(20, 12)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 if precision == "float32" else 5e-3)


@needs_compiler
def test_texts_of_tokens_are_any_bytes(tmp_path):
    texts = [b"", b'??/\x00\\"%', "가".encode(), b"a1"]
    done = throughtime.export_c(throughtime.RNN(4, 3), tmp_path / "t.c", ids=True, texts=texts)
    built = ctypes.CDLL(str(Built(done.path, "t", reads_ids=True).library))
    found = (ctypes.c_char_p * 4).in_dll(built, "t_text"), (ctypes.c_ushort * 4).in_dll(built, "t_lengths")
    assert list(found[1]) == [len(text) for text in texts]
    assert [
        ctypes.string_at(ctypes.cast(found[0], ctypes.POINTER(ctypes.c_void_p))[k], len(t)) for k, t in enumerate(texts)
    ] == texts
    with pytest.raises(
        InputError, match="2 texts were given for the model's tokens; expected one for each of 4 token ids"
    ):
        throughtime.export_c(throughtime.RNN(4, 3), tmp_path / "t.c", ids=True, texts=texts[:2])
    with pytest.raises(InputError, match="expected none, as it reads no ids"):
        throughtime.export_c(throughtime.RNN(4, 3), tmp_path / "t.c", texts=texts)


def test_names_are_made_of_files_names(tmp_path):
    for file, name in {"my-model.c": "my_model", "3.c": "model_3", "int.c": "model_int"}.items():
        assert throughtime.export_c(throughtime.RNN(2, 3), tmp_path / file).name == name


@pytest.mark.parametrize("name", ["my model", "3x", "", "int", "é"])
def test_a_name_that_c_does_not_allow_is_refused(name, tmp_path):
    with pytest.raises(InputError, match="can't be a name in C; expected letters"):
        throughtime.export_c(throughtime.RNN(2, 3), tmp_path / "m.c", name=name)
    assert not list(tmp_path.iterdir())


def test_what_can_not_be_written_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(InputError, match="bidirectional"):
        throughtime.export_c(throughtime.RNN(2, 3, bidirectional=True), tmp_path / "m.c")
    with pytest.raises(InputError, match="precision"):
        throughtime.export_c(throughtime.RNN(2, 3), tmp_path / "m.c", precision="bfloat16")
    layer = throughtime.RNN(2, 3)
    layer.weight_hh_l0.data[0, 0] = torch.nan
    for precision in ("float32", "int8"):
        with pytest.raises(InputError, match="isn't finite"):
            throughtime.export_c(layer, tmp_path / "m.c", precision=precision)
    assert not list(tmp_path.iterdir())
