"""What a step costs in C: models written by `export_c`, compiled here, checked against the layers, and then timed.

    python -m benchmarks.c_step [--compiler gcc] [--seconds 0.5] [--json FILE]

A step is timed inside a loop in C, on one core; between two samples of audio at 48 kHz are 20.8 µs. Contestants take turns: each
model in float32 and int8, and the stream engine through Python beside them. RTNeural's published figures, of another machine (an
i7-8700B; Chowdhury, 2021), are 0.33 µs for an LSTM of 16 units and 1.04 for one of 32, with a readout of one number.
"""

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import throughtime

MODELS = {
    "LSTM 16, one number in and out": (throughtime.LSTM, 1, 16, 1),
    "LSTM 32, one number in and out": (throughtime.LSTM, 1, 32, 1),
    "GRU 32, one number in and out": (throughtime.GRU, 1, 32, 1),
    "LSTM 64, one number in and out": (throughtime.LSTM, 1, 64, 1),
    "LSTM 256, 65 in and out": (throughtime.LSTM, 65, 256, 65),
}
_LOOP = """
#include "{name}.c"
void run(struct {name} *s, const float *x, float *y, long steps) {{
  long t;
  for (t = 0; t < steps; ++t) {name}_step(s, x + t % 64 * {name}_inputs, y);
}}
"""


class InC:
    """A model in C, compiled with a loop around its step."""

    def __init__(self, model: nn.Module, folder: Path, name: str, precision: str, compiler: str) -> None:
        throughtime.export_c(model, folder / f"{name}.c", precision=precision, name=name)
        loop = _LOOP.format(name=name).replace(f"{name}_inputs", f"{name.upper()}_INPUTS")
        (folder / f"{name}_loop.c").write_text(loop, encoding="ascii")
        library = folder / f"{name}.so"
        command = [
            compiler,
            "-std=c99",
            "-O3",
            "-march=native",
            "-shared",
            "-fPIC",
            f"{name}_loop.c",
            "-o",
            str(library),
            "-lm",
        ]
        subprocess.run(command, cwd=folder, check=True)
        loaded = ctypes.CDLL(str(library))
        self.loop, self.reset = loaded["run"], loaded[f"{name}_reset"]
        self.state = ctypes.create_string_buffer(1 << 20)

    def run(self, x: np.ndarray, steps: int) -> np.ndarray:
        """Step from the beginning over 64 inputs again and again; return the last output."""
        y = np.empty(1024, np.float32)
        self.reset(self.state)
        addresses = [ctypes.c_void_p(array.ctypes.data) for array in (x, y)]
        self.loop(self.state, *addresses, ctypes.c_long(steps))
        return y


def measure(compiler: str, seconds: float, turns: int = 9) -> list[dict[str, Any]]:
    """Check and time all models; return a record of each."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (title, (kind, inputs, hidden, outputs)) in enumerate(MODELS.items()):
            torch.manual_seed(number)
            model = nn.Sequential(kind(inputs, hidden), nn.Linear(hidden, outputs)).eval()
            x = np.random.default_rng(0).standard_normal((64, inputs)).astype(np.float32)
            right = throughtime.stream(model).feed(x)[-1]
            runs, times, errors = {}, {}, {}
            for precision in ("float32", "int8"):
                own = InC(model, Path(folder), f"m{number}_{precision}", precision, compiler)
                errors[precision] = float(np.abs(own.run(x, 64)[:outputs] - right).max())
                assert errors[precision] < {"float32": 1e-5, "int8": 5e-2}[precision], f"{title}, {precision}: wrong"
                runs[f"C, {precision}"] = own
            engine = throughtime.stream(model)
            for name in [*runs, "stream, through Python"]:
                times[name] = []
            count = 1000
            for _ in range(turns):
                for name, own in runs.items():
                    began = time.perf_counter()
                    done = 0
                    while time.perf_counter() - began < seconds / turns:
                        own.run(x, count)
                        done += count
                    times[name].append((time.perf_counter() - began) / done * 1e6)
                began = time.perf_counter()
                for _ in range(200):
                    engine.step(x[0])
                times["stream, through Python"].append((time.perf_counter() - began) / 200 * 1e6)
            medians = {name: statistics.median(taken) for name, taken in times.items()}
            records.append({"model": title, "microseconds": medians, "errors": errors})
    return records


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", default="gcc")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each model and precision (default: 0.5)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    version = subprocess.run([given.compiler, "--version"], capture_output=True, text=True, check=True).stdout
    print(f"{platform.processor() or platform.machine()}, {version.splitlines()[0]}, -O3 -march=native, one core\n")
    records = measure(given.compiler, given.seconds)
    for record in records:
        taken = ", ".join(f"{name} {time:.2f} µs" for name, time in record["microseconds"].items())
        print(f"{record['model']:32} {taken}")
    if given.json:
        given.json.write_text(json.dumps(records, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
