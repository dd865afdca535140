"""How the files of a corpus become ids, in one pass, while the vocabulary is still growing.

A level's encoder gives out ids as its characters or words come. Cutting a text in words is what takes long, so pieces of a large
one are cut by several processes, each with ids of its own, which become the corpus's in the order of the text: the same that one
process gives. `TokenFile` holds them, in the narrowest integers that will do. When all is read, the sequences that are held out are
put last and rare words become unknown.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from throughtime.errors import InputError, unknown_name
from throughtime.lm.bpe import LEAST_VOCABULARY, train_bpe
from throughtime.lm.reading import CHUNK, lines_of, read_texts
from throughtime.lm.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    code_points_of,
    level_names,
    sequence_names,
)
from throughtime.lm.words import (
    GrowingWords,
    WordTokenizer,
    cut,
    ids_of,
    lines_of_their_own,
    whole_words,
    words_of_their_own,
)
from throughtime.lm.words import encode_lines as encode_word_lines
from throughtime.training.files import create_beside, put_in_place

_MOST_FOR_BPE = 100_000_000  # characters that a bpe's merges are learned from
_LONGEST = 4_000_000  # characters without white space that may be held back
_WORTH_PROCESSES = 16 << 20  # bytes of text from which starting processes pays


@dataclass(frozen=True)
class Tokenization:
    """How a text is cut into tokens.

    Attributes:
        level: "char", "byte", "word" or "bpe".
        sequences: "line" or "file" where each of them is a sequence of its own, ended by an end-of-sequence token; `None` where
            the whole text is one stream.
        vocabulary: Most tokens there may be: 10,000 words, the unknown one included, or 2,000 of a bpe, if not given. Only for
            these two.
        min_count: How often a word must occur in the training text to be a token.
        split_punctuation: Whether punctuation marks are tokens of their own, at level "word".

    Raises:
        InputError: A name or a number can't be.
    """

    level: str = "char"
    sequences: str | None = None
    vocabulary: int | None = None
    min_count: int = 2
    split_punctuation: bool = True

    def __post_init__(self) -> None:
        if self.level not in level_names():
            raise unknown_name("level", self.level, level_names())
        if self.sequences not in (None, *sequence_names()):
            raise unknown_name("sequence", str(self.sequences), sequence_names())
        if self.min_count < 1:
            raise InputError(f"--min-count {self.min_count}: expected at least 1")
        if self.vocabulary is not None:
            least = {"word": 2, "bpe": LEAST_VOCABULARY}.get(self.level)
            if least is None:
                raise InputError(f"--vocabulary is for --level word and bpe; at level {self.level} nothing is left out")
            if self.vocabulary < least:
                raise InputError(f"--vocabulary {self.vocabulary}: expected at least {least} at level {self.level}")

    @property
    def most_tokens(self) -> int:
        """The largest vocabulary of a level that has one."""
        return self.vocabulary or {"word": 10_000, "bpe": 2_000}[self.level]

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


class Encoder(Protocol):
    """Turns a corpus into ids, piece by piece.

    Attributes:
        level: Its tokenizer's.
        largest: The largest id so far, or that can be.
        state: What is held back until more text has come; may be kept and put back.
    """

    level: str
    largest: int
    state: Any

    def feed(self, text: str) -> NDArray[np.integer]:
        """Return the ids of the next piece of the stream."""
        ...

    def end(self) -> NDArray[np.integer]:
        """Return the ids of what was held back: the stream ends here."""
        ...

    def encode_lines(self, lines: list[str]) -> NDArray[np.integer]:
        """Return the ids of lines, each ended by the end-of-sequence token."""
        ...

    def eos(self) -> NDArray[np.integer]:
        """Return the end-of-sequence token alone."""
        ...

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of all that came."""
        ...


class Known(NamedTuple):
    """A vocabulary that there is already, whose ids stay.

    Attributes:
        tokenizer: The tokenizer that has it.
        grows: Whether characters or words that are new get ids after it; else they are unknown.
    """

    tokenizer: Tokenizer
    grows: bool


