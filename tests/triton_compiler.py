"""Compile the Triton kernels for a GPU, without one: `python tests/triton_compiler.py CELL KIND SHAPE` prints what is wrong.

What the interpreter runs needn't compile: the compiler knows less of Python, and has layouts.
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_cases import Case

import throughtime.backend.triton as backend
from throughtime.kernels.triton import plan

ARCHITECTURES = (80, 90)
MOST_SHARED = {
    80: 163 * 1024,
    90: 227 * 1024,
}  # bytes of a program, CUDA C++ Programming Guide, table of compute capabilities
SHAPES = {
    "odd": {"hidden": 57, "batch": 19, "ragged": True, "resets": True, "reverse": True},
    "wide": {"hidden": 264, "batch": 37, "resets": True},
    "both": {"hidden": 40, "batch": 21, "both": True, "ragged": True},
    "packed": {"hidden": 6, "packed": True, "tokens": True, "bias": False},
}
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
}
_LOAD = re.compile(r"tt\.load .*isVolatile.*?tensor<([\dx]+)x!tt\.ptr<i\d+>, (#\w+)>")
_LAYOUT = re.compile(r"sizePerThread = \[(.*?)\], threadsPerWarp = \[(.*?)\], warpsPerCTA = \[(.*?)\]")


def launches(case: Case, kind: str) -> list[tuple[Any, dict[str, Any]]]:
    """Both kernels and their arguments, which aren't launched."""
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    launch = plan.Plan._launch

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, _):
            return lambda **arguments: found.setdefault(self.kernel.fn.__name__, (self.kernel, arguments))

    plan.Plan._launch = lambda self, kernel, cut, arguments: launch(self, Kernel(kernel), cut, arguments)
    plan.programs_at_once = lambda _: 132
    backend.refusal = lambda _: None
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    (request,) = case.requests(DTYPES[kind], apart=False)
    done = backend.forward(request, True)
    backend.backward(request, done.output, request.initial, done.output, done.saved, False)
    return list(found.values())


def compiled(kernel: Any, arguments: dict[str, Any], architecture: int) -> Any:
    """Compile a kernel as a launch would, as if all pointers were aligned, as torch's are."""
    arguments = dict(arguments)
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages", "launch_cooperative_grid")}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            attributes[place,] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or value == 1:
            signature[parameter.name] = "constexpr"
            constants[place,] = value
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def copies(text: str) -> list[str]:
    """Return the tiles that threads wait for of which some hold copies: they would be loaded at different times."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)", text, re.MULTILINE))
    loads = _LOAD.findall(text)
    assert loads, "no load that waits was found"
    found = []
    for shape, name in loads:
        layout = _LAYOUT.search(layouts[name])
        if layout is None:
            found.append(f"{shape} {layouts[name]}")
            continue
        each = zip(*([int(n) for n in numbers.split(",")] for numbers in layout.groups()), strict=True)
        if any(a * b * c > int(size) for (a, b, c), size in zip(each, shape.split("x"), strict=True)):
            found.append(f"{shape} {layouts[name]}")
    return found


def main(cell: str, kind: str, shape: str) -> int:
    """Print a line for each fault; return how many there are."""
    torch.manual_seed(0)
    faults = []
    for kernel, arguments in launches(Case(cell, **SHAPES[shape]), kind):
        for architecture in ARCHITECTURES:
            found = compiled(kernel, arguments, architecture)
            faults += [f"{kernel.fn.__name__} has copies of {tile}" for tile in copies(found.asm["ttgir"])]
            if found.metadata.shared > MOST_SHARED[architecture]:
                faults.append(f"{kernel.fn.__name__} takes {found.metadata.shared} bytes of shared memory")
    print(*faults, sep="\n")
    return len(faults)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(*sys.argv[1:]))
