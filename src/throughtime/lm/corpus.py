"""Files and folders of text, encoded once into a file of token ids.

Text is read as UTF-8, strictly, and taken as it stands: line ends are not translated, and files follow each other without
a separator. A byte-order mark at the start of a file is dropped; at level "byte" it stays. Where lines or files are sequences,
each is ended by an end-of-sequence token, empty lines are left out, and the sequences held out are evenly spread over the text.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from throughtime.errors import InputError
from throughtime.lm.encoding import (
    Known,
    TokenFile,
    Tokenization,
    cutters,
    encode_file,
    encoder_of,
    held_out_last,
    keep_frequent,
    make_encoder,
)
from throughtime.lm.reading import (
    Found,
    LeftOut,
    LineEnds,
    check_file,
    check_looks_like_text,
    find_files,
    identity,
    read_texts,
)
from throughtime.lm.stored_tokens import StoredTokens
from throughtime.lm.tokenizer import Tokenizer, tokenizer_from_json
from throughtime.lm.words import WordTokenizer
from throughtime.training.checkpoint import load_json, save_json
from throughtime.training.files import LARGE, CheckpointError

TOKENS = "tokens.bin"
DESCRIPTION = "corpus.json"

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Corpus:
    """An encoded text, cut in two contiguous pieces.

    Attributes:
        tokenizer: Which ids stand for what.
        train: Ids (N_train,), in their file; a slice is an array.
        held_out: Ids (N_held_out,).
        sources: For each file its path, bytes, modification time and sha256.
        left_out: What was found in folders, or met again, and not read.
        reused: Whether the encoding was already there.
    """

    tokenizer: Tokenizer
    train: StoredTokens
    held_out: NDArray[np.integer]
    sources: list[dict[str, Any]]
    left_out: list[LeftOut]
    reused: bool = False

    @property
    def held_out_characters(self) -> int:
        """Characters in the held-out piece."""
        return self.tokenizer.characters_of(self.held_out)

    @property
    def held_out_bytes(self) -> int:
        """Bytes of UTF-8 in the held-out piece."""
        return self.tokenizer.bytes_of(self.held_out)


def build_corpus(
    paths: Sequence[str | Path],
    folder: str | Path,
    how: Tokenization | str = "char",
    *,
    split: float = 0.9,
    include: str = "*",
    out: str | Path | None = None,
    known: Known | None = None,
    on_progress: OnProgress | None = None,
) -> Corpus:
    """Encode files and folders into `folder`, or reuse what is there if the files are unchanged.

    Args:
        paths: Text files, which must be right; and folders, of which every text file is taken, in order of path. Hidden
            files are passed over; what is not UTF-8 text is left out, as are runs. A file that is met twice is read once.
        folder: Where `tokens.bin` and `corpus.json` go.
        how: How the text is cut into tokens; a level's name for all else at its default.
        split: Share that is trained on: of the tokens, from the start; of the sequences, evenly spread.
        include: Pattern that file names in folders must match, such as "*.py".
        out: The run's folder, which isn't read where it is in a folder that is; `None` where there is none.
        known: A vocabulary of the same level that there is already.
        on_progress: Called with (bytes done, bytes in all).

    Raises:
        InputError: A file is missing, empty, unreadable, binary or not UTF-8; or there is too little text to split.
    """
    how = Tokenization(how) if isinstance(how, str) else how
    if not 0 < split < 1:
        raise InputError(f"--split {split}: expected the share of the text to train on, between 0 and 1")
    found = find_files(paths, include, out)
    folder = Path(folder)
    wanted = {"how": how.to_json(), "split": split, "files": [identity(path) for path, _ in found.files]}
    if known is not None:
        description = json.dumps(known.tokenizer.to_json()).encode()
        wanted["known"] = {"sha256": hashlib.sha256(description).hexdigest(), "grows": known.grows}
    if (there := _reusable(folder, wanted)) is not None:
        return there
    try:
        folder.mkdir(parents=True, exist_ok=True)
        on_progress = on_progress or (lambda done, total: None)
        description = _encode_all(found, folder / TOKENS, how, split, on_progress, known)
    except OSError as error:
        raise InputError(f"{folder}: can't write the encoded text there: {error.strerror}") from error
    save_json(folder / DESCRIPTION, description | {"wanted": wanted}, sealed=True)
    return open_corpus(folder)


def open_corpus(folder: str | Path, reused: bool = False) -> Corpus:
    """Open what `build_corpus` wrote.

    Raises:
        InputError: The encoded text is missing, truncated or altered, or its description is none.
    """
    folder = Path(folder)
    description = load_json(folder / DESCRIPTION, sealed=True, most=LARGE)
    for name, is_right in _DESCRIBED.items():
        if not is_right(description.get(name)):
            raise CheckpointError(
                f"{folder / DESCRIPTION}: {name} is not what was written; delete this folder to encode anew"
            )
    tokenizer = tokenizer_from_json(description["tokenizer"])
    count, boundary = description["tokens"], description["boundary"]
    if not boundary < count:
        raise CheckpointError(
            f"{folder / DESCRIPTION}: boundary is {boundary} of {count} tokens; delete this folder to encode anew"
        )
    stored = StoredTokens(
        folder / TOKENS,
        np.dtype(description["dtype"]),
        count,
        tokenizer.vocabulary_size,
        description["tokens_sha256"],
    )
    left_out = [LeftOut(*each) for each in description["left_out"]]
    return Corpus(tokenizer, stored.part(0, boundary), stored[boundary:], description["sources"], left_out, reused)


def _is_source(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("path"), str)
        and isinstance(value.get("bytes"), int)
        and isinstance(value.get("sha256"), str)
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**62


_DESCRIBED: dict[str, Callable[[Any], bool]] = {  # what a description holds, and what each entry must be
    "dtype": lambda value: value in ("uint8", "uint16", "uint32"),
    "tokens": _is_count,
    "boundary": _is_count,
    "tokens_sha256": lambda value: isinstance(value, str),
    "tokenizer": lambda value: isinstance(value, dict),
    "sources": lambda value: isinstance(value, list) and all(map(_is_source, value)),
    "left_out": lambda value: (
        isinstance(value, list)
        and all(isinstance(each, list) and len(each) == 3 and all(isinstance(w, str) for w in each) for each in value)
    ),
}


def read_tokens(path: str | Path, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Encode one file with a tokenizer that exists; what is unknown to it becomes its unknown token.

    Raises:
        InputError: The file is missing, empty, unreadable, binary or not UTF-8.
    """
    path = Path(path)
    check_file(path)
    encoder = encoder_of(tokenizer)
    pieces = [*encode_file(read_texts(path, tokenizer.level), encoder, tokenizer.sequences), encoder.end()]
    ids = np.concatenate([piece.astype(np.int64) for piece in pieces])
    least, needed = (1, "a sequence to score") if tokenizer.sequences else (2, "one to read and one to predict")
    if len(ids) < least:
        raise InputError(f"{path}: holds {len(ids)} tokens; at least {least} are needed, {needed}")
    return ids


