"""Text to token ids and back: what a tokenizer is, and the two simplest, one token a Unicode character or one a byte.

A text is either one stream of tokens, or sequences: lines or files, each ended by an end-of-sequence token (EOS) of its own,
which stands for the line end.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from throughtime.errors import InputError, unknown_name
from throughtime.lm.bpe import BpeTokenizer
from throughtime.lm.words import WordTokenizer

_LINE_END = 10  # "\n"
LINE_ENDS = ("\n", "\r\n", "\r")
UNKNOWN = "\ufffd"  # U+FFFD REPLACEMENT CHARACTER stands for the unknown token where ids become text


class Decoder(Protocol):
    """Turns ids that arrive one by one into text, as soon as there is any."""

    def push(self, token: int) -> str:
        """Return the text that this token completes, which may be none yet."""
        ...


class Tokenizer(Protocol):
    """What a language model needs of its tokens.

    Attributes:
        level: Its name, one of `level_names()`.
        vocabulary_size: V; ids are 0 … V−1.
        unknown_id: The id of whatever was not in the training text, or `None` where everything is known.
        sequences: "line" or "file" where each of them is a sequence of its own; `None` where the text is one stream.
        eos_id: The id of the token that ends a sequence, `None` where the text is one stream.
        line_end: How most lines of a stream end, one of `LINE_ENDS`.
    """

    level: str
    vocabulary_size: int
    unknown_id: int | None
    sequences: str | None
    eos_id: int | None
    line_end: str

    def encode(self, text: str, follows: bool = False) -> NDArray[np.int64]:
        """Return the ids (N,) of a text. What is unknown gets `unknown_id`.

        Args:
            text: The text.
            follows: Whether it goes on from a word right before it, which matters where words are tokens.
        """
        ...

    def encode_lines(self, lines: Iterable[str]) -> NDArray[np.int64]:
        """Return the ids of lines one after the other, each ended by `eos_id`."""
        ...

    def split_prompt(self, text: str) -> tuple[str, str]:
        """Return the part of a prompt that is read, and the space after it that is part of the token to come, or ""."""
        ...

    def begins_with_space(self, before: int | None) -> NDArray[np.bool_]:
        """Return which tokens (V,) bring a space of their own with them, after a token or at the start of a text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids."""
        ...

    def decoder(self) -> Decoder:
        """Return a fresh decoder for streaming."""
        ...

    def bytes_of(self, ids: NDArray[np.integer]) -> int:
        """Return how many bytes of UTF-8 the tokens stand for."""
        ...

    def characters_of(self, ids: NDArray[np.integer]) -> int:
        """Return how many characters the tokens stand for."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return all that `tokenizer_from_json` needs."""
        ...


