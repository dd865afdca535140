"""How far gradients reach at the start: each cell under each initialisation, and how long the lag matrix takes.

    python benchmarks/gradient_horizons.py

Per seed: a fresh layer, H = 64, on white noise (T = 200, B = 8, I = 8); the loss of the last step sends a gradient of length 1
and random direction into h. The horizon is the first lag at which the mean norm of ∂L_T/∂(state) is below 1e-3 of what it
was. The timing checks the matrix against autograd first. Prints a table and one JSON object; exit code 1 where a horizon lies
outside the range expected.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

import throughtime
from throughtime import insight

STEPS, BATCH, INPUTS, HIDDEN = 200, 8, 8, 64
EXPECTED: dict[tuple[str, str], tuple[float, float]] = {  # cell, initialisation: the range of the median horizon
    ("rnn", "default"): (9, 15),
    ("rnn", "orthogonal"): (35, 75),
    ("rnn", "orthogonal:1.5"): (math.inf, math.inf),
    ("lstm", "default"): (10, 15),
    ("lstm", "forget:1"): (28, 40),
    ("lstm", "forget:3"): (math.inf, math.inf),
    ("lstm", "chrono:200"): (math.inf, math.inf),
    ("gru", "default"): (11, 17),
    ("gru", "update:3"): (150, 199),
}
CELLS = {"rnn": throughtime.RNN, "lstm": throughtime.LSTM, "gru": throughtime.GRU}


def measure_curve(cell: str, names: str, seed: int) -> Tensor:
    """Return φ_k of one fresh layer, 1 at lag 0."""
    torch.manual_seed(seed)
    layer = throughtime.init.initialise_(CELLS[cell](INPUTS, HIDDEN), names)
    recording = insight.record(layer, torch.randn(STEPS, BATCH, INPUTS))
    gradient = torch.nn.functional.normalize(torch.randn(STEPS, BATCH, HIDDEN), dim=2)
    (lag,) = insight.lag_matrix(recording, gradient, probes=1)
    return lag.curve / lag.curve[0]


def horizon(curve: Tensor) -> float:
    """Return the first lag below 1e-3."""
    below = (curve < 1e-3).nonzero()
    return float(below[0]) if len(below) else math.inf


def measure_horizons(seeds: int) -> list[dict[str, Any]]:
    """Measure every row of the table."""
    rows = []
    for (cell, names), (low, high) in EXPECTED.items():
        curves = [measure_curve(cell, names, seed) for seed in range(seeds)]
        horizons = sorted(map(horizon, curves))
        median = horizons[len(horizons) // 2]
        rows.append(
            {
                "cell": cell,
                "init": names,
                "horizon": median,
                "lowest": horizons[0],
                "highest": horizons[-1],
                "at_lag_100": statistics.median(curve[100].item() for curve in curves),
                "as_expected": low <= median <= high,
            }
        )
    return rows


def check_against_autograd() -> None:
    """Refuse to time a lag matrix that is wrong."""
    layer, x = throughtime.LSTM(3, 7).double(), torch.randn(9, 2, 3, dtype=torch.float64)
    recording, weight = insight.record(layer, x), torch.randn(9, 2, 7, dtype=torch.float64)
    sums = insight.lag_gradients(recording, weight)[0].weight_hh.sum(0)
    (layer(x)[0] * weight).sum().backward()
    torch.testing.assert_close(sums, layer.weight_hh_l0.grad)


def time_lag_matrix(steps: int, hidden: int, lags: int | None, repeats: int) -> dict[str, Any]:
    """Time the lag matrix of an LSTM from its recording, and the recording."""
    layer, x = throughtime.LSTM(hidden, hidden), torch.randn(steps, BATCH, hidden)
    gradient = torch.randn(steps, BATCH, hidden)
    recorded, measured = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        recording = insight.record(layer, x)
        recorded.append(time.perf_counter() - began)
        insight.lag_matrix(recording, gradient, lags=lags)
        measured.append(time.perf_counter() - began - recorded[-1])
    return {
        "shape": f"LSTM T{steps} H{hidden} B{BATCH}" + (f", {lags} lags" if lags else ""),
        "record_ms": round(1e3 * statistics.median(recorded), 1),
        "lag_matrix_ms": round(1e3 * statistics.median(measured), 1),
    }


def main() -> int:
    """Measure, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=["horizons", "timing"], help="do one of the two")
    given = parser.parse_args()
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "throughtime": throughtime.__version__,
    }
    rows = []
    if given.only != "timing":
        rows = measure_horizons(given.seeds)
        print(f"{'cell':6}{'init':16}{'first lag below 1e-3':>22}   {'norm at lag 100':>16}")
        for row in rows:
            range_ = f"{row['horizon']:.0f} [{row['lowest']:.0f}–{row['highest']:.0f}]"
            range_ = "never" if row["lowest"] == math.inf else range_.replace("inf", "never")
            mark = "" if row["as_expected"] else "   not as expected"
            print(f"{row['cell']:6}{row['init']:16}{range_:>22}   {row['at_lag_100']:>16.3g}{mark}")
        result["horizons"] = [{name: str(v) if v == math.inf else v for name, v in row.items()} for row in rows]
    if given.only != "horizons":
        check_against_autograd()
        result["timing"] = [time_lag_matrix(100, 64, None, 25), time_lag_matrix(1000, 128, 200, 5)]
    print(json.dumps(result, indent=2))
    return 0 if all(row["as_expected"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
