"""`throughtime export`, and the program in C that reads and writes text with what it wrote."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from throughtime import load
from throughtime.kernels import native

pytestmark = pytest.mark.skipif(native.module is None, reason="a run is evaluated in int8 by a stream")
SMALL = ("--steps", 12, "--hidden", 8, "--batch", 4, "--bptt", 16)
EXAMPLE = Path(__file__).parents[2] / "examples" / "read_text.c"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler")
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_program_in_c_measures_what_eval_measures_and_writes(throughtime, run, tmp_path, precision):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 10, encoding="utf-8")
    model = tmp_path / "model.c"
    assert throughtime("export", run, model, "--precision", precision).code == 0
    command = ["gcc", "-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-O1", f'-DMODEL="{model}"', EXAMPLE]
    subprocess.run([*command, "-o", tmp_path / "read_text", "-lm"], check=True)
    done = subprocess.run([tmp_path / "read_text", "40"], input=text.read_bytes(), capture_output=True, check=True)
    expected = throughtime("eval", run, text, "--precision", precision, "--json").json["nats_per_token"]
    found, tokens = float(done.stderr.split()[0]), int(done.stderr.split()[-2])
    assert abs(found - expected) < (2e-4 if precision == "float32" else 5e-3)
    assert tokens == 199
    assert len(done.stdout.decode()) == 41
    done = subprocess.run([tmp_path / "read_text"], input=b" " * (2**20 + 1), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (2, b"the text is longer than 1048576 bytes\n")


def test_a_script_is_told_what_was_written(throughtime, run, tmp_path):
    told = throughtime("export", run, tmp_path / "my-net.c", "--name", "net", "--json").json
    assert told["name"] == "net"
    assert told["path"] == str(tmp_path / "my-net.c")
    assert "struct net {" in (tmp_path / "my-net.c").read_text()


def test_the_example_is_named_where_it_reads_the_file(throughtime, run, text, tmp_path):
    assert "it; examples/read_text.c reads" in throughtime("export", run, tmp_path / "model.c").err
    assert "it; with --name model, examples/read_text.c reads" in throughtime("export", run, tmp_path / "m.c").err
    assert throughtime("train", text, "--out", tmp_path / "words", *SMALL, "--level", "word").code == 0
    ended = throughtime("export", tmp_path / "words", tmp_path / "model.c")
    assert ended.err.endswith("model_step(&state, id, logits) steps it\n")


@pytest.mark.parametrize("command", [("export", "model.c"), ("export", "model.onnx"), ("quantize",)])
def test_an_mlp_has_no_step(throughtime, text, tmp_path, command):
    assert throughtime("train", text, "--out", tmp_path / "run", *SMALL, "--cell", "mlp").code == 0
    name, *file = command
    ended = throughtime(name, tmp_path / "run", *(tmp_path / each for each in file))
    assert ended.code == 2
    assert "an mlp sees a fixed window and carries no state" in ended.err
    assert len(ended.err.strip().splitlines()) == 1


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_onnx_runtime_steps_a_run_as_the_model_does(throughtime, text, tmp_path, cell):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, out = tmp_path / "run", tmp_path / "model.onnx"
    assert throughtime("train", text, "--out", folder, *SMALL, "--cell", cell, "--layers", 2).code == 0
    ended = throughtime("export", folder, out)
    assert "differs from the equations in float64 by" in ended.err
    model = load(folder).model.eval()
    session = onnxruntime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    inputs, outputs = ([one.name for one in ends] for ends in (session.get_inputs(), session.get_outputs()))
    ids, states = torch.randint(model.config.vocabulary_size, (30, 2)), None
    given = {name: np.zeros((1, 2, 8), np.float32) for name in inputs[1:]}
    for step in ids.split([1, 1, 28]):
        found = dict(zip(outputs, session.run(None, {"ids": step.numpy(), **given}), strict=True))
        with torch.no_grad():
            logits, states = model(step, states)
        torch.testing.assert_close(torch.from_numpy(found["logits"]), logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.from_numpy(found["probabilities"]), logits.softmax(-1), atol=1e-5, rtol=1e-5)
        given = {name: found[f"next_{name}"] for name in inputs[1:]}
        torch.testing.assert_close(torch.from_numpy(given["h_1"][0]), states[0][1], atol=1e-5, rtol=1e-5)


def test_a_script_is_told_what_is_in_an_onnx_file(throughtime, run, tmp_path):
    pytest.importorskip("onnxruntime")
    told = throughtime("export", run, tmp_path / "m.onnx", "--json").json
    assert told["inputs"] == ["ids", "h_0", "c_0"]
    assert told["largest_error"] < 1e-5


@pytest.mark.parametrize("option", ["--layer-norm", "--zoneout"])
def test_a_run_that_onnx_has_no_node_for_is_refused_by_name(throughtime, text, tmp_path, option):
    pytest.importorskip("onnxruntime")
    given = (option,) if option == "--layer-norm" else (option, 0.1)
    assert throughtime("train", text, "--out", tmp_path / "run", *SMALL, *given).code == 0
    ended = throughtime("export", tmp_path / "run", tmp_path / "model.onnx")
    assert ended.code == 2
    assert f"has no {'zoneout' if option == '--zoneout' else 'layer normalisation'}" in ended.err
    assert not list(tmp_path.glob("model*"))


@pytest.mark.parametrize(
    ("file", "options", "said"),
    [
        ("model.txt", [], "expected a file that ends in .c or .onnx"),
        ("model.onnx", ["--precision", "int8"], "--precision int8 is for C"),
        ("model.onnx", ["--name", "net"], "--name net is for C"),
        ("nowhere/model.onnx", [], "can't be written: No such file or directory"),
        ("nowhere/model.c", [], "can't be written: No such file or directory"),
        ("model.c", ["--name", "a b"], "can't be a name in C"),
        ("model.c", ["--precision", "int4"], "int4"),
    ],
)
def test_what_can_not_be_written_is_said_in_a_line(throughtime, run, tmp_path, file, options, said):
    ended = throughtime("export", run, tmp_path / file, *options)
    assert ended.code == 2
    assert said in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("model*"))
