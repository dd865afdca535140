"""Files of text: found, read in pieces, and refused with the place where they are no text."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from throughtime.errors import InputError

CHUNK = 8 << 20  # bytes of text held at a time


def find_files(paths: Sequence[str | Path], include: str = "*") -> list[tuple[Path, bool]]:
    """Return (file, whether it was named explicitly) in a fixed order.

    Raises:
        InputError: A file that was named is missing or empty, or a folder holds none that matches.
    """
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
            check_file(given)
            files.append((given, True))
    return files


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
            yield from _utf8(path, chunks)


def lines_of(texts: Iterable[str]) -> Iterator[list[str]]:
    r"""Yield the lines of a text that comes in pieces, some at a time; empty ones are left out.

    A line ends with "\n" or "\r\n", which are not part of it, or with the text.
    """
    rest = ""
    for text in texts:
        *lines, rest = (rest + text).split("\n")
        if whole := [line for line in (line.removesuffix("\r") for line in lines) if line]:
            yield whole
    if rest.removesuffix("\r"):
        yield [rest.removesuffix("\r")]


def looks_binary(path: Path) -> bool:
    """Return whether there is a NUL byte near the file's start."""
    with _opened(path) as file:
        return b"\0" in file.read(CHUNK)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from error


def _observed(chunks: Iterable[bytes], on_chunk: Callable[[bytes], None]) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        on_chunk(chunk)


def _utf8(path: Path, chunks: Iterable[bytes]) -> Iterator[str]:
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
        yield text
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


def identity(path: Path) -> list[Any]:
    """Return what tells a file from a changed one without reading it."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]
