"""Altered runs, read by every command: each ends with an answer or one line, and nothing outside the run is touched.

    python benchmarks/fuzz_runs.py --count 5000 --seed 1

An altered run has one of its files flipped, cut, filled, removed or made a link, a pipe or a folder; or entries of its JSON, its
tensors or its log forged, and every digest renewed as a forger would. Each is copied for each command, and all of them read it in a
process that is forked from one that has run every command, so that nothing is left to be imported. What is not allowed is printed
with the run's number, and ends the script with 1: an exit code other than 0, 2, 130, 141 and 143, a traceback, "this is a bug",
more than 10 s of computing or 100 s in all, a raw control character (but in the text that a model writes), or a change outside the
run.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from throughtime.app.cli import main as throughtime
from throughtime.lm import TrainingOptions, train
from throughtime.lm.run import CHECKPOINT, CONFIG, DATA, GENERATION, METRICS, MODEL, RESULTS, TOKENIZER, file_digest
from throughtime.training.checkpoint import load, load_json, save, save_json
from throughtime.training.files import CheckpointError

LONGEST, WAITING = 10, 100  # seconds for a command: of computing, and in all, on a machine that does other work too
ALLOWED = (0, 2, 130, 141, 143)
DESCRIPTION, TOKENS = f"{DATA}/corpus.json", f"{DATA}/tokens.bin"
FILES = (CONFIG, TOKENIZER, MODEL, GENERATION, RESULTS, METRICS, DESCRIPTION, TOKENS, CHECKPOINT, "config.toml")
SEALED = (RESULTS, DESCRIPTION)
RAW = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\xaa-\xae]|\xe2\x81[\xa6-\xa9]")
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        2,
        10**5,
        10**9,
        2**62,
        2**64,
        10**300,
        0.5,
        -0.5,
        1e-320,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *("", "x", "\x1b[31mred", "\u202ereversed", "\x9b1m", "\ud800", "lstm", "word", "/etc/passwd", "a" * 5000),
    *([], {}, [[]], [None], {"": 0}, {"a": {"b": []}}),
)

COMMANDS = {
    "info": ["info", "RUN"],
    "info --json": ["info", "RUN", "--json"],
    "sample": ["sample", "RUN", "--length", "5", "--seed", "1", "--prompt", "the"],
    "sample --last": ["sample", "RUN", "--length", "5", "--seed", "1", "--last"],
    "eval": ["eval", "RUN", "TEXT", "--ngram", "2"],
    "eval --json": ["eval", "RUN", "TEXT", "--json"],
    "score": ["score", "RUN", "TEXT"],
    "score --json": ["score", "RUN", "TEXT", "--json"],
    "plot": ["plot", "RUN"],
    "gradients": ["gradients", "RUN", "--lags", "3", "--probe", "2"],
    "compare-gradients": ["compare-gradients", "rnn", "RUN", "--lags", "3", "--probe", "2"],
    "pack": ["pack", "RUN", "RUN-packed"],
    "resume": ["train", "--resume", "RUN"],
    "resume longer": ["train", "--resume", "RUN", "--steps", "2"],
    "train --from": [
        "train",
        "--from",
        "RUN",
        "TEXT",
        "--out",
        "RUN-next",
        "--steps",
        "2",
        "--batch",
        "2",
        "--bptt",
        "8",
    ],
}
MADE = "RUN-packed", "RUN-next"  # beside the run, by the commands


def make_runs(folder: Path) -> list[Path]:
    """Train small runs, complete and stopped, of each level."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog.\nanother line, of words and marks!\n" * 12)
    small: dict[str, Any] = {"hidden": 6, "batch": 2, "bptt": 8, "steps": 6}
    kinds: dict[str, dict[str, Any]] = {
        "char": {},
        "stopped": {"cell": "gru", "layers": 2, "ema": 0.9, "eval_every": 2},
        "words": {"level": "word", "mode": "sentence", "eval_every": 3},
        "mlp": {"cell": "mlp", "window": 3, "level": "byte", "optimizer": "sgd"},
    }
    if find_spec("tokenizers") is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it warns of forks otherwise
        kinds["pairs"] = {"level": "bpe", "vocabulary": 300, "cell": "rnn"}

    def stop(report: Any) -> None:
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    for name, options in kinds.items():
        train([text], folder / name, TrainingOptions.from_values(small | options), stop if name == "stopped" else None)
    return [folder / name for name in kinds]


