"""Models as C files: compiled without a warning, and compared with the layers and the engine."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

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
        # In a thread of its own: code of -ffast-math lets the thread that loads it take denormals for zero ever after.
        with ThreadPoolExecutor(1) as pool:
            loaded = pool.submit(ctypes.CDLL, str(library)).result()
        self.step_, self.reset_ = loaded[f"{name}_step"], loaded[f"{name}_reset"]
        self.outputs = int(re.search(r"_OUTPUTS (\d+)", text)[1])
        self.reads_ids = reads_ids
        fields = [
            int(count) * (1 if kind == "signed char" else 4)
            for kind, count in re.findall(r"^  (float|int|int32_t|signed char) \w+\[(\d+)\];", text, re.MULTILINE)
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
@pytest.mark.parametrize("flags", [("-O0",), ("-O3", "-ffp-contract=fast"), ("-O3", "-ffast-math")], ids=str)
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
@pytest.mark.skipif("gcc" not in COMPILERS or platform.machine() != "x86_64", reason="there is no gcc for x87")
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_arithmetic_wider_than_float(precision, tmp_path):
    """As compilers for 32-bit x86 have it by default."""
    torch.manual_seed(1)
    model = nn.Sequential(throughtime.LSTM(3, 20), nn.Linear(20, 7)).eval()
    done = throughtime.export_c(model, tmp_path / "m.c", precision=precision)
    x = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    found = Built(done.path, "m", compiler="gcc", flags=("-std=gnu99", "-O2", "-mfpmath=387")).feed(x)
    expected = throughtime.stream(model, precision=precision).feed(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 if precision == "float32" else 5e-3)


@needs_kernels
@needs_compiler
def test_an_int_of_16_bits_holds_no_sum(tmp_path):
    """As small processors have it: C asks no more of an int."""
    torch.manual_seed(0)
    model = nn.Sequential(throughtime.LSTM(2, 36), nn.Linear(36, 2)).eval()
    done = throughtime.export_c(model, tmp_path / "net.c", precision="int8")
    headers = "".join(f"#include <{header}.h>\n" for header in ("math", "stdint", "string"))
    (tmp_path / "short.c").write_text(
        f"{headers}#define NET_DECLARATIONS_ONLY\n#define int short\n"
        + done.path.read_text(encoding="ascii").replace("#ifndef NET_DECLARATIONS_ONLY", "#if 1"),
        encoding="ascii",
    )
    command = [COMPILERS[0], "-std=c99", "-O1", "-w", "-shared", "-fPIC", "short.c", "-o", "short.so", "-lm"]
    subprocess.run(command, cwd=tmp_path, check=True)
    library, state = ctypes.CDLL(str(tmp_path / "short.so")), ctypes.create_string_buffer(done.state)
    library.net_reset(state)
    x = np.random.default_rng(0).standard_normal((20, 2)).astype(np.float32)
    found = np.zeros((20, 2), np.float32)
    for x_t, y in zip(x, found, strict=True):
        library.net_step(state, x_t.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p))
    np.testing.assert_allclose(found, throughtime.stream(model, precision="int8").feed(x), rtol=0, atol=5e-3)


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
    texts = [b"", b'??/\x00\\"%', "가".encode(), b"a1", b"\x00\xff" * 5000]
    done = throughtime.export_c(throughtime.RNN(5, 3), tmp_path / "t.c", ids=True, texts=texts)
    built = ctypes.CDLL(str(Built(done.path, "t", reads_ids=True).library))
    found = (ctypes.c_char_p * 5).in_dll(built, "t_text"), (ctypes.c_ushort * 5).in_dll(built, "t_lengths")
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
    with pytest.raises(InputError, match=r"texts\[1\] is str; expected bytes"):
        throughtime.export_c(throughtime.RNN(2, 3), tmp_path / "t.c", ids=True, texts=[b"a", "b"])


def test_names_are_made_of_files_names(tmp_path):
    files = {
        "my-model.c": "my_model",
        "3.c": "model_3",
        "int.c": "model_int",
        "class.c": "model_class",
        "NULL.c": "model_NULL",
        "stat.c": "model_stat",
        "tm.c": "model_tm",
        "_Bool.c": "model_Bool",
        "__x.c": "model_x",
        "가.c": "model",
        ".c": "model_c",
    }
    for file, name in files.items():
        assert throughtime.export_c(throughtime.RNN(2, 3), tmp_path / file).name == name


@pytest.mark.parametrize(
    "name",
    [
        "my model",
        "3x",
        "",
        "int",
        "é",
        "a\n",
        "_Bool",
        "__LINE__",
        "_x",
        "class",
        "true",
        "NULL",
        "NAN",
        "linux",
        "tm",
        "stat",
        "FILE",
        "uint32_t",
        5,
        b"x",
    ],
)
def test_a_name_that_c_does_not_allow_is_refused(name, tmp_path):
    with pytest.raises(InputError, match="can't be a name in C"):
        throughtime.export_c(throughtime.RNN(2, 3), tmp_path / "m.c", name=name)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("gcc") is None or shutil.which("g++") is None, reason="needs gcc and g++")
def test_a_name_stands_beside_other_headers(tmp_path):
    names = ("math", "stdint", "string", "stdio", "stdlib", "time", "signal", "locale", "sys/stat", "sys/time", "fcntl")
    headers = "".join(f"#include <{name}.h>\n" for name in names)
    for file in ("tm.c", "stat.c", "FILE.c", "uint32_t.c", "timeval.c", "flock.c", "sigaction.c", "index.c", "y1.c"):
        done = throughtime.export_c(throughtime.RNN(2, 3), tmp_path / file)
        program = f'{headers}#define {done.name.upper()}_DECLARATIONS_ONLY\n#include "{file}"\n'
        for compiler, language in (("gcc", "c"), ("g++", "c++")):
            command = [compiler, "-D_GNU_SOURCE", "-w", "-fsyntax-only", f"-I{tmp_path}", "-x", language, "-"]
            built = subprocess.run(command, input=program, text=True, capture_output=True, check=False)
            assert not built.returncode, (file, compiler, built.stderr[:300])


class Doubled(throughtime.LSTM):
    def __call__(self, *given):
        output, state = super().__call__(*given)
        return 2 * output, state


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.Embedding(0, 3), throughtime.RNN(3, 4)), "Embedding has no rows"),
        (lambda: nn.Sequential(throughtime.RNN(3, 4), nn.Linear(4, 0)), r"Linear has a weight \[0, 4\]"),
        (lambda: nn.Sequential(nn.Linear(0, 3), throughtime.RNN(3, 4)), r"Linear has a weight \[3, 0\]"),
        (lambda: Doubled(3, 4), "can't stream Doubled"),
        (lambda: throughtime.LSTMCell(3, 4), "can't stream LSTMCell"),
        (lambda: throughtime.RNN(3, 4, dtype=torch.float64), "float64"),
        (lambda: throughtime.RNN(3, 4, device="meta"), "meta"),
        (lambda: [throughtime.RNN(3, 4)], "can't stream a list"),
    ],
)
def test_models_that_have_no_step_are_refused(make, reason, tmp_path):
    with pytest.raises(InputError, match=reason):
        throughtime.export_c(make(), tmp_path / "m.c")
    assert not list(tmp_path.iterdir())


@needs_kernels
@needs_compiler
def test_weights_of_any_size_and_tied_ones(tmp_path):
    torch.manual_seed(3)
    embedding, layer, output = nn.Embedding(6, 5), throughtime.GRU(5, 5), nn.Linear(5, 6, bias=False)
    output.weight = embedding.weight
    with torch.no_grad():
        layer.weight_hh_l0[0] *= 1e-40
        layer.weight_hh_l0[1] = -0.0
        layer.bias_ih_l0[2] = 3.4028234e38
        layer.bias_hh_l0[4] = -3.4028234e38
    model = nn.Sequential(embedding, layer, output)
    done = throughtime.export_c(model, tmp_path / "m.c")
    ids = np.arange(30) % 6
    expected = throughtime.stream(model).feed(ids)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(Built(done.path, "m", reads_ids=True).feed(ids), expected, rtol=0, atol=2e-6)


class TestWhereItIsWritten:
    layer = throughtime.RNN(2, 3)

    def test_a_folder_is_no_file(self, tmp_path):
        (tmp_path / "m.c").mkdir()
        with pytest.raises(IsADirectoryError, match=r"m\.c'$"):
            throughtime.export_c(self.layer, tmp_path / "m.c")
        assert [path.name for path in tmp_path.iterdir()] == ["m.c"]

    @pytest.mark.parametrize("path", ["no/m.c", "file/m.c"])
    def test_where_there_is_no_folder(self, path, tmp_path):
        (tmp_path / "file").write_text("", encoding="utf-8")
        with pytest.raises(OSError, match=r"o such file|ot a directory"):
            throughtime.export_c(self.layer, tmp_path / path)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_a_link_stays_one_and_rights_stay(self, tmp_path):
        (tmp_path / "real.c").write_text("before", encoding="utf-8")
        (tmp_path / "real.c").chmod(0o600)
        (tmp_path / "m.c").symlink_to("real.c")
        throughtime.export_c(self.layer, tmp_path / "m.c")
        assert (tmp_path / "m.c").is_symlink()
        assert "struct m {" in (tmp_path / "real.c").read_text(encoding="utf-8")
        assert (tmp_path / "real.c").stat().st_mode & 0o777 == 0o600

    def test_a_pipe_is_written_into_and_stays_one(self, tmp_path):
        os.mkfifo(tmp_path / "m.c")
        reader = subprocess.Popen(["cat", tmp_path / "m.c"], stdout=subprocess.PIPE, text=True)
        throughtime.export_c(self.layer, tmp_path / "m.c")
        is_one = (tmp_path / "m.c").is_fifo()
        if not is_one:
            reader.kill()
        assert "struct m {" in reader.communicate(timeout=30)[0]
        assert is_one

    def test_what_may_not_be_written_stays_as_it_is(self, tmp_path, monkeypatch):
        (tmp_path / "m.c").write_text("mine", encoding="utf-8")
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # as for anybody but root
        with pytest.raises(PermissionError, match=r"m\.c"):
            throughtime.export_c(self.layer, tmp_path / "m.c")
        assert (tmp_path / "m.c").read_text(encoding="utf-8") == "mine"

    def test_files_beside_it_are_left_alone(self, tmp_path):
        (tmp_path / "m.c.part").write_text("mine", encoding="utf-8")
        throughtime.export_c(self.layer, tmp_path / "m.c")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m.c", "m.c.part"]

    @pytest.mark.parametrize("path", ["", ".", "/", "a\0.c"])
    def test_a_path_that_names_no_file(self, path):
        with pytest.raises(InputError, match="names no file; expected one such as"):
            throughtime.export_c(self.layer, path)


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


def test_int8_refuses_sums_beyond_its_integers(tmp_path):
    with pytest.raises(InputError, match="at most 133,144 numbers exactly, and a layer reads 133,145; expected"):
        throughtime.export_c(throughtime.RNN(133_145, 1), tmp_path / "deep.c", precision="int8")
