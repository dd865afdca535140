"""The command line under calls that nobody meant: thousands of them, from a fixed seed, in worker processes with time-outs.

    python -m benchmarks.fuzz_cli [--calls 2500] [--seed 1] [--workers 2]

Each call is a command, options with values of every kind (right, huge, tiny, no number, hostile text) and places that are there or
not. It fails where its exit code isn't 0, 2, 129, 130, 141 or 143, it takes more than ten seconds of CPU, it shows a traceback or a
raw control character (what `sample` and `score` print is a model's or a file's own text), its JSON doesn't parse, what was given is
changed, or anything is written but where the call said. Calls that train are bounded by --steps.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

CODES = {0, 2, 129, 130, 141, 143}
LONGEST = 10.0  # seconds
OWN_TEXT = ("sample", "score")  # commands that print what a model or a file says, as it is
HOSTILE = "x\x1b[2J\x9b\u202ey\n\ud800"
COMMANDS = (
    "train",
    "eval",
    "score",
    "sample",
    "explain",
    "gradients",
    "compare-gradients",
    "task",
    "info",
    "plot",
    "pack",
)
NUMBERS = ["0", "1", "2", "3", "-1", "0.5", "1e-39", "1e39", "1e-320", "1e308", "nan", "inf", "-inf", "9" * 23, "9" * 400,
           "9223372036854775807", "2147483648", "0x10", "1_000", "", " ", "seven", "٣", HOSTILE]  # fmt: skip
WORDS = ["lstm", "gru", "rnn", "mlp", "char", "byte", "word", "bpe", "stream", "sentence", "line", "file", "cosine", "sgd", "rms",
         "nt-asgd", "forget:3", "chrono:nan", "orthogonal:1e39", "update:", "default+", "float32", "bfloat16", "cpu", "auto",
         "*.txt", "/*.txt", "**.txt", "[", "", HOSTILE, "{{data}}", "--", "-", "%s%n", "a" * 5000]  # fmt: skip
PLACES = [
    "RUN",
    "NAMES",
    "TEXT",
    "LINES",
    "EMPTY",
    "BINARY",
    "FOLDER",
    "NOWHERE",
    "HOSTILE",
    "",
    ".",
    "/dev/null",
    "/proc/self/mem",
]
TRAIN = ("--steps", "2", "--hidden", "4", "--batch", "2", "--bptt", "4")
SMALL = ("--lags", "6", "--probe", "3")
TASK = ("--steps", "2", "--hidden", "4")


class Outcome(NamedTuple):
    """What came of one call."""

    arguments: list[str]
    code: int
    seconds: float  # of CPU
    complaint: str | None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    began = time.perf_counter()
    outcomes, failed = [], 0
    for outcome in fuzz(given.calls, given.seed, given.workers):
        outcomes.append(outcome)
        if outcome.complaint:
            failed += 1
            print(f"FAILED {_shown(outcome.arguments)}: {outcome.complaint}", flush=True)
    took = time.perf_counter() - began
    codes = Counter(outcome.code for outcome in outcomes)
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    print(f"{len(outcomes):,} calls in {took:.0f} s, seed {given.seed}: exit codes {dict(sorted(codes.items()))}")
    print(f"slowest: {slowest.seconds:.1f} s of CPU, {_shown(slowest.arguments)}")
    print(f"{failed} failed")
    return int(failed > 0)


def fuzz(calls: int, seed: int, workers: int = 1) -> Iterator[Outcome]:
    """Make calls in worker processes; yield what came of each."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(workers, _prepare, (folder,)) as pool:
        yield from pool.imap_unordered(_call, [f"{seed}/{number}" for number in range(calls)])


def make_call(chance: random.Random) -> list[str]:
    """Return one call: mostly well-formed, with something in it that nobody meant."""
    from typer.main import get_command

    from throughtime.app.cli import app

    command = chance.choice(COMMANDS)
    known = get_command(app).commands[command].params  # type: ignore[attr-defined]
    options = [parameter for parameter in known if parameter.param_type_name == "option"]
    arguments = [parameter for parameter in known if parameter.param_type_name == "argument"]
    words = [command]
    for argument in arguments:
        words += [
            _place("out" if command == "explain" and argument.name == "file" else argument.name, chance)
            for _ in range(chance.choice((0, 1, 1, 1, 1, 2 if argument.nargs == -1 else 1)))
        ]
    words += {"train": TRAIN, "gradients": SMALL, "compare-gradients": SMALL, "task": TASK}.get(command, ())
    words += ["--length", "3"] if command == "sample" else ["--length", "12"] if command == "task" else []
    words += ["--out", "NEW"] if command == "train" and chance.random() < 0.9 else []
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        option = chance.choice(options)
        if option.name in ("steps", "length", "epochs", "minutes") and command in ("train", "task"):
            continue  # a long training that was asked for is no hang
        name = chance.choice((*option.opts, *option.secondary_opts))
        name = name if chance.random() < 0.95 else chance.choice((name[:-1], name + "x", name.upper(), "-" + name))
        words += [name] if option.is_flag else [name, _value(option, chance)]
    if chance.random() < 0.05:
        chance.shuffle(words)
    return words