def make_encoder(
    how: Tokenization, files: list[tuple[Path, bool]], split: float, known: Known | None = None
) -> Encoder:
    """Return an encoder that has seen nothing yet but a vocabulary that is known, or has learned its merges at level "bpe"."""
    if known is not None and how.level == "char" and known.grows:
        return _CharEncoder(how, code_points_of(cast("CharTokenizer", known.tokenizer).characters).tolist())
    if known is not None and how.level == "word" and known.grows:
        return _WordEncoder(how, cast("WordTokenizer", known.tokenizer).words)
    if known is not None:
        return encoder_of(known.tokenizer)
    if how.level == "bpe":
        texts = _training_text(files, how, split)
        return _WholeWordEncoder(
            train_bpe(texts, max(how.most_tokens - bool(how.sequences), LEAST_VOCABULARY), how.sequences)
        )
    return {"char": _CharEncoder, "byte": _ByteEncoder, "word": _WordEncoder}[how.level](how)


class Cutters(NamedTuple):
    """Processes that cut text in words, and how many pieces may be under way at a time."""

    processes: ProcessPoolExecutor
    ahead: int


@contextmanager
def cutters(how: Tokenization, size: int) -> Iterator[Cutters | None]:
    """Yield processes that cut text in words, one a core; or `None` where one process does it as well.

    They are forked, so that no script of a user's is run again and no library loaded twice; they use nothing of torch.

    Args:
        how: How the text is cut.
        size: Its bytes.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if how.level != "word" or size < _WORTH_PROCESSES or cores < 2:
        yield None
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(cores, fork, initializer=_end_with, initargs=(os.getpid(),)) as processes:
        try:
            yield Cutters(processes, 2 * cores)
        finally:
            processes.shutdown(cancel_futures=True)


def _end_with(parent: int) -> None:
    """Leave Ctrl-C to the parent process, and end when that is gone, even if it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def encode_file(
    texts: Iterator[str], encoder: Encoder, sequences: str | None, side_by_side: Cutters | None = None
) -> Iterator[NDArray[np.integer]]:
    """Yield the ids of one file, piece by piece; the end of a stream isn't among them."""
    if side_by_side is not None and isinstance(encoder, _WordEncoder):
        yield from _encode_side_by_side(texts, encoder, sequences, side_by_side)
    elif sequences == "line":
        yield from map(encoder.encode_lines, lines_of(texts, encoder.level))
    else:
        yield from map(encoder.feed, texts)
    if sequences == "file":
        yield encoder.end()
        yield encoder.eos()


def _encode_side_by_side(
    texts: Iterator[str], encoder: "_WordEncoder", sequences: str | None, cutters: Cutters
) -> Iterator[NDArray[np.integer]]:
    """Yield what the encoder would, while the next pieces are being cut."""
    under_way: deque[Future[tuple[list[str], NDArray[np.uint32]]]] = deque()
    try:
        for future in _cut_side_by_side(texts, encoder, sequences, cutters.processes):
            under_way.append(future)
            if len(under_way) == cutters.ahead:
                yield encoder.adopt(*under_way.popleft().result())
    except InputError:  # what came before the place that is no text has given out ids, as it does in one process
        for future in under_way:
            encoder.adopt(*future.result())
        raise
    while under_way:
        yield encoder.adopt(*under_way.popleft().result())


def _cut_side_by_side(
    texts: Iterator[str], encoder: "_WordEncoder", sequences: str | None, processes: ProcessPoolExecutor
) -> Iterator[Future[tuple[list[str], NDArray[np.uint32]]]]:
    if sequences == "line":
        for lines in lines_of(texts, encoder.level):
            yield processes.submit(lines_of_their_own, lines, encoder.split_punctuation)
        return
    for text in texts:
        piece, follows = encoder.hold_back(text)
        yield processes.submit(words_of_their_own, piece, encoder.split_punctuation, follows)


