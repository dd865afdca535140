"""`throughtime export`, and the program in C that reads and writes text with what it wrote."""

import shutil
import subprocess
from pathlib import Path

import pytest

from throughtime.kernels import native

pytestmark = pytest.mark.skipif(native.module is None, reason="a run is evaluated in int8 by a stream")
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


def test_a_script_is_told_what_was_written(throughtime, run, tmp_path):
    told = throughtime("export", run, tmp_path / "my-net.c", "--name", "net", "--json").json
    assert told["name"] == "net"
    assert told["path"] == str(tmp_path / "my-net.c")
    assert "struct net {" in (tmp_path / "my-net.c").read_text()


@pytest.mark.parametrize(
    ("file", "options", "said"),
    [
        ("model.onnx", [], "expected a file that ends in .c"),
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
