"""Text to token ids and back: one token a Unicode character, or one a byte.

Both are vectorised over whole chunks of text, and both decode piece by piece for streaming.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from throughtime.errors import InputError, unknown_name

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
    """

    level: str
    vocabulary_size: int
    unknown_id: int | None

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids (N,) of a text. What is unknown gets `unknown_id`."""
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
        characters: The known characters, without repetition; the first gets id 1.

    Example:
        >>> tokenizer = CharTokenizer("abc")
        >>> tokenizer.encode("cab?").tolist()
        [3, 1, 2, 0]
        >>> tokenizer.decode([3, 1, 2])
        'cab'
    """

    level = "char"
    unknown_id: int | None = 0

    def __init__(self, characters: str | Sequence[str]) -> None:
        self.characters = "".join(characters)
        code_points = _code_points(self.characters)
        if len(np.unique(code_points)) != len(code_points):
            raise InputError("a character tokenizer was given the same character twice; expected each one once")
        self.vocabulary_size = len(code_points) + 1
        self._order = np.argsort(code_points)
        self._sorted = code_points[self._order]
        self._sizes = np.array([len(UNKNOWN.encode()), *(len(c.encode()) for c in self.characters)])

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids (N,) of a text; an unknown character gets id 0."""
        return self.encode_code_points(_code_points(text))

    def encode_code_points(self, code_points: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return the ids of Unicode code points."""
        if not len(self._sorted):
            return np.zeros(len(code_points), dtype=np.int64)
        place = np.minimum(np.searchsorted(self._sorted, code_points), len(self._sorted) - 1)
        return np.where(self._sorted[place] == code_points, self._order[place] + 1, 0)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; the unknown token becomes U+FFFD."""
        return "".join(UNKNOWN if i == 0 else self.characters[i - 1] for i in ids)

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
        return {"level": self.level, "characters": self.characters}


class _CharDecoder:
    def __init__(self, tokenizer: CharTokenizer) -> None:
        self._tokenizer = tokenizer

    def push(self, token: int) -> str:
        return self._tokenizer.decode([token])


class ByteTokenizer:
    """One token a byte, ids 0 … 255: any file, any encoding, nothing unknown.

    Example:
        >>> ByteTokenizer().encode("한").tolist()
        [237, 149, 156]
    """

    level = "byte"
    unknown_id: int | None = None
    vocabulary_size = 256

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the bytes of a text in UTF-8."""
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of bytes; what is not UTF-8 becomes U+FFFD."""
        return bytes(ids).decode("utf-8", "replace")

    def decoder(self) -> Decoder:
        """Return a decoder that holds the bytes of a character back until it is whole."""
        return _ByteDecoder()

    def bytes_of(self, ids: NDArray[np.integer]) -> int:
        """Return the number of tokens: one byte each."""
        return len(ids)

    def characters_of(self, ids: NDArray[np.integer]) -> int:
        """Return how many characters begin among the bytes, reading them as UTF-8."""
        return int(np.count_nonzero((np.asarray(ids) & 0xC0) != 0x80))

    def to_json(self) -> dict[str, Any]:
        """Return all that `tokenizer_from_json` needs."""
        return {"level": self.level}


class _ByteDecoder:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))


def level_names() -> list[str]:
    """Return the levels there are."""
    return ["char", "byte"]


def tokenizer_from_json(description: dict[str, Any]) -> Tokenizer:
    """Make the tokenizer that `to_json` described.

    Raises:
        InputError: The level is unknown, or the description is damaged.
    """
    level = description.get("level")
    if level == "byte":
        return ByteTokenizer()
    if level == "char" and isinstance(description.get("characters"), str):
        return CharTokenizer(description["characters"])
    if level in level_names():
        raise InputError(f"a {level} tokenizer's description lacks its characters; the run's tokenizer.json is damaged")
    raise unknown_name("level", str(level), level_names())


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