def _place(name: str, chance: random.Random) -> str:
    if name in ("word", "name", "names"):
        return chance.choice(["ybigta", "lag", "adding", "lstm", "gru@update:2", "lstm@", "한글", "RUN", *WORDS])
    usual = {"run": "RUN", "runs": "RUN", "file": "TEXT", "paths": "TEXT"}.get(name, "NEW")
    return usual if usual == "NEW" or chance.random() < 0.7 else chance.choice(PLACES)


def _value(option: Any, chance: random.Random) -> str:
    if option.name in ("out", "resume", "config", "text"):
        return "NEW" if option.name == "out" else chance.choice(PLACES)
    return chance.choice(NUMBERS if chance.random() < 0.7 else WORDS)


def _prepare(folder: str) -> None:
    """Make what calls are made on, once in each worker."""
    import torch

    torch.set_num_threads(1)
    here = Path(folder) / str(os.getpid())
    given = here / "given"
    given.mkdir(parents=True)
    (given / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (given / "lines.txt").write_text("anna\nbob\n\ncarla\n" * 8)
    (given / "empty.txt").touch()
    (given / "binary").write_bytes(bytes(range(256)) * 4)
    _program(["train", str(given / "text.txt"), "--out", str(given / "run"), *TRAIN])
    _program(["train", str(given / "lines.txt"), "--out", str(given / "names"), "--mode", "sentence", *TRAIN])
    os.chdir(here)
    os.environ |= {"HOME": str(here), "COLUMNS": "80"}
    global _HERE, _GIVEN
    _HERE, _GIVEN = here, _state(given)


_HERE = Path()
_GIVEN: dict[str, str] = {}


def _call(seed: str) -> Outcome:
    given = _HERE / "given"
    places = {
        "RUN": given / "run", "NAMES": given / "names", "TEXT": given / "text.txt", "LINES": given / "lines.txt",
        "EMPTY": given / "empty.txt", "BINARY": given / "binary", "FOLDER": given, "NOWHERE": _HERE / "nowhere",
        "HOSTILE": _HERE / HOSTILE, "NEW": f"new-{seed.replace('/', '-')}",
    }  # fmt: skip
    arguments = [str(places.get(word, word)) for word in make_call(random.Random(seed))]
    before = {path.name for path in _HERE.iterdir()}
    began = time.process_time()
    code, out, err = _program(arguments)
    seconds = time.process_time() - began
    complaint = _complaint(arguments, code, out, err, seconds)
    if complaint is None and _state(given) != _GIVEN:
        complaint = f"changed what was given: {sorted(_state(given).items() ^ _GIVEN.items())[:3]}"
    new = str(places["NEW"])
    allowed = {new, f"{new}.png", "explain.html", ".config", ".cache"}  # the last two are matplotlib's
    if complaint is None and (written := {path.name for path in _HERE.iterdir()} - before - allowed):
        complaint = f"wrote {written}"
    return Outcome(arguments, code, seconds, complaint)


def _complaint(arguments: list[str], code: int, out: str, err: str, seconds: float) -> str | None:
    if code not in CODES:
        return f"exit code {code}: {err[-300:]!r}"
    if seconds > LONGEST:
        return f"took {seconds:.1f} s"
    if "Traceback" in err or "this is a bug" in err:
        return err[-300:]
    shown = err if arguments[0] in OWN_TEXT and "--json" not in arguments else out + err
    if raw := {c for c in shown if not (c.isprintable() or c in "\n\u200c\u200d" or (c.isspace() and c > "\x9f"))}:
        return f"raw {raw!r}"
    if code == 0 and "--json" in arguments and "--help" not in arguments and out.startswith("{"):
        json.loads(out, parse_constant=_no_number)
    return None


def _no_number(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def _program(arguments: list[str]) -> tuple[int, str, str]:
    """Call the program in this process; one that hangs is ended by a timer of CPU time."""
    from throughtime.app.cli import main as program

    def hang(number: int, frame: Any) -> None:
        raise TimeoutError

    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, 3 * LONGEST)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = program(arguments)
    except BaseException as error:
        code = -1
        err.write(f"{type(error).__name__}: {error}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return code, out.getvalue(), err.getvalue()


def _state(folder: Path) -> dict[str, str]:
    """Return the digest of each file; a picture that `plot` was asked for belongs to its run, and so does a lock."""
    files = (
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "loss.png" and "lock" not in path.name
    )
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _shown(arguments: list[str]) -> str:
    return ascii(shlex.join(arguments))[1:-1][:300]


if __name__ == "__main__":
    sys.exit(main())
