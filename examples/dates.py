"""Dates as people write them, to ISO 8601: sequence to sequence, with an end that the network says itself.

    python examples/dates.py

"Tuesday, 3 March 1998" and "3.3.98" become "1998-03-03", "March 1998" becomes "1998-03", and "1998" stays: answers have
lengths of their own. An encoder reads the characters, a decoder writes from its last state until it writes the end.
"""

import argparse
import calendar
import datetime
import itertools
import random

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import throughtime

END = 0  # what a written answer ends with, and what the decoder reads before its first character
WRITTEN = "0123456789-"
Pair = tuple[str, str]


def draw(chance: random.Random) -> Pair:
    """Return a date between 1950 and 2049 in one of twelve forms, and in ISO 8601."""
    date = datetime.date(1950, 1, 1) + datetime.timedelta(days=chance.randrange(36_500))
    day, month, name = date.day, date.month, calendar.month_name[date.month]
    full = date.isoformat()
    ending = "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return chance.choice(
        [
            (f"{calendar.day_name[date.weekday()]}, {day} {name} {date.year}", full),
            (f"{day} {name} {date.year}", full),
            (f"{day}{ending} of {name}, {date.year}", full),
            (f"{name} {day}{ending}, {date.year}", full),
            (f"{name[:3]} {day}, {date.year}", full),
            (f"{day}-{name[:3]}-{date.year % 100:02}", full),
            (f"{day}.{month}.{date.year}", full),
            (f"{day}.{month}.{date.year % 100:02}", full),
            (f"{month}/{day}/{date.year}", full),
            (f"{date.year}{month:02}{day:02}", full),
            (f"{name} {date.year}", full[:7]),
            (f"{date.year}", full[:4]),
        ]
    )


class Translator(nn.Module):
    """Characters to characters: an encoder's last state is the decoder's first."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.encoder = throughtime.GRU(128, hidden)
        self.decoder = throughtime.GRU(len(WRITTEN) + 1, hidden)
        self.readout = nn.Linear(hidden, len(WRITTEN) + 1)

    def forward(self, read: Tensor, lengths: Tensor, written: Tensor) -> Tensor:
        """Return logits (S, B, 12) of each character of the answers, given those before it, (S, B)."""
        _, state = self.encoder(read, lengths=lengths)  # ids stand for one-hot vectors
        return self.readout(self.decoder(written, state)[0])

    @torch.no_grad()
    def answer(self, read: Tensor, lengths: Tensor, longest: int = 12) -> list[str]:
        """Return the likeliest next character again and again, until each row has written its end."""
        _, state = self.encoder(read, lengths=lengths)
        last = torch.full((1, read.shape[1]), END)
        chosen = []
        for _ in range(longest):
            output, state = self.decoder(last, state)
            last = self.readout(output).argmax(dim=2)
            chosen.append(last)
        rows = torch.cat(chosen).T.tolist()
        return ["".join(WRITTEN[i - 1] for i in itertools.takewhile(lambda i: i != END, row)) for row in rows]


def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return characters (T, B), and lengths (B,)."""
    return pad_sequence([torch.tensor([ord(c) for c in text]) for text in texts]), torch.tensor([len(t) for t in texts])


def train(model: Translator, pairs: list[Pair], steps: int) -> None:
    """Minimise the cross-entropy of the answers, ends included, in batches of 64 pairs."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps)
    for _ in range(steps):
        batch = [pairs[i] for i in torch.randint(len(pairs), (64,))]
        answers = pad_sequence(
            [torch.tensor([WRITTEN.index(c) + 1 for c in iso] + [END]) for _, iso in batch], padding_value=-1
        )
        written = torch.cat([torch.full((1, 64), END), answers[:-1].clamp(min=END)])  # what was written before
        logits = model(*encode([text for text, _ in batch]), written)
        optimiser.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=-1).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()


def most_similar(pairs: list[Pair], test: list[Pair]) -> list[str]:
    """Return, for each date, the answer of the one that shares most of its pieces of three characters."""

    def pieces(text: str) -> set[str]:
        return {f" {text} "[i : i + 3] for i in range(len(text))}

    known = [(pieces(text), iso) for text, iso in pairs]
    return [max(known, key=lambda pair: len(own & pair[0]))[1] for own in (pieces(text) for text, _ in test)]


def share_right(answers: list[str], test: list[Pair]) -> float:
    """Return how many of the answers are right."""
    return sum(answer == iso for answer, (_, iso) in zip(answers, test, strict=True)) / len(test)


def main() -> None:
    """Train, and print how many of the dates that weren't trained on come out right to the last character."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    chance = random.Random(given.seed)
    pairs = list({text: (text, iso) for text, iso in (draw(chance) for _ in range(12_000))}.values())
    pairs, test = pairs[200:], pairs[:200]

    model = Translator()
    train(model, pairs, given.steps)
    answers = model.answer(*encode([text for text, _ in test]))
    print(f"{len(pairs):,} dates to train on; of 200 others, right to the last character:")
    print(f"  GRU encoder and decoder     {share_right(answers, test):.3f}")
    print(f"  the most similar's answer   {share_right(most_similar(pairs, test), test):.3f}")
    for (text, iso), answer in list(zip(test, answers, strict=True))[:6]:
        print(f"    {text:32}{answer:12}{'' if answer == iso else 'wrong: ' + iso}")


if __name__ == "__main__":
    main()
