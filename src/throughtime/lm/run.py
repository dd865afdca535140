"""A run: the folder that training writes, and what can be done with it.

Every file that is read again is vouched for, by itself or by a digest in one that vouches for itself; but for
generation_config.json, which people may edit.

config.json              the options of training and the shape of the model
config.toml              the options again, as `train --config` reads them: given back, they make the same run
tokenizer.json           which ids stand for what
model.safetensors        the weights, the best where they were measured along the way; verifies itself, config and tokenizer
generation_config.json   how `sample` chooses unless told otherwise
results.json             what training came to: time, steps, held-out evaluation; verifies itself
metrics.jsonl            a line a second of training, one for each measurement, one for each rollback; each verifies itself
tensorboard/             the same for TensorBoard, where that was asked for
data/                    the encoded text: corpus.json describes it and verifies itself and tokens.bin
checkpoint/              latest.safetensors, all that an exact continuation needs; verifies itself, config, tokenizer and data;
                         best.safetensors, while a complete run is trained longer: the best weights since then
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w
from torch import Tensor

from throughtime.errors import InputError
from throughtime.lm.config import CONFIG, RunConfig, check_format, read_config
from throughtime.lm.corpus import DESCRIPTION, Corpus, open_corpus
from throughtime.lm.evaluation import Evaluation
from throughtime.lm.fields import made_of
from throughtime.lm.generation import Sampling
from throughtime.lm.metrics import read_metrics
from throughtime.lm.model import LanguageModel, ModelConfig, device_named, outline
from throughtime.lm.tokenizer import Tokenizer, tokenizer_from_json
from throughtime.plain import shell_word
from throughtime.training.checkpoint import load, load_json, save, save_json
from throughtime.training.files import (
    LARGE,
    CheckpointError,
    check_folder,
    create_beside,
    is_leftover,
    open_to_read,
    reading,
    remove_leftovers,
    write_atomically,
)
from throughtime.training.locking import LOCK, check_unlocked
from throughtime.training.restoring import check_tensors

TOKENIZER, MODEL, GENERATION = "tokenizer.json", "model.safetensors", "generation_config.json"
OPTIONS, TENSORBOARD = "config.toml", "tensorboard"
RESULTS, METRICS, DATA, CHECKPOINT = "results.json", "metrics.jsonl", "data", "checkpoint/latest.safetensors"
BEST = "checkpoint/best.safetensors"
JOB = ".job"

OF_MODEL = CONFIG, TOKENIZER  # whose digests the weights carry
OF_CHECKPOINT = CONFIG, TOKENIZER, f"{DATA}/{DESCRIPTION}"  # and a checkpoint
_BOUND = "files"  # where a checkpoint's state has them


class Run:
    """An opened run folder; make one with `open_run` or `create_run`.

    Attributes:
        folder: Where it is.
        config: All that its config.json says.
        options: The options it was trained with, as in `TrainingOptions`.
        model_config: The shape of its model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, folder: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.config = config
        self.options = config.training
        self.model_config = config.model
        self.tokenizer = tokenizer
        self._corpus: Corpus | None = None

    def load_model(self, device: str = "auto", *, last: bool = False, since: bool = False) -> LanguageModel:
        """Load the trained model, ready to evaluate or sample.

        Args:
            device: Where it goes.
            last: Whether to take the weights of the last checkpoint; else those of `model.safetensors`, which are the best that
                were measured, or the last where nothing was measured along the way.
            since: Whether to take the best weights since a complete run is trained longer.

        Raises:
            InputError: Weights, configuration or tokenizer are missing, truncated or altered, or don't belong together.
        """
        if last:
            self._check_whole("no last weights, only the best; leave --last out")
        name = CHECKPOINT if last else BEST if since else MODEL
        tensors, _ = _load_bound(self.folder, name)
        if last:
            prefix = "average.module." if any(name.startswith("average.") for name in tensors) else "model."
            tensors = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
        _check_weights(self.folder / name, tensors, self.model_config)
        model = LanguageModel(self.model_config)
        model.load_state_dict(tensors)
        return model.to(device_named(device)).eval()

    def save_model(self, model: LanguageModel, *, since: bool = False) -> None:
        """Write the weights, bound to the configuration and the tokenizer beside them; or the best since it is trained longer."""
        self._check_there()
        save(self.folder / (BEST if since else MODEL), model.state_dict(), self._digests(OF_MODEL))

    def save_checkpoint(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write what a loop's `checkpoint` returned, bound to the configuration, the tokenizer and the encoded text."""
        self._check_there()
        (self.folder / CHECKPOINT).parent.mkdir(exist_ok=True)
        save(self.folder / CHECKPOINT, tensors, state | {_BOUND: self._digests(OF_CHECKPOINT)})

    def _check_there(self) -> None:
        """Raise if the folder was moved or removed since it was opened."""
        if not os.path.lexists(self.folder / CONFIG):
            raise InputError(
                f"{self.folder}: the run was moved or removed while it was trained, and nothing more is saved; if it was moved, go "
                "on with what was saved before: throughtime train --resume, and its new place"
            )

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read what a loop's `restore` takes.

        Raises:
            InputError: It is missing, truncated or altered, or belongs to another configuration, tokenizer or text; or the run
                was packed.
        """
        self._check_whole("no checkpoint, only its best weights")
        return _load_bound(self.folder, CHECKPOINT)

    @property
    def weights_digest(self) -> str:
        """The SHA-256 of model.safetensors."""
        return file_digest(self.folder / MODEL, most=None)

    def _check_whole(self, lacks: str) -> None:
        if self.config.packed is not None:
            raise InputError(f"{self.folder}: was packed to be shared and holds {lacks}")

    def _digests(self, names: Sequence[str]) -> dict[str, str]:
        return {name: file_digest(self.folder / name) for name in names}

    @property
    def generation(self) -> dict[str, Any]:
        """How `sample` chooses unless told otherwise: the fields of `Sampling`.

        Raises:
            CheckpointError: The file is missing, or holds something else.
        """
        path = self.folder / GENERATION
        return asdict(made_of(Sampling, load_json(path), f"{path}: not what 'sample' can be told"))

    @property
    def results(self) -> dict[str, Any] | None:
        """What training came to, or `None` while it is not done."""
        path = self.folder / RESULTS
        return _checked_results(load_json(path, sealed=True), path) if os.path.lexists(path) else None

    def save_results(self, results: dict[str, Any]) -> None:
        """Write what training came to."""
        save_json(self.folder / RESULTS, results, sealed=True)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a crash cut off is left out.

        Raises:
            CheckpointError: A line is damaged.
        """
        return read_metrics(self.folder / METRICS)

    def corpus(self) -> Corpus:
        """Open the encoded text that the run was trained on.

        Raises:
            InputError: It is missing or damaged, or the run was packed.
        """
        self._check_whole(
            "no text; what needs the text of its training can be asked of the run that it was packed from"
        )
        if self._corpus is None:
            self._corpus = open_corpus(self.folder / DATA)
            if self._corpus.tokenizer.to_json() != self.tokenizer.to_json():
                raise CheckpointError(f"{self.folder / DATA}: encoded by another tokenizer than the run's; restore it")
        return self._corpus


def open_run(folder: str | Path) -> Run:
    """Open a run folder, its weights, configuration and tokenizer verified.

    Raises:
        InputError: There is none, or its files are damaged, or don't belong together.
    """
    folder = find_run(folder)
    check_format(folder)
    if not os.path.lexists(folder / MODEL):
        read_config(folder)  # raises if it is something else
        raise InputError(
            f"{folder}: has no {MODEL}; its training was stopped before anything was saved, or the file was lost: restore it or "
            "train anew, with another --out"
        )
    tensors, _ = _load_bound(folder, MODEL)
    config = read_config(folder)
    try:
        tokenizer = tokenizer_from_json(load_json(folder / TOKENIZER, most=LARGE))
    except (InputError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / TOKENIZER}: {str(error).removeprefix(f'{folder / TOKENIZER}: ')}") from error
    if tokenizer.vocabulary_size != config.model.vocabulary_size:
        raise CheckpointError(
            f"{folder / TOKENIZER}: a vocabulary of {tokenizer.vocabulary_size:,}, but the model's has "
            f"{config.model.vocabulary_size:,}; restore the run"
        )
    _check_weights(folder / MODEL, tensors, config.model)
    return Run(folder, config, tokenizer)


@dataclass(frozen=True)
class _Trained:
    """What results.json tells of a training, its stages apart."""

    steps: int
    seconds: float
    clip_share: float
    best_step: int | None
    stopped_early: bool
    rollbacks: int


@dataclass(frozen=True)
class _Stage:
    steps: int
    seconds: float
    nats_per_token: float


def _checked_results(results: dict[str, Any], path: Path) -> dict[str, Any]:
    training = results.get("training")
    stages = training.get("stages", []) if isinstance(training, dict) else None
    if not isinstance(training, dict) or not isinstance(stages, list):
        raise CheckpointError(f"{path}: not what a training came to; restore it, or delete it")
    made_of(_Trained, {name: value for name, value in training.items() if name != "stages"}, f"{path}: training")
    for stage in stages:
        made_of(_Stage, stage, f"{path}: stages")
    made_of(Evaluation, results.get("held_out"), f"{path}: held_out")
    return results


def find_run(folder: str | Path) -> Path:
    """Return the path of a run folder, of which no more is known than that it looks like one.

    Raises:
        InputError: It doesn't, or a folder in it is a link.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"{folder}: no such run; expected a folder written by 'throughtime train … --out {folder}'")
    if not os.path.lexists(folder / CONFIG):
        inside = min((str(config.parent) for config in folder.glob(f"*/{CONFIG}")), default=None)
        expected = "a folder written by 'throughtime train'" + (f", such as {inside}" if inside else "")
        raise InputError(f"{folder}: not a run, it has no {CONFIG}; expected {expected}")
    _check_folders(folder)
    return folder


def _load_bound(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and a state that are bound to other files of a run, which must be those."""
    path = folder / name
    tensors, state = load(path)
    is_model = name != CHECKPOINT
    digests = state if is_model else state.pop(_BOUND, None)
    if not isinstance(digests, dict):
        raise CheckpointError(f"{path}: doesn't say which run it is of; restore it or train anew")
    for other in OF_MODEL if is_model else OF_CHECKPOINT:
        if digests.get(other) != file_digest(folder / other):
            raise CheckpointError(
                f"{folder / other}: altered since {name} was written (its SHA-256 doesn't match); restore it or train anew"
            )
    return tensors, state


def _check_weights(path: Path, tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """Refuse weights that aren't those of a model; its sizes are bounded by theirs before it is laid out."""
    there = sum(tensor.numel() for tensor in tensors.values())
    try:
        if config.num_layers > len(tensors) or config.parameter_count > there:
            raise CheckpointError(f"it needs more than the {there:,} numbers that are there")
        check_tensors(tensors, outline(config).state_dict())
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: the weights don't fit the configuration beside them ({error}); restore the run"
        ) from error


def check_new(folder: str | Path) -> Path:
    """Return the path of a run to be, made if need be, without touching anything that is there.

    Raises:
        InputError: There is something already, somebody trains there, or nothing can be written there.
    """
    folder = Path(folder)
    check_unlocked(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out {folder}: a file of this name exists; expected a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        check_empty(folder)
        probe, file = create_beside(folder / CONFIG)
        file.close()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {folder}: can't be written: {error.strerror}; give another folder") from error
    return folder


def check_empty(folder: Path) -> None:
    """Raise if a folder holds anything but an encoded text and what a process that was killed left.

    Raises:
        InputError: It does.
    """
    if all(entry.name in (DATA, LOCK, JOB) or is_leftover(entry.name) for entry in folder.iterdir()):
        return
    go_on = f", or go on with --resume {shell_word(folder)}" if (folder / CHECKPOINT).exists() else ""
    raise InputError(
        f"--out {folder}: this folder exists and is not empty; nothing is overwritten, give another --out{go_on}"
    )


def create_run(folder: Path, config: RunConfig, tokenizer: Tokenizer) -> Run:
    """Write what describes a run, before the first step."""
    save_json(folder / TOKENIZER, tokenizer.to_json())
    save_json(folder / GENERATION, asdict(Sampling()))
    given = {name: value for name, value in config.training.items() if value is not None}  # TOML knows no null
    write_atomically(folder / OPTIONS, tomli_w.dumps(given).encode())
    config.write(folder)
    return Run(folder, config, tokenizer)


def clean(folder: Path) -> None:
    """Remove what a process that was killed left half written; only for who may write the run alone.

    Raises:
        CheckpointError: A folder in it is a link.
    """
    _check_folders(folder)
    for inside in (folder, folder / DATA, (folder / CHECKPOINT).parent):
        remove_leftovers(inside)


def _check_folders(folder: Path) -> None:
    for inside in (folder / DATA, (folder / CHECKPOINT).parent, folder / TENSORBOARD):
        check_folder(inside)


def clear_run(folder: Path) -> None:
    """Remove a run's files, but keep its encoded text, so that it can be trained anew."""
    for name in (CONFIG, OPTIONS, TOKENIZER, MODEL, GENERATION, RESULTS, METRICS, JOB):
        (folder / name).unlink(missing_ok=True)
    for inside in ((folder / CHECKPOINT).parent, folder / TENSORBOARD):
        shutil.rmtree(inside, ignore_errors=True)


def file_digest(path: Path, most: int | None = LARGE) -> str:
    """Return the SHA-256 of a file of `most` bytes at most.

    Raises:
        CheckpointError: It can't be read, or is larger.
    """
    with open_to_read(path, most) as file, reading(path):
        return hashlib.file_digest(file, "sha256").hexdigest()
