"""Who computes: each backend is a module that says what it refuses, and computes the rest.

| backend | what computes |
|---|---|
| `native` | the C++ kernels: float32, float64, bfloat16 (and float16 as float32) on the CPU, every cell, lengths and resets |
| `reference` | the equations in `throughtime.cells`, step by step in plain torch: any device, any floating dtype |
| `triton` | Triton kernels: float32, bfloat16, float16 on an NVIDIA GPU, every cell without a projection, lengths and resets |
| `torch` | torch's own fused call (oneDNN, cuDNN): no resets, no reset-before GRU |

All have `refusal(request)`: the reason why they can't serve a request, or `None`. All but `torch` compute a layer:

- `forward(request, keep)` returns a `Result`; without `keep`, no backward pass will follow and nothing is saved;
- `backward(request, grad_output, grad_final, output, saved, needs_input)` returns a `Gradient`;
- `fake_saved(request)` returns what `forward` would save, for tensors without values.

`fused`, the module of "torch", has a `forward` for whole stacks, which torch differentiates itself.
"""

import torch

from throughtime.backend import fused, native, reference, triton
from throughtime.errors import InputError, unknown_name
from throughtime.kernels import native as kernels

MODULES = {"native": native, "triton": triton, "reference": reference, "torch": fused}


def backends() -> dict[str, str]:
    """Say which backends can compute here and what each is; without a compiled module no "native", without a GPU no "triton".

    Example:
        >>> print(backends()["reference"])
        the equations, step by step in plain torch
    """
    found = {} if kernels.missing else {"native": kernels.description()}
    if triton.missing() is None:
        found["triton"] = triton.description()
    return found | {
        "reference": "the equations, step by step in plain torch",
        "torch": f"torch {torch.__version__}'s own fused call",
    }


def check_backend(name: str) -> None:
    """Check that a backend may be asked for.

    Args:
        name: "auto" or a key of `backends()`.

    Raises:
        InputError: There is no such backend, or it isn't in this installation.
    """
    if name == "native" and kernels.missing:
        raise InputError(f"backend 'native' can't be had: {kernels.missing}; use backend='auto', or {kernels.ADVICE}")
    if name == "triton" and (reason := triton.missing()):
        raise InputError(f"backend 'triton' can't be had: {reason}; use backend='auto'")
    if name not in ("auto", *MODULES):
        raise unknown_name("backend", name, ["auto", *backends()])