def _reusable(folder: Path, wanted: dict[str, Any]) -> Corpus | None:
    try:
        if load_json(folder / DESCRIPTION, sealed=True, most=LARGE).get("wanted") == json.loads(json.dumps(wanted)):
            return open_corpus(folder, reused=True)
    except (InputError, OSError):
        return None
    return None


def _encode_all(
    found: Found, target: Path, how: Tokenization, split: float, on_progress: OnProgress, known: Known | None
) -> dict[str, Any]:
    """Write every file's tokens, cut in what is trained on and what is held out; return the description of what was written."""
    files, left_out = found.files, list(found.left_out)
    total, done = sum(path.stat().st_size for path, _ in files), 0
    sources: list[dict[str, Any]] = []
    encoder, ends = make_encoder(how, files, split, known), LineEnds()
    written = TokenFile(target)
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(written.close)
        processes = at_the_end.enter_context(cutters(how, total))
        for path, named in files:
            before, state, digest, own_ends = written.count, encoder.state, hashlib.sha256(), LineEnds()
            on_chunk = _counted(digest, own_ends, lambda read, so_far=done: on_progress(so_far + read, total))
            try:
                if how.level != "byte" and not named:
                    check_looks_like_text(path)
                for ids in encode_file(read_texts(path, how.level, on_chunk), encoder, how.sequences, processes):
                    written.append(ids, encoder.largest)
                sources.append({"path": str(path), "bytes": path.stat().st_size, "sha256": digest.hexdigest()})
                ends.add(own_ends)
            except InputError as error:
                if named:
                    raise error if str(path) in str(error) else InputError(f"{path}: {error}") from error
                written.truncate(before)
                encoder.state = state
                left_out.append(LeftOut(str(path), "no text", str(error).removeprefix(f"{path}: ")))
            done += path.stat().st_size
        if not sources:
            raise InputError(
                f"none of {len(files):,} files is UTF-8 text; train with --level byte for other encodings. The first is "
                f"{files[0][0]}: {left_out[-len(files)].reason}"
            )
        if how.sequences is None:
            rest = encoder.end()
            written.append(rest, encoder.largest)
        name = str(files[0][0]) if len(files) == 1 else f"{len(sources):,} of {len(files):,} files"
        description = _cut(written, encoder.tokenizer(), how, split, name, known, ends.usual)
        digest = written.finish()
    return description | {"tokens_sha256": digest, "sources": sources, "left_out": left_out}


def _counted(digest: Any, ends: LineEnds, on_bytes: Callable[[int], None]) -> Callable[[bytes], None]:
    """Return what digests the pieces of a file, counts their line ends, and reports how many bytes have come by."""
    done = 0

    def on_chunk(chunk: bytes) -> None:
        nonlocal done
        digest.update(chunk)
        ends.count(chunk)
        done += len(chunk)
        on_bytes(done)

    return on_chunk


def _cut(
    written: TokenFile,
    tokenizer: Tokenizer,
    how: Tokenization,
    split: float,
    name: str,
    known: Known | None,
    line_end: str,
) -> dict[str, Any]:
    """Decide what is held out, and which words are kept; rewrite the file where that changes it; describe it."""
    tokens = written.tokens()
    if len(tokens) < 4:
        count = f"{len(tokens)} token{'s' * (len(tokens) != 1)}"
        raise InputError(f"{name}: {count} in all; too little to train on and hold out, expected some hundreds")
    boundary = min(max(int(split * len(tokens)), 2), len(tokens) - 2)
    if tokenizer.eos_id is not None:
        try:
            changed, boundary = held_out_last(tokens, tokenizer.eos_id, split)
        except InputError as error:
            alone = (
                "; its lines end with a carriage return alone: convert it with tr '\\r' '\\n'"
                if line_end == "\r"
                else ""
            )
            raise InputError(f"{name}: {error}{alone}") from error
        written.rewrite(changed)
    if isinstance(tokenizer, WordTokenizer) and (known is None or known.grows):
        stay = 0 if known is None else len(cast("WordTokenizer", known.tokenizer).words)
        table, tokenizer = keep_frequent(written.tokens(), boundary, tokenizer, how, stay)
        written.translate(table)
    return {
        "dtype": written.dtype.name,
        "tokens": written.count,
        "boundary": boundary,
        "tokenizer": tokenizer.to_json() | {"line_end": line_end},
    }
