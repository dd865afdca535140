"""What to train: published recipes by name, and what a budget of minutes is best spent on."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from throughtime.errors import InputError, unknown_name
from throughtime.kernels import native
from throughtime.lm.options import as_given

_ZAREMBA = {
    "level": "word",
    "cell": "lstm",
    "layers": 2,
    "batch": 20,
    "optimizer": "sgd",
    "momentum": 0.0,
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup": 0.0,
    "rollbacks": 0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "char-rnn": {
        "level": "char", "cell": "lstm", "hidden": 128, "layers": 2, "embedding": 0, "batch": 50, "bptt": 50, "epochs": 50.0,
        "optimizer": "adam", "lr": 2e-3, "weight_decay": 0.0, "warmup": 0.0, "schedule": "constant", "lr_decay": 0.97,
        "lr_decay_after": 10.0, "clip": 0.0, "clip_value": 5.0,
    },
    "zaremba-small": _ZAREMBA | {
        "hidden": 200, "embedding": 200, "bptt": 20, "epochs": 13.0, "lr": 20.0, "clip": 0.25, "lr_decay": 0.5,
        "lr_decay_after": 4.0, "init_range": 0.1,
    },
    "zaremba-medium": _ZAREMBA | {
        "hidden": 650, "embedding": 650, "bptt": 35, "epochs": 39.0, "lr": 35.0, "clip": 5 / 35, "lr_decay": 1 / 1.2,
        "lr_decay_after": 6.0, "init_range": 0.05, "dropout": 0.5,
    },
    "zaremba-large": _ZAREMBA | {
        "hidden": 1500, "embedding": 1500, "bptt": 35, "epochs": 55.0, "lr": 35.0, "clip": 10 / 35, "lr_decay": 1 / 1.15,
        "lr_decay_after": 14.0, "init_range": 0.04, "dropout": 0.65,
    },
    "awd-lstm": {
        "level": "word", "cell": "lstm", "hidden": 1150, "layers": 3, "embedding": 400, "tied": True, "batch": 20, "bptt": 70,
        "epochs": 500.0, "optimizer": "nt-asgd", "nonmonotone": 5, "eval_every": 664, "lr": 30.0, "clip": 0.25,
        "weight_decay": 1.2e-6, "warmup": 0.0, "schedule": "constant", "dropout": 0.4, "locked": True, "embedding_dropout": 0.1,
        "weight_drop": 0.5, "rollbacks": 0,
    },
    "nanogpt-cpu": {
        "level": "char", "cell": "lstm", "hidden": 256, "layers": 1, "batch": 12, "bptt": 64, "steps": 2000, "optimizer": "adamw",
        "lr": 1e-2, "schedule": "cosine", "warmup": 0.05, "final_lr": 0.0, "clip": 1.0, "weight_decay": 0.01,
    },
}  # fmt: skip
"""Recipes by name, as options of training; what is given beside a name wins.

- "char-rnn": Karpathy (2015), the defaults of char-rnn's `train.lua`: 2 × 128, dropout 0, RMSprop 2e-3 with decay 0.97 from
  epoch 10, entries clipped to 5. RMSprop is replaced by Adam.
- "zaremba-small", "zaremba-medium", "zaremba-large": Zaremba, Sutskever & Vinyals (2014), "Recurrent neural network
  regularization", section 4.1: 2 × 200, 650 and 1500, dropout 0, 0.5, 0.65 (there of the embedding too). Their loss is a sum over
  T steps and ours a mean, so a rate of 1 is T here, and a norm of 5 or 10 is that over T.
- "awd-lstm": Merity, Keskar & Socher (2018), "Regularizing and optimizing LSTM language models", Penn Treebank: 3 × 1150 on
  embeddings of 400, tied, weight drop 0.5, locked dropout, NT-ASGD with one measurement an epoch of its 664 steps. Here all layers
  are 1150 wide, a window's length isn't drawn, one probability, 0.4, is that of all locked dropouts, and activations aren't
  penalised.
- "nanogpt-cpu": the budget of nanoGPT's README for a CPU, 2,000 steps of 12 × 64 characters, spent on an LSTM.
"""


def preset(name: str) -> dict[str, Any]:
    """Return the options of a recipe.

    Raises:
        InputError: There is no such recipe.

    Example:
        >>> preset("zaremba-small")["hidden"]
        200
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return dict(PRESETS[name])


class Size(NamedTuple):
    """A model for a time, as measured: a row of the table that a budget of minutes is looked up in.

    Attributes:
        minutes: The longest time that it is for.
        layers: L of LSTM.
        hidden: H.
        pace: Characters a second, by dtype, trained on with two threads of a Zen 4, with AVX512-BF16 and with AVX-512.
    """

    minutes: float
    layers: int
    hidden: int
    pace: Mapping[str, int]


