"""The Triton kernels compile for a GPU, which this test doesn't need; in processes of their own: elsewhere they are interpreted."""

import subprocess
import sys
from pathlib import Path

import pytest
from triton_cases import CELLS, VARIANTS

pytest.importorskip("triton", reason="Triton isn't installed")

KINDS = ("tf32", "bfloat16", "float32", "float16")
SHAPES = ("odd", "wide", "both", "packed")
ONE_WAY = VARIANTS[4:]  # with masks
CASES = [
    *((cell, KINDS[i % 4], SHAPES[(i + i // 4) % 4]) for i, cell in enumerate(CELLS + VARIANTS[:4])),
    *((cell, KINDS[i % 2], SHAPES[i % 2]) for i, cell in enumerate(ONE_WAY)),
    ("lstm", "bfloat16", "odd"),
    ("gru", "tf32", "packed"),
]


@pytest.mark.parametrize(("cell", "kind", "shape"), CASES)
def test_both_kernels_compile_for_two_architectures(cell, kind, shape):
    script = Path(__file__).parents[1] / "triton_compiler.py"
    done = subprocess.run([sys.executable, script, cell, kind, shape], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
