"""The options of training, each stated once: the command line, TOML files, the checks and the reports are made of these.

Nothing here needs torch, so that help is there at once.
"""

import math
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from throughtime.errors import FieldError, InputError, unknown_name
from throughtime.lm.kinds import settled

MODEL, REGULARISATION, DATA, BUDGET = "Model", "Regularisation", "Data", "Budget (one of them)"
OPTIMISATION, RATE, WATCHING, MACHINE = "Optimisation", "Learning rate", "Watching and saving", "Machine"


class Range(NamedTuple):
    """The numbers that an option may be, infinity and NaN never among them.

    Attributes:
        least: From here on.
        expected: In words.
        below: Up to here, not itself.
        open: Whether `least` itself isn't one of them.
        whole: Whether only whole numbers are.
    """

    least: float
    expected: str
    below: float = math.inf
    open: bool = False
    whole: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise unless a value is in it.

        Raises:
            FieldError: It isn't.
        """
        is_number = isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)
        if is_number and self.least <= value < self.below and not (self.open and value == self.least):
            return
        raise FieldError(name, value, self.expected)


AT_LEAST_1 = Range(1, "a whole number, at least 1", whole=True)
AT_LEAST_0 = Range(0, "a whole number, at least 0", whole=True)
OR_OFF = Range(0, "a whole number, or 0 for off", whole=True)
PROBABILITY, SHARE = Range(0, "a probability from 0 to below 1", 1), Range(0, "a share from 0 to below 1", 1)
PART = Range(0, "a share above 0, below 1", 1, open=True)
POSITIVE, PENALTY = Range(0, "a number above 0", open=True), Range(0, "a weight of 0 or more; 0 is off")


class About(NamedTuple):
    """What there is to say of an option.

    Attributes:
        panel: Where help lists it; "" where the command line hasn't got it.
        metavar: What it takes, in help; "" of one that is on or off.
        help: What it is.
        usually: What it is where it isn't given, in words, where that isn't just its default.
        range: The numbers that it may be; `None` where something else decides.
        names: The names that it may be, where they are few.
        search: How a sweep searches it: "log" and "linear" are ranges on that scale, "names" choices; "" where one text and one
            trial's budget say what it is, and it isn't searched.
    """

    panel: str
    metavar: str
    help: str
    usually: str | None = None
    range: Range | None = None
    names: tuple[str, ...] = ()
    search: str = ""


LOG, LINEAR, NAMES = "log", "linear", "names"  # how a sweep searches an option


def _option(default: Any, panel: str, metavar: str, help: str, usually: str | None = None, **more: Any) -> Any:
    return field(default=default, metadata={"about": About(panel, metavar, help, usually, **more)})


OPTIMIZERS = ("adamw", "adam", "sgd", "nt-asgd")
DTYPES = ("float32", "bfloat16")
MODES = ("stream", "sentence")
BUDGETS = ("minutes", "epochs", "steps")


@dataclass(frozen=True)
class Options:
    """All that training can be told, each value within its own range.

    Raises:
        InputError: A value is out of its range; the command line names the flag.
    """

    level: str = _option("char", DATA, "NAME", "A token is a char, a byte, a word or a bpe token.")
    mode: str = _option(
        *("stream", DATA, "NAME"),
        "stream carries the state through the whole text; at sentence, each line or file starts anew and ends.",
        names=MODES,
    )
    sequence: str = _option("line", DATA, "NAME", "What is a sequence at --mode sentence: a line or a file.")
    vocabulary: int | None = _option(
        None, DATA, "V", "Most tokens of a word or bpe vocabulary.", "10000 words, 2000 bpe tokens"
    )
    min_count: int = _option(2, DATA, "N", "How often a word must occur to be known.")
    split_punctuation: bool = _option(True, DATA, "", "Are punctuation marks words of their own?")
    grow_vocabulary: bool = _option(
        True, DATA, "", "With --from: do characters or words that are new become tokens? Else they are unknown."
    )
    include: str = _option("*", DATA, "GLOB", "Which files of a folder to read.")
    split: float = _option(0.9, DATA, "P", "Share to train on, from the start; the rest is held out.", range=PART)
    preset: str | None = _option(
        *(None, MODEL, "NAME"),
        "A recipe: char-rnn, zaremba-small, -medium, -large, awd-lstm or nanogpt-cpu; flags override it.",
        "",
    )
    cell: str = _option(
        "lstm", MODEL, "NAME", "rnn, rnn_relu, lstm, gru or mlp, which sees a fixed window of tokens.", search=NAMES
    )
    hidden: int = _option(256, MODEL, "H", "Hidden units of a layer.", range=AT_LEAST_1, search=LOG)
    layers: int = _option(1, MODEL, "L", "Layers.", range=AT_LEAST_1, search=LINEAR)
    embedding: int | None = _option(
        *(None, MODEL, "E"),
        "Width of the embedding; 0 is one-hot.",
        "0, H for words and bpe",
        range=AT_LEAST_0,
        search=LOG,
    )
    window: int = _option(8, MODEL, "N", "Tokens that an mlp sees.", range=AT_LEAST_1, search=LOG)
    tied: bool = _option(False, MODEL, "", "Let the output layer share the embedding.", search=NAMES)
    layer_norm: bool = _option(False, MODEL, "", "Normalise the layers.", search=NAMES)
    init: str = _option(
        *("default", MODEL, "NAME"),
        "How layers start: orthogonal[:gain], forget:bias, update:bias, chrono:lag; join by +.",
        search=NAMES,
    )
    init_range: float = _option(
        *(0.0, MODEL, "R"),
        "Start every weight from U(−R, R), as in Zaremba et al. (2014); 0 is our own way.",
        range=Range(0, "a number above 0, below 1e6, or 0 for off", 1e6),
        search=LOG,
    )
    freeze: str | None = _option(
        None, MODEL, "PARTS", "With --from: hold embedding, layers (by number) or output still, as in 1,2.", ""
    )
    dropout: float = _option(
        0.0,
        REGULARISATION,
        "P",
        "Share of activations dropped, between layers and before the output.",
        range=PROBABILITY,
        search=LINEAR,
    )
    locked: bool = _option(False, REGULARISATION, "", "Drop the same ones at every step of a window.", search=NAMES)
    embedding_dropout: float = _option(
        0.0, REGULARISATION, "P", "Share of the vocabulary unseen in a window.", range=PROBABILITY, search=LINEAR
    )
    weight_drop: float = _option(
        0.0,
        REGULARISATION,
        "P",
        "Share of the recurrent weights dropped in a window.",
        range=PROBABILITY,
        search=LINEAR,
    )
    recurrent_dropout: float = _option(
        0.0, REGULARISATION, "P", "Share of h hidden from W_hh, all of a window.", range=PROBABILITY, search=LINEAR
    )
    zoneout: float = _option(
        0.0, REGULARISATION, "P", "Share of the state that stays as it is in a step.", range=PROBABILITY, search=LINEAR
    )
    ar: float = _option(
        0.0, REGULARISATION, "A", "Weight of h's mean square in the loss (AR).", range=PENALTY, search=LOG
    )
    tar: float = _option(
        0.0, REGULARISATION, "B", "Weight of its change's mean square (TAR).", range=PENALTY, search=LOG
    )
    minutes: float | None = _option(None, BUDGET, "M", "Training time.", "3")
    epochs: float | None = _option(None, BUDGET, "E", "Passes over the training text.", "")
    steps: int | None = _option(None, BUDGET, "N", "Updates of the weights.", "")
    batch: int | None = _option(
        None,
        OPTIMISATION,
        "B",
        "Streams trained on side by side.",
        "32, fewer of a short text",
        range=AT_LEAST_1,
        search=LOG,
    )
    bptt: int | None = _option(
        None, OPTIMISATION, "T", "Steps of truncated BPTT.", "64, fewer of a short text", range=AT_LEAST_1, search=LOG
    )
    optimizer: str = _option(
        *("adamw", OPTIMISATION, "NAME"),
        "adamw, adam, sgd, or nt-asgd (Merity et al., 2018): SGD whose weights are averaged once they no longer improve.",
        names=OPTIMIZERS,
        search=NAMES,
    )
    momentum: float = _option(0.9, OPTIMISATION, "M", "Momentum of sgd.", range=SHARE, search=LINEAR)
    nonmonotone: int = _option(5, OPTIMISATION, "N", "Measurements that nt-asgd waits for a better one.", search=LINEAR)
    lr: float = _option(1e-2, RATE, "X", "Learning rate at its peak.", range=POSITIVE, search=LOG)
    schedule: str = _option("cosine", RATE, "NAME", "cosine, linear or constant.", search=NAMES)
    final_lr: float = _option(0.02, RATE, "P", "Share of the learning rate at the end.", search=LINEAR)
    lr_decay: float = _option(
        1.0, RATE, "X", "Factor on the rate for each epoch after --lr-decay-after.", search=LINEAR
    )
    lr_decay_after: float = _option(0.0, RATE, "E", "Epochs at the full rate.", search=LINEAR)
    warmup: float = _option(0.02, RATE, "P", "Share of warm-up.", search=LINEAR)
    weight_decay: float = _option(
        *(0.01, OPTIMISATION, "X"), "Weight decay, of matrices only.", range=Range(0, "0 or more"), search=LOG
    )
    clip: float = _option(1.0, OPTIMISATION, "C", "Largest global gradient norm; 0 is off.", search=LOG)
    clip_value: float = _option(0.0, OPTIMISATION, "C", "Largest single gradient entry; 0 is off.", search=LOG)
    ema: float = _option(
        *(0.0, OPTIMISATION, "D"),
        "Decay of a running average of the weights, which is then what is evaluated and saved; 0 is none.",
        range=SHARE,
        search=LINEAR,
    )
    eval_every: int = _option(
        0, WATCHING, "N", "Measure after every N steps, and keep the best; 0 is off.", range=OR_OFF
    )
    patience: int = _option(0, WATCHING, "N", "Stop after N measurements without a better one; 0 is off.", range=OR_OFF)
    rollbacks: int = _option(
        3, WATCHING, "N", "How often to go back and slow down when the loss diverges.", range=OR_OFF
    )
    gradients_every: int = _option(
        *(0, WATCHING, "N"),
        "Log every N steps how far gradients reach (200 costs about 1 % of the time); 0 is off.",
        range=OR_OFF,
    )
    tensorboard: bool = _option(False, WATCHING, "", "Log for TensorBoard too.")
    seed: int = _option(
        1,
        MACHINE,
        "S",
        "Seed of everything random.",
        range=Range(0, "a whole number from 0 to 2^63 − 1", 2**63, whole=True),
    )
    dtype: str = _option(
        "float32",
        MACHINE,
        "NAME",
        "float32 or bfloat16, to compute in; the weights are float32.",
        names=DTYPES,
        search=NAMES,
    )
    device: str = _option("auto", MACHINE, "NAME", "auto, cpu, cuda or mps.")
    from_weights: str | None = _option(
        None, "", "SHA-256", "That of the model.safetensors that training goes on from; without it, weights are random."
    )

    def __post_init__(self) -> None:
        for name in ABOUT:
            object.__setattr__(self, name, checked(name, getattr(self, name)))


def checked(name: str, value: Any) -> Any:
    """Return an option's value, of its kind and in its range; whether it goes together with others is not asked.

    Raises:
        InputError: It can't be one.

    Example:
        >>> checked("hidden", 64)
        64
    """
    about = ABOUT[name]
    try:
        value = settled(name, value, KINDS[name])
    except FieldError as error:
        if about.range is None or math.isinf(about.range.below):
            raise
        raise FieldError(name, value, about.range.expected) from error
    if about.range is not None and value is not None:
        about.range.check(name, value)
    if about.names and value not in about.names:
        raise unknown_name(name, str(value), about.names)
    return value


def flag(name: str) -> str:
    """Return an option's flag: "--lr-decay" of "lr_decay"."""
    return f"--{name.replace('_', '-')}"


