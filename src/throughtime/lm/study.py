"""A study: one text, many trainings, whose options Optuna chooses by what the earlier ones came to.

study.json    which study the folder is of
study.db      Optuna's own storage, SQLite, unless another is named: trials, their options, what they came to on the way
data/         the encoded text, which the trials share
trial-0000/   a run, as `train` writes it

Any number of processes work on one study at a time. Each holds a lock for the trial that it trains, which ends with the process: a
trial that is under way in the storage, and that nobody holds, is gone on with by the next who looks, from its run's checkpoint.
"""

import hashlib
import importlib.util
import json
import math
import os
import re
import secrets
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from throughtime.errors import FieldError, InputError, is_out_of_memory, unknown_name
from throughtime.lm import tensorboard
from throughtime.lm.corpus import DESCRIPTION, TOKENS, Corpus, build_corpus
from throughtime.lm.model import device_named
from throughtime.lm.options import ABOUT, as_given, flag
from throughtime.lm.presets import for_minutes
from throughtime.lm.reading import find_files
from throughtime.lm.run import CHECKPOINT, CONFIG, DATA, RESULTS, open_run
from throughtime.lm.space import Space, described, read_space, usual_space
from throughtime.lm.training import Observer, OnEvent, Probe, TrainingOptions, TrainingSummary, resume, train
from throughtime.plain import printable
from throughtime.training import NonFiniteError
from throughtime.training.checkpoint import load_json, save_json
from throughtime.training.files import LARGE, CheckpointError, UnwritableError
from throughtime.training.locking import LOCK, lock
from throughtime.training.loop import StepReport

if TYPE_CHECKING:
    import optuna

STUDY, DATABASE = "study.json", "study.db"
PARTS = 10  # into which measurements cut a trial's budget
_SETTINGS, _PLACE, _RUN, _CAUSE, _STARTS, _SECONDS = "settings", "place", "run", "cause", "starts", "seconds"
_MOST_STARTS = 3  # without a new checkpoint, after which a trial whose process was killed each time is given up
_MOST_REFUSED = 5  # trials in a row that can't be trained, after which nothing else is tried
_LOCKED = 60  # seconds to wait for SQLite while another process writes
_ENOUGH = 10  # complete trials from which importances are told
_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


@dataclass(frozen=True)
class Tried:
    """A trial of a study.

    Attributes:
        number: Counted from 0.
        state: "complete", "pruned", "failed", "running" or "waiting".
        bits_per_character: On the held-out text; of a pruned one, as measured last; `None` where nothing was.
        options: Those that were searched.
        run: The folder of its run; it may be gone, or that of another machine.
        cause: Why it isn't complete, in a line.
        seconds: Training time; `None` while it isn't over.
        signal: Which signal stopped it just now; `None` where none did.
        elsewhere: Of a trial that was begun in another folder, its run there, "host:/path"; else `None`.
    """

    number: int
    state: str
    bits_per_character: float | None
    options: dict[str, Any]
    run: Path
    cause: str | None = None
    seconds: float | None = None
    signal: int | None = None
    elsewhere: str | None = None

    @property
    def is_here(self) -> bool:
        """Whether its run is there, in the study's own folder."""
        return self.elsewhere is None and (self.run / CONFIG).exists()


def check_library() -> None:
    """Raise InputError unless Optuna is there."""
    if importlib.util.find_spec("optuna") is None:
        raise InputError("a sweep needs Optuna: pip install 'throughtime[sweep]'")