# Two layers overfit later than one wide one that takes as long.
SIZES = (
    Size(0.75, 1, 256, {"bfloat16": 100_000, "float32": 67_000}),
    Size(1.75, 1, 384, {"bfloat16": 60_000, "float32": 38_000}),
    Size(5.0, 2, 256, {"bfloat16": 40_000, "float32": 24_000}),
    Size(float("inf"), 2, 448, {"bfloat16": 19_000, "float32": 11_000}),
)
# Dropout by how often the text is read, on tiny Shakespeare; docs/log.md has the runs.
DROPOUTS = ((2.0, 0.0), (4.0, 0.1), (8.0, 0.25), (14.0, 0.4), (float("inf"), 0.5))
_RECIPE = {
    "optimizer": "adamw",
    "lr": 1e-2,
    "weight_decay": 0.1,
    "schedule": "cosine",
    "warmup": 0.02,
    "final_lr": 0.0,
}
# On an NVIDIA H100, three minutes of tiny Shakespeare beside other work: 1.391 nats, docs/gpu.md. Other times weren't measured.
_GPU_RECIPE = _RECIPE | {"lr": 5e-3, "layers": 2, "hidden": 512, "batch": 64, "bptt": 128, "dtype": "bfloat16"}
_GPU_PACE = 550_000  # characters a second
_GPU_WEIGHT_DROP = 0.3  # where dropout is at its largest
_SAID = ("layers", "hidden", "dropout", "weight_drop", "dtype", "batch", "bptt", "lr", "weight_decay")


class Window(NamedTuple):
    """How much is trained on at a time.

    Attributes:
        batch: B, streams or sequences side by side.
        bptt: T, steps of truncated BPTT.
    """

    batch: int
    bptt: int


WINDOW = Window(32, 64)
_STREAM = 128  # tokens of each stream of a text that is too short for that window


def window_for(tokens: int, usual: Window = WINDOW) -> Window:
    """Return a window for a stream of so many tokens, at least 2: the usual one, or one that a short text fills to its end.

    Example:
        >>> window_for(1_000_000), window_for(1000), window_for(2)
        (Window(batch=32, bptt=64), Window(batch=7, bptt=47), Window(batch=1, bptt=1))
    """
    predicted = tokens - 1
    if predicted >= usual.batch * usual.bptt:
        return usual
    batch = max(min(predicted // _STREAM, usual.batch), 1)
    length = predicted // batch
    return Window(batch, length // -(-length // usual.bptt))


class Choice(NamedTuple):
    """Options, and why.

    Attributes:
        options: What training is told: what was given, and what was chosen beside it.
        reason: A line for the reader; `None` where nothing was chosen.
    """

    options: dict[str, Any]
    reason: str | None


def for_minutes(given: Mapping[str, Any], text_bytes: int) -> Choice:
    """Choose size, batch, window, rates, dropout and dtype for a time; each option that is given stays.

    The larger the time, the larger the model; the more often it will see the text, the more dropout. The table is that of an LSTM
    of characters or bytes on a CPU; on an NVIDIA GPU there is one model for all times. For another cell, level or device, with a
    preset, or with a budget that is no time, nothing is chosen.

    Args:
        given: Options of training by name, those that the user gave.
        text_bytes: Size of the text.

    Example:
        >>> for_minutes({"minutes": 3.0, "batch": 16}, 1_115_394).options["batch"]
        16
    """
    fixed = {name: value for name, value in given.items() if value is not None}
    others = any(name in fixed for name in ("preset", "steps", "epochs"))
    is_measured = fixed.get("level", "char") in ("char", "byte") and fixed.get("cell", "lstm") == "lstm"
    device = fixed.get("device", "auto")
    if others or not is_measured or device not in ("auto", "cpu", "cuda"):
        return Choice(fixed, None)
    minutes = fixed.get("minutes", 3.0)
    if not isinstance(minutes, int | float) or not 0 < minutes < float("inf"):
        raise InputError(f"--minutes {minutes}: expected a number above 0")
    is_on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    trained_on = max(text_bytes * fixed.get("split", 0.9), 1)
    if is_on_gpu:
        chosen, pace, because = dict(_GPU_RECIPE), _GPU_PACE, ""
        if trained_on < 100 * chosen["batch"] * chosen["bptt"]:  # the usual window is cut to a short text's length
            del chosen["batch"], chosen["bptt"]
    else:
        size = next(size for size in SIZES if minutes <= size.minutes)
        dtype, because = _fastest_dtype()
        pace = size.pace[fixed["dtype"] if fixed.get("dtype") in size.pace else dtype]
        chosen = _RECIPE | {"layers": size.layers, "hidden": size.hidden, "dtype": dtype}
        because = f" ({dtype} since {because})"
    passes = 60 * minutes * pace / trained_on
    chosen["dropout"] = next(dropout for most, dropout in DROPOUTS if passes < most or most == math.inf)
    if is_on_gpu and chosen["dropout"] == DROPOUTS[-1][1]:
        chosen["weight_drop"] = _GPU_WEIGHT_DROP
    chosen = {name: value for name, value in (chosen | {"minutes": float(minutes)}).items() if name not in fixed}
    if not chosen:
        return Choice(fixed, None)
    flags = "  ".join(as_given(name, chosen[name]) for name in _SAID if name in chosen)
    reader = "a GPU" if is_on_gpu else "two cores"
    why = f"chosen for {minutes:g} minutes of {text_bytes / 1e6:,.1f} MB, read about {passes:,.0f} times by {reader}"
    return Choice(
        chosen | fixed, f"{why}: {flags}{because if 'dtype' in chosen else ''}; give any of these flags to change it"
    )


def _fastest_dtype() -> tuple[str, str]:
    """Return the dtype that this machine trains in fastest, and why."""
    if native.missing:
        return "float32", "the C++ kernels are missing"
    if native.instruction_set() == "avx512_bf16":
        return "bfloat16", "this CPU multiplies it twice as fast, with AVX512-BF16"
    return "float32", f"with {native.instruction_set()} bfloat16 is no faster"
