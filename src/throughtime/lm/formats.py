"""What a file is that isn't text in UTF-8: known by its first bytes, and by its name to whoever is refused it."""

from typing import NamedTuple

HEAD = 4096  # bytes from a file's start that tell


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        name: As in "this is …".
        advice: What to do with it.
    """

    name: str
    advice: str


def format_of(head: bytes) -> Format | None:
    r"""Return what a file is, by its first bytes, at most `HEAD`; `None` where they don't tell.

    Example:
        >>> format_of(b"\x1f\x8b\x08\x00").name
        'gzip-compressed'
        >>> format_of("no mark".encode("utf-16-le")).name
        'text in UTF-16-LE'
        >>> format_of(b"caf\xe9") is None
        True
    """
    if (encoding := _wide_encoding(head)) is not None:
        return Format(f"text in {encoding}", f"convert it, for example with: iconv -f {encoding} -t UTF-8")
    for begin, mark, name, advice in _MARKS:
        if head[begin : begin + len(mark)] == mark:
            return Format(name, advice)
    return None


def _wide_encoding(head: bytes) -> str | None:
    """Return the name of an encoding with two or four bytes to a unit, by its mark or by where the zeros are."""
    for mark, name in _WIDE_MARKS:
        if head.startswith(mark):
            return name
    for name, width, place in (("UTF-32-LE", 4, 0), ("UTF-32-BE", 4, 3), ("UTF-16-LE", 2, 0), ("UTF-16-BE", 2, 1)):
        whole = head[: len(head) // width * width]
        zeros = sum(whole[at::width].count(0) for at in range(width) if at != place)
        is_whole = len(head) < HEAD
        if 3 * zeros < len(whole) + 1 or 0 in whole[place::width] or (is_whole and whole != head):
            continue  # less than text in mostly Latin letters has
        try:
            text = whole.decode(name, "strict" if is_whole else "ignore")  # the last character may be cut in two
        except UnicodeDecodeError:
            continue
        if all(character.isprintable() or character.isspace() for character in text):
            return name
    return None


_WIDE_MARKS = (  # UTF-32's first, since UTF-16's little-endian mark is how it begins
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_TAKE_OUT = "take the text out of it first"
_UNPACK = "unpack it first, and give the folder"
_NO_TEXT = "give a text, or train with --level byte to learn its bytes"


def _by(command: str) -> str:
    return f"decompress it first, for example with: {command}"


_MARKS = (
    (0, b"\x1f\x8b", "gzip-compressed", _by("gunzip --keep")),
    (0, b"BZh", "bzip2-compressed", _by("bunzip2 --keep")),
    (0, b"\xfd7zXZ\0", "xz-compressed", _by("unxz --keep")),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed", _by("unzstd")),
    (0, b"\x04\x22\x4d\x18", "lz4-compressed", _by("unlz4")),
    (0, b"\x1f\x9d", "compressed by compress", _by("uncompress")),
    (30, b"mimetypeapplication/epub+zip", "an EPUB book", _TAKE_OUT),
    (30, b"mimetypeapplication/vnd.oasis", "an OpenDocument file", _TAKE_OUT),
    (30, b"[Content_Types].xml", "an Office document (docx, xlsx or pptx)", _TAKE_OUT),
    (0, b"PK\x03\x04", "a zip archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"%PDF-", "a PDF", _TAKE_OUT),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document (doc, xls or ppt)", _TAKE_OUT),
    (60, b"BOOKMOBI", "a Mobipocket book", _TAKE_OUT),
    (0, b"SQLite format 3\0", "an SQLite database", _TAKE_OUT),
    (0, b"PAR1", "a Parquet table", _TAKE_OUT),
    (0, b"ARROW1", "an Arrow table", _TAKE_OUT),
    (0, b"\x89HDF\r\n", "an HDF5 file", _TAKE_OUT),
    (0, b"\x93NUMPY", "a NumPy array", _NO_TEXT),
    (0, b"\x80\x02", "a Python pickle", _NO_TEXT),
    (0, b"\x80\x03", "a Python pickle", _NO_TEXT),
    (0, b"\x80\x04", "a Python pickle", _NO_TEXT),
    (0, b"\x80\x05", "a Python pickle", _NO_TEXT),
    (0, b"GGUF", "a GGUF model", _NO_TEXT),
    (0, b"\x89PNG\r\n", "a PNG picture", _NO_TEXT),
    (0, b"\xff\xd8\xff", "a JPEG picture", _NO_TEXT),
    (0, b"GIF8", "a GIF picture", _NO_TEXT),
    (8, b"WEBP", "a WebP picture", _NO_TEXT),
    (0, b"II*\0", "a TIFF picture", _NO_TEXT),
    (0, b"MM\0*", "a TIFF picture", _NO_TEXT),
    (8, b"WAVE", "a WAV recording", _NO_TEXT),
    (0, b"ID3", "an MP3 recording", _NO_TEXT),
    (0, b"OggS", "an Ogg recording", _NO_TEXT),
    (0, b"fLaC", "a FLAC recording", _NO_TEXT),
    (4, b"ftyp", "an MP4 film", _NO_TEXT),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM film", _NO_TEXT),
    (0, b"\x7fELF", "a program or library", _NO_TEXT),
    (0, b"\xcf\xfa\xed\xfe", "a program or library", _NO_TEXT),
    (0, b"MZ", "a program or library", _NO_TEXT),
    (0, b"\0asm", "a WebAssembly module", _NO_TEXT),
    (0, b"\xca\xfe\xba\xbe", "a Java class or a program", _NO_TEXT),
    (0, b"\xa7\x0d\x0d\x0a", "compiled Python", _NO_TEXT),
)
