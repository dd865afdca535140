"""Compilation beforehand: every contestant that compiles runs once in a process of its own, all of them side by side.

What they compile is found again in the caches on disk of Triton, torch.compile and torch's extensions. Who takes too long is
killed and, unless it is ours, left out.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.cases import Setting, cases
from benchmarks.gpu.contest import Contestant, answer
from benchmarks.gpu.timing import synchronise

LEAST = 40.0  # seconds that one has to have had before it is given up, when time is over for all
KEPT = {"TRITON_CACHE_AUTOTUNING": "1"}  # what a peer's tuning chose is found again, too
_ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "1"} | KEPT


@dataclass
class _Child:
    case: str
    key: str
    process: subprocess.Popen[bytes]
    said: Path
    began: float = field(default_factory=time.monotonic)


def compiling(setting: Setting, case: str) -> Iterator[Contestant]:
    """Every contestant of a case that compiles and can take part."""
    for contest in cases(setting)[case]():
        yield from (one for one in contest.contestants if one.compiles and not one.missing)


def run_once(setting: Setting, case: str, key: str) -> None:
    """Run those contestants of a case once that compile under one name."""
    for one in compiling(setting, case):
        if one.compiles == key:
            with one.numerics.in_force():
                answer(one.build())
                synchronise(setting.device)


def prepare(
    setting: Setting, names: Sequence[str], seconds: float, each: float, options: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Compile what the named cases need; return for each case under which names it was given up, and why.

    Args:
        setting: Where the cases run.
        names: The cases.
        seconds: For all of it. Who has hardly begun by then compiles when its turn comes.
        each: Seconds for one process.
        options: The command line's, which the processes repeat.
    """
    waiting = [(case, key) for case in names for key in dict.fromkeys(one.compiles for one in compiling(setting, case))]
    given_up: dict[str, dict[str, str]] = {case: {} for case in names}
    running: list[_Child] = []
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while running or (waiting and time.monotonic() < end):
            while waiting and len(running) < (os.cpu_count() or 1) + 4 and time.monotonic() < end:
                running.append(_begin(*waiting.pop(0), options, Path(folder, str(len(waiting)))))
            for child in list(running):
                now = time.monotonic()
                if child.process.poll() is not None:
                    running.remove(child)
                    _note_failure(child)
                elif now > min(end, child.began + each):
                    running.remove(child)
                    os.killpg(child.process.pid, signal.SIGKILL)
                    child.process.wait()
                    if now - child.began >= LEAST:
                        given_up[child.case][child.key] = f"not compiled within {now - child.began:.0f} s"
            time.sleep(0.1)
    return given_up


def _begin(case: str, key: str, options: Sequence[str], said: Path) -> _Child:
    command = [sys.executable, "-m", "benchmarks.gpu", *options, "--once", case, key]
    with said.open("wb") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | _ENVIRONMENT,
            start_new_session=True,  # so that its compilers end with it
        )
    return _Child(case, key, process, said)


def _note_failure(child: _Child) -> None:
    """Print what a process that failed said last; its contestant tries again when its turn comes."""
    if child.process.returncode:
        last = child.said.read_text("utf-8", "replace").strip().splitlines()[-1:]
        print(f"preparing {child.case}, {child.key}: {''.join(last)[:200]}", flush=True)