class Study:
    """An opened study; make one with `open_study`.

    Attributes:
        folder: Where its runs are.
        name: Its name in the storage.
        storage: The storage, as Optuna's commands take it, without a password.
        space: What is searched.
        base: Options of training that all trials share.
        corpus: The text.
    """

    def __init__(
        self, folder: Path, paths: Sequence[str | Path], corpus: Corpus, kept: "_Kept", mark: "_Mark", device: str
    ) -> None:
        self.folder, self.name, self.corpus = folder, mark.name, corpus
        self.storage = kept.shown
        self.space, self.base = kept.space, kept.settings["base"]
        self._kept, self._mark, self._paths, self._device = kept, mark, paths, device
        self._refused = 0

    @property
    def level(self) -> str:
        """What a token is."""
        return self.base.get("level", "char")

    def tried(self) -> list[Tried]:
        """Return all trials, in the order of their numbers."""
        with _storage(self.storage):
            return [self._tried(trial) for trial in self._kept.study.get_trials(deepcopy=False)]

    def begin(self, trials: int) -> "Begun | None":
        """Go on with a trial that nobody trains any more, or begin another one.

        Args:
            trials: How many the study is to have, all that were ever begun.

        Returns:
            A context that holds the trial for this process; `None` where there is nothing left to begin.

        Raises:
            InputError: The text isn't the study's any more, the storage can't be used, or several trials in a row couldn't be
                trained.
        """
        if self._refused >= _MOST_REFUSED:
            raise InputError(
                f"{self.folder}: the last {self._refused} trials couldn't be trained, each for its reason above; change "
                "what is fixed or searched, with another --out"
            )
        with ExitStack() as held:
            with lock(self.folder, wait=True), _storage(self.storage):
                self._check_text()
                trial = self._unheld(held) or self._next(trials, held)
            return None if trial is None else Begun(self, trial, held.pop_all())

    def importances(self) -> dict[str, float]:
        """Return how much of what the trials came to is by which option (PED-ANOVA, Watanabe et al., 2023), largest first.

        Empty below ten complete trials, or where it can't be told.
        """
        import optuna

        complete = [one for one in self.tried() if one.state == "complete"]
        if len(complete) < _ENOUGH or len(self.space) < 2:
            return {}
        with _quietly(), suppress(ValueError, RuntimeError, ImportError):
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            return dict(optuna.importance.get_param_importances(self._kept.study, evaluator=evaluator))
        return {}

    def run_folder(self, number: int) -> Path:
        """Return the folder of a trial's run."""
        return self.folder / f"trial-{number:04}"

    def _check_text(self) -> None:
        _encoded(self.folder, self._paths, TrainingOptions.from_values(self.base))
        if _digest(self.folder) != self._kept.settings["text"]:
            raise InputError(
                f"{self.folder}: the text has changed since this study began; restore it, or give another --out"
            )

    def _unheld(self, held: ExitStack) -> "optuna.trial.Trial | None":
        """Hold a trial that was begun here and that no process holds."""
        import optuna

        study, running = self._kept.study, optuna.trial.TrialState.RUNNING
        for frozen in study.get_trials(deepcopy=False, states=(running,)):
            if not self._is_here(frozen):
                continue
            with suppress(CheckpointError), ExitStack() as tentatively:
                tentatively.enter_context(lock(self.folder, _lock_of(frozen.number)))
                if self._frozen(frozen.number).state == running:  # who held it may have ended it just now
                    held.push(tentatively.pop_all())
                    return self._trial(frozen._trial_id)
        return None

    def _next(self, trials: int, held: ExitStack) -> "optuna.trial.Trial | None":
        """Begin a trial, and hold it."""
        import optuna

        study = self._kept.study
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        begun = len(states) - states.count(optuna.trial.TrialState.WAITING)
        if begun >= trials:
            return None
        # A sampler of its own for each trial: what is drawn doesn't depend on which process draws, or on how often it was started.
        drawn = np.random.SeedSequence([self.base.get("seed", 1), begun]).generate_state(1)[0]
        with _quietly():
            study.sampler = optuna.samplers.TPESampler(seed=int(drawn), constant_liar=True)
            trial = study.ask()
        held.enter_context(lock(self.folder, _lock_of(trial.number)))
        trial.set_user_attr(_PLACE, self._mark.place)
        trial.set_user_attr(_RUN, f"{socket.gethostname()}:{self.run_folder(trial.number).resolve()}")
        return trial

    def _trial(self, identifier: int) -> "optuna.trial.Trial":
        import optuna

        with _quietly():
            return optuna.trial.Trial(self._kept.study, identifier)

    def _is_here(self, frozen: Any) -> bool:
        """Return whether a trial was begun in this folder."""
        return self._kept.is_here or frozen.user_attrs.get(_PLACE) == self._mark.place

    def _frozen(self, number: int) -> Any:
        """Return what the storage says of a trial."""
        return self._kept.study.get_trials(deepcopy=False)[number]

    def _tried(self, frozen: Any, signal: int | None = None) -> Tried:
        value = frozen.value if frozen.value is not None else next(reversed(frozen.intermediate_values.values()), None)
        known = frozen.user_attrs
        return Tried(
            frozen.number,
            _STATES[frozen.state.name],
            value if value is not None and math.isfinite(value) else None,
            {name: frozen.params[name] for name in self.space if name in frozen.params},
            self.run_folder(frozen.number),
            known.get(_CAUSE),
            known.get(_SECONDS),
            signal,
            None if self._is_here(frozen) else known.get(_RUN, "unknown"),
        )