def encoder_of(tokenizer: Tokenizer) -> Encoder:
    """Return an encoder whose vocabulary is fixed."""
    if tokenizer.level == "byte":
        return _ByteEncoder(Tokenization("byte", tokenizer.sequences))
    return _WholeWordEncoder(tokenizer) if tokenizer.level in ("word", "bpe") else _FixedEncoder(tokenizer)


class _FixedEncoder:
    """For tokens that don't reach beyond a piece of text."""

    state: Any = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.level = tokenizer.level
        self.largest = tokenizer.vocabulary_size - 1

    def feed(self, text: str) -> NDArray[np.integer]:
        return self._tokenizer.encode(text)

    def end(self) -> NDArray[np.integer]:
        return np.zeros(0, dtype=np.int64)

    def encode_lines(self, lines: list[str]) -> NDArray[np.integer]:
        return self._tokenizer.encode_lines(lines)

    def eos(self) -> NDArray[np.integer]:
        return np.array([self._tokenizer.eos_id])

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer


class _ByteEncoder(_FixedEncoder):
    """Takes each byte as the character of its number, as `read_texts` gives them."""

    def __init__(self, how: Tokenization) -> None:
        super().__init__(ByteTokenizer(how.sequences))

    def feed(self, text: str) -> NDArray[np.integer]:
        return np.frombuffer(text.encode("latin-1"), dtype=np.uint8)

    def encode_lines(self, lines: list[str]) -> NDArray[np.integer]:
        ids = self.feed("".join(line + "\n" for line in lines))
        return np.where(ids == ord("\n"), np.uint16(256), ids)


class _CharEncoder:
    level = "char"
    state: Any = None

    def __init__(self, how: Tokenization, known: Sequence[int] = ()) -> None:
        self._sequences = how.sequences
        self._ids = np.zeros(0x110000, dtype=np.uint32)  # of every code point there can be, 0 where it was not yet seen
        self._first = 2 if how.sequences else 1
        self._characters: list[int] = list(known)
        self._ids[self._characters] = np.arange(self._first, self._first + len(known))
        self.largest = self._first - 1 + len(known)

    def feed(self, text: str) -> NDArray[np.integer]:
        code_points = code_points_of(text)
        ids = self._ids[code_points]
        if not ids.all():
            new = np.unique(code_points[ids == 0])
            self._ids[new] = np.arange(self.largest + 1, self.largest + 1 + len(new))
            self._characters += new.tolist()
            self.largest += len(new)
            ids = self._ids[code_points]
        return ids

    def end(self) -> NDArray[np.integer]:
        return np.zeros(0, dtype=np.uint32)

    def encode_lines(self, lines: list[str]) -> NDArray[np.integer]:
        self._ids[ord("\n")] = 1  # no line holds one
        return self.feed("".join(line + "\n" for line in lines))

    def eos(self) -> NDArray[np.integer]:
        return np.array([1])

    def tokenizer(self) -> Tokenizer:
        return CharTokenizer("".join(map(chr, self._characters)), self._sequences)


