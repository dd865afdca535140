"""Training a language model: from files of text to a run."""

import math
import os
import platform
import re
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from throughtime.errors import InputError, unknown_name
from throughtime.init import initialise_model_
from throughtime.lm.config import RunConfig, versions
from throughtime.lm.corpus import Corpus, build_corpus, open_corpus
from throughtime.lm.encoding import Known, Tokenization
from throughtime.lm.evaluation import Evaluation, evaluate, validation_loss
from throughtime.lm.memory import check_fits
from throughtime.lm.metrics import line_of, open_metrics
from throughtime.lm.model import ADJUSTABLE, OPTIONS_OF_SHAPE, LanguageModel, ModelConfig, cell_names, device_named
from throughtime.lm.options import ABOUT, BUDGETS, Options, as_options, attributes, check_budgets
from throughtime.lm.presets import WINDOW, Window, preset, window_for
from throughtime.lm.restarts import Job
from throughtime.lm.run import (
    BEST,
    CHECKPOINT,
    DATA,
    METRICS,
    MODEL,
    TENSORBOARD,
    Run,
    check_empty,
    check_new,
    clean,
    clear_run,
    create_run,
    find_run,
    open_run,
)
from throughtime.lm.tensorboard import Board, board, check_library
from throughtime.lm.tokenizer import sequence_names
from throughtime.lm.transfer import freeze, knows_tokens, read_parts, take_over
from throughtime.plain import shell_word
from throughtime.training import (
    Budget,
    Clipping,
    Loop,
    LostRankError,
    NonFiniteError,
    Probe,
    Ranks,
    Rollback,
    Schedule,
    Sequences,
    Streams,
    Validation,
    Windows,
    joined,
)
from throughtime.training import StepReport as LoopReport
from throughtime.training.files import CheckpointError, read
from throughtime.training.locking import lock

_METRICS_EVERY = 1.0  # seconds


