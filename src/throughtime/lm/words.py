r"""Words as tokens: a frequency cut-off, and everything between the words kept.

A text is cut into words (runs of letters, digits and combining marks, with apostrophes inside), single punctuation marks, and
runs of white space. The one space between two words is no token, any other white space is one ("\n", "\n\n", "\n    "). A mark
that touches a word or another mark remembers so: "dog." is "dog" and a "." that is attached on its left. This is how the text
comes back exactly, as long as its words are known.
"""

import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from throughtime.errors import InputError

BLANKS = " \t"  # dropped at both ends of a line that is a sequence
UNKNOWN_WORD = "<unk>"  # as in published corpora, where it may stand in the text itself
_LEFT, _RIGHT = 1, 2  # attached to what stands before, after


def cut(text: str, split_punctuation: bool = True, follows: bool = False) -> list[str]:
    r"""Cut a text into words, marks and white space.

    Args:
        text: Any text.
        split_punctuation: Whether marks are tokens of their own; without, a word is whatever stands between white space, as in
            corpora that are cut into words already.
        follows: Whether a word stands right before the text.

    Returns:
        Each piece after a digit that says how it is attached: 0 not, 1 to what stands before, 2 to what stands after, 3 to both.

    Example:
        >>> cut('He said "no".\n')
        ['0He', '0said', '2"', '0no', '1"', '1.', '0\n']
    """
    pieces: list[str] = []
    before = "word" if follows else ""  # kind of the piece before
    mark = -1  # place in `pieces` of a mark right before
    for match in _pattern(split_punctuation).finditer(text):
        kind, piece = match.lastgroup, match.group()
        if kind == "space":
            if piece != " " or not before or match.end() == len(text):
                pieces.append("0" + piece)
            mark = -1
        elif kind == "word":
            if mark >= 0 and before == "mark":
                pieces[mark] = str(int(pieces[mark][0]) | _RIGHT) + pieces[mark][1:]
            pieces.append("0" + piece)
            mark = -1
        else:
            pieces.append(f"{_LEFT if before in ('word', 'mark') else 0}{piece}")
            mark = len(pieces) - 1
        before = kind or ""
    return pieces


def whole_words(text: str) -> tuple[str, str]:
    """Split a piece of a longer text after its last word that is surely whole; return what is before, and what is after."""
    head = text.rstrip().rsplit(None, 1)
    end = len(head[0]) if len(head) == 2 else 0
    return text[:end], text[end:]


@cache
def _pattern(split_punctuation: bool) -> re.Pattern[str]:
    if not split_punctuation:
        return re.compile(r"(?P<space>\s+)|(?P<word>\S+)")
    marks = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] == "M")
    letter = rf"[\w{marks}]"
    word = rf"(?<!\S){UNKNOWN_WORD}(?!\S)|{letter}+(?:['’]{letter}+)*"
    return re.compile(rf"(?P<space>\s+)|(?P<word>{word})|(?P<mark>.)", re.DOTALL)