class CharTokenizer:
    """One token a Unicode character (code point) of the training text; id 0 is the unknown character.

    Args:
        characters: The known characters, without repetition; the first gets id 1, or 2 where there are sequences.
        sequences: "line" or "file" where each of them is a sequence of its own, ended by the token with id 1; else `None`.
        line_end: How most lines of a stream end.

    Example:
        >>> tokenizer = CharTokenizer("abc")
        >>> tokenizer.encode("cab?").tolist()
        [3, 1, 2, 0]
        >>> tokenizer.decode([3, 1, 2])
        'cab'
    """

    level = "char"
    unknown_id: int | None = 0

    def __init__(self, characters: str | Sequence[str], sequences: str | None = None, line_end: str = "\n") -> None:
        self.characters = "".join(characters)
        self.sequences = sequences
        self.line_end = line_end
        self.eos_id = 1 if sequences else None
        code_points = code_points_of(self.characters)
        if len(np.unique(code_points)) != len(code_points):
            raise InputError("a character tokenizer was given the same character twice; expected each one once")
        self._first = 2 if sequences else 1
        self._texts = UNKNOWN + ("\n" if sequences else "") + self.characters
        self.vocabulary_size = len(self._texts)
        self._order = np.argsort(code_points)
        self._sorted = code_points[self._order]
        self._sizes = np.array([len(c.encode("utf-8", "surrogatepass")) for c in self._texts])

    def encode(self, text: str, follows: bool = False) -> NDArray[np.int64]:
        """Return the ids (N,) of a text; an unknown character gets id 0. `follows` makes no difference."""
        code_points = code_points_of(text)
        if not len(self._sorted):
            return np.zeros(len(code_points), dtype=np.int64)
        place = np.minimum(np.searchsorted(self._sorted, code_points), len(self._sorted) - 1)
        return np.where(self._sorted[place] == code_points, self._order[place] + self._first, 0)

    def encode_lines(self, lines: Iterable[str]) -> NDArray[np.int64]:
        """Return the ids of lines, each ended by `eos_id`."""
        assert self.eos_id is not None
        text = "".join(line + "\n" for line in lines)
        ids = self.encode(text)
        ids[code_points_of(text) == _LINE_END] = self.eos_id
        return ids

    def split_prompt(self, text: str) -> tuple[str, str]:
        """Return a prompt as it is: a space is a token."""
        return text, ""

    def begins_with_space(self, before: int | None) -> NDArray[np.bool_]:
        """Return that no token brings a space with it."""
        return np.zeros(self.vocabulary_size, dtype=bool)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; the unknown token becomes U+FFFD, the end of a sequence a line end."""
        return "".join(self._texts[token] for token in ids)

    def decoder(self) -> Decoder:
        """Return a decoder: every token is a character at once."""
        return _CharDecoder(self)

    def bytes_of(self, ids: NDArray[np.integer]) -> int:
        """Return how many bytes of UTF-8 the tokens stand for; an unknown one counts as U+FFFD."""
        counts = np.bincount(ids, minlength=self.vocabulary_size)
        return int(counts @ self._sizes)

    def characters_of(self, ids: NDArray[np.integer]) -> int:
        """Return how many characters the tokens stand for: one each."""
        return len(ids)

    def to_json(self) -> dict[str, Any]:
        """Return all that `tokenizer_from_json` needs."""
        return {
            "level": self.level,
            "sequences": self.sequences,
            "line_end": self.line_end,
            "characters": self.characters,
        }


class _CharDecoder:
    def __init__(self, tokenizer: CharTokenizer) -> None:
        self._tokenizer = tokenizer

    def push(self, token: int) -> str:
        return self._tokenizer.decode([token])


class ByteTokenizer:
    """One token a byte, ids 0 … 255: any file, any encoding, nothing unknown.

    Args:
        sequences: "line" or "file" where each of them is a sequence of its own, ended by the token with id 256; else `None`.
        line_end: How most lines of a stream end.

    Example:
        >>> ByteTokenizer().encode("한").tolist()
        [237, 149, 156]
    """

    level = "byte"
    unknown_id: int | None = None

    def __init__(self, sequences: str | None = None, line_end: str = "\n") -> None:
        self.sequences = sequences
        self.line_end = line_end
        self.eos_id = 256 if sequences else None
        self.vocabulary_size = 257 if sequences else 256

    def encode(self, text: str, follows: bool = False) -> NDArray[np.int64]:
        """Return the bytes of a text, see `to_bytes`. `follows` makes no difference."""
        return np.frombuffer(to_bytes(text), dtype=np.uint8).astype(np.int64)

    def encode_lines(self, lines: Iterable[str]) -> NDArray[np.int64]:
        """Return the bytes of lines, each ended by `eos_id`."""
        assert self.eos_id is not None
        ids = self.encode("".join(line + "\n" for line in lines))
        return np.where(ids == _LINE_END, self.eos_id, ids)

    def split_prompt(self, text: str) -> tuple[str, str]:
        """Return a prompt as it is: a space is a token."""
        return text, ""

    def begins_with_space(self, before: int | None) -> NDArray[np.bool_]:
        """Return that no token brings a space with it."""
        return np.zeros(self.vocabulary_size, dtype=bool)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of bytes; what is not UTF-8 becomes U+FFFD, the end of a sequence a line end."""
        return bytes(_LINE_END if token == self.eos_id else token for token in ids).decode("utf-8", "replace")

    def decoder(self) -> Decoder:
        """Return a decoder that holds the bytes of a character back until it is whole."""
        return _ByteDecoder()

    def token_bytes(self, token: int) -> bytes:
        """Return the byte of one token; the end of a sequence is a line end."""
        return bytes([token]) if token < 256 else b"\n"

    def bytes_of(self, ids: NDArray[np.integer]) -> int:
        """Return the number of tokens: one byte each."""
        return len(ids)

    def characters_of(self, ids: NDArray[np.integer]) -> int:
        """Return how many characters begin among the bytes, reading them as UTF-8."""
        return int(np.count_nonzero((np.asarray(ids) & 0xC0) != 0x80))

    def to_json(self) -> dict[str, Any]:
        """Return all that `tokenizer_from_json` needs."""
        return {"level": self.level, "sequences": self.sequences, "line_end": self.line_end}


