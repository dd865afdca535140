"""Byte-pair encoding (Sennrich et al., 2016), on bytes: by Hugging Face's tokenizers, trained on the corpus itself.

Every text can be written with the 256 bytes, so nothing is unknown and every text comes back exactly.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from throughtime.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HuggingFaceTokenizer

_PIECE = (
    10_000  # characters that are encoded at a time: pieces are encoded in parallel, and none gets too long to merge
)
LEAST_VOCABULARY = 256


class BpeTokenizer:
    """Tokens are frequent sequences of bytes.

    Args:
        description: What Hugging Face's tokenizers writes as `tokenizer.json`.
        sequences: "line" or "file" where each of them is a sequence of its own, ended by the last token; else `None`.
        line_end: How most lines of a stream end.

    Example:
        >>> tokenizer = train_bpe(["to be or not to be "] * 20, vocabulary_size=270)
        >>> tokenizer.decode(tokenizer.encode("to be, 한"))
        'to be, 한'
        >>> len(tokenizer.encode(" to be")) < 6
        True
    """

    level = "bpe"
    unknown_id: int | None = None

    def __init__(self, description: dict[str, Any], sequences: str | None = None, line_end: str = "\n") -> None:
        tokenizers = _library()
        _check_plain(description)
        try:
            self._tokenizer: HuggingFaceTokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"a bpe tokenizer's description is damaged: {' '.join(str(error).split())}") from error
        self._description = description
        size = self._tokenizer.get_vocab_size()
        self.sequences = sequences
        self.line_end = line_end
        self.eos_id = size if sequences else None
        self.vocabulary_size = size + (1 if sequences else 0)
        alphabet = _alphabet()
        pieces = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        self._bytes = [bytes(alphabet[c] for c in piece) for piece, _ in pieces] + [b"\n"] * bool(sequences)

    def encode(self, text: str, follows: bool = False) -> NDArray[np.int64]:
        """Return the ids (N,) of a text; what isn't a character becomes U+FFFD. `follows` makes no difference."""
        return np.concatenate(self._encode_batch(list(_pieces(text))))

    def encode_lines(self, lines: Iterable[str]) -> NDArray[np.int64]:
        """Return the ids of lines, each ended by `eos_id`."""
        assert self.eos_id is not None
        batch, ends = [], []
        for line in lines:
            batch += _pieces(line)
            ends.append(len(batch))
        if not batch:
            return np.zeros(0, dtype=np.int64)
        ids = self._encode_batch(batch)
        for end in ends:
            ids[end - 1] = np.append(ids[end - 1], self.eos_id)
        return np.concatenate(ids)

    def _encode_batch(self, pieces: list[str]) -> list[NDArray[np.int64]]:
        whole = [p if p.isascii() else p.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for p in pieces]
        encodings = self._tokenizer.encode_batch_fast(whole, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def split_prompt(self, text: str) -> tuple[str, str]:
        """Return the part of a prompt that is read, and the last space after it, which is part of the next word's token."""
        return (text[:-1], " ") if text.endswith(" ") else (text, "")

    def begins_with_space(self, before: int | None) -> NDArray[np.bool_]:
        """Return which tokens (V,) begin with a space."""
        return np.array([piece.startswith(b" ") for piece in self._bytes])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are no character become U+FFFD."""
        return b"".join(self._bytes[token] for token in ids).decode("utf-8", "replace")

    def decoder(self) -> "_BpeDecoder":
        """Return a decoder that holds the bytes of a character back until it is whole."""
        return _BpeDecoder(self._bytes)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token; the end of a sequence is a line end."""
        return self._bytes[token]

    def bytes_of(self, ids: NDArray[np.integer]) -> int:
        """Return how many bytes of UTF-8 the tokens stand for."""
        return self._total(ids, [len(piece) for piece in self._bytes])

    def characters_of(self, ids: NDArray[np.integer]) -> int:
        """Return how many characters begin in the tokens."""
        return self._total(ids, [sum(byte & 0xC0 != 0x80 for byte in piece) for piece in self._bytes])

    def _total(self, ids: NDArray[np.integer], sizes: list[int]) -> int:
        return int(np.bincount(ids, minlength=self.vocabulary_size) @ np.array(sizes))

    def to_json(self) -> dict[str, Any]:
        """Return all that `tokenizer_from_json` needs; under "huggingface" is what that library itself reads."""
        return {
            "level": self.level,
            "sequences": self.sequences,
            "line_end": self.line_end,
            "huggingface": self._description,
        }


_PARTS = {  # of a description, and what they must be where they are there: nothing that changes a text before or after
    "": ("truncation", "padding", "added_tokens", "normalizer", "post_processor"),
    "model": ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback"),
    "pre_tokenizer": ("add_prefix_space",),
}


def _check_plain(description: dict[str, Any]) -> None:
    """Raise unless a description is of byte-pair encoding on bytes and of nothing else.

    Raises:
        InputError: With the part that is something else.
    """
    damaged = "a bpe tokenizer's description is damaged or foreign"
    for name, absent in _PARTS.items():
        part = description.get(name) if name else description
        kind = {"model": "BPE", "pre_tokenizer": "ByteLevel"}.get(name)
        if not isinstance(part, dict) or (kind is not None and part.get("type") != kind):
            raise InputError(f"{damaged}: its {name} isn't that of a byte-level BPE")
        for entry in absent:
            if part.get(entry):
                raise InputError(f"{damaged}: it has {entry}, which ours never have")
    vocabulary, letters = description["model"].get("vocab"), _alphabet()
    if not isinstance(vocabulary, dict) or not all(type(number) is int for number in vocabulary.values()):
        raise InputError(f"{damaged}: it has no vocabulary")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise InputError(f"{damaged}: its vocabulary isn't numbered from 0 on")
    if not letters.keys() <= vocabulary.keys() or not all(letters.keys() >= set(piece) for piece in vocabulary):
        raise InputError(f"{damaged}: its vocabulary lacks a byte, or has pieces that are none")


class _BpeDecoder:
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._pieces[token])


def train_bpe(texts: Iterable[str], vocabulary_size: int, sequences: str | None = None) -> BpeTokenizer:
    """Learn the merges of a byte-level BPE.

    Args:
        texts: What to learn from.
        vocabulary_size: How many tokens to make, at most; 256 of them are the bytes.
        sequences: See `BpeTokenizer`; the end-of-sequence token comes on top.

    Raises:
        InputError: The vocabulary is smaller than the bytes, or Hugging Face's tokenizers isn't installed.
    """
    if vocabulary_size < LEAST_VOCABULARY:
        raise InputError(f"--vocabulary {vocabulary_size}: a bpe needs at least {LEAST_VOCABULARY}, one for each byte")
    tokenizers = _library()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return BpeTokenizer(json.loads(tokenizer.to_str()), sequences)


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text where it makes no difference to the tokens: before white space, if there is any in reach."""
    begin = 0
    while len(text) - begin > _PIECE:
        piece = text[begin : begin + _PIECE]
        head = piece.rstrip().rsplit(None, 1)
        end = len(head[0]) if len(head) == 2 and head[0].strip() else _PIECE
        yield piece[:end]
        begin += end
    yield text[begin:]


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise InputError("--level bpe needs Hugging Face's tokenizers: pip install 'throughtime[bpe]'") from error
    return tokenizers


def _alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable bytes stand for themselves in Latin-1; the others, in order, are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
