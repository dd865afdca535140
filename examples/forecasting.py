"""Forecast 192 series at once: children per woman by country, one year and five years ahead.

    python examples/forecasting.py

The World Bank's figures come with statsmodels, 1960 to 2011. Everybody learns from the years up to 2000 and forecasts, from each
later year, the five that follow it. A GRU reads all countries; an ARIMA(1,1,0) is fitted to each, and a linear
autoregression of ten years to all of them together.
"""

import argparse

import numpy as np
import torch
from numpy.typing import NDArray
from statsmodels.datasets import fertility
from statsmodels.tsa.ar_model import AutoReg
from torch import Tensor, nn

import throughtime

AHEAD, LAGS, FIRST, SPLIT = 5, 10, 1960, 2001
Series = NDArray[np.float64]


def read() -> Series:
    """Return the logarithm of children per woman (T, N), of the countries that have every year."""
    table = fertility.load_pandas().data
    values = table[[str(year) for year in range(FIRST, 2012)]].to_numpy(float)
    return np.log(values[~np.isnan(values).any(axis=1)]).T


def errors(x: Series, forecasts: Series) -> str:
    """Return the root mean squared error of one year ahead and of one to five, in children per woman.

    `forecasts` (S, N, AHEAD) are those made from each year but the last five, the last S of them counted.
    """
    first = len(x) - AHEAD - len(forecasts)
    truth = np.stack([x[t + 1 : t + 1 + AHEAD].T for t in range(first, len(x) - AHEAD)])
    squared = (np.exp(forecasts) - np.exp(truth)) ** 2
    return f"{np.sqrt(squared[:, :, 0].mean()):.4f}        {np.sqrt(squared.mean()):.4f}"


def last_change_goes_on(x: Series, starts: range) -> Series:
    """Forecast that each country's last change repeats itself."""
    return np.stack([x[t][:, None] + (x[t] - x[t - 1])[:, None] * np.arange(1, AHEAD + 1) for t in starts])


def arima_each(x: Series, starts: range) -> Series:
    """Forecast each country by an autoregression of its changes."""
    forecasts = np.repeat(np.stack([x[t] for t in starts])[:, :, None], AHEAD, axis=2)
    for n, changes in enumerate(np.diff(x, axis=0).T):
        constant, factor = AutoReg(changes[: SPLIT - 1 - FIRST], 1).fit().params
        for s, t in enumerate(starts):
            change, total = changes[t - 1], 0.0
            for k in range(AHEAD):
                change = constant + factor * change
                total += change
                forecasts[s, n, k] += total
    return forecasts


def linear_of_all(x: Series, starts: range) -> Series:
    """Forecast by least squares on the last ten changes and the level, of all countries together."""
    changes = np.diff(x, axis=0)

    def seen(t: int) -> Series:
        return np.column_stack([changes[t - LAGS : t].T, x[t], np.ones(x.shape[1])])

    known = range(LAGS, SPLIT - FIRST - AHEAD)
    targets = np.concatenate([(x[t + 1 : t + 1 + AHEAD] - x[t]).T for t in known])
    factors = np.linalg.lstsq(np.concatenate([seen(t) for t in known]), targets, rcond=None)[0]
    return np.stack([x[t][:, None] + seen(t) @ factors for t in starts])


class Forecaster(nn.Module):
    """Changes and levels (T, N, 2) to the five next levels less the present one, (T, N, AHEAD)."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = throughtime.GRU(2, 32)
        self.readout = nn.Sequential(nn.Dropout(0.3), nn.Linear(32, AHEAD))

    def forward(self, seen: Tensor) -> Tensor:  # noqa: D102
        noise = 0.3 * torch.randn_like(seen) * torch.tensor([1.0, 0.1]) if self.training else 0.0
        last_change_goes_on = seen[..., :1] * torch.arange(1, AHEAD + 1)
        return last_change_goes_on + self.readout(self.gru(seen + noise)[0])


def gru_of_all(x: Series, starts: range, steps: int) -> Series:
    """Forecast by a recurrent network that reads every country from 1960 on."""
    levels = torch.tensor(x).float()
    changes = levels.diff(dim=0)
    scale = changes[: SPLIT - 1 - FIRST].std()
    seen = torch.stack([changes / scale, levels[1:]], dim=2)  # from the second year on
    ahead = (levels[1:].unfold(0, AHEAD + 1, 1)[..., 1:] - levels[1:-AHEAD, :, None]) / scale
    known = slice(0, SPLIT - 1 - FIRST - AHEAD)  # those whose five next years are known in 2000

    model = Forecaster()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        loss = nn.functional.smooth_l1_loss(model(seen[known])[2:], ahead[known][2:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        forecasts = (model(seen) * scale)[[t - 1 for t in starts]].double().numpy()
    return x[starts][:, :, None] + forecasts


def main() -> None:
    """Print everybody's errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    x = read()
    starts = range(SPLIT - 1 - FIRST, len(x) - AHEAD)  # 2000 is the first year to forecast from
    print(f"{x.shape[1]} countries; error in children per woman: one year ahead, one to five")
    of_five = np.mean([gru_of_all(x, starts, given.steps) for _ in range(5)], axis=0)
    print(f"  GRU of all, mean of five     {errors(x, of_five)}")
    print(f"  linear, of all               {errors(x, linear_of_all(x, starts))}")
    print(f"  ARIMA(1,1,0) for each        {errors(x, arima_each(x, starts))}")
    print(f"  the last change goes on      {errors(x, last_change_goes_on(x, starts))}")


if __name__ == "__main__":
    main()
