"""What a run's config.json says: how it was trained, the shape of its model, and by what it was written."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import throughtime
from throughtime.lm.fields import made_of
from throughtime.lm.model import ModelConfig
from throughtime.training.checkpoint import CheckpointError, load_json, save_json

CONFIG = "config.json"
FORMAT = 1  # of a run's files; goes up where an earlier throughtime would read them wrongly


def versions() -> dict[str, Any]:
    """Return what a run is written by: the versions of throughtime and torch, and that of its files' format."""
    return {"throughtime": throughtime.__version__, "torch": str(torch.__version__), "format": FORMAT}


@dataclass(frozen=True)
class RunConfig:
    """The contents of config.json.

    Attributes:
        training: The options of training, as in `TrainingOptions`.
        model: The shape of the model.
        versions: What it was written by, as `versions` returns it; empty of a run that is older than they are.
        packed: Of a run that was packed to be shared, how many tokens it was trained on and measured on; else `None`.
        origin: Of a run that went on from another one's weights, that one's name ("run", but not in a pack) and how many tokens
            were new to it ("new_tokens"); else `None`.
    """

    training: dict[str, Any]
    model: ModelConfig
    versions: dict[str, Any]
    packed: dict[str, int] | None = None
    origin: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Write it to a run's folder."""
        record = {"training": self.training, "model": asdict(self.model), "versions": self.versions}
        more = {"packed": self.packed, "origin": self.origin}
        save_json(folder / CONFIG, record | {name: value for name, value in more.items() if value is not None})


def check_options(training: dict[str, Any], where: str) -> None:
    """Raise unless they are the options of a training.

    Raises:
        InputError: With the first that isn't.
    """
    from throughtime.lm.training import TrainingOptions  # which opens runs, and so comes after this

    TrainingOptions.from_values({name: value for name, value in training.items() if value is not None}, source=where)


def check_format(folder: Path) -> None:
    """Raise if a run's files are of a newer format than is known here.

    Raises:
        CheckpointError: They are, or the file is no JSON object.
    """
    written_by = load_json(folder / CONFIG).get("versions")
    if not isinstance(written_by, dict):
        return
    found = written_by.get("format")
    if not isinstance(found, int) or found <= FORMAT:
        return
    if written_by.get("throughtime") == throughtime.__version__:
        raise CheckpointError(
            f"{folder / CONFIG}: altered, it says format {found} of a throughtime that has {FORMAT}; restore it"
        )
    raise CheckpointError(
        f"{folder / CONFIG}: written in format {found} by throughtime {written_by.get('throughtime')}; this is throughtime "
        f"{throughtime.__version__}, which reads up to format {FORMAT}: pip install --upgrade throughtime"
    )


def read_config(folder: Path) -> RunConfig:
    """Return what a run's config.json says, whatever else of the run there is.

    Raises:
        CheckpointError: It is not a run's, or of a newer format.
    """
    check_format(folder)
    config = load_json(folder / CONFIG)
    try:
        training = config["training"]
        if not isinstance(training, dict):
            raise TypeError(f"training is a {type(training).__name__}")
        model = made_of(ModelConfig, config["model"], f"{folder / CONFIG}: model")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: not a run's configuration ({error}); restore it") from error
    check_options(training, f"{folder / CONFIG}")
    written_by, packed = config.get("versions", {}), config.get("packed")
    is_written = isinstance(written_by, dict) and _are_counts({"format": FORMAT} | written_by, ("format",))
    is_written = is_written and all(_is_count(value) or _is_text(value) for value in written_by.values())
    origin = config.get("origin")
    is_from = origin is None or (isinstance(origin, dict) and _are_counts({"new_tokens": -1} | origin, ("new_tokens",)))
    is_from = is_from and (origin is None or _is_text(origin.get("run", "")))
    if not is_written or not is_from or not (packed is None or _are_counts(packed)):
        raise CheckpointError(f"{folder / CONFIG}: not a run's configuration (versions, packed or origin); restore it")
    return RunConfig(training, model, written_by, packed, origin)


def _are_counts(values: Any, names: tuple[str, ...] | None = None) -> bool:
    """Return whether a JSON object holds whole numbers of 0 or more, under some names or all."""
    if not isinstance(values, dict):
        return False
    counts = values.values() if names is None else [values[name] for name in names]
    return all(_is_count(count) for count in counts)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    """Return whether a value of JSON is text that can be written again; half of a surrogate pair can't."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
