"""A guitar amplifier's stage learned from what goes in and comes out, and then as C: an LSTM with a skip, sample by sample.

    python examples/amp.py

The circuit is simulated: a high-pass, a valve whose bias sinks while the playing is loud and recovers in a tenth of a second,
and a low-pass. What it does to a sample so depends on what was played long before, which no waveshaper and no short filter can
know. The strings are synthesised (Karplus and Strong, 1983). The network is that of Wright, Damskägg and Välimäki (2019): an
LSTM, a readout and the input added; it is trained by truncated BPTT with carried states, and judged by a phrase that it hasn't
heard.
"""

import argparse
import ctypes
import math
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import lfilter
from torch import Tensor, nn

import throughtime

RATE = 44_100
WINDOW, ROWS, TAPS = 512, 32, 64
Sound = NDArray[np.float64]


def play(seconds: float, random: np.random.Generator) -> Sound:
    """Return plucked strings, softly and loudly, one to three at once."""
    sound = np.zeros(round(seconds * RATE))
    begins = 0
    while begins < len(sound):
        for _ in range(random.integers(1, 4)):
            period = round(RATE / (82.4 * 2 ** (random.integers(0, 37) / 12)))  # E2 to E5
            plucked = np.zeros(len(sound) - begins)
            burst = random.uniform(-1, 1, period)[: len(plucked)]
            plucked[: len(burst)] = burst - burst.mean()
            string = np.zeros(period + 2)
            string[0], string[period:] = 1.0, -0.498
            sound[begins:] += random.uniform(0.1, 1.0) ** 2 * lfilter([1.0], string, plucked)
        begins += round(random.uniform(0.1, 0.5) * RATE)
    return 0.5 * sound / abs(sound).max()


def amplify(x: Sound) -> Sound:
    """Return what the simulated circuit makes of a signal."""
    low, loudness, smooth = 0.0, 0.0, 0.0
    y = np.empty_like(x)
    rise, fall = (1 - math.exp(-1 / (RATE * seconds)) for seconds in (0.005, 0.1))
    below, above = (1 - math.exp(-2 * math.pi * hertz / RATE) for hertz in (80, 5000))
    for t, sample in enumerate(x.tolist()):
        low += below * (sample - low)
        driven = 24 * (sample - low)
        loudness += (rise if abs(driven) > loudness else fall) * (abs(driven) - loudness)
        bias = 0.3 - 0.3 * loudness
        shaped = math.tanh(driven + bias) - math.tanh(bias)
        smooth += above * (shaped - smooth)
        y[t] = smooth
    return y


