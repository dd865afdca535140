"""A trained run from Python: it writes, tells what may come next, and scores."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import NDArray
from torch import nn

from throughtime.errors import InputError, unknown_name
from throughtime.lm.generation import Sampling, generate, seed_of_sample
from throughtime.lm.kinds import settled
from throughtime.lm.model import LanguageModel
from throughtime.lm.next_token import next_probabilities
from throughtime.lm.run import Run, open_run
from throughtime.lm.score import score_lines
from throughtime.lm.tokenizer import Tokenizer, to_bytes


class Writing(TypedDict, total=False):
    """What `LoadedRun.generate` can be told; `throughtime sample` has the same by the same names.

    Attributes:
        length: Most tokens to generate; 500 if not given.
        temperature: This and the next seven are `Sampling`'s. What isn't given is as the run's `generation_config.json` has it.
        seed: Makes the text repeatable.
        stop: A text, or several, before which to stop.
        alphabet: The only characters that may be written.
        precision: What products multiply: "float32", "bfloat16" or "int8"; see `throughtime.stream`.
    """

    length: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float
    no_repeat_ngram: int
    greedy: bool
    seed: int | None
    stop: str | Sequence[str]
    alphabet: str | None
    precision: str


class LoadedRun:
    """A trained run with its weights; `load` makes one.

    Attributes:
        run: Its folder, opened: options, measured results, encoded text.
        model: Its language model, an `nn.Module` in eval mode: `model(ids, state)` gives logits (T, B, V) and the next state.
        tokenizer: Text to the model's token ids and back.
    """

    def __init__(self, run: Run, model: LanguageModel) -> None:
        self.run = run
        self.model = model
        self.tokenizer: Tokenizer = run.tokenizer

    @property
    def options(self) -> dict[str, Any]:
        """What it was trained with, as in `TrainingOptions`."""
        return self.run.options

    @property
    def results(self) -> dict[str, Any] | None:
        """What training came to and what was measured on the held-out text; `None` while training isn't done."""
        return self.run.results

    reads_ids = True  # for `throughtime.stream`, as is `stages`

    def stages(self) -> list[nn.Module]:
        """Return the model's layers in order: `throughtime.stream(run)` steps it, token id by token id."""
        return self.model.stages()

    def generate(self, prompt: str = "", **options: Unpack[Writing]) -> str:
        """Go on from a prompt; return the prompt and what follows it.

        With the same seed it is the text that `throughtime sample` prints, which adds a line end.

        Args:
            prompt: What to go on from. What the run doesn't know in it is read as its unknown token.
            options: `length`, `temperature`, `seed`, …: see `Writing`.

        Raises:
            InputError: An option isn't known or is out of range.
        """
        return "".join(self.stream(prompt, **options))

    def stream(self, prompt: str = "", **options: Unpack[Writing]) -> Iterator[str]:
        """Yield the text of `generate` piece by piece, as it comes: the prompt first."""
        return self._written(prompt, 0, options)

    def samples(self, prompt: str = "", count: int = 3, **options: Unpack[Writing]) -> list[str]:
        """Return several texts that go on from a prompt, as `throughtime sample --samples` writes them; else as `generate`."""
        count = settled("count", count, int)
        if count < 1:
            raise InputError(f"count = {count}: expected at least 1 sample")
        return ["".join(self._written(prompt, number, options)) for number in range(count)]

    def probabilities(self, prompt: str = "") -> dict[str, float]:
        r"""Return the probability of each token that may follow a prompt, by name, the likeliest first; they sum to 1.

        Names are what is written, words without the space before them; "<unk>" is the unknown token, "<eos>" the end of a
        sequence, and bytes that are no character by themselves go by their escapes, "\xed".
        """
        return next_probabilities(self.model, self.tokenizer, _text("prompt", prompt))

    @overload
    def score(self, lines: str) -> float: ...  # pyright: ignore[reportOverlappingOverload] a str is no list of its letters

    @overload
    def score(self, lines: Iterable[str]) -> NDArray[np.float64]: ...

    def score(self, lines: str | Iterable[str]) -> float | NDArray[np.float64]:
        """Return ln p of each line, its end included, every one read from a fresh state: what `throughtime score` prints.

        Args:
            lines: One line, or several; each with its line end or without.

        Returns:
            One number, or as many (N,) as there are lines.

        Raises:
            InputError: A line is no text or holds a line end inside, or the run knows no line ends.
        """
        if isinstance(lines, str):
            return float(self.score([lines])[0])
        if not isinstance(lines, Iterable):
            raise InputError(f"lines = {lines!r}: expected a text, or several")
        given = [self._line(number, line) for number, line in enumerate(lines)]
        return -score_lines(self.model, self.tokenizer, given).nats if given else np.zeros(0)

    def _line(self, number: int, line: str) -> str:
        if not isinstance(line, str):
            raise InputError(f"lines[{number}] = {line!r}: expected text")
        line = line[:-1].removesuffix("\r") if line.endswith("\n") else line
        if "\n" in line:
            raise InputError(f"lines[{number}] holds a line end inside; expected one line in each text")
        return to_bytes(line).decode("latin-1") if self.tokenizer.level == "byte" else line

    def _written(self, prompt: str, number: int, options: Writing) -> Iterator[str]:
        """Return the pieces of one of several samples."""
        prompt = _text("prompt", prompt)
        for name in options:
            if name not in Writing.__annotations__:
                raise unknown_name("option", name, Writing.__annotations__)
        apart: dict[str, Any] = {"length": 500, "seed": None, "stop": (), "alphabet": None, "precision": "float32"}
        chosen: dict[str, Any] = apart | options
        length, seed, stop, alphabet, precision = (chosen.pop(name) for name in apart)
        if not isinstance(stop, Iterable):
            raise InputError(f"stop = {stop!r}: expected a text, or several")
        stop = (stop,) if isinstance(stop, str) else [_text(f"stop[{place}]", text) for place, text in enumerate(stop)]
        alphabet = None if alphabet is None else _text("alphabet", alphabet)
        sampling = Sampling(**self.run.generation | chosen)
        seed = seed_of_sample(seed, number)
        how = (prompt, length, sampling, seed, stop, alphabet)
        pieces = generate(self.model, self.tokenizer, *how, precision=precision)
        return chain([prompt], pieces)

    def __repr__(self) -> str:
        parts = [
            self.model.config.describe(),
            f"{self.model.config.vocabulary_size:,} tokens of level {self.tokenizer.level}",
        ]
        if self.results is not None:
            parts.append(f"held out: {self.results['held_out']['nats_per_token']:.4f} nats per token")
        return f"<throughtime run {str(self.run.folder)!r}: {'; '.join(parts)}>"


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} = {value!r}: expected text")
    return value


def load(folder: str | Path, *, device: str = "auto", last: bool = False) -> LoadedRun:
    """Load a trained run: a folder that `throughtime train` wrote.

    Args:
        folder: Where it is.
        device: Where the model goes: "auto" takes a GPU where there is one; "cpu", "cuda", …
        last: Whether to take the last weights, not the best that were measured.

    Raises:
        InputError: There is no run, or a file of it is missing, truncated or altered.

    Example:
        >>> from pathlib import Path
        >>> from throughtime.lm import TrainingOptions, train
        >>> _ = Path("book.txt").write_text("once upon a time there was a king. " * 40)
        >>> _ = train(["book.txt"], "run", TrainingOptions(hidden=8, steps=10, batch=4, bptt=16))
        >>> run = load("run")
        >>> text = run.generate("once", length=20, seed=1)
        >>> len(text), round(sum(run.probabilities("once upon").values()), 6)
        (24, 1.0)
    """
    run = open_run(folder)
    return LoadedRun(run, run.load_model(device, last=last))