class WordTokenizer:
    r"""One token a word, a punctuation mark or a run of white space; id 0 is the unknown word, `<unk>`.

    Args:
        words: The known pieces, as `cut` returns them.
        split_punctuation: How a text is cut, see `cut`.
        sequences: "line" or "file" where each of them is a sequence of its own, ended by the token with id 1; else `None`.
        line_end: How most lines of a stream end.

    Example:
        >>> tokenizer = WordTokenizer(["0the", "0dog", "1.", "0\n"])
        >>> tokenizer.encode("the dog. the cat.\n").tolist()
        [1, 2, 3, 1, 0, 3, 4]
        >>> tokenizer.decode([1, 2, 3, 1, 0, 3, 4])
        'the dog. the <unk>.\n'
    """

    level = "word"
    unknown_id: int | None = 0

    def __init__(
        self,
        words: Sequence[str],
        split_punctuation: bool = True,
        sequences: str | None = None,
        line_end: str = "\n",
    ) -> None:
        self.words = list(words)
        self.split_punctuation = split_punctuation
        self.sequences = sequences
        self.line_end = line_end
        self.eos_id = 1 if sequences else None
        pieces = ["0" + UNKNOWN_WORD, *(["0\n"] if sequences else []), *self.words]
        first = len(pieces) - len(self.words)
        self._ids = {piece: first + place for place, piece in enumerate(self.words)}
        if len(self._ids) != len(self.words) or not all(piece[:1] in tuple("0123") for piece in pieces):
            raise InputError("a word tokenizer was given a piece twice, or one without its digit")
        self.vocabulary_size = len(pieces)
        self._texts = [piece[1:] for piece in pieces]
        glue = np.array([int(piece[0]) for piece in pieces])
        self._left, self._right = (glue & _LEFT) > 0, (glue & _RIGHT) > 0
        self._space = np.array([text.isspace() for text in self._texts])

    def encode(self, text: str, follows: bool = False) -> NDArray[np.int64]:
        """Return the ids (N,) of a text; `follows` says that a word stands right before it."""
        return ids_of(cut(text, self.split_punctuation, follows), self._ids)

    def encode_lines(self, lines: Iterable[str]) -> NDArray[np.int64]:
        """Return the ids of lines, each ended by `eos_id`; blanks at their ends are dropped."""
        assert self.eos_id is not None
        return encode_lines(lines, self.split_punctuation, self._ids, self.eos_id)

    def split_prompt(self, text: str) -> tuple[str, str]:
        """Return the part of a prompt that is read, and the space after its last word, which comes with the next word.

        Several spaces are read where they are a known piece. Blanks that a line begins with are left out where lines are
        sequences, as they are in training.
        """
        if self.sequences == "line":
            text = text.lstrip(BLANKS)
        head = text.rstrip(" ")
        spaces = text[len(head) :]
        is_owed = head and not head[-1].isspace() and (spaces == " " or "0" + spaces not in self._ids)
        return (head, spaces) if is_owed else (text, "")

    def begins_with_space(self, before: int | None) -> NDArray[np.bool_]:
        """Return which tokens (V,) have a space before them after another."""
        every = np.arange(self.vocabulary_size)
        return np.zeros(len(every), dtype=bool) if before is None else self.separated(before, every)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; the unknown token becomes `<unk>`."""
        decoder = self.decoder()
        return "".join(decoder.push(token) for token in ids)

    def decoder(self) -> "_WordDecoder":
        """Return a decoder that puts the space before a word that needs one."""
        return _WordDecoder(self)

    def separated(self, before: Any, after: Any) -> Any:
        """Return whether a space stands between two tokens, or between the tokens of two arrays."""
        return ~(self._space[before] | self._space[after] | self._right[before] | self._left[after])

    def text_of(self, token: int) -> str:
        """Return the text of one token, without a space before it."""
        return self._texts[token]

    def bytes_of(self, ids: NDArray[np.integer]) -> int:
        """Return how many bytes of UTF-8 the tokens stand for, the spaces between them included."""
        return self._total(ids, [len(text.encode("utf-8", "surrogatepass")) for text in self._texts])

    def characters_of(self, ids: NDArray[np.integer]) -> int:
        """Return how many characters the tokens stand for, the spaces between them included."""
        return self._total(ids, [len(text) for text in self._texts])

    def _total(self, ids: NDArray[np.integer], sizes: list[int]) -> int:
        ids = np.asarray(ids)
        spaces = int(np.count_nonzero(self.separated(ids[:-1], ids[1:])))
        return int(np.bincount(ids, minlength=self.vocabulary_size) @ np.array(sizes)) + spaces

    def to_json(self) -> dict[str, Any]:
        """Return all that `tokenizer_from_json` needs."""
        return {
            "level": self.level,
            "sequences": self.sequences,
            "line_end": self.line_end,
            "split_punctuation": self.split_punctuation,
            "words": self.words,
        }


class _WordDecoder:
    def __init__(self, tokenizer: WordTokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: int | None = None

    def push(self, token: int) -> str:
        space = " " if self._before is not None and self._tokenizer.separated(self._before, token) else ""
        self._before = token
        return space + self._tokenizer.text_of(token)


def encode_lines(
    lines: Iterable[str], split_punctuation: bool, ids: Mapping[str, int], eos_id: int
) -> NDArray[np.int64]:
    """Return the ids of lines, each ended by `eos_id`."""
    pieces = [np.append(ids_of(cut(line.strip(BLANKS), split_punctuation), ids), eos_id) for line in lines]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


def ids_of(pieces: list[str], ids: Mapping[str, int]) -> NDArray[np.int64]:
    """Look pieces up; where the mapping makes no ids of its own, those that aren't there get 0."""
    if isinstance(ids, GrowingWords):
        return np.fromiter(map(ids.__getitem__, pieces), dtype=np.int64, count=len(pieces))
    return np.fromiter((ids.get(piece, 0) for piece in pieces), dtype=np.int64, count=len(pieces))


def words_of_their_own(text: str, split_punctuation: bool, follows: bool) -> tuple[list[str], NDArray[np.uint32]]:
    """Return the pieces of a text in order of appearance, each once, and where in that list each of them is."""
    own: dict[str, int] = {}
    ids = [own.setdefault(piece, len(own)) for piece in cut(text, split_punctuation, follows)]
    return list(own), np.array(ids, dtype=np.uint32)


def lines_of_their_own(lines: list[str], split_punctuation: bool) -> tuple[list[str], NDArray[np.uint32]]:
    """Return the pieces of lines in order of appearance, each once, and where they are, counted from 1; 0 ends a line."""
    own: dict[str, int] = {}
    ids: list[int] = []
    for line in lines:
        ids += [own.setdefault(piece, len(own) + 1) for piece in cut(line.strip(BLANKS), split_punctuation)]
        ids.append(0)
    return list(own), np.array(ids, dtype=np.uint32)


class GrowingWords(dict[str, int]):
    """Ids of words that are given out as the words come.

    Args:
        first: The first id.
    """

    def __init__(self, first: int) -> None:
        super().__init__({"0" + UNKNOWN_WORD: 0})
        self._next = first

    def __missing__(self, piece: str) -> int:
        number = self[piece] = self._next
        self._next += 1
        return number
