"""The Triton kernels compiled, against the equations: these tests need an NVIDIA GPU. In a process without one they are skipped."""

import pytest
import torch
from triton_cases import CELLS, VARIANTS, Case

from throughtime.backend import reference, triton

if triton.missing() is not None or triton.is_interpreted():
    pytest.skip(f"the kernels can't run: {triton.missing()}", allow_module_level=True)

TF32 = "TF32"
KINDS = [torch.float32, TF32, torch.bfloat16, torch.float16]
FLOOR = {torch.float32: 1e-6, TF32: 1e-3, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHAPES = {
    "one program": {"hidden": 6, "batch": 3},
    "odd, ragged, with resets, in reverse": {
        "hidden": 57,
        "batch": 19,
        "steps": 7,
        "ragged": True,
        "resets": True,
        "reverse": True,
    },
    "wide": {"hidden": 264, "batch": 37, "steps": 9, "resets": True, "inputs": 24},
    "many rows": {"hidden": 128, "batch": 150, "steps": 6, "inputs": 8, "ragged": True},
}
WAYS = {
    "both ways": {"both": True, "ragged": True, "resets": True},
    "both ways, packed": {"both": True, "packed": True},
    "packed": {"packed": True, "reverse": True},
    "token ids": {"tokens": True, "ragged": True, "bias": False},
}


def check(case, kind, monkeypatch):
    """Kernels may err three times what the equations err in the same numerics on the same GPU."""
    dtype = torch.float32 if kind == TF32 else kind
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", kind == TF32)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", kind == TF32)
    right = case.run(reference, torch.float64, "cuda")
    honest, found = case.run(reference, dtype, "cuda"), case.run(triton, dtype, "cuda")
    if case.cell == "rnn_relu" and dtype.itemsize == 2:
        right = right[:1]  # rounding takes states across relu's corner, and their gradients with them
    for index, (own, other, exact) in enumerate(zip(found, honest, right, strict=False)):
        assert own.shape == exact.shape
        assert own.dtype == dtype
        errors = [float((t.double() - exact).norm() / exact.norm().clamp(min=1e-9)) for t in (own, other)]
        assert errors[0] <= 3 * max(errors[1], FLOOR[kind]), (
            f"result {index} errs by {errors[0]:.1e}, equations by {errors[1]:.1e}"
        )


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", CELLS + VARIANTS)
def test_every_cell(cell, shape, kind, monkeypatch):
    check(Case(cell, **SHAPES[shape]), kind, monkeypatch)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cell", [*CELLS, *VARIANTS[:4]])
def test_every_way(cell, way, kind, monkeypatch):
    check(Case(cell, hidden=40, batch=21, steps=6, **WAYS[way]), kind, monkeypatch)


@pytest.mark.parametrize("cell", ["lstm+layer_norm", "gru_reset_before"])
def test_bits_are_the_same_each_time(cell):
    case = Case(cell, hidden=264, batch=37, steps=30, resets=True)
    first = case.run(triton, device="cuda")
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, case.run(triton, device="cuda"), strict=True))