def alter(run: Path, chooser: random.Random, outside: Path) -> str:
    """Alter a run in one way, and return which."""
    how = chooser.choice((spoil, replace_file, forge_json, forge_json, forge_tensors, forge_state, forge_metrics))
    try:
        return how(run, chooser, outside)
    except (FileNotFoundError, CheckpointError, IndexError):  # the run has no such file, or nothing is in it
        return spoil(run, chooser, outside)


def spoil(run: Path, chooser: random.Random, outside: Path) -> str:
    """Flip a bit, cut the file, fill it or remove it."""
    path = chooser.choice([run / name for name in FILES if (run / name).exists()])
    data = bytearray(path.read_bytes())
    how = chooser.choice(("flip", "flip", "cut", "zeros", "noise", "remove", "empty"))
    at = chooser.randrange(len(data))
    if how == "flip":
        data[at] ^= 1 << chooser.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how in ("zeros", "noise"):
        data[at : at + 20] = bytes(20) if how == "zeros" else chooser.randbytes(20)
    path.write_bytes(b"" if how == "empty" else data)
    if how == "remove":
        path.unlink()
    return f"{how} {path.relative_to(run)} at {at}"


def replace_file(run: Path, chooser: random.Random, outside: Path) -> str:
    """Put a link, another name of a file outside, a pipe or a folder in a file's place."""
    name = chooser.choice((*FILES, ".lock", "loss.png", DATA, "checkpoint", "tensorboard"))
    path, how = run / name, chooser.choice(("link", "hard link", "dangling", "device", "pipe", "folder"))
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "hard link":
        path.hardlink_to(outside)
    else:
        path.symlink_to({"link": outside, "dangling": outside.with_name("nothing"), "device": "/dev/zero"}[how])
    return f"{how} {name}"


def forge_json(run: Path, chooser: random.Random, outside: Path) -> str:
    """Replace, remove or add an entry somewhere in a JSON file."""
    name = chooser.choice((CONFIG, CONFIG, TOKENIZER, GENERATION, RESULTS, DESCRIPTION, DESCRIPTION))
    sealed = name in SEALED
    value = load_json(run / name, sealed=sealed)
    place: Any = value
    parent: Any = value
    keys: list[Any] = []
    while isinstance(place, dict | list) and place and (not keys or chooser.random() < 0.7):
        key = chooser.choice(list(place) if isinstance(place, dict) else range(len(place)))
        keys.append(key)
        parent, place = place, place[key]
    new = chooser.choice(VALUES)
    if isinstance(parent, dict) and chooser.random() < 0.15:
        del parent[keys[-1]]
        new = "nothing"
    else:
        parent[keys[-1]] = new
    if chooser.random() < 0.05:
        (run / name).write_text('{"a":' * 200_000)
        new = "depth"
    else:
        save_json(run / name, value, sealed=sealed)
    renew(run)
    return f"{name} {keys} = {str(new)[:40]!r}"


def forge_tensors(run: Path, chooser: random.Random, outside: Path) -> str:
    """Give a tensor another shape, dtype, number or name."""
    name = chooser.choice((MODEL, CHECKPOINT))
    tensors, state = load(run / name)
    key = chooser.choice(list(tensors))
    tensor = tensors[key]
    how = chooser.choice(("one", "more", "empty", "double", "int", "nan", "huge", "remove", "rename"))
    changed = {
        "one": torch.zeros(1),
        "more": torch.cat([tensor.flatten(), tensor.flatten()]),
        "empty": torch.zeros(0, 5),
        "double": tensor.double(),
        "int": tensor.to(torch.int16),
        "nan": torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor - 1,
        "huge": torch.full_like(tensor, 1e38) if tensor.is_floating_point() else tensor + 7,
    }
    tensors.pop(key)
    if how != "remove":
        tensors[key + "x" if how == "rename" else key] = changed.get(how, tensor)
    save(run / name, tensors, state)
    return f"{name} {key} {how}"