class Begun:
    """A trial that this process holds, until the context ends.

    Attributes:
        study: Whose it is.
        number: Its number.
        run: The folder of its run.
        options: What was chosen for it.
        is_continued: Whether it was begun before.
    """

    def __init__(self, study: Study, trial: "optuna.trial.Trial", held: ExitStack) -> None:
        self.study, self.number, self.run = study, trial.number, study.run_folder(trial.number)
        self._trial, self._held = trial, held
        with _storage(study.storage), _quietly():
            self.options = {name: axis.suggest(trial, name) for name, axis in study.space.items()}
            self._starts = self._starts_without_progress()
            self._measured = set(study._frozen(trial.number).intermediate_values)
        self.is_continued = (self.run / CHECKPOINT).exists()
        self._pruned_at: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def train(
        self, observer: Observer | None = None, on_event: OnEvent | None = None, probe: Probe | None = None
    ) -> Tried:
        """Train it, and tell the study what came of it.

        A training that diverges, needs more memory than there is or whose options don't go together is pruned with its cause, so
        that Optuna learns to keep away from there.

        Args:
            observer: As of `train`.
            on_event: As of `train`.
            probe: As of `train`.

        Raises:
            InputError: A file of its run is damaged or can't be written, or the storage can't be used; the trial is gone on with
                when the study is.
        """
        with _storage(self.study.storage):
            if self._starts >= _MOST_STARTS:
                return self._end(
                    "PRUNED", cause=f"given up: its process was killed {self._starts} times; out of memory?"
                )
            self._count_starts(self._starts + 1)
            try:
                return self._judge(self._train(observer, on_event, probe))
            except UnwritableError:
                self._was_not_killed()
                raise
            except CheckpointError as error:
                self._was_not_killed()
                raise InputError(f"{error} (or delete {self.run}, to train this trial anew)") from error
            except (KeyboardInterrupt, OSError):
                self._was_not_killed()
                raise
            except Exception as error:
                cause = _cause(error)
                if cause is None:
                    raise
                self.study._refused = 0 if isinstance(error, NonFiniteError) else self.study._refused + 1
                return self._end("PRUNED", cause=cause)

    def _starts_without_progress(self) -> int:
        """Return how often it was begun since its checkpoint is the one that it is."""
        known = self._trial.user_attrs.get(_STARTS, {})
        return known.get("count", 0) if known.get("checkpoint") == self._saved_at() else 0

    def _count_starts(self, count: int) -> None:
        self._trial.set_user_attr(_STARTS, {"count": count, "checkpoint": self._saved_at()})

    def _was_not_killed(self) -> None:
        with suppress(Exception):  # the storage may be on the disk that is full; what went wrong first is said
            self._count_starts(0)

    def _saved_at(self) -> int | None:
        path = self.run / CHECKPOINT
        return path.stat().st_mtime_ns if path.exists() else None

    def _train(
        self, observer: Observer | None, on_event: OnEvent | None, probe: Probe | None
    ) -> TrainingSummary | dict[str, Any]:
        """Train it from its checkpoint or anew; or return the results that are there already."""
        if (self.run / RESULTS).exists():
            results = open_run(self.run).results
            assert results is not None
            return results
        if self.is_continued:
            return resume(self.run, observer, on_event, probe, monitor=self._monitor)
        options = TrainingOptions.from_values(self.study.base | self.options | {"device": self.study._device})
        if self.run.exists():
            shutil.rmtree(self.run)  # what was left of a training before its first checkpoint
        _share(self.study.folder / DATA, self.run / DATA)
        try:
            paths, around = self.study._paths, self.study.folder
            probe = probe if options.gradients_every else None
            return train(
                paths, self.run, options, observer, None, on_event, probe, monitor=self._monitor, around=around
            )
        finally:
            if not (self.run / CONFIG).exists():
                shutil.rmtree(self.run, ignore_errors=True)

    def _monitor(self, report: StepReport, measure: Callable[[], float | None]) -> bool:
        """Tell Optuna how a training does at each part of its budget; return whether it is hopeless."""
        import optuna

        part = int(report.progress * PARTS)
        if not 0 < part < PARTS or part in self._measured:
            return False
        nats = measure()
        if nats is None:
            return False
        if not math.isfinite(nats):
            raise NonFiniteError(f"the held-out loss became {nats} at step {report.step}; lower the learning rate")
        self._measured.add(part)
        corpus = self.study.corpus
        try:
            self._trial.report(nats / math.log(2) * len(corpus.held_out) / corpus.held_out_characters, part)
        except optuna.exceptions.UpdateFinishedTrialError:
            return True  # somebody ended it, in the dashboard
        if self._trial.should_prune():
            self._pruned_at = part
        return self._pruned_at is not None

    def _judge(self, came: TrainingSummary | dict[str, Any]) -> Tried:
        """Tell the study what a training came to."""
        self.study._refused = 0
        if isinstance(came, dict):
            return self._end("COMPLETE", came["held_out"]["bits_per_character"], seconds=came["training"]["seconds"])
        if came.evaluation is not None:
            value = came.evaluation.bits_per_character
            if not math.isfinite(value):
                return self._end("PRUNED", cause=f"diverged: the held-out loss became {value}", seconds=came.seconds)
            return self._end("COMPLETE", value, seconds=came.seconds)
        if came.signal is not None:
            self._count_starts(0)
            return self._now(came.signal)
        if self._pruned_at is None:
            return self._now()
        cause = f"worse than the median after {self._pruned_at * 100 // PARTS} % of its budget"
        return self._end("PRUNED", cause=cause, seconds=came.seconds)

    def _end(self, state: str, value: float | None = None, cause: str | None = None, seconds: float = 0.0) -> Tried:
        import optuna

        if cause is not None:
            self._trial.set_user_attr(_CAUSE, cause)
        self._trial.set_user_attr(_SECONDS, seconds)
        states = optuna.trial.TrialState
        with _quietly():
            self.study._kept.study.tell(self._trial, value, state=states[state], skip_if_finished=True)
        return self._now()

    def _now(self, signal: int | None = None) -> Tried:
        return self.study._tried(self.study._frozen(self.number), signal)


