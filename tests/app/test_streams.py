"""Standard output and error in every state that a shell can leave them in."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

PROGRAM = f"{sys.executable} -m throughtime"


def shell(command: str, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False, **settings)


@pytest.mark.parametrize("command", ["info {run}", "sample {run} --length 5", "--help", "eval {run} {text} --json"])
def test_a_closed_output_is_said_in_a_line(command: str, run: Path, text: Path) -> None:
    ended = shell(f"{PROGRAM} {command.format(run=run, text=text)} >&-")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "standard output is closed" in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", ["info {run}", "sample {run} --length 5", "--help", "info {run} --json"])
def test_an_output_on_a_full_disk_is_said_in_a_line(command: str, run: Path) -> None:
    ended = shell(f"{PROGRAM} {command.format(run=run)} >/dev/full")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "no space left on device" in ended.stderr


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-"])
def test_training_goes_on_where_its_messages_are_lost(where: str, text: Path, tmp_path: Path) -> None:
    ended = shell(f"{PROGRAM} train {text} --out {tmp_path / 'run'} --steps 3 --hidden 8 --json {where}")
    assert ended.returncode == 0
    assert '"steps": 3' in ended.stdout
    assert not ended.stderr
    assert shell(f"{PROGRAM} info {tmp_path / 'nothing'} {where}").returncode == 2


def test_no_file_becomes_standard_output(run: Path, tmp_path: Path) -> None:
    ended = shell(f"{PROGRAM} gradients {run} --lags 8 --probe 4 --out {tmp_path} >&- 2>&-")
    assert ended.returncode == 2
    assert not list(tmp_path.iterdir())


def test_a_dumb_terminal_gets_no_colours(run: Path) -> None:
    script = f"{PROGRAM} --help; {PROGRAM} info nowhere; {PROGRAM} info {run}"
    code = f"import pty, sys; sys.exit(pty.spawn(['bash', '-c', {script!r}]) >> 8)"
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    said = {
        term: subprocess.run(
            [sys.executable, "-c", code], capture_output=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
            env=environment | {"TERM": term},
        ).stdout
        for term in ("dumb", "xterm-256color")
    }  # fmt: skip
    assert b"no such run" in said["dumb"]
    assert b"\x1b" not in said["dumb"]
    assert b"\x1b[1m" in said["xterm-256color"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_closed_terminal_and_an_impatient_ctrl_c_save(
    number: signal.Signals, code: int, text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["train", str(text), "--out", str(run), "--hidden", "8", "--batch", "2", "--steps", "20000"]
    with subprocess.Popen(
        [sys.executable, "-m", "throughtime", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        for _ in range(10):
            process.send_signal(number)
            time.sleep(0.02)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert err.splitlines()[-1] == f"stopped and saved; go on with: throughtime train --resume {run}"


@pytest.mark.parametrize("wait", [0.0, 0.3, 0.6])
def test_ctrl_c_again_and_again_before_the_first_step_ends_in_a_line(wait: float, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "throughtime", "train", str(text), "--out", str(run), "--steps", "99999"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not run.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(wait)
        for _ in range(10):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "KeyboardInterrupt" not in err
    assert err.splitlines()[-1].startswith("stopped")


def test_an_interrupt_that_came_through_executed_text_is_no_other_end(tmp_path: Path) -> None:
    """As while torch or a dataclass is being imported; Python itself would end `python -m` by a signal then."""
    module = """
        import sys
        from throughtime.app import signals
        try:
            exec("raise KeyboardInterrupt")
        except KeyboardInterrupt:
            signals.ignore()
        sys.exit(130)
    """
    (tmp_path / "interrupted.py").write_text(textwrap.dedent(module))
    ended = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, timeout=60, check=False)
    assert ended.returncode == 130
