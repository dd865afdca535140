"""Training by torchrun, as a user starts it: one report, one line where it ends, and a run as one process makes it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from throughtime.lm import TrainingOptions, train
from throughtime.lm.run import open_run

pytestmark = [pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals processes"), pytest.mark.slow]

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
OPTIONS = {"hidden": 8, "batch": 4, "bptt": 16, "eval_every": 5, "lr": 0.01, "steps": 120}
GIVEN = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def start(*arguments: object, restarts: int = 0) -> subprocess.Popen:
    """Start two processes of the program by torchrun."""
    words = [*TORCHRUN, "--max-restarts", str(restarts), "-m", "throughtime", *map(str, arguments)]
    there = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    return subprocess.Popen(words, env=there, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(err: str) -> list[str]:
    """Return what our program says of its end; torchrun has a page of its own."""
    return [line for line in err.splitlines() if line.startswith("throughtime train:")]


def wait_for_a_measurement(run: Path, step: int) -> None:
    """Wait until a run was measured, and so saved, after a step."""
    until = time.monotonic() + 200
    while time.monotonic() < until:
        if (run / "metrics.jsonl").exists():
            events = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"validation"' in line]
            if events and json.loads(events[-1])["step"] >= step:
                return
        time.sleep(0.02)
    pytest.fail("training makes no progress")


def workers(agent: int) -> list[int]:
    """Return the processes that torchrun has started, in the order of their ranks."""
    tasks = Path(f"/proc/{agent}/task").glob("*/children")
    return sorted(int(number) for children in tasks for number in children.read_text().split())


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that one process makes."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train([text], out, TrainingOptions(**OPTIONS))
    return out


def assert_same_run(run: Path, expected: Path) -> None:
    """Losses, of training and of the held-out text, and weights agree to float noise."""
    found, wanted = open_run(run), open_run(expected)
    assert found.results is not None
    assert wanted.results is not None
    assert found.results["held_out"]["nats_per_token"] == pytest.approx(
        wanted.results["held_out"]["nats_per_token"], abs=1e-4
    )
    measured = [
        {line["step"]: line["loss"] for line in each.metrics() if line.get("event") == "validation"}
        for each in (found, wanted)
    ]
    assert measured[0] == pytest.approx(measured[1], abs=1e-4)
    weights = [each.load_model("cpu", last=True).output.weight.detach() for each in (found, wanted)]
    assert (weights[0] - weights[1]).abs().max() < 1e-3
    assert found.config.training == wanted.config.training
    assert {path.name for path in run.iterdir()} == {path.name for path in expected.iterdir()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_lost_process_is_told_in_a_line_and_torchrun_goes_on_from_what_was_saved(text, alone, tmp_path):
    run = tmp_path / "run"
    job = start("train", text, "--out", run, *GIVEN, restarts=1)
    wait_for_a_measurement(run, 15)
    os.kill(workers(job.pid)[1], signal.SIGKILL)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 0, err
    (line,) = said(err)
    assert "another process of this training is gone" in line
    assert line.endswith(f"what was saved last is whole, go on with: throughtime train --resume {run}")
    assert err.count("characters to train on") == 2  # said by the first process of each start
    assert out.count("nats per token") == 1
    assert_same_run(run, alone)


def test_a_signal_to_torchrun_saves_and_another_number_of_processes_goes_on(text, alone, tmp_path, throughtime):
    run = tmp_path / "run"
    job = start("train", text, "--out", run, *GIVEN)
    wait_for_a_measurement(run, 15)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=200)
    assert f"stopped and saved; go on with: throughtime train --resume {run}" in err
    assert not said(err)
    assert open_run(run).results is None
    again = throughtime("train", "--resume", run)
    assert again.code == 0
    assert_same_run(run, alone)
    longer = start("train", "--resume", run, "--steps", 10, "--json")
    out, err = longer.communicate(timeout=200)
    assert longer.returncode == 0, err
    assert json.loads(out)["steps"] == OPTIONS["steps"] + 10


def test_what_several_processes_cannot_share_is_said_once(text, tmp_path):
    job = start("train", text, "--out", tmp_path / "new" / "run", *GIVEN, "--batch", "5")
    out, err = job.communicate(timeout=200)
    assert job.returncode
    assert not out
    assert said(err) == [
        "throughtime train: --batch 5: its rows are divided among 2 processes; expected a multiple of 2, such as 4 or 6"
    ]
    assert not (tmp_path / "new").exists()
