"""Files of text: found, read in pieces, and refused with the place where they are no text."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from throughtime.errors import InputError
from throughtime.lm.formats import HEAD, format_of
from throughtime.lm.words import BLANKS

CHUNK = 8 << 20  # bytes of text held at a time
_SIGNS_OF_A_RUN = ({"config.json", "tokenizer.json"}, {"corpus.json", "tokens.bin"})


class LeftOut(NamedTuple):
    """What was found and not read.

    Attributes:
        path: Where it is.
        kind: "no text", "run", "link" (to a folder), "again" (a file that was met before) or "unreadable" (a folder).
        reason: Why it isn't read, for a reader.
    """

    path: str
    kind: str
    reason: str


class Found(NamedTuple):
    """What was found where text was looked for.

    Attributes:
        files: (file, whether it was named explicitly) in a fixed order, each file once.
        left_out: What was passed over.
    """

    files: list[tuple[Path, bool]]
    left_out: list[LeftOut]


def find_files(paths: Sequence[str | Path], include: str = "*", out: str | Path | None = None) -> Found:
    """Find the files to read, in a fixed order.

    A file that is met again (named twice, beside its folder, by a link) is read once, where it comes first. In folders, hidden
    files are passed over without a word; runs and links to folders are left out and told.

    Args:
        paths: Files and folders.
        include: Pattern that the names of files in folders must match, such as "*.py".
        out: The folder that will be written to; what is in it isn't read.

    Raises:
        InputError: A file that was named is missing or empty; a folder is a run, or holds no file that matches; a name is empty.
    """
    if not paths:
        raise InputError("no text was given; expected at least one file or folder")
    found = Found([], [])
    out = None if out is None else Path(out).resolve()
    places: dict[tuple[int, int], int] = {}  # where in the list a file is, by what it is on the disk
    for given in paths:
        if not str(given):
            raise InputError("an empty name was given for a file or folder; expected a text, or . for this folder")
        path = Path(given)
        is_folder = path.is_dir()
        if not is_folder:
            check_file(path)
        for file in _files_inside(path, include, out, found.left_out) if is_folder else [path]:
            status = file.stat()
            place = places.setdefault((status.st_dev, status.st_ino), len(found.files))
            if place == len(found.files):
                found.files.append((file, not is_folder))
            else:
                first, named = found.files[place]
                found.files[place] = first, named or not is_folder
                found.left_out.append(LeftOut(str(file), "again", f"the same file as {first}"))
    return found


def _files_inside(folder: Path, include: str, out: Path | None, left_out: list[LeftOut]) -> list[Path]:
    """Return the files of a folder in order of path; add what is passed over to the list."""
    aside = _aside(folder)
    if folder in aside:
        raise InputError(
            f"{folder}: {aside[folder].reason}; expected a folder of text (--resume RUN goes on with a run)"
        )
    try:
        matching = sorted(folder.rglob(include))
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"--include {include!r}: expected a pattern for names, such as '*.txt' ({error})") from error
    shown = [path for path in matching if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    own = _inside(folder, out)
    left_out += sorted(each for path, each in aside.items() if own not in (path, *path.parents))
    unread = {own, *aside}
    files = [path for path in shown if path.is_file() and unread.isdisjoint(path.parents)]
    if not files:
        besides = f" besides {len(aside):,} left out" if aside else ""
        raise InputError(
            f"{folder}: no files match {include!r} in this folder{besides}; give a folder of text, or --include"
        )
    return files


def _inside(folder: Path, out: Path | None) -> Path | None:
    """Return how the folder that will be written to is met in another; `None` where it isn't in there."""
    whole = folder.resolve()
    return folder / out.relative_to(whole) if out is not None and whole in out.parents else None


def _aside(folder: Path) -> dict[Path, LeftOut]:
    """Return the folders in a folder, or itself, that aren't read."""
    aside: dict[Path, LeftOut] = {}

    def leave_out(path: Path, kind: str, reason: str) -> None:
        aside[path] = LeftOut(str(path), kind, reason)

    def on_error(error: OSError) -> None:
        leave_out(Path(error.filename), "unreadable", f"can't be read: {error.strerror}")

    for place, inside, names in os.walk(folder, onerror=on_error):
        here = Path(place)
        if any(sign <= set(names) for sign in _SIGNS_OF_A_RUN):
            leave_out(here, "run", "a run, not text")
        for name in inside:
            if (here / name).is_symlink() and name[0] != ".":
                leave_out(here / name, "link", "a link to a folder")
        inside[:] = [] if here in aside else [name for name in inside if name[0] != "."]
    return aside


