"""Generated text on its way to the terminal."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from throughtime.app.terminal import messages, visible
from throughtime.errors import InputError
from throughtime.lm.generate import Beam, Sampling, generate, seed_of_sample

if TYPE_CHECKING:
    from throughtime.lm.run import Run
    from throughtime.lm.tokenizer import Tokenizer


def stream(
    run: "Run",
    prompt: str,
    length: int,
    sampling: Sampling,
    seed: int | None,
    *,
    stop: Sequence[str] = (),
    samples: int = 1,
    last: bool = False,
    alphabet: str | None = None,
) -> None:
    """Write the prompt and its continuation to stdout as they come; what the run can't read in the prompt is said once.

    Args:
        run: The run that writes.
        prompt: What to go on from.
        length: Most tokens to generate.
        sampling: How each is chosen.
        seed: Makes the text repeatable; each further sample takes the next number.
        stop: Texts before which to stop.
        samples: How many continuations; those of a stream are set apart by an empty line.
        last: Whether the last weights write, not the best that were measured.
        alphabet: The only characters that may be written.

    Raises:
        InputError: A number is below 1, or the run is damaged.
    """
    if samples < 1:
        raise InputError(f"--samples {samples}: expected at least 1")
    tokenizer = run.tokenizer
    _say_unknown(prompt, tokenizer)
    prompt = tokenizer.prompt(prompt)
    model = run.load_model(last=last)
    for number in range(samples):
        if number and tokenizer.eos_id is None:
            _write("\n")
        chance = seed_of_sample(seed, number)
        pieces = generate(model, tokenizer, prompt, length, sampling, chance, stop, alphabet)
        _write(prompt)
        written = prompt
        for piece in pieces:
            _write(piece)
            written = piece
        if not written.endswith("\n"):
            _write("\n")


def write_beams(prompt: str, found: Sequence[Beam]) -> None:
    """Write what beam search found, each after its log-probability if there are several."""
    for beam in found:
        score = f"{beam.log_probability:.4f}\t" if len(found) > 1 else ""
        _write(f"{score}{prompt}{beam.text}\n")


def _say_unknown(prompt: str, tokenizer: "Tokenizer") -> None:
    unknown = _unknown(prompt, tokenizer)
    if unknown:
        note = f"not in the run's vocabulary, read as unknown: {' '.join(map(visible, unknown))}"
        messages().print(note, style="dim", soft_wrap=True)


def _unknown(prompt: str, tokenizer: "Tokenizer") -> list[str]:
    """Return the characters or words of a prompt that the run doesn't know."""
    if tokenizer.unknown_id is None:
        return []
    parts = list(prompt) if tokenizer.level == "char" else tokenizer.prompt(prompt).split()
    known = (np.any(tokenizer.encode(part) == tokenizer.unknown_id) for part in parts)
    return list(dict.fromkeys(part for part, lacks in zip(parts, known, strict=True) if lacks))


def _write(text: str) -> None:
    """Write at once; on a terminal without the control characters that could command it."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()
