"""Files that are no text are known by name."""

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from throughtime.lm.formats import HEAD, format_of

TEXT = "Il était une fois, “quoted”, a cat.\r\n" * 300


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


def numpy_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(9))
    return file.getvalue()


FILES = {
    "gzip-compressed": gzip.compress(TEXT.encode()),
    "bzip2-compressed": bz2.compress(TEXT.encode()),
    "xz-compressed": lzma.compress(TEXT.encode()),
    "a zip archive": zipped("a.txt", TEXT.encode()),
    "an EPUB book": zipped("mimetype", b"application/epub+zip"),
    "an Office document (docx, xlsx or pptx)": zipped("[Content_Types].xml", b"<?xml?>"),
    "a tar archive": tarred(),
    "a Python pickle": pickle.dumps(TEXT),
    "a NumPy array": numpy_array(),
    "a PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "a PNG picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "an SQLite database": b"SQLite format 3\0\x10\0",
}


@pytest.mark.parametrize("name", FILES)
def test_a_binary_file_is_known_by_its_beginning(name):
    found = format_of(FILES[name][:HEAD])
    assert found is not None
    assert found.name == name
    assert found.advice


@pytest.mark.parametrize("text", [TEXT, TEXT[:7], "a\n"])
@pytest.mark.parametrize("encoding", ["UTF-16-LE", "UTF-16-BE", "UTF-32-LE", "UTF-32-BE"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_wide_encodings_are_known_with_and_without_a_mark(text, encoding, mark):
    found = format_of((mark + text).encode(encoding)[:HEAD])
    assert found is not None
    assert found.name == "text in " + (encoding[:6] if mark else encoding)
    assert (mark + text).encode(encoding).decode(found.name.removeprefix("text in ")) == text  # the advice is right


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"caf\xe9 ", b"\xe2\x82 cut", b"abc\0def" * 50, b"a\0b\0\0\0c\0" * 9, b"\0" * 99]
)
def test_what_the_beginning_does_not_tell(data):
    assert format_of(data) is None


@given(st.binary(max_size=200))
def test_no_beginning_is_an_error(data):
    format_of(data)
