"""One process trains in a folder: the second is told which, and a process that was killed holds nothing."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from throughtime.training.files import CheckpointError
from throughtime.training.locking import LOCK, check_unlocked, lock

pytest.importorskip("fcntl")

HOLD = """
import sys
from throughtime.training.locking import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_the_second_is_told_who_holds_it_and_a_kill_leaves_nothing_held(tmp_path):
    with holder(tmp_path) as process:
        for refused in (lambda: lock(tmp_path).__enter__(), lambda: check_unlocked(tmp_path)):
            with pytest.raises(
                CheckpointError, match=rf"process {process.pid} is training there; .*kill {process.pid}"
            ):
                refused()
        process.send_signal(signal.SIGKILL)
        process.wait()
    check_unlocked(tmp_path)
    assert (tmp_path / LOCK).exists()
    with lock(tmp_path):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_of_many_at_once_one_holds_it(tmp_path):
    """Some find the file just before it is removed, and make it anew."""
    inside, most, held = [], [], []

    def contend():
        for _ in range(200):
            try:
                with lock(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    held.append(1)
            except CheckpointError:
                pass

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert held  # how often depends on whose turn it is
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "reason"), [(os.symlink, "a link, expected a plain file"), (os.link, r"another name too \(a hard link\)")]
)
def test_a_trap_in_place_of_the_lock_is_refused(tmp_path, make, reason):
    (tmp_path / "outside").write_text("somebody else's")
    make(tmp_path / "outside", tmp_path / LOCK)
    for refused in (lambda: lock(tmp_path).__enter__(), lambda: check_unlocked(tmp_path)):
        with pytest.raises(CheckpointError, match=reason):
            refused()
    assert (tmp_path / "outside").read_text() == "somebody else's"