class _Mark(NamedTuple):
    """What study.json says.

    Attributes:
        name: The study's name in the storage.
        id: That of the study, which its storage knows too.
        place: That of the folder: which trials were begun in it.
    """

    name: str
    id: str
    place: str


@dataclass
class _Kept:
    """A study in its storage.

    Attributes:
        study: Optuna's.
        shown: The storage's URL, without a password.
        is_here: Whether the storage is the folder's own, so that all trials are, too.
        settings: What the study began with.
    """

    study: "optuna.Study"
    shown: str
    is_here: bool
    settings: dict[str, Any]

    @property
    def space(self) -> Space:
        """What is searched."""
        return read_space(self.settings["space"])[1]


class _Plan:
    """What a study is to be, by what was given, each value of it checked."""

    def __init__(self, given: Mapping[str, Any], paths: Sequence[str | Path], folder: Path) -> None:
        for name in given:
            if name not in ABOUT:
                raise unknown_name("option", name, ABOUT)
        fixed, space = read_space(given)
        self.device = fixed.pop("device", "auto")
        if fixed.get("from_weights") is not None:
            raise InputError("from_weights: the trials of a sweep begin with random weights; leave it out")
        self.given = {name: axis.plain for name, axis in space.items()} | fixed
        corners = _corners(space)
        corner = next((each for each in corners if _refusal(fixed | each) is None), corners[0])
        include = TrainingOptions.from_values(fixed | corner).include
        size = sum(file.stat().st_size for file, _ in find_files(paths, include, folder).files)
        base, self.reason = for_minutes(fixed | corner | {"device": self.device}, size)
        usual, _ = for_minutes(fixed | {"device": self.device}, size)
        self.usual = asdict(TrainingOptions.from_values(usual))
        if not space:
            space = usual_space(fixed | ({"cell": None} if "preset" in fixed else {}), self.usual)
        self.base = {name: value for name, value in base.items() if name not in space and name != "device"}
        self.space = space
        self._check_ends()
        self._check_machine()

    @property
    def settings(self) -> dict[str, Any]:
        """What the storage keeps."""
        return {
            "given": self.given,
            "space": {name: axis.plain for name, axis in self.space.items()},
            "base": self.base,
        }

    @property
    def begins_with(self) -> dict[str, Any] | None:
        """What training would take by itself, where that is in the space: the first trial."""
        inside = all(self.usual[name] in axis for name, axis in self.space.items())
        return {name: self.usual[name] for name in self.space} if inside else None

    def _check_ends(self) -> None:
        """Refuse a value at the end of a range, or a choice, that goes with neither the first nor the last of the others."""
        corners = _corners(self.space)
        for name, axis in self.space.items():
            for value in axis.ends:
                refused = [why for corner in corners if (why := _refusal(self.base | corner | {name: value}))]
                if len(refused) == len(corners):
                    raise refused[0]

    def _check_machine(self) -> None:
        """Refuse what no trial could have here, lest each is pruned for it."""
        device_named(self.device)
        if self.base.get("tensorboard"):
            tensorboard.check_library()

    def check_same(self, settings: Any, folder: Path) -> None:
        """Refuse a study that began with something else."""
        try:
            before = dict(settings["given"])
            read_space(settings["space"])
            TrainingOptions.from_values(settings["base"])
            str(settings["text"])
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(
                f"{folder}: the storage's study is none of throughtime's; give it another --name"
            ) from error
        for name in sorted(before.keys() | self.given.keys()):
            was, now = before.get(name), self.given.get(name)
            if was != now:
                raise InputError(
                    f"{folder}: this study began with {_said(name, was)}, not with {_said(name, now)}; give what it began with, or "
                    "another --out"
                )


