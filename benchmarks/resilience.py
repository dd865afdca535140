"""What a crash may cost: nothing; and what may come of a damaged, trapped or forged run: a refusal. Each many times over.

    python benchmarks/resilience.py            # the full counts, some minutes
    python benchmarks/resilience.py --scale 0.02

Each check raises where a promise is broken, and returns how often it was kept; the counts are printed as one JSON object. The test
suite runs the same checks with small counts.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from throughtime.errors import InputError
from throughtime.lm import LanguageModel, ModelConfig, TrainingOptions, cell_names, open_run, resume, train
from throughtime.lm.run import BEST, CHECKPOINT, CONFIG, DATA, GENERATION, METRICS, MODEL, OPTIONS, RESULTS, TOKENIZER
from throughtime.training import Budget, Clipping, Loop, Sequences, Streams
from throughtime.training.checkpoint import CheckpointError, load, save

TENSORS = {"weight": torch.arange(3000.0).reshape(50, 60), "ids": torch.arange(7)}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adam": {"ema": 0.9},
    "sgd": {"momentum": 0.9},
    "nt-asgd": {"eval_every": 2},
}


def make_loop(cell: str, sequences: bool, steps: int) -> Loop:
    """Return a small training, the same each time."""
    torch.manual_seed(3)
    model = LanguageModel(ModelConfig(9, cell, 8, 2, embedding_size=6, dropout=0.3, locked=True, embedding_dropout=0.1))
    tokens = np.random.default_rng(0).integers(1, 9, 400)
    tokens[np.random.default_rng(1).integers(0, 400, 50)] = 0
    tokens[-1] = 0

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Loop(
        model=model,
        windows=Sequences(tokens, 0, 3, 6) if sequences else Streams(tokens, batch=3, window=8),
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
        loss=loss,
        budget=Budget(steps=steps),
        learning_rate=1e-2,
        clipping=Clipping(norm=0.5),
        average=0.9,
        rollbacks=3,
    )


def everything(loop: Loop) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all that a checkpoint holds but the time."""
    tensors, state = loop.checkpoint()
    kept = {name: value for name, value in state.items() if name != "seconds"}
    return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(kept))