def check_file(path: Path) -> None:
    """Refuse what is no file with something in it."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file; expected a text file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; expected text")


def read_texts(path: Path, level: str, on_chunk: Callable[[bytes], None] = lambda chunk: None) -> Iterator[str]:
    """Yield a file's text piece by piece.

    Args:
        path: The file.
        level: At "byte", each byte is given as the character of its number and nothing is refused; at any other level the file
            is UTF-8, strictly, without NUL, and a byte-order mark at its start is dropped.
        on_chunk: Called with each piece of the file that has been dealt with.

    Raises:
        InputError: The file can't be read, or is not UTF-8 text; with the place.
    """
    with _opened(path) as file:
        chunks = _observed(iter(lambda: file.read(CHUNK), b""), on_chunk)
        if level == "byte":
            yield from (chunk.decode("latin-1") for chunk in chunks)
        else:
            yield from _utf8(str(path), chunks, lambda: _head(path))


class LineEnds:
    r"""How the lines of a text end, counted as its bytes come by.

    Example:
        >>> ends = LineEnds()
        >>> ends.count(b"one\r\ntwo\r")
        >>> ends.count(b"\nthree\n")
        >>> ends.usual
        '\r\n'
    """

    def __init__(self) -> None:
        self._counts = {"\n": 0, "\r\n": 0, "\r": 0}
        self._before = b""

    def count(self, chunk: bytes) -> None:
        """Take the next bytes."""
        data = self._before + chunk
        self._before = data[-1:] if data.endswith(b"\r") else b""
        data = data[: len(data) - len(self._before)]
        both = data.count(b"\r\n")
        self._counts["\r\n"] += both
        self._counts["\n"] += data.count(b"\n") - both
        self._counts["\r"] += data.count(b"\r") - both

    def add(self, others: "LineEnds") -> None:
        """Take what was counted elsewhere."""
        for end, count in others._counts.items():
            self._counts[end] += count

    @property
    def usual(self) -> str:
        """The line end that is there most often; a text of one line has the usual one."""
        return max(self._counts, key=lambda end: self._counts[end])


def read_bytes(path: Path) -> bytes:
    """Return all of a file.

    Raises:
        InputError: It is missing, empty or can't be read.
    """
    check_file(path)
    with _opened(path) as file:
        return file.read()


def decode_text(name: str, data: bytes) -> str:
    """Return a text that is held whole, as `read_texts` reads one.

    Args:
        name: Where it is from, for the message.
        data: UTF-8.

    Raises:
        InputError: It is something else.
    """
    return "".join(_utf8(name, [data], lambda: data[:HEAD]))


def lines_of(texts: Iterable[str], level: str) -> Iterator[list[str]]:
    r"""Yield the lines of a text that comes in pieces, some at a time; empty ones are left out.

    A line ends with "\n" or "\r\n", which are not part of it, or with the text. At level "word" a line of blanks is empty too.
    """
    blanks = BLANKS if level == "word" else ""
    rest = ""
    for text in texts:
        *lines, rest = (rest + text).split("\n")
        if whole := [line for line in (line.removesuffix("\r") for line in lines) if line.strip(blanks)]:
            yield whole
    if (last := rest.removesuffix("\r")).strip(blanks):
        yield [last]


def check_looks_like_text(path: Path) -> None:
    """Refuse a file with a NUL byte near its start."""
    with _opened(path) as file:
        if (place := file.read(CHUNK).find(b"\0")) >= 0:
            raise _no_text(
                str(path),
                f"NUL byte at position {place:,}: not a text file; train with --level byte for binary files",
                _head(path),
            )


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from error


def _observed(chunks: Iterable[bytes], on_chunk: Callable[[bytes], None]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        on_chunk(chunk)


def _utf8(name: str, chunks: Iterable[bytes], head: Callable[[], bytes]) -> Iterator[str]:
    """Decode UTF-8 strictly, chunk by chunk, and say where it fails."""
    offset, rest = 0, b""
    for chunk in chunks:
        data = rest + chunk
        if offset == 0 and data.startswith(b"\xef\xbb\xbf"):
            data, offset = data[3:], 3
        try:
            text, rest = _decode(data)
        except UnicodeDecodeError as error:
            found = f"byte 0x{data[error.start]:02x} at position {offset + error.start:,} is not UTF-8"
            advice = "convert it to UTF-8, or train with --level byte for other encodings"
            raise _no_text(name, f"{found}; {advice}", head()) from error
        offset += len(data) - len(rest)
        if "\0" in text:
            at = offset - len(data) + len(rest) + len(text[: text.index("\0")].encode())
            found = f"NUL byte at position {at:,}: not a text file; train with --level byte for binary files"
            raise _no_text(name, found, head())
        yield text
    if rest:
        found = f"the file ends in the middle of a character, at byte {offset:,}; it may be cut off"
        raise _no_text(name, found, head())


def _decode(data: bytes) -> tuple[str, bytes]:
    """Return the text of whole characters, and the bytes of one that is still to come."""
    try:
        return data.decode(), b""
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and error.end == len(data):
            return data[: error.start].decode(), data[error.start :]
        raise


def _head(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read(HEAD)


def _no_text(name: str, found: str, head: bytes) -> InputError:
    """Return the refusal of a file: what it is, where that is known by its beginning, or else what was found in it."""
    known = format_of(head)
    return InputError(f"{name}: {found}" if known is None else f"{name}: {known.name}, not UTF-8 text; {known.advice}")


def identity(path: Path) -> list[Any]:
    """Return what tells a file from a changed one without reading it."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]