class _WholeWordEncoder(_FixedEncoder):
    """Holds the last word back until it is surely whole; `state` is that word, and whether anything stood before it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.state = ("", False)

    def feed(self, text: str) -> NDArray[np.integer]:
        return self._encode(*self.hold_back(text))

    def hold_back(self, text: str) -> tuple[str, bool]:
        """Return the words that are surely whole now, and whether they go on from a word right before."""
        rest, follows = self.state
        piece, rest = whole_words(rest + text)
        if len(rest) > _LONGEST:
            if self._tokenizer.level == "word":
                raise InputError(
                    f"{_LONGEST:,} characters without white space: not a text of words; use --level char, byte or bpe"
                )
            piece, rest = piece + rest, ""  # a bpe may be cut anywhere
        self.state = rest, follows or bool(piece)
        return piece, follows

    def end(self) -> NDArray[np.integer]:
        (rest, follows), self.state = self.state, ("", False)
        return self._encode(rest, follows)

    def _encode(self, text: str, follows: bool) -> NDArray[np.integer]:
        return self._tokenizer.encode(text, follows)


class _WordEncoder(_WholeWordEncoder):
    def __init__(self, how: Tokenization, known: Sequence[str] = ()) -> None:
        self.split_punctuation, self._sequences = how.split_punctuation, how.sequences
        super().__init__(WordTokenizer([], self.split_punctuation, self._sequences))
        self._ids = GrowingWords(first=2 if how.sequences else 1)
        ids_of(list(known), self._ids)
        self._grown(np.zeros(0, dtype=np.int64))

    def encode_lines(self, lines: list[str]) -> NDArray[np.integer]:
        return self._grown(encode_word_lines(lines, self.split_punctuation, self._ids, 1))

    def _encode(self, text: str, follows: bool) -> NDArray[np.integer]:
        return self._grown(ids_of(cut(text, self.split_punctuation, follows), self._ids))

    def adopt(self, pieces: list[str], own: NDArray[np.uint32]) -> NDArray[np.integer]:
        """Return the ids of what another process cut: its pieces, in order of appearance, and where they stand."""
        ids = ids_of(pieces, self._ids)
        if self._sequences == "line":
            ids = np.append(1, ids)  # a process's own id 0 is the line end
        return self._grown(ids[own])

    def _grown(self, ids: NDArray[np.integer]) -> NDArray[np.integer]:
        self.largest = len(self._ids) + (1 if self._sequences else 0) - 1
        return ids

    def tokenizer(self) -> Tokenizer:
        words = [word for word, number in self._ids.items() if number]
        return WordTokenizer(words, self.split_punctuation, self._sequences)


class TokenFile:
    """Tokens in a file that grows, in the narrowest unsigned integers that hold them.

    Args:
        target: Where the file will be when it is finished; until then it stands beside.
    """

    def __init__(self, target: Path) -> None:
        self.count = 0
        self.dtype = np.dtype(np.uint8)
        self._target = target
        self.path, self._file = create_beside(target)

    def append(self, ids: NDArray[np.integer], largest: int) -> None:
        """Write ids at the end; none of them is above `largest`."""
        needed = np.min_scalar_type(max(largest, 255))
        if needed.itemsize > self.dtype.itemsize:
            self._widen(needed)
        _write(self._file, ids.astype(self.dtype, copy=False))
        self.count += len(ids)

    def _widen(self, dtype: np.dtype) -> None:
        self._copy(dtype, lambda chunk: chunk)

    def _copy(self, dtype: np.dtype, change: Callable[[NDArray[np.integer]], NDArray[np.integer]]) -> None:
        """Rewrite what is there, a chunk at a time."""
        copy_path, copy = create_beside(self._target)
        try:
            self._file.seek(0)
            while len(chunk := np.fromfile(self._file, self.dtype, CHUNK)):
                _write(copy, change(chunk).astype(dtype, copy=False))
        except BaseException:
            copy.close()
            copy_path.unlink()
            raise
        self.close()
        self.path, self._file = copy_path, copy
        self.dtype = dtype

    def truncate(self, count: int) -> None:
        """Take back all tokens from `count` on."""
        self._file.flush()
        self._file.truncate(count * self.dtype.itemsize)
        self._file.seek(0, 2)
        self.count = count

    def tokens(self) -> NDArray[np.integer]:
        """Return what was written, memory-mapped."""
        self._file.flush()
        return np.memmap(self.path, dtype=self.dtype, mode="r") if self.count else np.zeros(0, self.dtype)

    def translate(self, table: NDArray[np.integer]) -> None:
        """Replace each id by what stands in its place in a table."""
        self._copy(table.dtype, lambda chunk: table[chunk])

    def rewrite(self, tokens: NDArray[np.integer]) -> None:
        """Replace everything."""
        self.truncate(0)
        self.dtype = tokens.dtype
        self.append(tokens, 255)

    def finish(self) -> str:
        """Put the file in its place; return its SHA-256."""
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        self._file.close()
        put_in_place(self.path, self._target)
        return digest

    def close(self) -> None:
        """Close the file, and remove it if it isn't in its place."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def is_held_out(index: NDArray[np.int64], split: float) -> NDArray[np.bool_]:
    """Return which sequences are held out: the share 1 − split of them, evenly spread, counted from 0."""
    share = 1 - split + 1e-12  # so that a tenth is a tenth, whatever 1 − 0.9 comes to
    return np.floor((index + 1) * share) > np.floor(index * share)