def check_resume(cell: str, sequences: bool, steps: int) -> int:
    """Stop at every step, go on from the file, and find the next step's state equal to the uninterrupted training's, bit for bit.

    By induction, every stop then leads to the same end; from the first step and the middle, that is run too.
    """
    loop = make_loop(cell, sequences, steps)
    loop.model.train()
    history = [everything(loop)]
    with tempfile.TemporaryDirectory() as folder:
        for step in range(steps):
            save(Path(folder) / f"{step}", *loop.checkpoint())
            loop._step()
            history.append(everything(loop))
        for stop in range(steps):
            again = make_loop(cell, sequences, steps)
            torch.manual_seed(stop)
            again.restore(*load(Path(folder) / f"{stop}"))
            again.model.train()
            for step in range(stop, steps if stop in (1, steps // 2) else stop + 1):
                again._step()
                _same(everything(again), history[step + 1], f"{cell}: step {step + 1} after a stop at {stop}")
    return steps


def _same(actual: tuple[dict[str, Tensor], Any], expected: tuple[dict[str, Tensor], Any], where: str) -> None:
    assert actual[1] == expected[1], where
    assert actual[0].keys() == expected[0].keys(), where
    for name, tensor in expected[0].items():
        assert torch.equal(actual[0][name], tensor), f"{where}: {name}"


def check_random_kills(folder: Path, count: int, seed: int = 1) -> int:
    """Kill a process that saves again and again, at a random moment; what it said was saved must be there, or what came next."""
    chooser = random.Random(seed)
    path = folder / "kills.safetensors"
    saved = 0
    save(path, TENSORS, {"step": saved})
    for _ in range(count):
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            with contextlib.suppress(BaseException):
                while True:
                    saved += 1
                    save(path, TENSORS, {"step": saved})
                    os.write(writer, saved.to_bytes(8, "little"))
            os._exit(1)
        os.close(writer)
        last = os.read(reader, 8)  # it is at work
        time.sleep(chooser.random() * 0.01)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        while more := os.read(reader, 8):
            last = more
        os.close(reader)
        told = int.from_bytes(last, "little")
        tensors, state = load(path)
        assert state["step"] in (told, told + 1), (state, told)
        assert torch.equal(tensors["weight"], TENSORS["weight"])
        saved = state["step"]
    return count


def check_kills_at_every_call(folder: Path) -> int:
    """Kill a save before and after each of its system calls, and amid its write: the old file is there, or the new one."""
    path = folder / "calls.safetensors"
    count = 0
    for place, moment in (
        (p, m) for p in ("open", "write", "fsync", "replace", "fsync folder") for m in ("before", "amid", "after")
    ):
        save(path, TENSORS, {"step": 1})
        process = os.fork()
        if process == 0:
            with contextlib.suppress(BaseException):
                _die_at(place, moment)
                save(path, TENSORS, {"step": 2})
            os._exit(1)  # it should have died
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), (place, moment)
        tensors, state = load(path)
        renamed = (place, moment) in {("replace", "after")} or place == "fsync folder"
        assert state["step"] == (2 if renamed else 1), (place, moment, state)
        assert torch.equal(tensors["weight"], TENSORS["weight"])
        count += 1
    return count


def _die_at(place: str, moment: str) -> None:
    """Make this process kill itself in a save."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            if moment != "after":
                die()
            result = call(*arguments)
            die()
            return result

        return called

    opened, synced, as_file = os.open, os.fsync, os.fdopen
    if place == "replace":
        Path.replace = around(Path.replace)
    elif place == "open":
        os.open = around(opened)
    elif place == "write":

        def open_to_die(descriptor: int, mode: str) -> Any:
            file = as_file(descriptor, mode, buffering=0)

            class Dying:
                def __enter__(self) -> "Dying":
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def write(self, data: bytes) -> None:
                    file.write(data[: {"before": 0, "amid": len(data) // 2, "after": len(data)}[moment]])
                    die()

            return Dying()

        os.fdopen = open_to_die  # type: ignore[assignment]
    else:
        calls = []

        def sync(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) == (2 if place == "fsync folder" else 1):
                around(synced)(descriptor)
            synced(descriptor)

        os.fsync = sync


def check_full_disk(folder: Path, count: int) -> int:
    """Let a save run into a limit at many places of its file: it is refused with the reason, and what was there still is."""
    path = folder / "full.safetensors"
    save(path, TENSORS, {"step": 1})
    size = path.stat().st_size
    for limit in np.linspace(0, size - 1, count).astype(int).tolist():
        process = os.fork()
        if process == 0:
            code = 1
            with contextlib.suppress(BaseException):
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                try:
                    save(path, TENSORS, {"step": 2})
                except CheckpointError as error:
                    code = 0 if "what was saved before is still there" in str(error) else 1
            os._exit(code)
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == 0, limit
        assert load(path)[1] == {"step": 1}
        assert [entry.name for entry in folder.iterdir() if entry.name.startswith(".full")] == []
    return count


def _refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        load(path)
    except CheckpointError as error:
        said = str(error)
    else:
        raise AssertionError(f"{path} was loaded though it is damaged")
    assert str(path) in said
    assert "\n" not in said


def check_truncation(folder: Path) -> int:
    """Cut a checkpoint after every byte of its header, and after every hundredth of the rest."""
    path = folder / "cut.safetensors"
    save(path, TENSORS, {"step": 1})
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    lengths = [*range(header + 1), *range(header + 1, len(data), 100), len(data) - 1]
    for length in lengths:
        _refused(path, data[:length])
    return len(lengths)


def check_bit_flips(folder: Path, count: int, seed: int = 1) -> int:
    """Flip one random bit of a checkpoint at a time."""
    path = folder / "flipped.safetensors"
    save(path, TENSORS, {"step": 1})
    data = path.read_bytes()
    chooser = random.Random(seed)
    for _ in range(count):
        place = chooser.randrange(8 * len(data))
        spoilt = bytearray(data)
        spoilt[place // 8] ^= 1 << place % 8
        _refused(path, bytes(spoilt))
    return count


def check_killed_trainings(folder: Path, count: int, steps: int = 60, seed: int = 1) -> int:
    """Kill trainings that save after every step, again and again until they are done: the end is that of one left alone."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog.\n" * 60)
    options = TrainingOptions(hidden=8, batch=4, bptt=16, steps=steps, dropout=0.2, ema=0.9, eval_every=20)
    train([text], folder / "whole", options)
    expected, _ = load(folder / "whole" / "checkpoint" / "latest.safetensors")
    weights, _ = load(folder / "whole" / "model.safetensors")
    chooser = random.Random(seed)
    kills = 0
    for number in range(count):
        run = folder / f"run{number}"
        while True:
            process = os.fork()
            if process == 0:
                with contextlib.suppress(BaseException), _quiet():
                    Loop.run.__defaults__ = (None, None, 0.0, None)  # save after every step
                    resume(run) if (run / "checkpoint" / "latest.safetensors").exists() else train([text], run, options)
                    os._exit(0)
                os._exit(1)
            time.sleep(0.05 + chooser.random() * 0.4)
            if os.waitpid(process, os.WNOHANG) != (0, 0):
                break
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            kills += 1
            if not (run / "checkpoint" / "latest.safetensors").exists():
                _remove(run)
        for name, tensor in load(run / "checkpoint" / "latest.safetensors")[0].items():
            assert torch.equal(tensor, expected[name]), name
        for name, tensor in load(run / "model.safetensors")[0].items():
            assert torch.equal(tensor, weights[name]), name
        assert (run / "results.json").exists()
    return kills


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