def forge_state(run: Path, chooser: random.Random, outside: Path) -> str:
    """Replace an entry of the checkpoint's state."""
    tensors, state = load(run / CHECKPOINT)
    key, value = chooser.choice(list(state)), chooser.choice(VALUES)
    if key == "watch" and chooser.random() < 0.7:
        state["watch"][chooser.choice(list(state["watch"]))] = value
    else:
        state[key] = value
    save(run / CHECKPOINT, tensors, state)
    return f"state {key} = {str(value)[:40]!r}"


def forge_metrics(run: Path, chooser: random.Random, outside: Path) -> str:
    """Add a line to the log, most of them with the checksum that they would have."""
    entries = {"step": 1, "seconds": 1.0, "loss": 1.0, "gradient_norm": 1.0}
    entries[chooser.choice((*entries, "event", "other"))] = chooser.choice(VALUES)
    body = chooser.choice((json.dumps(entries)[:-1], "3", "null", "[]", '{"step": 1'))
    check = f', "crc32": {zlib.crc32(body.encode())}}}' if chooser.random() < 0.8 else "}"
    with (run / METRICS).open("a") as file:
        file.write(body + check + "\n")
    return f"metrics {body[:60]!r}"


def renew(run: Path) -> None:
    """Bind weights and checkpoint to what stands beside them now."""
    tensors, state = load(run / MODEL)
    save(run / MODEL, tensors, {name: file_digest(run / name) for name in state})
    tensors, state = load(run / CHECKPOINT)
    save(run / CHECKPOINT, tensors, state | {"files": {name: file_digest(run / name) for name in state["files"]}})


@dataclass(frozen=True)
class Answer:
    """How a command ended: its exit code (or the signal that ended it, negative), output, messages, and time in seconds."""

    command: str
    code: int
    printed: bytes
    told: bytes
    seconds: float
    touched: bool  # something outside the run


def read_by_all(altered: Path, folder: Path, beside: Path, before: dict[str, bytes]) -> list[Answer]:
    """Let every command read a copy of a run, in a process that is forked; another goes on where one is ended by a signal."""
    answers: list[Answer] = []
    while left := list(COMMANDS)[len(answers) :]:
        ended = folder / "ended"
        ended.write_text("")
        began, process = time.perf_counter(), os.fork()
        if process == 0:
            try:
                for number, name in enumerate(left):
                    run_command(name, altered, folder, number, ended)
            finally:
                os._exit(0)
        _, status = os.waitpid(process, 0)
        entries = [json.loads(line) for line in ended.read_text().splitlines()]
        if len(entries) < len(left):
            code = os.waitstatus_to_exitcode(status) or 1  # an exception that the program let through
            entries.append([code, time.perf_counter() - began - sum(seconds for _, seconds in entries)])
        touched = snapshot(beside) != before or (beside / "nothing").exists()
        for number, (name, (code, seconds)) in enumerate(zip(left, entries, strict=False)):
            printed, told = ((folder / f"{stream}{number}").read_bytes() for stream in ("printed", "told"))
            answers.append(Answer(name, code, printed, told, seconds, touched))
    return answers


