"""Find wrong readings as they come: a GRU that forecasts the next one, stepped by `throughtime.stream`.

    python examples/anomalies.py

The readings are the sea's temperature off Peru, monthly from 1950 to 2010 (El Niño's region; statsmodels has them). The network
learns from the years up to 1990. In those after, one reading in twenty is exchanged for that of another month, half a year away:
a temperature that the sea has, at the wrong time. How surprising a reading is says whether it is wrong, and a reading that
is taken for wrong is not fed: the state goes on with its forecast.
"""

import argparse

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from statsmodels.datasets import elnino
from torch import nn

import throughtime

KNOWN = 12 * 41  # months up to 1990
Series = NDArray[np.float64]


def train(x: Series, steps: int) -> nn.Module:
    """Return a network that reads temperatures (T, B, 1) and forecasts the next."""
    model = nn.Sequential(throughtime.GRU(1, 32), nn.Linear(32, 1))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    series = torch.tensor(x).float()[:, None, None]
    for _ in range(steps):
        read = series[:-1] + 0.2 * torch.randn(len(series) - 1, 8, 1)  # eight noisy copies
        forecast = model[1](model[0](read)[0])
        loss = nn.functional.mse_loss(forecast[12:], series[13:].expand(-1, 8, 1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


def spoil(x: Series, random: np.random.Generator) -> tuple[Series, NDArray[np.bool_]]:
    """Return the series with one reading in twenty exchanged, and which."""
    wrong = random.random(len(x)) < 0.05
    away = np.clip(np.arange(len(x)) + random.choice([-6, 6], len(x)), 0, len(x) - 1)
    return np.where(wrong, x[away], x), wrong


def surprises(model: nn.Module, known: Series, readings: Series, limit: float = 1.5) -> Series:
    """Return how far each reading is from what a stream forecast, as the readings come."""
    one = throughtime.stream(model)
    forecast = one.feed(known[:, None].astype(np.float32))[-1, 0]
    found = []
    for reading in readings:
        found.append(abs(reading - forecast))
        taken = reading if found[-1] < limit else forecast
        forecast = one.step(np.array([taken], np.float32))[0]  # microseconds
    return np.array(found)


def main() -> None:
    """Print how well each rule tells wrong readings: the share of pairs, one right and one wrong, that it orders so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    x = elnino.load_pandas().data.to_numpy(float)[:, 1:].ravel()
    x = (x - x[:KNOWN].mean()) / x[:KNOWN].std()

    model = train(x[:KNOWN], given.steps)
    rows = {"GRU, a stream": [], "12 months before": [], "mean of 12 months": []}
    for draw in range(20):
        readings, wrong = spoil(x[KNOWN:], np.random.default_rng(given.seed + draw))
        before = np.concatenate([x[:KNOWN], readings])
        year = np.lib.stride_tricks.sliding_window_view(before, 12)[KNOWN - 12 : -1]
        rows["GRU, a stream"].append(roc_auc_score(wrong, surprises(model, x[:KNOWN], readings)))
        rows["12 months before"].append(roc_auc_score(wrong, abs(readings - year[:, 0])))
        rows["mean of 12 months"].append(roc_auc_score(wrong, abs(readings - year.mean(1)) / year.std(1)))
    print(f"{len(readings)} readings, one in twenty wrong, 20 draws: area under the ROC curve")
    for name, areas in rows.items():
        print(f"  {name:22}{np.mean(areas):.3f}")


if __name__ == "__main__":
    main()