def open_study(
    paths: Sequence[str | Path],
    folder: str | Path,
    given: Mapping[str, Any],
    *,
    storage: str | None = None,
    name: str | None = None,
    prune: bool = True,
    on_encoding: Callable[[int, int], None] | None = None,
) -> tuple[Study, str | None]:
    """Begin a study, or open one to go on with it.

    Args:
        paths: Files and folders of text.
        folder: The study's folder.
        given: Options of training by name, as `space.read_space` takes them.
        storage: Where Optuna keeps the study: a database's URL, redis://…, or a file for its journal; a file of SQLite in the
            folder if not given.
        name: The study's name there; the folder's if not given.
        prune: Whether trials end early whose held-out loss is above the median of those before, at the same share of their budget.
            The median waits for five complete trials and for 30 % of a budget: rates that fall along it say little sooner.
        on_encoding: Called with (bytes done, bytes in all) while the text is read.

    Returns:
        The study; and of a new one a line that says why its options are as they are, or `None`.

    Raises:
        InputError: Text, folder, storage or options can't be used, or aren't those that the study began with.
    """
    check_library()
    if name == "":
        raise InputError("--name is empty: expected the study's name; is a variable unset?")
    folder = Path(folder)
    plan = _Plan(given, paths, folder)
    with _held(folder, name) as mark:
        kept = _open_storage(storage, folder, mark, prune)
        corpus = _encoded(folder, paths, TrainingOptions.from_values(plan.base), on_encoding)
        is_new = not kept.settings
        if (folder / STUDY).exists() and kept.settings.get("id") != mark.id:
            raise InputError(f"{folder}: its study isn't in {kept.shown}; {_to_find(storage, folder)}")
        with _storage(kept.shown):
            if is_new:
                kept.settings |= plan.settings | {"text": _digest(folder), "id": mark.id}
                if plan.begins_with is not None:
                    kept.study.enqueue_trial(plan.begins_with)
                kept.study.set_user_attr(_SETTINGS, kept.settings)
        plan.check_same(kept.settings, folder)
        if kept.settings["text"] != _digest(folder):
            raise InputError(f"{folder}: this study began with another text; give that one, or another --out")
        mark = mark._replace(id=kept.settings["id"])
        save_json(folder / STUDY, mark._asdict())
    return Study(folder, paths, corpus, kept, mark, plan.device), plan.reason if is_new else None