class _ByteDecoder:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]) if token < 256 else b"\n")


def level_names() -> list[str]:
    """Return the levels there are."""
    return ["char", "byte", "word", "bpe"]


def sequence_names() -> list[str]:
    """Return what can be a sequence of its own."""
    return ["line", "file"]


def line_end_ids(tokenizer: Tokenizer) -> list[int]:
    r"""Return the tokens of a stream's line end, as they stand in it; none where the vocabulary lacks one.

    Example:
        >>> line_end_ids(CharTokenizer("ab\r\n", line_end="\r\n")), line_end_ids(CharTokenizer("ab"))
        ([3, 4], [])
    """
    pieces = [tokenizer.line_end] if tokenizer.level == "word" else list(tokenizer.line_end)
    ids = [token for piece in pieces for token in tokenizer.encode(piece).tolist()]
    return [] if tokenizer.unknown_id in ids else ids


def tokenizer_from_json(description: dict[str, Any]) -> Tokenizer:
    """Make the tokenizer that `to_json` described.

    Raises:
        InputError: The level is unknown, or the description is damaged.
    """
    level, sequences = description.get("level"), description.get("sequences")
    if level not in level_names():
        raise unknown_name("level", str(level), level_names())
    if sequences not in (None, *sequence_names()):
        raise InputError(f"a tokenizer's description has sequences {sequences!r}; the run's tokenizer.json is damaged")
    line_end = description.get("line_end", "\n")
    if line_end not in LINE_ENDS:
        raise InputError(f"a tokenizer's description has line ends {line_end!r}; the run's tokenizer.json is damaged")
    if level == "byte":
        return ByteTokenizer(sequences, line_end)
    part, kind = {"char": ("characters", str), "word": ("words", list), "bpe": ("huggingface", dict)}[level]
    if not isinstance(description.get(part), kind):
        raise InputError(f"a {level} tokenizer's description lacks its {part}; the run's tokenizer.json is damaged")
    if level == "char":
        return CharTokenizer(description["characters"], sequences, line_end)
    if level == "word":
        if not all(isinstance(word, str) for word in description["words"]):
            raise InputError(
                "a word tokenizer's description has words that are no text; the run's tokenizer.json is damaged"
            )
        return WordTokenizer(description["words"], bool(description.get("split_punctuation")), sequences, line_end)
    return BpeTokenizer(description["huggingface"], sequences, line_end)


def to_bytes(text: str) -> bytes:
    r"""Return the bytes of a text in UTF-8; where it holds bytes that are none, as `os.fsdecode` gives them, these bytes.

    Example:
        >>> to_bytes("caf\udce9")
        b'caf\xe9'
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a surrogate pair, which stands for no byte
        return text.encode("utf-8", "surrogatepass")


def code_points_of(text: str) -> NDArray[np.uint32]:
    """Return the Unicode code points of a text."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
