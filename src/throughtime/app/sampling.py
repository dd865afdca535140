"""A prompt on its way to a run, and generated text on its way to the terminal, a pipe or a file."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from throughtime.app.terminal import Output, note, visible
from throughtime.errors import InputError
from throughtime.lm.generation import MOST_TOKENS, Beam, Sampling, generate, generate_bytes, seed_of_sample
from throughtime.lm.reading import decode_text, read_bytes
from throughtime.lm.tokenizer import ByteTokenizer, to_bytes
from throughtime.lm.words import WordTokenizer, cut

if TYPE_CHECKING:
    from throughtime.lm.run import Run
    from throughtime.lm.tokenizer import Tokenizer

MOST_SAMPLES = MOST_TOKENS


def read_prompt(given: str, file: Path | None, tokenizer: "Tokenizer") -> str:
    """Return what a run goes on from: the text that was given, or a file's.

    Args:
        given: The text; bytes of a shell's argument that are no UTF-8 are as Python gives them.
        file: A file, or "-" for standard input: any bytes for a run of bytes, else UTF-8. All of it is the prompt; where
            sequences are lines, its line end isn't.
        tokenizer: The run's tokenizer.

    Raises:
        InputError: Both were given; a file is missing or empty, or not UTF-8 where it has to be.
    """
    if file is None:
        return given if tokenizer.level == "byte" else decode_text("--prompt", to_bytes(given))
    if given:
        raise InputError("--prompt and --prompt-file both give the prompt; expected one of them")
    if str(file) == "-" and sys.stdin is None:
        raise InputError("--prompt-file -: standard input is closed; expected a prompt there")
    if str(file) == "-":
        name, data = "standard input", sys.stdin.buffer.read()
    else:
        name, data = str(file), read_bytes(file)
    if not data:
        raise InputError(f"{name} is empty; expected a prompt, or no --prompt-file to begin anywhere")
    if tokenizer.sequences == "line":
        data = data.removesuffix(b"\n").removesuffix(b"\r")
    return data.decode("utf-8", "surrogateescape") if tokenizer.level == "byte" else decode_text(name, data)


def stop_texts(given: Sequence[str]) -> list[str]:
    r"""Return the texts to stop before: each as it was given and, as a shell passes "\n" on as two characters, as it reads then.

    Example:
        >>> stop_texts(["the end", r"\n\n"])
        ['the end', '\\n\\n', '\n\n']
    """
    read = [re.sub(r"\\([nrt\\])", lambda found: _ESCAPES[found[1]], text) for text in given]
    return list(dict.fromkeys(text for pair in zip(given, read, strict=True) for text in pair))


_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


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
    precision: str = "float32",
) -> None:
    """Write the prompt and its continuation to stdout as they come; what the run can't read in the prompt is said once.

    A run of bytes writes them as they are; to a terminal those that are no UTF-8 go by their escapes. To a pipe or file, a single
    stream of bytes isn't even given a line end.

    Args:
        run: The run that writes.
        prompt: What to go on from.
        length: Most tokens to generate.
        sampling: How each is chosen.
        seed: Makes the text repeatable, and with it all further samples.
        stop: Texts before which to stop.
        samples: How many continuations; those of a stream are set apart by an empty line.
        last: Whether the last weights write, not the best that were measured.
        alphabet: The only characters that may be written.
        precision: What products multiply.

    Raises:
        InputError: A number is out of its range, or the run is damaged.
    """
    if not 1 <= samples <= MOST_SAMPLES:
        raise InputError(f"--samples {samples}: expected a whole number from 1 to {MOST_SAMPLES:,}")
    tokenizer = run.tokenizer
    _say_unknown(prompt, tokenizer)
    model = run.load_model(last=last)
    is_bare = isinstance(tokenizer, ByteTokenizer) and tokenizer.eos_id is None and samples == 1
    for number in range(samples):
        output = Output()
        if number and tokenizer.eos_id is None:
            output.write("\n")
        how = (prompt, length, sampling, seed_of_sample(seed, number), stop, alphabet)
        if isinstance(tokenizer, ByteTokenizer):
            # which refuses what can't be, before anything is written
            continuation = generate_bytes(model, tokenizer, *how, precision=precision)
            output.write(to_bytes(prompt))
            output.write_all(continuation)
        else:
            continued = generate(model, tokenizer, *how, precision=precision)
            output.write(prompt)
            output.write_all(continued)
        if not is_bare or sys.stdout.isatty():
            output.end_line()


def write_beams(prompt: str, found: Sequence[Beam], tokenizer: "Tokenizer") -> None:
    """Write what beam search found, each after its log-probability if there are several."""
    for beam in found:
        output = Output()
        output.write(f"{beam.log_probability:.4f}\t" if len(found) > 1 else "")
        if isinstance(tokenizer, ByteTokenizer):
            output.write(to_bytes(prompt) + b"".join(map(tokenizer.token_bytes, beam.ids)))
        else:
            output.write(prompt + beam.text)
        output.write("\n")


def _say_unknown(prompt: str, tokenizer: "Tokenizer") -> None:
    unknown = _unknown(prompt, tokenizer)
    if unknown:
        note(f"not in the run's vocabulary, read as unknown: {' '.join(map(visible, unknown))}", "dim")


def _unknown(prompt: str, tokenizer: "Tokenizer") -> list[str]:
    """Return the characters, words and white space of a prompt that the run doesn't know."""
    if tokenizer.unknown_id is None:
        return []
    read, _ = tokenizer.split_prompt(prompt)
    in_words = isinstance(tokenizer, WordTokenizer)
    parts = [piece[1:] for piece in cut(read, tokenizer.split_punctuation)] if in_words else list(read)
    known = tokenizer.encode(read) != tokenizer.unknown_id
    return list(dict.fromkeys(part for part, is_known in zip(parts, known, strict=True) if not is_known))
