"""Files of a run are plain files: what is a link or a pipe is neither followed nor waited for, and what is written is whole."""

import os
import signal

import pytest

from throughtime.training.files import (
    CheckpointError,
    check_folder,
    create_beside,
    is_leftover,
    open_to_append,
    open_to_read,
    read,
    remove_leftovers,
    write_atomically,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")


@pytest.fixture(autouse=True)
def _patience():
    """Whatever waits for the other end of a pipe is interrupted."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def make(kind, path, target):
    target.write_bytes(b"somebody else's")
    if kind == "link":
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to(target.with_name("nothing"))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


KINDS = {"link": "a link", "dangling link": "a link", "pipe": "a pipe", "device": "a link", "folder": "a folder"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [read, open_to_read, open_to_append])
def test_what_is_no_plain_file_is_refused(tmp_path, kind, call):
    make(kind, tmp_path / "file", tmp_path / "target")
    with pytest.raises(CheckpointError, match=f"file: {KINDS[kind]}, expected a plain file"):
        call(tmp_path / "file")
    assert (tmp_path / "target").read_bytes() == b"somebody else's"
    assert not (tmp_path / "nothing").exists()


def test_a_file_with_another_name_is_read_and_never_written_into(tmp_path):
    (tmp_path / "target").write_bytes(b"somebody else's")
    os.link(tmp_path / "target", tmp_path / "file")
    assert read(tmp_path / "file") == b"somebody else's"
    with pytest.raises(CheckpointError, match=r"file: has another name too \(a hard link\)"):
        open_to_append(tmp_path / "file")
    write_atomically(tmp_path / "file", b"ours")  # in its place
    open_to_append(tmp_path / "file").close()
    assert (tmp_path / "target").read_bytes() == b"somebody else's"


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "device"])
def test_what_is_written_takes_the_place_of_a_link(tmp_path, kind):
    make(kind, tmp_path / "file", tmp_path / "target")
    write_atomically(tmp_path / "file", b"ours")
    assert read(tmp_path / "file") == b"ours"
    assert (tmp_path / "target").read_bytes() == b"somebody else's"
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "target"}


def test_a_name_that_could_be_foreseen_is_no_trap(tmp_path):
    (tmp_path / "target").write_bytes(b"somebody else's")
    (tmp_path / ".file.new").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "file", b"ours")
    assert (tmp_path / "target").read_bytes() == b"somebody else's"
    names = set()
    for _ in range(3):
        beside, file = create_beside(tmp_path / "file")
        file.close()
        names.add(beside)
    assert len(names) == 3


def test_what_a_crash_left_is_removed_and_nothing_else(tmp_path):
    left, file = create_beside(tmp_path / "file")
    file.close()
    (tmp_path / ".file.new").write_text("")
    (tmp_path / ".hidden").write_text("")
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "none")
    assert not left.exists()
    assert is_leftover(left.name)
    assert {entry.name for entry in tmp_path.iterdir()} == {".file.new", ".hidden"}


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"ours")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_link_is_refused(tmp_path):
    check_folder(tmp_path)
    check_folder(tmp_path / "none")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="link: a link, expected a folder"):
        check_folder(tmp_path / "link")


def test_missing_and_unwritable_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read(tmp_path / "none")
    with pytest.raises(CheckpointError, match="can't be written: No such file"):
        open_to_append(tmp_path / "none" / "file")
    with pytest.raises(CheckpointError, match="can't be written: No such file"):
        write_atomically(tmp_path / "none" / "file", b"")


def test_nothing_is_said_to_be_kept_where_nothing_was(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(CheckpointError, match=r"file: can't be written: No space left on device$"):
        write_atomically(tmp_path / "file", b"ours")
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(CheckpointError, match=r"No space left on device; what was saved before is still there$"):
        write_atomically(tmp_path / "file", b"ours")