def held_out_last(tokens: NDArray[np.integer], eos_id: int, split: float) -> tuple[NDArray[np.integer], int]:
    """Return the tokens with the sequences that are held out put last, and how many tokens come before these.

    Raises:
        InputError: There are fewer than two sequences.
    """
    ends = np.flatnonzero(np.asarray(tokens) == eos_id) + 1
    if len(ends) < 2:
        raise InputError(
            f"{len(ends)} sequence in all; to train on some and hold out others, at least 2 are needed. A text that isn't "
            "made of sequences is one stream: --mode stream"
        )
    chosen = is_held_out(np.arange(len(ends)), split)
    if chosen.all() or not chosen.any():
        chosen = np.arange(len(ends)) == len(ends) - 1
    held_out = np.repeat(chosen, np.diff(ends, prepend=0))
    return np.concatenate([tokens[~held_out], tokens[held_out]]), int(np.count_nonzero(~held_out))


def keep_frequent(
    tokens: NDArray[np.integer], boundary: int, tokenizer: WordTokenizer, how: Tokenization, known: int = 0
) -> tuple[NDArray[np.integer], WordTokenizer]:
    """Return what each id becomes when rare words are made unknown, and the tokenizer of the others, the most frequent first.

    The first `known` words stay where they are, however rare. Unless a size of the vocabulary is given, as many come after them
    as there would be without. Words are counted where they are trained on; what stands in the held-out text only is unknown, as it
    would be in any new text.
    """
    counts = np.zeros(tokenizer.vocabulary_size, dtype=np.int64)
    for begin in range(0, boundary, CHUNK):
        counts += np.bincount(tokens[begin : min(begin + CHUNK, boundary)], minlength=len(counts))
    first = tokenizer.vocabulary_size - len(tokenizer.words)
    new = first + known
    order = new + np.argsort(-counts[new:], kind="stable")
    most = how.vocabulary - new if known and how.vocabulary else how.most_tokens - first
    frequent = order[counts[order] >= how.min_count][: max(most, 0)]
    kept = np.concatenate([np.arange(first, new), frequent])
    table = np.zeros(tokenizer.vocabulary_size, dtype=np.min_scalar_type(max(first + len(kept) - 1, 255)))
    table[:first] = np.arange(first)
    table[kept] = first + np.arange(len(kept))
    words = [tokenizer.words[number - first] for number in kept]
    return table, WordTokenizer(words, how.split_punctuation, how.sequences)


def _training_text(files: list[tuple[Path, bool]], how: Tokenization, split: float) -> Iterator[str]:
    """Yield the text that will be trained on, as far as it is needed to learn a bpe's merges; what is no text is passed over."""
    most = sum(path.stat().st_size for path, _ in files) * (1.0 if how.sequences == "line" else split)
    read, lines_so_far = 0, 0
    for path, _ in files:
        texts = read_texts(path, how.level)
        try:
            for lines in lines_of(texts, how.level) if how.sequences == "line" else ([text] for text in texts):
                if read >= min(most, _MOST_FOR_BPE):
                    return
                if how.sequences == "line":
                    held_out = is_held_out(lines_so_far + np.arange(len(lines)), split)
                    lines_so_far += len(lines)
                    lines = [line for line, out in zip(lines, held_out, strict=True) if not out]
                for text in lines:
                    text = text[: max(int(most - read), 1)]
                    read += len(text.encode())
                    yield text
        except InputError:
            continue


def _write(file: BufferedRandom, ids: NDArray[np.generic]) -> None:
    """Write numbers to a file; unlike numpy's `tofile`, it says why it can't."""
    file.write(np.ascontiguousarray(ids).data)
