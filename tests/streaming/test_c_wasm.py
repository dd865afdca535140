"""An exported C file as WebAssembly: no C library, two headers of a few lines, and the engine's numbers under node."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import throughtime
from throughtime.kernels import native

# What the file takes of C's headers; each is an instruction of WebAssembly, or a few.
HEADERS = {
    "math.h": '#define NAN __builtin_nanf("")\n'
    + "".join(f"#define {name} __builtin_{name}\n" for name in ("fabsf", "sqrtf", "rintf")),
    "string.h": "#define memcpy __builtin_memcpy\n",
}
MODULE = """
#include "net.c"
static struct net state;
static float x[NET_INPUTS], y[NET_OUTPUTS];
float *input(void) { return x; }
float *output(void) { return y; }
void reset(void) { net_reset(&state); }
void step(void) { net_step(&state, x, y); }
"""
PAGE = """
import { readFileSync } from "node:fs";
const { instance } = await WebAssembly.instantiate(readFileSync("net.wasm"), {});
const { memory, input, output, reset, step } = instance.exports;
const sequence = JSON.parse(readFileSync("x.json")), found = [];
const x = new Float32Array(memory.buffer, input(), 2), y = new Float32Array(memory.buffer, output(), 3);
reset();
for (const row of sequence) {
  x.set(row);
  step();
  found.push(Array.from(y));
}
console.log(JSON.stringify(found));
"""


def linker() -> str | None:
    """LLVM's linker for WebAssembly: Debian's, or the one that comes with Rust."""
    if found := shutil.which("wasm-ld") or shutil.which("wasm-ld-14"):
        return found
    if shutil.which("rustc") is None:
        return None
    root = subprocess.run(["rustc", "--print", "sysroot"], capture_output=True, text=True, check=False).stdout.strip()
    return next((str(path) for path in Path(root or "/nowhere").glob("lib/rustlib/*/bin/gcc-ld/wasm-ld")), None)


def can_compile() -> bool:
    """Whether there is a clang that knows WebAssembly."""
    if shutil.which("clang") is None:
        return False
    told = subprocess.run(["clang", "--print-targets"], capture_output=True, text=True, check=False)
    return "wasm32" in told.stdout


pytestmark = [
    pytest.mark.skipif(native.module is None, reason="streams need the kernels"),
    pytest.mark.skipif(not (can_compile() and linker()), reason="there is no compiler for WebAssembly"),
    pytest.mark.skipif(shutil.which("node") is None, reason="there is no node"),
]


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("flags", [(), ("-msimd128",)], ids=str)
def test_a_module_under_node_computes_as_the_engine_does(precision, flags, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(throughtime.LSTM(2, 40, layer_norm=True), throughtime.GRU(40, 17), nn.Linear(17, 3)).eval()
    throughtime.export_c(model, tmp_path / "net.c", precision=precision)
    (tmp_path / "include").mkdir()
    x = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
    files = {**{f"include/{name}": text for name, text in HEADERS.items()}, "module.c": MODULE, "page.mjs": PAGE}
    for name, text in {**files, "x.json": json.dumps(x.tolist())}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    compile_ = ["clang", "--target=wasm32", "-std=c99", "-O3", *flags, "-ffreestanding", "-isystem", "include"]
    exported = [f"--export={name}" for name in ("input", "output", "reset", "step")]
    for command in (
        [*compile_, "-c", "module.c", "-o", "module.o"],
        [linker(), "--no-entry", *exported, "module.o", "-o", "net.wasm"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run(["node", "page.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = throughtime.stream(model, precision=precision).feed(x)
    np.testing.assert_allclose(json.loads(done.stdout), expected, rtol=0, atol=2e-6 if precision == "float32" else 5e-3)
