"""Each example runs from start to end; with a small budget already most of them beat what they are compared with."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from throughtime.kernels import native

EXAMPLES = Path(__file__).parent.parent / "examples"
# Of each: the packages it needs, a small budget, and the baseline that the network, printed first, beats with that already.
CASES = {
    "amp": ([], ["--seconds", "6", "--epochs", "16"], "polynomial"),
    "anomalies": (["sklearn", "statsmodels"], ["--steps", "60"], "12 months before"),
    "cartpole": (["gymnasium"], ["--windows", "2"], None),
    "conversion": ([], ["--turns", "1"], None),
    "dates": ([], ["--steps", "10"], None),
    "digits": (["sklearn"], ["--epochs", "2"], None),
    "forecasting": (["statsmodels"], ["--steps", "10"], None),
    "tagging": ([], ["--steps", "100"], "most frequent tag, 2 + 1 + 2 around"),
    "trainers": (["accelerate", "lightning", "sklearn"], ["--epochs", "2"], None),
}


def run(name: str, *arguments: str) -> list[tuple[str, float]]:
    """Return what an example prints: names, and their first figure."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments], capture_output=True, text=True, check=True
    )
    return [(who, float(figure)) for who, figure in re.findall(r"^  (\S.*?) {2,}(\d[\d.]*|inf)\b", done.stdout, re.M)]


@pytest.mark.parametrize("name", CASES)
def test_examples(name):
    needs, budget, baseline = CASES[name]
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} isn't installed")
    if name in ("amp", "anomalies") and native.module is None:
        pytest.skip("its many short steps need the kernels")
    rows = run(name, *budget)
    assert len(rows) >= 2
    if baseline is not None:
        assert rows[0][1] > dict(rows)[baseline]


@pytest.mark.skipif(shutil.which("cc") is None or native.module is None, reason="needs a C compiler and the kernels")
def test_the_amplifier_in_c_is_checked_against_the_layer_and_timed():
    assert dict(run("amp", "--seconds", "1", "--epochs", "1"))["LSTM in C"] > 0  # microseconds


def test_the_vanishing_gradients_reach_as_far_as_told():
    reach = dict(run("vanishing"))
    assert reach["RNN"] < reach["LSTM, forget bias 1"] < reach["LSTM, chrono 200"]


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*CASES, "vanishing"}
