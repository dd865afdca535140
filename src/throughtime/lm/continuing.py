"""Going on from trained weights with another text: which options are the run's, and which may be new."""

from collections.abc import Mapping
from typing import Any

from throughtime.errors import InputError
from throughtime.lm.model import ADJUSTABLE, OPTIONS_OF_SHAPE
from throughtime.lm.options import BUDGETS, flag
from throughtime.lm.presets import preset
from throughtime.lm.run import Run
from throughtime.lm.training import TrainingOptions

_OF_THE_TEXT = (
    "vocabulary",
    "include",
    "device",
    "tensorboard",
)  # and of this training alone; so they aren't inherited
_NEW = ("preset", "from_weights", "grow_vocabulary", "freeze", "init", "init_range", *BUDGETS, *_OF_THE_TEXT)
_WINDOW = ("batch", "bptt")  # of a stream, which hangs on the length of the text too


def options_from(run: Run, given: Mapping[str, Any] | None = None, source: str = "") -> TrainingOptions:
    """Return the options of a training that goes on from a run's weights.

    What gives the weights their shapes and the tokens their meaning is the run's. The budget is three minutes if nothing is said;
    all else that isn't given is as the run was trained. Of `batch` and `bptt`, where neither is given, `train` takes the run's too,
    or smaller ones if the text is a stream that is too short for them; they are `None` until then.

    Args:
        run: Whose weights are gone on from.
        given: Options by name.
        source: Where they are from, for the message: a file's name.

    Raises:
        InputError: An option is unknown or out of range, or can't be another than the run's.

    Example:
        >>> from pathlib import Path
        >>> from throughtime.lm import TrainingOptions, open_run, train
        >>> _ = Path("a.txt").write_text("once upon a time there was a king. " * 40)
        >>> _ = Path("b.txt").write_text("Once there was a QUEEN, upon a time. " * 40)
        >>> _ = train(["a.txt"], "a", TrainingOptions(hidden=8, steps=5, batch=4, bptt=16))
        >>> run = open_run("a")
        >>> summary = train(["b.txt"], "b", options_from(run, {"steps": 5}), source=run)
        >>> open_run("b").model_config.vocabulary_size - run.model_config.vocabulary_size  # "O", "Q", "U", "E", "N" and ","
        6
    """
    values = {name: value for name, value in (given or {}).items() if value is not None}
    recipe = preset(values["preset"]) if "preset" in values else {}
    if any(budget in values for budget in BUDGETS):
        recipe = {name: value for name, value in recipe.items() if name not in BUDGETS}
    asked = recipe | values
    shape = shape_of(run)
    for name, value in asked.items():
        if name in shape and value != shape[name]:
            raise InputError(
                f"{flag(name)} {value}: the weights of {run.folder} are of {flag(name)} {shape[name]}, which can't be "
                "changed; leave it out"
            )
    is_window_kept = run.tokenizer.sequences is not None or any(name in asked for name in _WINDOW)
    new = _NEW if is_window_kept else (*_NEW, *_WINDOW)
    inherited = {name: value for name, value in run.options.items() if name not in new and value is not None}
    digest = asked.get("from_weights", run.weights_digest)
    return TrainingOptions.from_values(inherited | shape | asked | {"from_weights": digest}, source)


def shape_of(run: Run) -> dict[str, Any]:
    """Return the options that a run's weights and tokens can't do without."""
    model, tokenizer = run.model_config, run.tokenizer
    mode = {"mode": "stream"} if tokenizer.sequences is None else {"mode": "sentence", "sequence": tokenizer.sequences}
    cut = {"level": tokenizer.level, "split_punctuation": run.options.get("split_punctuation", True)}
    fixed = {option: field for option, field in OPTIONS_OF_SHAPE.items() if option not in ADJUSTABLE}
    return mode | cut | {option: getattr(model, field) for option, field in fixed.items()}
