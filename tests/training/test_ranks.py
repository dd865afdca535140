"""Several processes: tests/training/two_ranks.py, run by two; and what one process can tell of them."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from throughtime.errors import InputError
from throughtime.launch import Launch, launched
from throughtime.training import Ranks, joined

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT",
         "TORCHELASTIC_MAX_RESTARTS")  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_come_to_what_one_comes_to():
    script, port = Path(__file__).parent / "two_ranks.py", str(free_port())
    there = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, script],
            env=there | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=250)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    assert said[0].splitlines() == [
        f"check_{name}, 0" for name in ("equality", "resumes", "decisions", "wrapped", "errors")
    ]


@pytest.fixture
def environment(monkeypatch):
    """Set what torchrun would; what isn't given isn't there."""

    def set_to(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    set_to()
    return set_to


def test_a_process_by_itself_is_alone(environment):
    with joined() as ranks:
        assert ranks == Ranks(0, 1)
    environment(WORLD_SIZE=1, RANK=0)
    with joined() as ranks:
        assert ranks.is_alone
    assert ranks.of_first(lambda: 3) == 3
    assert len(ranks.agents()) == 1


def test_the_environment_is_read(environment):
    environment(WORLD_SIZE=4, RANK=3, LOCAL_RANK=1, MASTER_ADDR="here", MASTER_PORT=1, TORCHELASTIC_MAX_RESTARTS=2)
    assert launched() == Launch(rank=3, size=4, local_rank=1, restarts=0, most_restarts=2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"WORLD_SIZE": 2}, "WORLD_SIZE is 2, but RANK isn't set; start the processes by torchrun"),
        ({"WORLD_SIZE": 2, "RANK": 0}, "but MASTER_ADDR isn't set"),
        ({"WORLD_SIZE": "two", "RANK": 0}, "WORLD_SIZE is 'two': expected a whole number, at least 1"),
        ({"WORLD_SIZE": 10**10, "RANK": 0}, "expected a whole number, at least 1 and of 9 digits at most; start"),
        ({"WORLD_SIZE": "9" * 5000, "RANK": 0}, "at least 1 and of 9 digits at most; start"),
        ({"WORLD_SIZE": 2, "RANK": 10**20, "MASTER_ADDR": "h", "MASTER_PORT": 1}, "at least 0 and of 9 digits at most"),
        ({"WORLD_SIZE": 0}, "WORLD_SIZE is '0': expected a whole number, at least 1"),
        ({"WORLD_SIZE": 2, "RANK": -1, "MASTER_ADDR": "h", "MASTER_PORT": 1}, "RANK is '-1'"),
        ({"WORLD_SIZE": 2, "RANK": 2, "MASTER_ADDR": "h", "MASTER_PORT": 1}, "expected a rank below it"),
        (
            {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "h", "MASTER_PORT": "x"},
            "MASTER_PORT is 'x': expected a whole number",
        ),
        (
            {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "h", "MASTER_PORT": 0},
            "MASTER_PORT is '0': expected a whole number",
        ),
        ({"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "h", "MASTER_PORT": 99999}, "can't meet the others at h:99999"),
    ],
)
def test_an_environment_that_says_too_little_or_nonsense_is_refused(environment, values, said):
    environment(**values)
    with pytest.raises(InputError, match=said) as caught, joined():
        pass
    assert "\n" not in str(caught.value)


WAITS = """
import signal, threading
from throughtime.training import joined
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(1.0, print, ["waits"], {"flush": True}).start()
try:
    with joined():
        pass
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(os.name != "posix", reason="signals a process")
@pytest.mark.parametrize("rank", range(2))
def test_ctrl_c_ends_the_wait_for_others(rank):
    there = os.environ | {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", WAITS],
        env=there | {"MASTER_PORT": str(free_port())},
        stdout=pipe,
        stderr=pipe,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waits\n"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "interrupted\n"), err


def test_each_process_draws_its_own_numbers_and_then_all_are_alike_again():
    drawn, after = [], []
    for rank in range(2):
        torch.manual_seed(3)
        with Ranks(rank, 2).own_chance(torch.device("cpu")):
            drawn.append(torch.rand(4))
        after.append(torch.rand(4))
    assert not torch.equal(*drawn)
    assert torch.equal(*after)


@pytest.mark.parametrize("rows", range(1, 9))
def test_shares_are_all_rows_in_order(rows):
    inputs = torch.arange(3 * rows).view(3, rows)
    lengths = torch.arange(rows) % 4
    shares = [Ranks(rank, 4).share_of((inputs, inputs, lengths)) for rank in range(4)]
    assert torch.equal(torch.cat([share.window[0] for share in shares], 1), inputs)
    assert torch.equal(torch.cat([share.window[2] for share in shares]), lengths)
    assert {share.positions for share in shares} == {int(lengths.sum())}
    if lengths.any():
        assert sum(share.weight for share in shares) == pytest.approx(1)


def test_devices_are_one_for_each_process(monkeypatch):
    two = Ranks(1, 2, local_rank=1)
    assert two.device(torch.device("cpu")) == torch.device("cpu")
    assert Ranks().device(torch.device("mps")) == torch.device("mps")
    with pytest.raises(InputError, match="--device mps: serves one process only"):
        two.device(torch.device("mps"))
    with pytest.raises(InputError, match="want one each"):
        two.device(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="process 2 of this machine finds 1 GPU\\(s\\)"):
        two.device(torch.device("cuda"))
