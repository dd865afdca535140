"""Nothing is allocated in a native step: asked of an allocator that counts."""

import shutil
import subprocess
import sys

import pytest

from throughtime.kernels import native

COUNTING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
static long count;
long counted(void) { return count; }
void* malloc(size_t size) {
  static void* (*next)(size_t);
  if (!next) next = (void* (*)(size_t))dlsym(RTLD_NEXT, "malloc");
  ++count;
  return next(size);
}
void* aligned_alloc(size_t alignment, size_t size) {
  static void* (*next)(size_t, size_t);
  if (!next) next = (void* (*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
  ++count;
  return next(alignment, size);
}
int posix_memalign(void** to, size_t alignment, size_t size) {
  static int (*next)(void**, size_t, size_t);
  if (!next) next = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  ++count;
  return next(to, alignment, size);
}
"""

STEPPING = """
import ctypes, sys
import numpy as np, torch
import throughtime
from torch import nn
counted = ctypes.CDLL(None).counted
counted.restype = ctypes.c_long
before = counted()
np.empty(1 << 20)
assert counted() > before, "the allocator doesn't count"
layers = [throughtime.LSTM(9, 37, num_layers=2, proj_size=8, layer_norm=True), throughtime.GRU(9, 37), throughtime.RNN(9, 37)]
for layer in layers:
    model = nn.Sequential(layer, nn.Linear(layer.output_size, 300))
    for precision in ("float32", "bfloat16", "int8"):
        for streams in (1, 100):
            stream = throughtime.stream(model, streams=streams, precision=precision)
            x = np.zeros((3000, streams, 9), np.float32)
            out = np.zeros((3000, streams, 300), np.float32)
            which = np.arange(streams)[::-1].copy()
            calls = [(steps, streams, of, x.ctypes.data, 0, out.ctypes.data, False)
                     for of in (0, which.ctypes.data) for steps in (1, 3000 // streams)]
            stream._engine.feed(*calls[0])
            one_x, one_out = x[0, :, :] if streams > 1 else x[0, 0], out[0, :, :] if streams > 1 else out[0, 0]
            before = counted()
            for call in calls:
                stream._engine.feed(*call)
            stream._engine.step(one_x, one_out)
            stream._engine.reset(0, streams)
            found = counted() - before
            print(type(layer).__name__, precision, streams, found)
            assert found == 0
"""


@pytest.mark.skipif(native.module is None, reason="streams need the kernels")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD is Linux's")
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_step_allocates_nothing(tmp_path):
    source, library = tmp_path / "counting.c", tmp_path / "counting.so"
    source.write_text(COUNTING)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", STEPPING],
        env={"LD_PRELOAD": str(library), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == 3 * 3 * 2
