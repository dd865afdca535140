"""Files and folders of text, encoded once into a memory-mapped array of token ids.

Text is read as UTF-8, strictly, and taken as it stands: line ends are not translated, and files follow each other without
a separator. A byte-order mark at the start of a file is dropped at level "char".
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from throughtime.errors import InputError, unknown_name
from throughtime.lm.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, level_names, tokenizer_from_json
from throughtime.training.checkpoint import load_json, save_json

TOKENS = "tokens.bin"
DESCRIPTION = "corpus.json"
_CHUNK = 8 << 20  # bytes of text held at a time

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Corpus:
    """An encoded text, cut in two contiguous pieces.

    Attributes:
        tokenizer: Which ids stand for what.
        train: Ids (N_train,), memory-mapped.
        held_out: Ids (N_held_out,), memory-mapped.
        sources: For each file its path, bytes, modification time and sha256.
        skipped: Files of a folder that are not UTF-8 text, and were left out.
        reused: Whether the encoding was already there.
    """

    tokenizer: Tokenizer
    train: NDArray[np.integer]
    held_out: NDArray[np.integer]
    sources: list[dict[str, Any]]
    skipped: int
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
    level: str = "char",
    *,
    split: float = 0.9,
    include: str = "*",
    on_progress: OnProgress | None = None,
) -> Corpus:
    """Encode files and folders into `folder`, or reuse what is there if the files are unchanged.

    Args:
        paths: Text files, which must be right; and folders, of which every text file is taken, in order of path. Hidden
            files are passed over; what is not UTF-8 text is skipped and counted.
        folder: Where `tokens.bin` and `corpus.json` go.
        level: "char" or "byte".
        split: Share of the tokens, from the start, that is trained on.
        include: Pattern that file names in folders must match, such as "*.py".
        on_progress: Called with (bytes done, bytes in all).

    Raises:
        InputError: A file is missing, empty, unreadable, binary or not UTF-8; or there is too little text to split.
    """
    if level not in level_names():
        raise unknown_name("level", level, level_names())
    if not 0 < split < 1:
        raise InputError(f"--split {split}: expected the share of the text to train on, between 0 and 1")
    files = _find_files(paths, include)
    folder = Path(folder)
    wanted = {"level": level, "split": split, "files": [_identity(path) for path, _ in files]}
    if (there := _reusable(folder, wanted)) is not None:
        return there
    try:
        folder.mkdir(parents=True, exist_ok=True)
        description = _encode_all(files, folder / TOKENS, level, on_progress or (lambda done, total: None))
    except OSError as error:
        raise InputError(f"{folder}: can't write the encoded text there: {error.strerror}") from error
    description |= {"wanted": wanted, "boundary": _boundary(description["tokens"], split, files)}
    save_json(folder / DESCRIPTION, description)
    return open_corpus(folder)


def open_corpus(folder: str | Path, reused: bool = False) -> Corpus:
    """Open what `build_corpus` wrote.

    Raises:
        InputError: The encoded text is missing, or doesn't have the size that its description gives.
    """
    folder = Path(folder)
    description = load_json(folder / DESCRIPTION)
    try:
        dtype, count, boundary = np.dtype(description["dtype"]), description["tokens"], description["boundary"]
        tokenizer = tokenizer_from_json(description["tokenizer"])
        size = (folder / TOKENS).stat().st_size
    except (KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{folder}: the encoded text is damaged ({error}); delete this folder to encode anew"
        ) from error
    if size != count * dtype.itemsize:
        raise InputError(
            f"{folder / TOKENS}: {size} bytes, expected {count * dtype.itemsize}; delete it to encode anew"
        )
    tokens = np.memmap(folder / TOKENS, dtype=dtype, mode="r")
    sources, skipped = description["sources"], description["skipped"]
    return Corpus(tokenizer, tokens[:boundary], tokens[boundary:], sources, skipped, reused)


def read_tokens(path: str | Path, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Encode one file with a tokenizer that exists; characters unknown to it become its unknown token.

    Raises:
        InputError: The file is missing, empty, unreadable, binary or not UTF-8.
    """
    path = Path(path)
    _check_file(path)
    with _opened(path) as file:
        if isinstance(tokenizer, CharTokenizer):
            pieces = [tokenizer.encode_code_points(c) for c in _code_points(path, _chunks(file))]
        else:
            pieces = [np.frombuffer(chunk, dtype=np.uint8).astype(np.int64) for chunk in _chunks(file)]
    ids = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    if len(ids) < 2:
        raise InputError(f"{path}: holds {len(ids)} tokens; at least 2 are needed, one to read and one to predict")
    return ids