ABOUT: dict[str, About] = {each.name: each.metadata["about"] for each in fields(Options)}
KINDS: dict[str, Any] = {each.name: each.type for each in fields(Options)}
DEFAULTS: dict[str, Any] = {each.name: each.default for each in fields(Options)}


@contextmanager
def as_options(**names: str) -> Iterator[None]:
    """Give a field that can't be what was given the name of the option that it comes from.

    Args:
        names: Options by field, where their names differ.
    """
    try:
        yield
    except FieldError as error:
        raise FieldError(names.get(error.field, error.field), error.value, error.expected) from error


def check_budgets(given: Iterable[str]) -> None:
    """Raise where there are several budgets, by name.

    Raises:
        InputError: There are.
    """
    given = set(given)
    named = [flag(name) for name in BUDGETS if name in given]
    if len(named) > 1:
        all_there_are = ", ".join(map(flag, BUDGETS))
        raise InputError(f"a budget of {' and '.join(named)}: expected exactly one of {all_there_are}")


def as_given(name: str, value: Any) -> str:
    """Return an option as a shell takes it: "--no-tied", "--lr 0.01".

    Example:
        >>> as_given("split_punctuation", False), as_given("include", "*.md")
        ('--no-split-punctuation', "--include '*.md'")
    """
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)} {shlex.quote(str(value))}"


def usual(name: str) -> str:
    """Return what an option is where it isn't given, in words; "" where nothing is to be said.

    Example:
        >>> usual("lr"), usual("tied"), usual("batch")
        ('0.01', 'no-tied', '32, fewer of a short text')
    """
    default, said = DEFAULTS[name], ABOUT[name].usually
    if said is not None:
        return said
    if isinstance(default, bool):
        return as_given(name, default).removeprefix("--")
    return f"{default:g}" if isinstance(default, float) else str(default)


def attributes() -> str:
    """Return the options as a docstring's "Attributes"."""
    lines = (
        f"        {name}: {about.help}{f' {about.usually} if not given.' * bool(about.usually)}"
        for name, about in ABOUT.items()
    )
    return "\n\n    Attributes:\n" + "\n".join(lines) + "\n    "


Options.__doc__ = (Options.__doc__ or "").rstrip() + attributes()