@dataclass(frozen=True)
class TrainingOptions(Options):
    """All that training can be told, checked: each option by itself, and those that go with each other or don't.

    Raises:
        InputError: A value is out of its range, or doesn't go with others.

    Example:
        >>> TrainingOptions(hidden=128, minutes=5).budget.describe()
        '5 minutes'
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.from_weights is not None and not re.fullmatch("[0-9a-f]{64}", self.from_weights):
            raise InputError(f"from_weights {self.from_weights!r}: expected the SHA-256 of a run's {MODEL}")
        if self.from_weights is None and (self.freeze is not None or not self.grow_vocabulary):
            given = "--no-grow-vocabulary" if self.freeze is None else "--freeze"
            raise InputError(f"{given} is for weights that are trained already; expected --from RUN with it")
        if self.from_weights is not None and (self.init_range or self.init != "default"):
            given = "--init-range" if self.init_range else "--init"
            raise InputError(f"{given} draws weights, and --from takes those of a run; leave one of them out")
        if self.preset is not None:
            preset(self.preset)
        self.tokenization  # noqa: B018 a name or a number that can't be raises
        if self.gradients_every and self.zoneout:
            raise InputError("--gradients-every can't look into layers with --zoneout; leave one of them out")
        if self.patience and not self.eval_every:
            raise InputError(
                "--patience needs measurements to lose it over; add --eval-every, for example --eval-every 500"
            )
        if self.gradients_every and self.cell == "mlp":
            raise InputError("--gradients-every: an mlp carries no state; expected a recurrent cell, or leave it out")
        if self.optimizer == "nt-asgd" and (self.ema or not self.eval_every or self.nonmonotone < 1):
            raise InputError(
                "--optimizer nt-asgd averages from where measurements no longer improve; expected --eval-every, such as "
                "--eval-every 500, --nonmonotone of at least 1, and no --ema"
            )
        self._check_init()
        self.budget  # noqa: B018 a budget that can't be raises
        self.clipping  # noqa: B018
        self.rates  # noqa: B018
        self.model_config(vocabulary_size=1)
        self.frozen  # noqa: B018

    @property
    def frozen(self) -> list[str]:
        """The parts that hold still."""
        return [] if self.freeze is None else read_parts(self.freeze, self.layers)

    def _check_init(self) -> None:
        """Refuse an initialisation that the cell hasn't."""
        if self.init == "default":
            return
        if self.cell == "mlp":
            raise InputError(
                f"--init {self.init}: is for recurrent layers, and --cell mlp has none; leave one of them out"
            )
        if self.cell in cell_names():  # another is refused for that
            with torch.random.fork_rng(devices=[]):
                initialise_model_(LanguageModel(ModelConfig(2, self.cell, hidden_size=1)), self.init)

    @property
    def budget(self) -> Budget:
        """How long to train; three minutes if nothing was said."""
        check_budgets(name for name in BUDGETS if getattr(self, name) is not None)
        minutes = 3.0 if self.minutes is self.epochs is self.steps is None else self.minutes
        return Budget(minutes, self.epochs, self.steps)

    @property
    def clipping(self) -> Clipping:
        """How gradients are clipped."""
        with as_options(norm="clip", value="clip_value"):
            return Clipping(self.clip, self.clip_value)

    @property
    def rates(self) -> Schedule:
        """How the learning rate goes along training."""
        with as_options(final="final_lr", decay="lr_decay", decay_after="lr_decay_after"):
            return Schedule(self.schedule, self.warmup, self.final_lr, self.lr_decay, self.lr_decay_after)

    @property
    def training_window(self) -> Window:
        """How much is trained on at a time."""
        return Window(self.batch or WINDOW.batch, self.bptt or WINDOW.bptt)

    @property
    def tokenization(self) -> Tokenization:
        """How the text is cut into tokens."""
        sequences = self.sequence if self.mode == "sentence" else None
        if self.sequence not in sequence_names():
            raise unknown_name("sequence", self.sequence, sequence_names())
        return Tokenization(self.level, sequences, self.vocabulary, self.min_count, self.split_punctuation)

    def model_config(self, vocabulary_size: int) -> ModelConfig:
        """Return the shape of the model for a vocabulary."""
        usual = self.hidden if self.level in ("word", "bpe") else 0
        embedding = usual if self.embedding is None else self.embedding
        shape: dict[str, Any] = {field: getattr(self, option) for option, field in OPTIONS_OF_SHAPE.items()}
        shape["embedding_size"] = embedding
        with as_options(**{field: option for option, field in OPTIONS_OF_SHAPE.items()}):
            return ModelConfig(vocabulary_size, **shape)

    @classmethod
    def from_values(cls, values: dict[str, Any], source: str = "") -> "TrainingOptions":
        """Make options of names and values, checked; a preset's stand for those that aren't given.

        Args:
            values: By field name.
            source: Where they are from, for the message: a file's name.

        Raises:
            InputError: A name is unknown, a value of the wrong type or out of range.
        """
        for name in values:
            if name not in ABOUT:
                raise InputError(f"{f'{source}: ' if source else ''}{unknown_name('option', name, ABOUT)}")
        if isinstance(name := values.get("preset"), str):
            recipe = preset(name)
            if any(values.get(budget) is not None for budget in BUDGETS):
                recipe = {name: value for name, value in recipe.items() if name not in BUDGETS}
            values = recipe | values
        try:
            return cls(**values)
        except InputError as error:
            if not source:
                raise
            raise InputError(f"{source}: {error}") from error

    @classmethod
    def from_toml(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> "TrainingOptions":
        """Read options from a TOML file of `name = value` lines; `overrides` win.

        Raises:
            InputError: The file can't be read, is not TOML, or holds an unknown or unfit option.
        """
        return cls.from_values(read_toml(path, overrides), source=f"--config {path}")


TrainingOptions.__doc__ = (TrainingOptions.__doc__ or "").rstrip() + attributes()


def read_toml(path: str | Path, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the names and values of a TOML file, and `overrides`, which win; a budget among them is the only one.

    Raises:
        InputError: The file can't be read, or is not TOML.
    """
    path = Path(path)
    try:
        values = tomllib.loads(read(path).decode("utf-8-sig"))  # some editors begin a file with a mark
    except CheckpointError as error:
        raise InputError(f"--config {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"--config {path}: not TOML: {error}") from error
    overrides = overrides or {}
    if any(overrides.get(name) is not None for name in BUDGETS):
        values = {name: value for name, value in values.items() if name not in BUDGETS}
    return values | overrides


@dataclass(frozen=True)
class StepReport(LoopReport):
    """What one step came to, in a reader's units too.

    Attributes:
        bits_per_character: The running loss in bits for each character of the training text.
    """

    bits_per_character: float


@dataclass(frozen=True)
class Longer:
    """What training a complete run longer came to, in nats per token on its held-out text.

    Attributes:
        steps: Updates before.
        before: What its weights came to.
        after: What the weights that were made since come to.
    """

    steps: int
    before: float
    after: float

    @property
    def is_better(self) -> bool:
        """Whether the run's weights are the new ones; else they stay as they were."""
        return self.after < self.before


@dataclass(frozen=True)
class TrainingSummary:
    """What a training came to.

    Attributes:
        run: Its folder.
        steps: Updates, those before a resume included.
        seconds: Training time, likewise.
        interrupted: Whether it was stopped before its budget was spent.
        signal: By which signal: SIGINT is Ctrl-C's; `None` where it wasn't, or a monitor stopped it.
        clip_share: Share of the steps whose gradient was clipped.
        evaluation: On the held-out text; `None` when interrupted.
        best_step: Steps after which the run's weights were taken; `None` where they are the last.
        stopped_early: Whether patience ended it.
        rollbacks: How many times the loss diverged and training went back.
        longer: Of a complete run that was trained longer, how that compares; else `None`.
    """

    run: Path
    steps: int
    seconds: float
    interrupted: bool
    clip_share: float
    evaluation: Evaluation | None
    signal: int | None = None
    best_step: int | None = None
    stopped_early: bool = False
    rollbacks: int = 0
    longer: Longer | None = None


class ShortText(NamedTuple):
    """What happens where a text is too short for the usual window: a smaller one is chosen.

    Attributes:
        tokens: How many there are to train on.
        window: The one that is trained with.
    """

    tokens: int
    window: Window


Observer = Callable[[StepReport], None]
OnEvent = Callable[[Rollback | Validation | ShortText], None]
Monitor = Callable[[LoopReport, Callable[[], float | None]], bool]
"""Takes what each step reports, and what measures the held-out loss (in nats per token) there; returns whether to stop."""


def train(
    paths: Sequence[str | Path],
    out: str | Path,
    options: TrainingOptions | None = None,
    observer: Observer | None = None,
    on_encoding: Callable[[int, int], None] | None = None,
    on_event: OnEvent | None = None,
    probe: Probe | None = None,
    source: Run | None = None,
    *,
    monitor: Monitor | None = None,
    around: str | Path | None = None,
) -> TrainingSummary:
    """Train a language model on text.

    Processes that torchrun started train it together, each with its share of the batch's rows; then all are to call this, with the
    same folder, on a file system that they share. The first one reads the text, reports, measures and writes, by its own arguments.
    Where torchrun starts them again (`--max-restarts`), they go on with the run that they began.

    Args:
        paths: Files and folders.
        out: The run's folder; it must not hold anything but the encoded text of an earlier run.
        options: How.
        observer: Called after each step.
        on_encoding: Called with (bytes done, bytes in all) while the text is read.
        on_event: Called after each measurement along the way, when training went back after a divergence, and where the text is
            short.
        probe: Measures scalars every `options.gradients_every` steps; they go to metrics.jsonl.
        source: The run whose weights are gone on from; `options` are then as `continuing.options_from` makes them.
        monitor: Asked after each step whether training is to stop; it changes nothing else.
        around: The folder of many runs that the run's own is in, which isn't read either where it is in a folder that is.

    Raises:
        InputError: Text, folder or options can't be used.
        NonFiniteError: The loss diverged more than `rollbacks` times; the last good checkpoint is kept.
        LostRankError: Another process is gone; the last checkpoint is kept.
    """
    with joined() as ranks:
        _check_monitor(monitor, ranks)
        job = Job.of(ranks)
        if ranks.of_first(lambda: job.began(out) is not None and (Path(out) / CHECKPOINT).exists()):
            return resume(out, observer, on_event, probe, monitor=monitor)
        if not ranks.is_first:
            return _train_along(Path(out), ranks, probe)
        if job.began(out) is not None:
            with lock(Path(out)):
                clear_run(Path(out))
        callbacks = _Callbacks(observer, on_encoding, on_event, probe, monitor, around)
        return _train(paths, out, options or TrainingOptions(), callbacks, source, ranks, job)


def _check_monitor(monitor: Monitor | None, ranks: Ranks) -> None:
    """Refuse to let one of several processes stop by itself."""
    if monitor is not None and not ranks.is_alone:
        raise InputError(f"a monitor stops a training of one process, and there are {ranks.size}; leave it out")


class _Callbacks(NamedTuple):
    """Who is told of a training, what measures and stops it, and where it is: as of `train`."""

    observer: Observer | None
    on_encoding: Callable[[int, int], None] | None
    on_event: OnEvent | None
    probe: Probe | None
    monitor: Monitor | None
    around: str | Path | None


def _train(
    paths: Sequence[str | Path],
    out: str | Path,
    options: TrainingOptions,
    callbacks: _Callbacks,
    source: Run | None,
    ranks: Ranks,
    job: Job,
) -> TrainingSummary:
    """Train a language model in the one process that reads the text and writes the run."""
    _check_source(options.from_weights, source)
    device = ranks.device(device_named(options.device))
    if options.tensorboard:
        check_library()
    with _new_folder(out) as folder, job.begins(folder, 0):
        with _all_or_nothing(folder):
            known = None if source is None else Known(source.tokenizer, options.grow_vocabulary)
            corpus = build_corpus(
                paths,
                folder / DATA,
                options.tokenization,
                split=options.split,
                include=options.include,
                out=folder if callbacks.around is None else callbacks.around,
                known=known,
                on_progress=callbacks.on_encoding,
            )
            options = _with_window(options, corpus, source, ranks, callbacks.on_event)
            config = options.model_config(corpus.tokenizer.vocabulary_size)
            windows = _make_windows(corpus, options, ranks)
            if device.type == "cpu":
                check_fits(config, *options.training_window, options.level)
            torch.manual_seed(options.seed)
            model = LanguageModel(config)
            if options.init_range:
                model.draw_uniformly(options.init_range)
            initialise_model_(model, options.init)
            origin = None if source is None else _start_from(source, model, options)
            loop = _make_loop(model, windows, corpus, options, ranks, callbacks.probe)
            described = RunConfig(asdict(options), config, versions(), origin=origin)
            run = create_run(folder, described, corpus.tokenizer)
            ranks.of_first(lambda: (options, config))
        with _free_unless_saved(folder, loop):
            return ranks.of_first(
                lambda: _finish(run, loop, corpus, callbacks.observer, callbacks.on_event, callbacks.monitor)
            )


def _train_along(folder: Path, ranks: Ranks, probe: Probe | None) -> TrainingSummary:
    """Train in a process beside the first one, which tells what is trained once that is written."""
    options, config = ranks.of_first(_of_the_first)
    corpus = open_corpus(_seen(folder / DATA, ranks))
    windows = _make_windows(corpus, options, ranks)
    return _go_along(folder, _make_loop(LanguageModel(config), windows, corpus, options, ranks, probe))


def _of_the_first() -> Any:
    raise AssertionError("only the first process makes this")


def _seen(path: Path, ranks: Ranks) -> Path:
    """Return a path that the first process has written, if this one sees it too."""
    if not path.exists():
        raise InputError(
            f"process {ranks.rank} of {ranks.size} doesn't see {path.resolve()} on {platform.node()}; expected --out on a file "
            "system that all machines share"
        )
    return path


def _go_along(folder: Path, loop: Loop) -> TrainingSummary:
    """Take part in all that the first process's `_finish` does together with the others."""

    def note(event: Rollback | Validation) -> None:
        if isinstance(event, Validation) and event.is_best:
            loop.checkpoint()

    with _said_as_options(folder):
        loop.run(save=loop.checkpoint, on_event=note)
        return loop.ranks.of_first(_of_the_first)


def _check_source(wanted: str | None, source: Run | None) -> None:
    """Raise unless training begins with the weights that its options are of."""
    there = None if source is None else source.weights_digest
    if wanted == there:
        return
    if source is None:
        raise InputError(f"these options go on from the weights {wanted}; expected --from RUN, the run that has them")
    raise InputError(
        f"--from {source.folder}: its weights are {there}, but the options go on from "
        f"{wanted or 'none; expected options_from(run, …)'}"
    )


def _start_from(source: Run, model: LanguageModel, options: TrainingOptions) -> dict[str, Any]:
    """Give a model a run's weights; return where they are from, and how many tokens are new to them."""
    more = model.config.vocabulary_size - source.model_config.vocabulary_size
    same = replace(source.model_config, **{name: getattr(model.config, name) for name in ADJUSTABLE})
    if replace(same, vocabulary_size=model.config.vocabulary_size) != model.config:
        raise InputError(
            f"--from {source.folder}: a {same.describe()}, but the options are of a {model.config.describe()}"
        )
    if more and knows_tokens(model, options.frozen):
        raise InputError(
            f"--freeze {options.freeze}: {more:,} tokens of this text are new to {source.folder}, and their weights could never "
            "learn; freeze other parts, or read the text with the vocabulary as it is: --no-grow-vocabulary"
        )
    tokenizer = source.tokenizer
    take_over(source.load_model("cpu"), model, sum(one is not None for one in (tokenizer.unknown_id, tokenizer.eos_id)))
    return {"run": source.folder.resolve().name, "new_tokens": more}


@contextmanager
def _new_folder(out: str | Path) -> Iterator[Path]:
    """Yield the folder of a run to be, held for this process; where nothing came to stand in it, it goes again."""
    made = [path for path in (Path(out), *Path(out).parents) if not path.exists()]
    folder = check_new(out)
    try:
        with lock(folder):
            check_empty(folder)  # who held it until now may have left a run
            clean(folder)
            yield folder
    finally:
        with suppress(OSError):  # a folder that holds something stays
            for path in made:
                path.rmdir()


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[None]:
    """Of a run that comes to nothing let nothing stay, but what was there before."""
    was_encoded = (folder / DATA).exists()
    try:
        yield
    except BaseException:
        clear_run(folder)
        if not was_encoded:
            shutil.rmtree(folder / DATA, ignore_errors=True)
        raise


@contextmanager
def _free_unless_saved(folder: Path, loop: Loop) -> Iterator[None]:
    """Of a run that breaks off before it was saved for the first time leave the encoded text alone, to be trained anew."""
    try:
        yield
    except BaseException:
        if not loop.step and not (folder / CHECKPOINT).exists():
            clear_run(folder)
        raise


def resume(
    run_folder: str | Path,
    observer: Observer | None = None,
    on_event: OnEvent | None = None,
    probe: Probe | None = None,
    *,
    longer: Budget | None = None,
    learning_rate: float | None = None,
    monitor: Monitor | None = None,
) -> TrainingSummary:
    """Go on with a run that was stopped, exactly where its last checkpoint left it; or train one for longer than was planned.

    Weights, optimiser, random numbers, position in the text and carried state are restored: with a budget of steps or
    epochs, on a CPU with the same number of threads, the result is that of a run that was never stopped, to the bit. (A rollback
    goes back to a state in memory, which after a resume is the one resumed from; from there on the two differ.)

    With `longer` another schedule begins where training stands, and what is said above holds for it too. A complete run keeps its
    weights and results until that schedule is over, and for good unless the new ones predict the held-out text better.

    Args:
        run_folder: Where the run is.
        observer: As of `train`.
        on_event: As of `train`.
        probe: As of `train`.
        longer: How much more to train.
        learning_rate: The peak of the rate from here on; the one before if not given.
        monitor: As of `train`.

    Raises:
        InputError: There is nothing to go on with, or it is damaged; or the run is complete and `longer` isn't given.
    """
    with joined() as ranks:
        _check_monitor(monitor, ranks)
        job = Job.of(ranks)
        began = ranks.of_first(lambda: job.began(run_folder))
        if not ranks.is_first:
            ranks.of_first(_of_the_first)  # nothing is read before the first process has found it whole
            run = open_run(_seen(Path(run_folder), ranks))
            options, loop, _ = _restored(run, probe, ranks)
            _begin_stage(loop, options, longer, learning_rate, began)
            return _go_along(run.folder, loop)
        with lock(find_run(run_folder)):
            clean(Path(run_folder))
            run = open_run(run_folder)
            options, loop, corpus = _restored(run, probe, ranks)
            _begin_stage(loop, options, longer, learning_rate, began)
            if (
                longer is None
                and loop.is_finished
                and (run.results or {}).get("training", {}).get("steps") == loop.step
            ):
                raise InputError(
                    f"{run.folder}: this run is complete, its budget is spent; to train it longer, say how much: --minutes, "
                    "--epochs or --steps"
                )
            ranks.of_first(lambda: None)
            with job.begins(run.folder, loop.stage.step):
                return ranks.of_first(lambda: _finish(run, loop, corpus, observer, on_event, monitor))


def _begin_stage(
    loop: Loop,
    options: TrainingOptions,
    longer: Budget | None,
    learning_rate: float | None,
    began: int | None,
) -> None:
    """Train a restored loop for longer, if that was asked for, and wasn't begun by these very processes before they were lost."""
    is_begun = began is not None and loop.longer is not None and loop.longer.step == began
    if longer is not None and not is_begun:
        loop.train_longer(longer, None if learning_rate is None else replace(options, lr=learning_rate).lr)


def _restored(run: Run, probe: Probe | None, ranks: Ranks) -> tuple[TrainingOptions, Loop, Corpus]:
    """Return a run's options, its training as the last checkpoint left it, and its text."""
    options = TrainingOptions.from_values(run.options, source=str(run.folder))
    if run.config.packed is None and not os.path.lexists(run.folder / CHECKPOINT):
        raise InputError(f"{run.folder}: no checkpoint was written yet; train anew, with another --out")
    tensors, state = run.load_checkpoint()
    corpus = run.corpus()
    _check_divides(options.training_window.batch, ranks, run.folder)
    windows = _make_windows(corpus, options, ranks)
    loop = _make_loop(LanguageModel(run.model_config), windows, corpus, options, ranks, probe)
    try:
        loop.restore(tensors, state)
    except CheckpointError as error:
        raise CheckpointError(f"{run.folder / CHECKPOINT}: {error}; restore it or train anew") from error
    return options, loop, corpus


def _check_divides(batch: int, ranks: Ranks, folder: Path) -> None:
    """Refuse to go on with a run, whose batch stays, in processes among which its rows can't be divided."""
    if batch % ranks.size:
        numbers = [number for number in range(1, batch + 1) if batch % number == 0]
        below, above = [n for n in numbers if n < ranks.size][-1:], [n for n in numbers if n > ranks.size][:1]
        raise InputError(
            f"{folder}: its batch has {batch} rows, which can't be divided among {ranks.size} processes; expected a number of "
            f"processes such as {' or '.join(map(str, below + above))}"
        )


def _with_window(
    options: TrainingOptions, corpus: Corpus, source: Run | None, ranks: Ranks, on_event: OnEvent | None
) -> TrainingOptions:
    """Return options that say which window is trained with; where nobody gave one, it is small enough for the text.

    A batch that nobody gave can be divided among the processes.
    """
    window = options.training_window
    if options.batch is options.bptt is None:
        if source is not None:
            window = TrainingOptions.from_values(source.options, str(source.folder)).training_window
        if corpus.tokenizer.eos_id is None and (chosen := window_for(len(corpus.train), window)) != window:
            window = chosen
            if on_event is not None:
                on_event(ShortText(len(corpus.train), window))
    batch, bptt = window
    if options.batch is None and batch % ranks.size:
        batch = max(batch // ranks.size, 1) * ranks.size
        bptt = bptt if options.bptt else max(min(bptt, (len(corpus.train) - 1) // batch), 1)
    return replace(options, batch=batch, bptt=bptt)


def _make_windows(corpus: Corpus, options: TrainingOptions, ranks: Ranks) -> Windows:
    """Return the streams of a text, or the batches of its sequences: all rows, of which each process reads its share."""
    batch, size = options.training_window.batch, ranks.size
    if batch % size:
        below, above = batch // size * size, -(-batch // size) * size
        such_as = f"{below} or {above}" if below else str(above)
        raise InputError(
            f"--batch {batch}: its rows are divided among {size} processes; expected a multiple of {size}, such as {such_as}"
        )
    if options.tar and options.mode == "sentence" and not ranks.is_alone:
        raise InputError(
            f"--tar with --mode sentence serves one process only, and there are {size}: its mean is not over the tokens "
            "that the loss is over; leave one of them out"
        )
    eos_id = corpus.tokenizer.eos_id
    if eos_id is None:
        try:
            return Streams(corpus.train, *options.training_window)
        except InputError as error:
            what = str(error).partition(";")[0]
            raise InputError(f"{what}; lower --batch or --bptt, or give more text") from error
    return Sequences(corpus.train, eos_id, *options.training_window, options.seed)


def _make_loop(
    model: LanguageModel,
    windows: Windows,
    corpus: Corpus,
    options: TrainingOptions,
    ranks: Ranks,
    probe: Probe | None,
) -> Loop:
    if options.gradients_every and probe is None:
        raise InputError(
            f"gradients_every = {options.gradients_every}: expected a probe to measure with; give probe= too"
        )

    device = ranks.device(device_named(options.device))
    model = model.to(device)
    freeze(model, options.frozen)

    def validate(model: nn.Module, should_stop: Callable[[], bool]) -> float | None:
        assert isinstance(model, LanguageModel)
        return validation_loss(model, corpus.held_out, corpus.tokenizer.eos_id, should_stop)

    return Loop(
        model=model,
        windows=windows,
        optimizer=_make_optimizer(model, options),
        forward=model.hidden,
        loss=model.loss,
        budget=options.budget,
        learning_rate=options.lr,
        schedule=options.rates,
        clipping=options.clipping,
        device=device,
        dtype=getattr(torch, options.dtype),
        average=options.ema,
        nonmonotone=options.nonmonotone if options.optimizer == "nt-asgd" else 0,
        validate=validate,
        validate_every=options.eval_every,
        patience=options.patience,
        rollbacks=options.rollbacks,
        probe=probe,
        probe_every=options.gradients_every,
        ranks=ranks,
    )


def _make_optimizer(model: LanguageModel, options: TrainingOptions) -> torch.optim.Optimizer:
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learned if p.dim() > 1]
    vectors = [p for p in learned if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if options.optimizer in ("sgd", "nt-asgd"):
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum if options.optimizer == "sgd" else 0.0)
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=options.lr, betas=(0.9, 0.99), fused=True)


def _finish(
    run: Run,
    loop: Loop,
    corpus: Corpus,
    observer: Observer | None,
    on_event: OnEvent | None,
    monitor: Monitor | None,
) -> TrainingSummary:
    """Run the loop, saving as it goes; then evaluate and write the results."""
    earlier = run.results  # of a run that is trained longer; its weights stay as they are until better ones are made
    steps_before = 0 if earlier is None else earlier["training"]["steps"]

    def save_all() -> None:
        if earlier is None and loop.best_step in (
            0,
            loop.step,
        ):  # else the run's weights are the best, of an earlier step
            run.save_model(_language_model(loop.trained))
        elif earlier is not None and loop.best_step == loop.step > steps_before:
            run.save_model(_language_model(loop.trained), since=True)
        run.save_checkpoint(*loop.checkpoint())

    scalars = run.folder / TENSORBOARD if run.options.get("tensorboard") else None
    with open_metrics(run.folder / METRICS) as metrics, board(scalars, loop.step) as shown:
        recorder = _Recorder(metrics, corpus, observer, on_event, shown)

        def see(report: LoopReport) -> None:
            recorder(report)
            if monitor is not None and monitor(report, loop.measure):
                loop.stop()

        def note(event: Rollback | Validation) -> None:
            if isinstance(event, Validation) and event.is_best:
                save_all()
            recorder.event(event)

        with _said_as_options(run.folder):
            finished = loop.run(see, save_all, on_event=note)
    summary = TrainingSummary(
        run.folder,
        loop.step,
        loop.seconds,
        not finished,
        loop.clip_share,
        None,
        loop.signal,
        loop.best_step or None,
        loop.stopped_early,
        loop.rolled_back,
    )
    if not finished:
        return summary
    was_measured = loop.best_step > steps_before
    made = _language_model(loop.trained)
    if was_measured:
        made = run.load_model(str(loop.device), since=earlier is not None)
    evaluation = evaluate(
        made,
        corpus.held_out,
        characters=corpus.held_out_characters,
        bytes=corpus.held_out_bytes,
        unknown_id=corpus.tokenizer.unknown_id,
        eos_id=corpus.tokenizer.eos_id,
    )
    summary = replace(summary, evaluation=evaluation)
    if earlier is not None:
        summary = _compare(run, summary, made, earlier, loop.best_step if was_measured else None)
    _write_results(run, summary, earlier)
    return summary


@contextmanager
def _said_as_options(folder: Path) -> Iterator[None]:
    """Say what can be done about a training that broke off, as the command line has it."""
    try:
        yield
    except NonFiniteError as error:
        raise type(error)(f"{error}: --lr, --clip") from error
    except LostRankError as error:
        go_on = f"what was saved last is whole, go on with: throughtime train --resume {shell_word(folder)}"
        is_saved = (folder / CHECKPOINT).exists()
        raise LostRankError(f"{error}; {go_on if is_saved else 'nothing was saved yet, train anew'}") from error


def _compare(
    run: Run, summary: TrainingSummary, made: LanguageModel, earlier: dict[str, Any], best_step: int | None
) -> TrainingSummary:
    """Give a run that was trained longer its new weights if they are better, and return what it is now."""
    assert summary.evaluation is not None
    training, held_out = earlier["training"], earlier["held_out"]
    longer = Longer(training["steps"], held_out["nats_per_token"], summary.evaluation.nats_per_token)
    if longer.is_better:
        run.save_model(made)
        return replace(summary, longer=longer, best_step=best_step)
    kept = training["best_step"] or training["steps"]
    return replace(summary, longer=longer, best_step=kept, evaluation=Evaluation(**held_out))


def _write_results(run: Run, summary: TrainingSummary, earlier: dict[str, Any] | None) -> None:
    assert summary.evaluation is not None
    training = {
        "steps": summary.steps,
        "seconds": summary.seconds,
        "clip_share": summary.clip_share,
        "best_step": summary.best_step,
        "stopped_early": summary.stopped_early,
        "rollbacks": summary.rollbacks,
    }
    if earlier is not None and summary.longer is not None:
        first = {name: earlier["training"][name] for name in ("steps", "seconds")}
        stages = earlier["training"].get("stages", [first | {"nats_per_token": summary.longer.before}])
        now = {"steps": summary.steps, "seconds": summary.seconds, "nats_per_token": summary.longer.after}
        training["stages"] = [*stages, now]
    run.save_results({"training": training, "held_out": asdict(summary.evaluation)})
    (run.folder / BEST).unlink(missing_ok=True)


def _language_model(model: nn.Module) -> LanguageModel:
    assert isinstance(model, LanguageModel)
    return model


class _Recorder:
    """Passes reports on, with bits per character, and writes one a second to metrics.jsonl."""

    def __init__(
        self, file: Any, corpus: Corpus, observer: Observer | None, on_event: OnEvent | None, shown: Board
    ) -> None:
        self._file = file
        self._shown = shown
        self._observer = observer
        self._on_event = on_event
        sample = corpus.train[:1_000_000]
        self._bits = len(sample) / max(corpus.tokenizer.characters_of(sample), 1) / math.log(2)
        self._written = 0.0

    def __call__(self, report: LoopReport) -> None:
        full = StepReport(**vars(report), bits_per_character=report.loss * self._bits)
        if self._observer is not None:
            self._observer(full)
        now = time.monotonic()
        if report.step == 1 or report.progress >= 1 or report.scalars or now - self._written >= _METRICS_EVERY:
            self._written = now
            record = asdict(full)
            scalars = record.pop("scalars")
            self._write(record | scalars)

    def event(self, event: Rollback | Validation) -> None:
        """Write down, and pass on, that training was measured or went back."""
        self._write({"event": type(event).__name__.lower(), **asdict(event)})
        if self._on_event is not None:
            self._on_event(event)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(line_of(record))
        self._file.flush()
        self._shown(record)