Reader = Callable[[Path], Any]
READERS: dict[str, tuple[Reader, ...]] = {  # of each file of a run, all who read it
    CONFIG: (open_run, resume),
    TOKENIZER: (open_run, resume),
    MODEL: (open_run, resume),
    CHECKPOINT: (lambda run: open_run(run).load_model(last=True), resume),
    BEST: (lambda run: open_run(run).load_model(since=True),),
    RESULTS: (lambda run: open_run(run).results,),
    METRICS: (lambda run: open_run(run).metrics(),),
    f"{DATA}/corpus.json": (lambda run: open_run(run).corpus(), resume),
    f"{DATA}/tokens.bin": (lambda run: open_run(run).corpus(), resume),
    GENERATION: (lambda run: open_run(run).generation,),
    OPTIONS: (lambda run: TrainingOptions.from_toml(run / OPTIONS),),
}
EDITABLE = (GENERATION, OPTIONS)  # by people: what is in range there is an edit
SMALL: dict[str, Any] = {"hidden": 6, "batch": 2, "bptt": 8, "steps": 6}


def _interrupt_at(step: int) -> Callable[[Any], None]:
    def observe(report: Any) -> None:
        if report.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return observe


def make_run(folder: Path, **options: Any) -> Path:
    """Train a small run that is stopped after 3 of its 6 steps."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog.\n" * 20)
    run = folder / "run"
    with _quiet():
        train([text], run, TrainingOptions.from_values(SMALL | options), _interrupt_at(3))
    return run


def make_full_run(folder: Path) -> Path:
    """Train a run that has every file that training writes: a complete one, stopped while it is trained longer."""
    run = make_run(folder, eval_every=2)
    with _quiet():
        resume(run)
        resume(run, _interrupt_at(9), longer=Budget(steps=6))
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert names == set(READERS), names ^ set(READERS)
    return run


def contents(folder: Path) -> dict[str, bytes | str]:
    """Return all that is in a folder: files by their bytes, links by what they point to."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def _refuses(reader: Reader, run: Path, named: str, where: str) -> bool:
    """Return whether a reader refuses a run, which it must do in one line that names the file."""
    try:
        with _quiet():
            reader(run)
    except InputError as error:
        said = str(error)
        assert named.rpartition("/")[2] in said, f"{where}: {said}"
        assert "\n" not in said, where
        return True
    return False


