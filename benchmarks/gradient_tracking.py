"""What `train --gradients-every` costs: steps per second with it and without, of the same training, measured in turns.

    python benchmarks/gradient_tracking.py            # an LSTM of 256, B 32, T 64, as `train` takes them by default
    python benchmarks/gradient_tracking.py --every 50

First sees that both come to the same weights, to the bit. Prints one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import throughtime
from throughtime.insight.tracking import track_gradients
from throughtime.lm import LanguageModel, ModelConfig
from throughtime.training import Budget, Clipping, Loop, Streams

VOCABULARY, BATCH, STEPS = 65, 32, 64


def make_loop(cell: str, hidden: int, updates: int, every: int) -> Loop:
    """Return a training that is the same whatever `every` is."""
    torch.manual_seed(1)
    model = LanguageModel(ModelConfig(VOCABULARY, cell, hidden))
    tokens = np.random.default_rng(1).integers(VOCABULARY, size=BATCH * STEPS * 50 + 1)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def probe(*window: Any) -> dict[str, float | None]:
        return track_gradients(*window)._asdict()

    return Loop(
        model=model,
        windows=Streams(tokens, BATCH, STEPS),
        optimizer=torch.optim.AdamW(model.parameters(), fused=True),
        loss=loss,
        budget=Budget(steps=updates),
        learning_rate=1e-3,
        clipping=Clipping(1.0),
        probe=probe if every else None,
        probe_every=every,
    )


def weights_after(cell: str, hidden: int, updates: int, every: int) -> Tensor:
    """Train and return all weights in a row."""
    loop = make_loop(cell, hidden, updates, every)
    loop.run()
    return torch.cat([p.detach().flatten() for p in loop.model.parameters()])


def main() -> int:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", default="lstm")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    same = torch.equal(weights_after(given.cell, given.hidden, 8, 4), weights_after(given.cell, given.hidden, 8, 0))
    if not same:
        print("the measurement changes the training", file=sys.stderr)
        return 1
    seconds: dict[int, list[float]] = {given.every: [], 0: []}
    for _ in range(given.turns):
        for every in seconds:
            loop = make_loop(given.cell, given.hidden, given.every, every)  # one measurement, at the last step
            began = time.perf_counter()
            loop.run()
            seconds[every].append(time.perf_counter() - began)
    with_it, without = (statistics.median(seconds[every]) for every in (given.every, 0))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "throughtime": throughtime.__version__,
        "model": f"{given.cell} {given.hidden}, B {BATCH}, T {STEPS}",
        "every": given.every,
        "steps_per_second": [round(given.every / with_it, 2), round(given.every / without, 2)],
        "cost": round(with_it / without - 1, 4),
    }
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
