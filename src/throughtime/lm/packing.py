"""A run made ready to be shared: its weights, tokenizer, options and figures, and nothing of its text or of its maker's paths."""

import os
import secrets
import shutil
from dataclasses import asdict
from pathlib import Path

from throughtime.errors import InputError
from throughtime.lm.card import model_card
from throughtime.lm.config import CONFIG, RunConfig, versions
from throughtime.lm.run import DATA, GENERATION, Run, create_run
from throughtime.lm.training import TrainingOptions
from throughtime.plain import printable
from throughtime.training.checkpoint import save_json, write_atomically

CARD = "README.md"
PRIVATE = ("include", "device")  # options that tell about files and machines


def pack(run: Run, out: str | Path) -> dict[str, int]:
    """Write what is to be shared of a run to a new folder: a run that samples, scores and evaluates, with a model card.

    Weights (the best that were measured), tokenizer, options and measured results go there, and the versions of what made them.
    The encoded text, the checkpoint, the curve of the loss, names of files and options that tell about them stay behind. The
    vocabulary goes along: characters, words or pieces of words that stand in the text.

    Args:
        run: The run; one whose training isn't finished is packed as it stands.
        out: A folder that isn't there or is empty.

    Returns:
        The files that were written, by name, and their bytes.

    Raises:
        InputError: The run is damaged, or nothing can be written there.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: exists and is no empty folder; nothing is overwritten, give another place")
    out = Path(os.path.abspath(out))  # noqa: PTH100 links stay links
    place = out if out.is_dir() else out.parent  # an empty folder may be a disk of its own
    beside = place / f".pack-{secrets.token_hex(8)}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        _write(run, beside, out.name)
        out.mkdir(exist_ok=True)
        names = sorted((path.name for path in beside.iterdir()), key=lambda name: name == CONFIG)
        for name in names:  # the configuration last: what was cut short is no run
            (beside / name).replace(out / name)
        return {name: (out / name).stat().st_size for name in sorted(names)}
    except OSError as error:
        raise InputError(f"{out}: can't be written: {error.strerror}; give another place") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write(run: Run, folder: Path, name: str) -> None:
    options = asdict(TrainingOptions.from_values(run.options, source=str(run.folder / CONFIG)))
    shared = {option: value for option, value in options.items() if option not in PRIVATE}
    origin = run.config.origin and {"new_tokens": run.config.origin["new_tokens"]}
    config = RunConfig(shared, run.model_config, run.config.versions or versions(), _counts(run), origin)
    packed = create_run(folder, config, run.tokenizer)
    save_json(folder / GENERATION, run.generation)
    results = run.results
    if results is not None:
        packed.save_results(results)
    packed.save_model(run.load_model("cpu"))
    card = printable(model_card(name, config, run.tokenizer, results), keep="\n")
    write_atomically(folder / CARD, card.encode())


def _counts(run: Run) -> dict[str, int]:
    """Return how much text there was, as far as the run still tells."""
    if run.config.packed is not None:
        return run.config.packed
    if not (run.folder / DATA).exists():
        return {}
    corpus = run.corpus()
    return {"train_tokens": len(corpus.train), "held_out_tokens": len(corpus.held_out)}
