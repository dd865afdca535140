"""Streaming generated text to the terminal."""

import sys
from typing import TYPE_CHECKING

import numpy as np

from throughtime.app.terminal import messages, visible
from throughtime.lm.generate import Sampling, generate

if TYPE_CHECKING:
    from throughtime.lm.run import Run


def stream(run: "Run", prompt: str, length: int, sampling: Sampling, seed: int | None) -> None:
    """Write the prompt and its continuation to stdout as they come; what the run can't read in the prompt is said once.

    Args:
        run: The run that writes.
        prompt: What to go on from.
        length: Tokens to generate.
        sampling: How each is chosen.
        seed: Makes the text repeatable.

    Raises:
        InputError: `length` is below 1, or the run is damaged.
    """
    tokenizer = run.tokenizer
    unknown = _unknown(prompt, tokenizer.encode(prompt), tokenizer.unknown_id)
    if unknown:
        note = f"not in the run's vocabulary, read as unknown: {' '.join(map(visible, unknown))}"
        messages().print(note, style="dim", soft_wrap=True)
    pieces = generate(run.load_model(), tokenizer, prompt, length, sampling, seed)
    _write(prompt)
    last = prompt
    for piece in pieces:
        _write(piece)
        last = piece
    if not last.endswith("\n"):
        _write("\n")


def _unknown(prompt: str, ids: np.ndarray, unknown_id: int | None) -> list[str]:
    if unknown_id is None or len(ids) != len(prompt):
        return []
    return list(dict.fromkeys(c for c, i in zip(prompt, ids, strict=True) if i == unknown_id))


def _write(text: str) -> None:
    """Write at once; on a terminal without the control characters that could command it."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()