def check_bit_flips_in_runs(folder: Path, count: int, seed: int = 1) -> dict[str, Any]:
    """Flip random bits of each file of a run, one at a time: all who read that file refuse it, and leave the run as it was.

    What people may edit is refused, or is an edit.

    Returns:
        For each file how many flips were refused, and for those that people may edit how many were edits.
    """
    run = make_full_run(folder)
    chooser = random.Random(seed)
    kept: dict[str, Any] = {}
    for name, readers in READERS.items():
        data = (run / name).read_bytes()
        refused = 0
        for _ in range(count):
            place = chooser.randrange(8 * len(data))
            spoilt = bytearray(data)
            spoilt[place // 8] ^= 1 << place % 8
            (run / name).write_bytes(spoilt)
            before, where = contents(run), f"{name}, bit {place}"
            named = "" if name == OPTIONS else name  # of an option out of range the flag is named
            answers = {_refuses(reader, run, named, where) for reader in readers}
            assert name in EDITABLE or answers == {True}, f"{where}: was read though it is damaged"
            assert contents(run) == before, where
            refused += answers == {True}
        (run / name).write_bytes(data)
        kept[name] = {"refused": refused, "edits": count - refused} if name in EDITABLE else refused
    return kept


def check_links_in_runs(folder: Path) -> int:
    """Put a link in place of each file and folder that training writes, to a file or to nothing: nothing outside is touched.

    Who reads the file refuses it; a resume or a new training refuses it, leaves it alone, or writes its own in the link's place.
    """
    run = make_full_run(folder)
    count = 0
    for name in (*READERS, ".lock", DATA, "checkpoint", "tensorboard"):
        for kind in ("link", "dangling"):
            trapped, outside, new = folder / "trapped", folder / "outside", folder / "new"
            shutil.copytree(run, trapped)
            outside.mkdir()
            if os.path.lexists(trapped / name):
                (trapped / name).rename(outside / "target")
            else:
                (outside / "target").mkdir()
            _link(trapped / name, outside / ("target" if kind == "link" else "nothing"))
            _link(new / name, outside / ("target" if kind == "link" else "nothing"))
            before, where = contents(outside), f"{kind} for {name}"
            for reader in READERS.get(name, ()):
                assert _refuses(reader, trapped, name, where), f"{where}: was followed"
            is_read = resume in READERS.get(name, (resume,)) or name == METRICS
            assert _refuses(resume, trapped, name, where) or not is_read, f"{where}: was followed by a resume"
            if not _refuses(lambda new: train([folder / "text.txt"], new, TrainingOptions(**SMALL)), new, "", where):
                assert not (new / name).is_symlink(), where  # the text was encoded anew, in the link's place
            assert contents(outside) == before, where
            assert not (outside / "nothing").exists(), where
            for each in (trapped, outside, new):
                shutil.rmtree(each)
            count += 1
    return count


def check_other_names_of_runs(folder: Path) -> int:
    """Go on with a run whose files all have names in another folder too, as a copy by `cp -al` has: nothing changes there."""
    run, trapped = make_full_run(folder), folder / "trapped"
    shutil.copytree(run, trapped, copy_function=os.link)
    before = contents(run)
    with _quiet():
        resume(trapped)
    assert contents(run) == before
    changed = [name for name, data in contents(trapped).items() if data != before.get(name)]
    assert changed  # or nothing was gone on with
    os.link(folder / "text.txt", trapped / ".lock")
    text = (folder / "text.txt").read_bytes()
    assert _refuses(resume, trapped, ".lock", "another name for .lock"), "was locked"
    assert (folder / "text.txt").read_bytes() == text
    return len(before)


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def check_two_writers(folder: Path, count: int) -> int:
    """Let two processes begin one training at the same moment, or one resume: one is refused, the other's run is whole."""
    stopped = make_run(folder)
    text, whole = folder / "text.txt", folder / "whole"
    shutil.copytree(stopped, whole)
    with _quiet():
        resume(whole)
    options = TrainingOptions.from_values(dict(open_run(whole).options))
    for number in range(count):
        contested = folder / f"contested{number}"
        if number % 2:
            shutil.copytree(stopped, contested)
        write = partial(resume, contested) if number % 2 else partial(train, [text], contested, options)
        ready, go = os.pipe()
        writers = [_fork_writer(write, ready, go) for _ in range(2)]
        os.close(ready)
        os.close(go)  # both begin
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) for writer in writers)
        assert codes == [0, 2], codes
        for name in (MODEL, CHECKPOINT):
            for key, tensor in load(whole / name)[0].items():
                assert torch.equal(load(contested / name)[0][key], tensor), (name, key)
        assert open_run(contested).results is not None
        assert contents(contested).keys() == contents(whole).keys()
    return count


def _fork_writer(write: Callable[[], Any], ready: int, go: int) -> int:
    """Start a process that writes once all ends of a pipe but its own are closed; 2 is its exit code where it is refused."""
    process = os.fork()
    if process == 0:
        code = 1
        with contextlib.suppress(BaseException), _quiet():
            os.close(go)
            os.read(ready, 1)
            try:
                write()
                code = 0
            except InputError as error:
                code = 2 if "\n" not in str(error) else 1
        os._exit(code)
    return process