def run_command(name: str, altered: Path, folder: Path, number: int, ended: Path) -> None:
    """Run a command on a copy of a run in this process; write down its exit code and seconds when it has ended."""
    run = folder / "run"
    remove_made(folder)
    copy_run(altered, run)
    for stream, to in (("printed", 1), ("told", 2)):
        opened = os.open(folder / f"{stream}{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, to)
        os.close(opened)
    signal.alarm(WAITING)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    began = time.perf_counter()
    code = throughtime(place(COMMANDS[name], run, folder / "text.txt"))
    sys.stdout.flush()
    with ended.open("a") as file:
        file.write(json.dumps([code, time.perf_counter() - began]) + "\n")


def place(words: list[str], run: Path, text: Path) -> list[str]:
    """Return a command with the names of a run and a text."""
    return [word.replace("RUN", str(run)).replace("TEXT", str(text)) for word in words]


def warm_up(runs: list[Path], folder: Path) -> None:
    """Run every command here on runs as they should be, so that what is forked has nothing to import."""
    for name, words in COMMANDS.items():
        run = folder / "run"
        copy_run(runs[name == "resume"], run)  # the second was stopped
        with (folder / "told").open("w") as output, redirect_stdout(output), redirect_stderr(output):
            code = throughtime(place(words, run, folder / "text.txt"))
        if code != 0:
            raise RuntimeError(f"{name}: exit code {code} with a good run: {(folder / 'told').read_text()}")
        remove_made(folder)


def remove_made(folder: Path) -> None:
    """Remove a run, and what the commands made beside it."""
    for name in ("RUN", *MADE):
        shutil.rmtree(folder / name.replace("RUN", "run"), ignore_errors=True)


def wrong(answer: Answer) -> str | None:
    """Return what is not allowed of an answer, if anything is."""
    if answer.code in (-signal.SIGALRM, -signal.SIGPROF):
        return f"longer than {LONGEST} s"
    if answer.code not in ALLOWED:
        return f"exit code {answer.code}"
    for sign in (b"Traceback", b"this is a bug"):
        if sign in answer.printed + answer.told:
            return sign.decode()
    written_by_model = answer.command.startswith("sample")  # its text is written as it is, but to terminals
    if RAW.search(answer.told if written_by_model else answer.printed + answer.told):
        return "a raw control character"
    return "something outside was changed, by this command or another" if answer.touched else None


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the files that no command may touch."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check_altered_runs(
    folder: Path, numbers: Iterable[int], seed: int = 1, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Alter a run for each number and let every command read it; return how many calls ended how, and which were wrong."""
    torch.set_num_threads(1)
    runs = make_runs(folder)
    beside = folder / "outside"
    beside.mkdir()
    (beside / "target").write_text("somebody else's\n" * 30)
    before = snapshot(beside)
    warm_up(runs, folder)
    codes: Counter[int] = Counter()
    failures: list[str] = []
    slowest = 0.0
    numbers = list(numbers)
    for number in numbers:
        chooser = random.Random(f"{seed} {number}")
        altered = folder / "altered"
        shutil.copytree(chooser.choice(runs), altered)
        what = alter(altered, chooser, beside / "target")
        for answer in read_by_all(altered, folder, beside, before):
            codes[answer.code] += 1
            slowest = max(slowest, answer.seconds)
            if (reason := wrong(answer)) is not None:
                failures.append(f"{number}: {what}: {answer.command}: {reason}")
                last_words = (answer.printed + answer.told)[-300:].decode("utf-8", "replace").strip()
                say(f"{failures[-1]}\n  {last_words!r}")
        remove_made(folder)
        shutil.rmtree(altered)
    calls = sum(codes.values())
    return {
        "runs": len(numbers),
        "calls": calls,
        "codes": dict(codes),
        "slowest": round(slowest, 2),
        "failures": failures,
    }


def copy_run(altered: Path, run: Path) -> None:
    """Copy a run as it is, links, other names and pipes too."""
    run.mkdir()
    for path in sorted(altered.rglob("*")):
        target = run / path.relative_to(altered)
        if path.is_symlink():
            target.symlink_to(path.readlink())
        elif path.is_fifo():
            os.mkfifo(target)
        elif path.is_dir():
            target.mkdir()
        elif path.stat().st_nlink > 1:
            target.hardlink_to(path)
        else:
            shutil.copyfile(path, target)


def main() -> int:
    """Fuzz, print the counts, and return whether something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, help="altered runs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that share them")
    given = parser.parse_args()
    began = time.perf_counter()
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        parts = [range(first, given.count, given.jobs) for first in range(given.jobs)]
        results = list(pool.map(check_in_a_folder_of_its_own, parts, [given.seed] * given.jobs))
    total = {
        "runs": sum(result["runs"] for result in results),
        "calls": sum(result["calls"] for result in results),
        "codes": dict(sum((Counter(result["codes"]) for result in results), Counter[int]())),
        "slowest": max(result["slowest"] for result in results),
        "failures": [failure for result in results for failure in result["failures"]],
    }
    print(json.dumps(total | {"seconds": round(time.perf_counter() - began)}, indent=2))
    return 1 if total["failures"] else 0


def check_in_a_folder_of_its_own(numbers: range, seed: int) -> dict[str, Any]:
    """Check altered runs in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        return check_altered_runs(Path(name), numbers, seed, lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(main())