class Amplifier(nn.Module):
    """Samples (T, B, 1) to samples, from a state to the next."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.steps = nn.Sequential(throughtime.LSTM(1, hidden_size), nn.Linear(hidden_size, 1))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # noqa: D102
        output, state = self.steps[0](x, state)
        return x + self.steps[1](output), state


def train(model: Amplifier, x: Sound, y: Sound, epochs: int) -> None:
    """Cut a recording into rows that are read at the same time, a window at a time; a window begins in the state of the last."""
    played, heard = (torch.tensor(s[: len(s) // ROWS * ROWS]).float().view(ROWS, -1).t()[..., None] for s in (x, y))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    windows = list(zip(played.split(WINDOW), heard.split(WINDOW), strict=True))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=epochs * len(windows))
    for _ in range(epochs):
        state = None
        for read, expected in windows:
            output, state = model(read, state)
            loss = (output - expected).square().sum() / expected.square().sum()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            state = tuple(part.detach() for part in state)


def powers_and_past(x: Sound, degree: int, taps: int) -> Sound:
    """Return x, x² … of each sample and of those before it: (T, degree · taps + 1), with a constant."""
    columns = [np.ones(len(x))]
    for power in range(1, degree + 1):
        before = np.concatenate([np.zeros(taps - 1), x**power])
        columns.append(np.lib.stride_tricks.sliding_window_view(before, taps))
    return np.column_stack(columns)


def least_squares(x: Sound, y: Sound, unheard: Sound, degree: int, taps: int) -> tuple[Sound, Sound]:
    """Fit powers of samples and of those before them; return what that makes of both signals."""
    products = sums = 0.0
    for begin in range(0, len(x), RATE):
        expected = y[begin : begin + RATE]
        seen = powers_and_past(x[max(0, begin - taps + 1) : begin + RATE], degree, taps)[-len(expected) :]
        products, sums = products + seen.T @ seen, sums + seen.T @ expected
    factors = np.linalg.lstsq(products, sums, rcond=1e-13)[0]
    made = [np.full(len(s), factors[0]) for s in (x, unheard)]
    for power, taken in enumerate(factors[1:].reshape(degree, taps), 1):
        for result, s in zip(made, (x, unheard), strict=True):
            result += lfilter(taken[::-1], [1.0], s**power)
    return made[0], made[1]


def in_c(model: Amplifier, x: Sound, compiler: str) -> tuple[NDArray[np.float32], float]:
    """Return what the model makes of a signal as a C program, and its microseconds a sample."""
    with tempfile.TemporaryDirectory() as folder:
        throughtime.export_c(model.steps, Path(folder) / "amp.c")
        (Path(folder) / "plugin.c").write_text(
            '#include "amp.c"\n'
            "void process(struct amp *s, const float *x, float *y, long samples) {\n"
            "  for (long t = 0; t < samples; ++t) { amp_step(s, x + t, y + t); y[t] += x[t]; }\n"
            "}\n"
        )
        options = ["-std=c99", "-O3", "-march=native", "-shared", "-fPIC", "plugin.c", "-o", "plugin.so", "-lm"]
        subprocess.run([compiler, *options], cwd=folder, check=True)
        plugin = ctypes.CDLL(f"{folder}/plugin.so")
        state = ctypes.create_string_buffer(1 << 16)
        played, output = x.astype(np.float32), np.empty(len(x), np.float32)
        taken = []
        for _ in range(5):
            plugin.amp_reset(state)
            began = time.perf_counter()
            plugin.process(state, *(ctypes.c_void_p(s.ctypes.data) for s in (played, output)), ctypes.c_long(len(x)))
            taken.append((time.perf_counter() - began) / len(x) * 1e6)
    return output, min(taken)


def main() -> None:
    """Print how far the signal stands above the error, for the network and what it is compared with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=16.0, help="of playing to learn from (default: 16)")
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    random = np.random.default_rng(given.seed)
    x, unheard = play(given.seconds, random), play(4.0, random)
    y, truth = amplify(x), amplify(unheard)

    model = Amplifier(given.hidden)
    train(model, x, y, given.epochs)
    with torch.no_grad():
        learned = model(torch.tensor(unheard).float()[:, None, None])[0].view(-1).numpy()
    filtered, unheard_filtered = least_squares(x, y, unheard, 1, TAPS)
    rows = {
        f"LSTM of {given.hidden}": learned,
        "FIR of each of 5 powers": least_squares(x, y, unheard, 5, TAPS)[1],
        "FIR, then polynomial": least_squares(filtered, y, unheard_filtered, 9, 1)[1],
        "polynomial": least_squares(x, y, unheard, 9, 1)[1],
        "FIR of 64 taps": unheard_filtered,
    }
    print("an unheard phrase: signal over error in dB, and the error-to-signal ratio")
    for name, made in rows.items():
        ratio = np.square(made - truth).sum() / np.square(truth).sum()
        print(f"  {name:26}{-10 * math.log10(ratio):4.1f}   {ratio:.5f}")
    compiler = shutil.which("cc")
    if compiler is None:
        print("no C compiler `cc` here: not tried in C")
        return
    output, microseconds = in_c(model, unheard, compiler)
    np.testing.assert_allclose(output, learned, rtol=0, atol=1e-4)  # a wrong program has no speed
    print("in C, the same samples: µs for each, and how many times faster than they are played")
    print(f"  {'LSTM in C':26}{microseconds:.2f}   {1e6 / RATE / microseconds:.0f}")


if __name__ == "__main__":
    main()
