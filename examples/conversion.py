"""A model that somebody wrote with `torch.nn.LSTM`, made ours in a line: the same numbers, sooner.

    python examples/conversion.py

It reads the lines of a Python file, as packed sequences of characters, and says what follows. Times depend on the machine and
on what else it does; contestants take turns, and medians are printed.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

import throughtime


class SomebodysModel(nn.Module):
    """Lines, tensors of characters, to logits of the characters that follow."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.lstm = nn.LSTM(64, 128, num_layers=2)
        self.head = nn.Linear(128, 128)

    def forward(self, lines: list[Tensor]) -> Tensor:  # noqa: D102
        packed = pack_sequence([self.embedding(line[:-1]) for line in lines], enforce_sorted=False)
        return self.head(torch.cat(unpack_sequence(self.lstm(packed)[0])))


def loss_of(model: nn.Module, lines: list[Tensor]) -> Tensor:
    """Make a training step's gradients, and return its loss."""
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(lines), torch.cat([line[1:] for line in lines]))
    loss.backward()
    return loss


def main() -> None:
    """Print how far losses and gradients differ, and the time of a training step with each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20)
    given = parser.parse_args()
    torch.manual_seed(1)
    source = Path(argparse.__file__).read_text("utf-8").splitlines()
    lines = [torch.tensor([min(ord(c), 127) for c in line]) for line in source if len(line) > 4]

    before = SomebodysModel()
    after = throughtime.convert(copy.deepcopy(before))  # the line

    apart = abs(loss_of(before, lines[:32]) - loss_of(after, lines[:32])).item()
    gradients = zip(before.parameters(), after.parameters(), strict=True)
    print(f"apart: losses by {apart:.0e}, gradients by {max((b.grad - a.grad).abs().max() for b, a in gradients):.0e}")
    times: dict[str, list[float]] = {"throughtime.LSTM": [], "torch.nn.LSTM": []}
    for turn in range(given.turns):
        batch = lines[32 * turn % 1024 :][:32]
        for name, model in zip(times, (after, before), strict=True):
            start = time.perf_counter()
            loss_of(model, batch)
            times[name].append(time.perf_counter() - start)
    print("a training step of 32 lines, milliseconds:")
    for name, taken in times.items():
        print(f"  {name:20}{1e3 * statistics.median(taken):.1f}")


if __name__ == "__main__":
    main()