@contextmanager
def _held(folder: Path, name: str | None) -> Iterator[_Mark]:
    """Hold a study's folder while it is opened; of one that comes to nothing let nothing stay."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: a file of this name exists; expected a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder, wait=True):
            there = {entry.name for entry in folder.iterdir()}
            mark = _mark_of(folder, name, there)
            try:
                yield mark
            except BaseException:
                for new in _made_by_opening(folder, there):
                    shutil.rmtree(new, ignore_errors=True) if new.is_dir() else new.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise InputError(f"--out {folder}: can't be written: {error.strerror}; give another folder") from error
    finally:
        with suppress(OSError):  # a folder that holds something stays
            for path in made:
                path.rmdir()


def _made_by_opening(folder: Path, there: set[str]) -> list[Path]:
    """Return what is new in a folder that held this before; in a study's folder others go on with their trials meanwhile."""
    new = [entry for entry in folder.iterdir() if entry.name not in there and entry.name != LOCK]
    return [entry for entry in new if entry.name in (DATA, DATABASE)] if STUDY in there else new


def _mark_of(folder: Path, name: str | None, there: set[str]) -> _Mark:
    """Return what a folder's study.json says, or what a new one's will."""
    if STUDY not in there:
        others = [each for each in there if each not in (DATA, DATABASE) and not each.startswith(".")]
        if others:
            raise InputError(
                f"--out {folder}: not a study, it holds {sorted(others)[0]}; expected a new folder, or a study's"
            )
        return _Mark(name or printable(folder.resolve().name), secrets.token_hex(8), secrets.token_hex(8))
    known = load_json(folder / STUDY)
    if known.keys() != set(_Mark._fields) or not all(isinstance(value, str) for value in known.values()):
        raise InputError(f"{folder / STUDY}: not what was written; restore it")
    if name not in (None, known["name"]):
        raise InputError(
            f"--name {name}: the study of {folder} is {known['name']}; leave it out, or give another --out"
        )
    return _Mark(**known)


def _open_storage(url: str | None, folder: Path, mark: _Mark, prune: bool) -> _Kept:
    """Open a study in its storage, or make it."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    shown = _sqlite(folder / DATABASE) if url is None else _without_passwords(url)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3) if prune else optuna.pruners.NopPruner()
    with _storage(shown, opening=True), _quietly():
        how = {"study_name": mark.name, "direction": "minimize", "load_if_exists": True, "pruner": pruner}
        study = optuna.create_study(storage=_backend(shown if url is None else url), **how)
        settings = study.user_attrs.get(_SETTINGS) or {}
        is_foreign = not settings and any(trial.state.name != "WAITING" for trial in study.get_trials(deepcopy=False))
        if not settings and not is_foreign:
            study.set_metric_names(["bits per character"])
    if is_foreign:
        raise InputError(f"--storage {shown}: its study {mark.name!r} is none of throughtime's; give another --name")
    return _Kept(study, shown, url is None, settings)


def _to_find(storage: str | None, folder: Path) -> str:
    """Return what can be done where a folder's study isn't in a storage."""
    own = "" if storage is not None else f"restore {folder / DATABASE}, or "
    return f"{own}give the --storage that it began with"


def _sqlite(path: Path) -> str:
    """Return the URL of a file of SQLite, as SQLAlchemy and Optuna read it, whatever the file's name."""
    return "sqlite:///" + re.sub(r"[%?{}]", lambda found: f"%{ord(found[0]):02X}", str(path))


def _without_passwords(url: str) -> str:
    """Return a URL that may be shown; a password may hold any character."""
    return re.sub(r"([?&]\w*(?:password|passwd|pwd)=)[^&]*", r"\1***", re.sub(r"://([^:@/]*):.*@", r"://\1:***@", url))


