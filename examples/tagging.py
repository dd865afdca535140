"""Tag each character of Python source as the language sees it: lines of any length, read both ways.

    python examples/tagging.py

The text is the standard library's own source, the tags are those of its `tokenize`: blank, keyword, name, number, string,
comment, operator. What a quote opens is known from the left, whether `is` is a keyword or begins `isinstance` from the right.
"""

import argparse
import io
import itertools
import keyword
import token
import tokenize
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

import throughtime

TAGS = ("blank", "keyword", "name", "number", "string", "comment", "operator")
MODULES = "argparse ast calendar csv datetime difflib enum fractions heapq inspect json/decoder pathlib random shutil"
Line = tuple[str, list[int]]


def tag_lines(source: str) -> list[Line]:
    """Return the lines of a source that no token crosses, and the tag of each of their characters."""
    lines = source.splitlines()
    tags = [[0] * len(line) for line in lines]
    crossed = set()
    for kind, text, (row, begin), (last, end), _ in tokenize.generate_tokens(io.StringIO(source).readline):
        name = token.tok_name[kind].lower()
        if name.startswith("fstring"):  # Python 3.12 cuts these in parts
            name = "string"
        tag = "keyword" if name == "name" and keyword.iskeyword(text) else {"op": "operator"}.get(name, name)
        if row != last:
            crossed.update(range(row - 1, last))
        elif tag in TAGS:
            tags[row - 1][begin:end] = [TAGS.index(tag)] * (end - begin)
    return [(line, tags[n]) for n, line in enumerate(lines) if line.strip() and n not in crossed]


def most_frequent(train: list[Line], test: list[Line], sides: int) -> float:
    """Return how many characters get the tag that is most frequent between their `sides` neighbours on each side."""
    seen: dict[str, Counter[int]] = defaultdict(Counter)
    windows = [
        [(" " * sides + line + " " * sides)[i : i + 2 * sides + 1] for i in range(len(line))] for line, _ in train
    ]
    for context, (_, tags) in zip(windows, train, strict=True):
        for window, tag in zip(context, tags, strict=True):
            for cut in range(sides + 1):  # narrower contexts, for what was never seen
                seen[window[cut : len(window) - cut]][tag] += 1
    right = total = 0
    for line, tags in test:
        padded = " " * sides + line + " " * sides
        for i, tag in enumerate(tags):
            window = padded[i : i + 2 * sides + 1]
            known = next((c for cut in range(sides + 1) if (c := seen.get(window[cut : len(window) - cut]))), Counter())
            right += bool(known) and known.most_common(1)[0][0] == tag
            total += 1
    return right / total


def batch_of(lines: list[Line]) -> tuple[Tensor, Tensor, Tensor]:
    """Return characters and tags (T, B), −1 where a line is over, and lengths (B,)."""
    lengths = torch.tensor([len(line) for line, _ in lines])
    padded = torch.nn.utils.rnn.pad_sequence
    characters = padded([torch.tensor([min(ord(c), 127) for c in line]) for line, _ in lines])
    return characters, padded([torch.tensor(tags) for _, tags in lines], padding_value=-1), lengths


class Tagger(nn.Module):
    """Characters (T, B) to logits (T, B, tags)."""

    def __init__(self, *, bidirectional: bool) -> None:
        super().__init__()
        self.lstm = throughtime.LSTM(128, 64, bidirectional=bidirectional)
        self.readout = nn.Linear(128 if bidirectional else 64, len(TAGS))

    def forward(self, characters: Tensor, lengths: Tensor) -> Tensor:  # noqa: D102
        output, _ = self.lstm(characters, lengths=lengths)  # integers stand for one-hot vectors; lengths in any order
        return self.readout(output)


def train_and_measure(model: Tagger, train: list[Line], test: list[Line], steps: int) -> float:
    """Train on batches of 32 lines; return how many characters of the others get their tag."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        characters, tags, lengths = batch_of([train[i] for i in torch.randint(len(train), (32,))])
        loss = nn.functional.cross_entropy(model(characters, lengths).flatten(0, 1), tags.flatten(), ignore_index=-1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    characters, tags, lengths = batch_of(test)
    with torch.no_grad():
        right = model(characters, lengths).argmax(dim=2) == tags
    return right.sum().item() / int(lengths.sum())


def main() -> None:
    """Train a tagger that reads both ways and one that reads forward, and print how much of unseen modules they tag right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    library = Path(argparse.__file__).parent
    modules = [tag_lines((library / f"{name}.py").read_text("utf-8")) for name in MODULES.split()]
    train, test = (list(itertools.chain.from_iterable(part)) for part in (modules[3:], modules[:3]))
    print(f"{len(train):,} lines to train on; of the characters of {len(test):,} lines of other modules, tagged right:")
    for name, bidirectional in (("LSTM, both ways", True), ("LSTM, forward", False)):
        print(f"  {name:38}{train_and_measure(Tagger(bidirectional=bidirectional), train, test, given.steps):.4f}")
    print(f"  {'most frequent tag, 2 + 1 + 2 around':38}{most_frequent(train, test, 2):.4f}")


if __name__ == "__main__":
    main()