def check_forged_states(folder: Path, count: int, seed: int = 1) -> dict[str, int]:
    """Forge the optimiser's state and the counts of checkpoints, and renew their digests: each is refused, and none crashes.

    Returns:
        For each optimiser how many forgeries were refused.
    """
    chooser = random.Random(seed)
    refused = {}
    for optimizer, options in OPTIMIZERS.items():
        (folder / optimizer).mkdir()
        run = make_run(folder / optimizer, optimizer=optimizer, **options)
        tensors, state = load(run / CHECKPOINT)
        for _ in range(count):
            forged, told, what = _forge(dict(tensors), json.loads(json.dumps(state)), chooser)
            save(run / CHECKPOINT, forged, told)
            code = _exit_code_of_a_refusal(run)
            assert code == 0, f"{optimizer}: {what}: {'was gone on from' if code == 1 else f'ended with {code}'}"
        refused[optimizer] = count
    return refused


def _forge(
    tensors: dict[str, Tensor], state: dict[str, Any], chooser: random.Random
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Return a checkpoint that no training could have written, and in what."""
    kept = [name for name in tensors if name.startswith("optimizer.")]
    if not kept or chooser.random() < 0.4:
        name = chooser.choice(("step", "seconds", "clipped_steps", "validated_at", "watch", "optimizer", "validations"))
        state[name] = chooser.choice((-1, float("nan"), None, "3", True, [None], {"x": 1}, {"0": 3}, 10**400))
        return tensors, state, f"{name} = {str(state[name])[:20]}"
    name = chooser.choice(kept)
    tensor = tensors.pop(name)
    changes: dict[str, Callable[[], Tensor]] = {
        "one element": lambda: torch.zeros(2),
        "more elements": lambda: torch.cat([tensor.flatten(), tensor.flatten()]),
        "nothing": lambda: torch.zeros(0, 3),
        "more dimensions": lambda: tensor.reshape(1, *tensor.shape),
        "double": lambda: tensor.double(),
        "integers": lambda: tensor.to(torch.int16),
        "NaN": lambda: torch.full_like(tensor, float("nan")),
        "infinity": lambda: torch.full_like(tensor, float("inf")),
    }
    if name.endswith(".step"):
        changes |= {"-1": lambda: torch.full_like(tensor, -1), "beyond": lambda: torch.full_like(tensor, 1e6)}
    how = chooser.choice((*changes, "missing", "renamed"))
    if how in changes:
        tensors[name] = changes[how]()
    elif how == "renamed":
        tensors[name + "x"] = tensor
    return tensors, state, f"{name}: {how}"


def _exit_code_of_a_refusal(run: Path) -> int:
    """Return 0 where a resume, in a process of its own, refuses a run in one line, 1 where it goes on, and else another code."""
    process = os.fork()
    if process == 0:
        code = 3
        with contextlib.suppress(BaseException):
            code = 0 if _refuses(resume, run, CHECKPOINT, "") else 1
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main() -> int:
    """Run all checks and print how often each promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all counts")
    scale = parser.parse_args().scale
    torch.set_num_threads(1)
    began = time.perf_counter()
    steps = max(int(200 * scale), 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def made(own: str) -> Path:
            (folder / own).mkdir()
            return folder / own

        result: dict[str, Any] = {
            "random kills during saves": check_random_kills(folder, max(int(500 * scale), 5)),
            "kills at every call": check_kills_at_every_call(folder),
            "full disk": check_full_disk(folder, max(int(200 * scale), 5)),
            "truncations": check_truncation(folder),
            "bit flips": check_bit_flips(folder, max(int(10_000 * scale), 50)),
            "bit flips in each file of a run": check_bit_flips_in_runs(made("flips"), max(int(1000 * scale), 10)),
            "links in runs": check_links_in_runs(made("links")),
            "other names of a run's files": check_other_names_of_runs(made("names")),
            "two writers": check_two_writers(made("writers"), max(int(100 * scale), 4)),
            "forged states": check_forged_states(made("forged"), max(int(500 * scale), 10)),
            "kills of whole trainings": check_killed_trainings(folder, max(int(20 * scale), 1)),
            "resumed steps": {
                f"{cell}, {'sequences' if sequences else 'stream'}": check_resume(cell, sequences, steps)
                for cell in cell_names()
                for sequences in (False, True)
            },
        }
    print(json.dumps(result | {"seconds": round(time.perf_counter() - began)}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