def _backend(url: str) -> Any:
    """Return Optuna's storage of a URL, or of a file for its journal."""
    from optuna.storages import JournalStorage, RDBStorage, journal
    from sqlalchemy.engine import make_url

    if not url:
        raise InputError("--storage is empty: expected a database's URL, or a file; is a variable unset?")
    if url.startswith("redis"):
        return JournalStorage(journal.JournalRedisBackend(url))
    if "://" not in url:
        if not _may_be_journal(Path(url)):
            raise InputError(
                f"--storage {url}: not a journal of Optuna's; expected one, a new file, or a URL, as in sqlite:///study.db"
            )
        return JournalStorage(journal.JournalFileBackend(url))
    if url.startswith("sqlite") and _is_in_memory(make_url(url).database or "", url):
        raise InputError(
            f"--storage {url}: is in memory, and gone at the end; expected a file, as in sqlite:///study.db"
        )
    options = {"connect_args": {"timeout": _LOCKED}} if url.startswith("sqlite") else {}
    return RDBStorage(url, engine_kwargs=options)


def _may_be_journal(path: Path) -> bool:
    """Return whether a file, if it is there, begins as a journal; Optuna would write to any other, too, before it looked."""
    if not path.is_file() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        try:
            return "op_code" in json.loads(file.readline(10_000_000))
        except (ValueError, TypeError, RecursionError):
            return False


def _is_in_memory(file: str, url: str) -> bool:
    return not file or file.endswith(":memory:") or "mode=memory" in url


@contextmanager
def _storage(shown: str, *, opening: bool = False) -> Iterator[None]:
    """Say in a line what a storage, or the library behind it, found wrong."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if not opening and library not in ("optuna", "sqlalchemy", "sqlite3", "redis"):
            raise
        cause = error.__cause__ if library == "optuna" and error.__cause__ is not None else error
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise InputError(f"--storage {shown}: can't be used: {reason}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out that Optuna calls a part of itself experimental, and that a trial which was asked for is outside its space."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _encoded(
    folder: Path,
    paths: Sequence[str | Path],
    options: TrainingOptions,
    on_encoding: Callable[[int, int], None] | None = None,
) -> Corpus:
    how = {"split": options.split, "include": options.include, "out": folder, "on_progress": on_encoding}
    return build_corpus(paths, folder / DATA, options.tokenization, **how)


def _digest(folder: Path) -> str:
    """Return what tells a study's text from any other, however it was encoded there."""
    description = load_json(folder / DATA / DESCRIPTION, sealed=True, most=LARGE)
    parts = [description[name] for name in ("tokens_sha256", "boundary", "tokenizer")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _share(source: Path, target: Path) -> None:
    """Give a run the study's encoded text, by another name of the same files where the system has that."""
    target.mkdir(parents=True)
    for name in (TOKENS, DESCRIPTION):
        try:
            os.link(source / name, target / name)
        except OSError:
            shutil.copyfile(source / name, target / name)


def _corners(space: Space) -> list[dict[str, Any]]:
    """Return the first value of each option that is searched, and the last."""
    return [{name: axis.ends[which] for name, axis in space.items()} for which in (0, -1)]


def _refusal(values: Mapping[str, Any]) -> InputError | None:
    try:
        TrainingOptions.from_values(dict(values))
    except InputError as error:
        return error
    return None


def _cause(error: Exception) -> str | None:
    """Return why a training came to nothing where its options are the reason; `None` of anything else."""
    if isinstance(error, NonFiniteError):
        return f"diverged: {error}"
    if is_out_of_memory(error):
        return "out of memory"
    if isinstance(error, FieldError):
        return f"refused: {flag(error.field)} {error.value}: expected {error.expected}"
    return f"refused: {error}" if isinstance(error, InputError) else None


def _said(name: str, value: Any) -> str:
    """Return an option as the command line takes it, or that there was none."""
    if value is None:
        return f"no {flag(name)}"
    fixed, space = read_space({name: value})
    return described(space) if space else as_given(name, fixed[name])


def _lock_of(number: int) -> str:
    return f".trial-{number:04}.lock"