def _find_files(paths: Sequence[str | Path], include: str) -> list[tuple[Path, bool]]:
    """Return (file, whether it was named explicitly) in a fixed order."""
    if not paths:
        raise InputError("no text was given; expected at least one file or folder")
    files: list[tuple[Path, bool]] = []
    for given in map(Path, paths):
        if given.is_dir():
            inside = sorted(
                path
                for path in given.rglob(include)
                if path.is_file() and not any(part.startswith(".") for part in path.relative_to(given).parts)
            )
            if not inside:
                raise InputError(
                    f"{given}: no files match {include!r} in this folder; give a folder of text, or --include"
                )
            files += [(path, False) for path in inside]
        else:
            _check_file(given)
            files.append((given, True))
    return files


def _check_file(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file; expected a text file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; expected text")


def _identity(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _reusable(folder: Path, wanted: dict[str, Any]) -> Corpus | None:
    try:
        if load_json(folder / DESCRIPTION).get("wanted") == json.loads(json.dumps(wanted)):
            return open_corpus(folder, reused=True)
    except (InputError, OSError):
        return None
    return None


def _boundary(tokens: int, split: float, files: list[tuple[Path, bool]]) -> int:
    """Return where the held-out piece begins, with something on either side of it."""
    if tokens < 4:
        name = files[0][0] if len(files) == 1 else f"{len(files)} files"
        raise InputError(f"{name}: {tokens} tokens in all; too little to train on and hold out, expected some hundreds")
    return min(max(int(split * tokens), 2), tokens - 2)


def _encode_all(files: list[tuple[Path, bool]], target: Path, level: str, on_progress: OnProgress) -> dict[str, Any]:
    """Write every file's tokens one after the other; return the description of what was written."""
    total, done, skipped = sum(path.stat().st_size for path, _ in files), 0, 0
    sources: list[dict[str, Any]] = []
    writer = _Writer(target.with_suffix(".part"), level)
    try:
        for path, named in files:
            before, size, digest = writer.count, path.stat().st_size, hashlib.sha256()
            try:
                if level == "char" and not named and _looks_binary(path):
                    raise InputError(f"{path}: binary")
                with _opened(path) as file:
                    chunks = _observed(
                        _chunks(file), digest, lambda read, so_far=done: on_progress(so_far + read, total)
                    )
                    writer.write_file(path, chunks)
                sources.append({"path": str(path), "bytes": size, "sha256": digest.hexdigest()})
            except InputError:
                if named:
                    raise
                writer.truncate(before)
                skipped += 1
            done += size
        if not sources:
            raise InputError(f"none of {skipped} files is UTF-8 text; use --level byte for other encodings")
        description = writer.finish(target)
    finally:
        writer.close()
    return description | {"sources": sources, "skipped": skipped}


class _Writer:
    """Appends tokens to a file, in the narrowest unsigned integers that hold them."""

    def __init__(self, path: Path, level: str) -> None:
        self.path = path
        self.level = level
        self.count = 0
        self._dtype = np.dtype(np.uint8)
        self._file = path.open("w+b")
        # id of every code point there can be, 0 where it was not yet seen
        self._ids = np.zeros(0x110000 if level == "char" else 0, dtype=np.uint32)
        self._characters: list[int] = []

    def write_file(self, path: Path, chunks: Iterator[bytes]) -> None:
        """Encode a file and append its tokens."""
        if self.level == "byte":
            for chunk in chunks:
                self._append(np.frombuffer(chunk, dtype=np.uint8))
        else:
            for code_points in _code_points(path, chunks):
                self._append(self._encode(code_points))

    def _encode(self, code_points: NDArray[np.uint32]) -> NDArray[np.uint32]:
        ids = self._ids[code_points]
        if not ids.all():
            new = np.unique(code_points[ids == 0])
            self._ids[new] = np.arange(len(self._characters) + 1, len(self._characters) + 1 + len(new))
            self._characters += new.tolist()
            ids = self._ids[code_points]
        return ids

    def _append(self, ids: NDArray[np.integer]) -> None:
        needed = np.min_scalar_type(max(len(self._characters), 255))
        if needed.itemsize > self._dtype.itemsize:
            self._widen(needed)
        ids.astype(self._dtype, copy=False).tofile(self._file)
        self.count += len(ids)

    def _widen(self, dtype: np.dtype) -> None:
        """Rewrite what is there in wider integers, a chunk at a time."""
        wide_path = self.path.with_suffix(".wide")
        with wide_path.open("w+b") as wide:
            self._file.seek(0)
            while len(chunk := np.fromfile(self._file, self._dtype, _CHUNK)):
                chunk.astype(dtype).tofile(wide)
        self._file.close()
        wide_path.replace(self.path)
        self._file = self.path.open("r+b")
        self._file.seek(0, 2)
        self._dtype = dtype

    def truncate(self, count: int) -> None:
        """Take back all tokens from `count` on."""
        self._file.flush()
        self._file.truncate(count * self._dtype.itemsize)
        self._file.seek(0, 2)
        self.count = count

    def finish(self, target: Path) -> dict[str, Any]:
        """Put the file in its place and describe it."""
        self._file.close()
        self.path.replace(target)
        tokenizer = CharTokenizer("".join(map(chr, self._characters))) if self.level == "char" else ByteTokenizer()
        return {"dtype": self._dtype.name, "tokens": self.count, "tokenizer": tokenizer.to_json()}

    def close(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from error


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _observed(chunks: Iterator[bytes], digest: Any, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """Pass chunks on; digest them, and report how many bytes have come by."""
    done = 0
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
        done += len(chunk)
        on_bytes(done)


def _looks_binary(path: Path) -> bool:
    with _opened(path) as file:
        return b"\0" in file.read(_CHUNK)


def _code_points(path: Path, chunks: Iterator[bytes]) -> Iterator[NDArray[np.uint32]]:
    """Decode UTF-8 strictly, chunk by chunk, and say where it fails."""
    offset, rest = 0, b""
    for chunk in chunks:
        data = rest + chunk
        if offset == 0 and data.startswith(b"\xef\xbb\xbf"):
            data, offset = data[3:], 3
        text, rest = _decode(path, data, offset)
        offset += len(data) - len(rest)
        if "\0" in text:
            at = offset - len(data) + len(rest) + len(text[: text.index("\0")].encode())
            raise InputError(f"{path}: NUL byte at position {at:,}: not a text file; use --level byte for binary files")
        yield np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    if rest:
        raise InputError(f"{path}: the file ends in the middle of a character, at byte {offset:,}; it may be cut off")


def _decode(path: Path, data: bytes, offset: int) -> tuple[str, bytes]:
    """Return the text of whole characters, and the bytes of one that is still to come."""
    try:
        return data.decode(), b""
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and error.end == len(data):
            return data[: error.start].decode(), data[error.start :]
        raise InputError(
            f"{path}: byte 0x{data[error.start]:02x} at position {offset + error.start:,} is not UTF-8; "
            "convert the file, or use --level byte for other encodings"
        ) from error
