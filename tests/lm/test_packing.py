import errno
import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import throughtime
from throughtime.errors import InputError
from throughtime.lm import TrainingOptions, open_run, pack, resume, train
from throughtime.lm.config import FORMAT
from throughtime.lm.packing import PRIVATE
from throughtime.training import Budget
from throughtime.training.checkpoint import load_json, save_json

LINES = [f"the secret number {n} is kept by agent {n * 7919 % 1000} of house {n * 31 % 97}" for n in range(300)]
SMALL = {"steps": 4, "hidden": 12, "batch": 3, "bptt": 12}
KINDS = {
    "char": {},
    "byte-best": {"level": "byte", "eval_every": 2},
    "word": {"level": "word", "embedding": 6, "tied": True},
    "bpe": {"level": "bpe", "mode": "sentence"},
    "mlp": {"cell": "mlp", "ema": 0.9},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs trained on a folder whose name is nobody's business."""
    place = tmp_path_factory.mktemp("home-of-jane")
    texts = place / "Jane's diaries"
    texts.mkdir()
    (texts / "private-1999.txt").write_text("\n".join(LINES), encoding="utf-8")
    for name, options in KINDS.items():
        train([texts], place / name, TrainingOptions(**SMALL, include="private-*.txt", **options))
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_text_and_of_the_paths_is_in_a_pack(folders, kind, tmp_path):
    out = tmp_path / "shared"
    files = pack(open_run(folders / kind), out)
    assert sorted(files) == sorted(path.name for path in out.iterdir())
    assert all(path.is_file() and path.stat().st_size == files[path.name] for path in out.iterdir())
    found = b"\n".join(path.read_bytes() for path in sorted(out.iterdir()))
    pieces = [line[begin : begin + 9] for line in LINES for begin in range(0, len(line) - 9, 9)]
    for private in (*pieces, "jane", "Jane", "diaries", "private-", str(tmp_path), str(folders)):
        assert private.encode() not in found
    assert "include" not in (out / "config.toml").read_text()
    assert not {"data", "checkpoint", "metrics.jsonl"} & set(files)
    packed = json.loads((out / "config.json").read_text())
    assert not set(PRIVATE) & set(packed["training"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_is_a_run_that_writes_and_scores_the_same(folders, kind, tmp_path):
    pack(open_run(folders / kind), tmp_path / "shared")
    run, packed = throughtime.load(folders / kind), throughtime.load(tmp_path / "shared")
    assert packed.generate("the", length=20, seed=3) == run.generate("the", length=20, seed=3)
    assert (
        packed.score(LINES[:2] if kind == "bpe" else []).tolist()
        == run.score(LINES[:2] if kind == "bpe" else []).tolist()
    )
    assert packed.probabilities("the") == run.probabilities("the")
    assert packed.results == run.results


def test_every_option_that_takes_any_text_is_private():
    """An option whose value could be a path or a name of the user's never goes along."""
    for field in fields(TrainingOptions):
        if "str" in str(field.type) and field.name not in PRIVATE:
            with pytest.raises(InputError):
                TrainingOptions.from_values({field.name: "/home/jane"})


def test_the_card_says_what_was_measured_and_how_it_is_used(folders, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    pack(open_run(folders / "word"), tmp_path / "Agents & 집 #1")
    card = hub.ModelCard.load(tmp_path / "Agents & 집 #1" / "README.md")
    results = open_run(folders / "word").results
    assert card.data.library_name == "throughtime"
    assert card.data.model_name == "Agents & 집 #1"
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["perplexity"] == results["held_out"]["perplexity"]
    for part in (
        f"{results['held_out']['perplexity']:,.3f}",
        "LSTM",
        torch.__version__,
        throughtime.__version__,
        "throughtime.load",
    ):
        assert part in card.text
    assert f"{len(open_run(folders / 'word').corpus().train):,} words" in card.text


def test_a_run_that_is_not_done_or_has_lost_its_text_is_packed_as_it_stands(folders, tmp_path):
    shutil.copytree(folders / "char", tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "run" / "data")
    pack(open_run(tmp_path / "run"), tmp_path / "shared")
    assert "not finished" in (tmp_path / "shared" / "README.md").read_text()
    assert throughtime.load(tmp_path / "shared").results is None


def test_a_pack_is_packed_again(folders, tmp_path):
    pack(open_run(folders / "char"), tmp_path / "a")
    pack(open_run(tmp_path / "a"), tmp_path / "b")
    for name in ("config.json", "tokenizer.json", "results.json", "config.toml", "generation_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert throughtime.load(tmp_path / "b").probabilities("the") == throughtime.load(tmp_path / "a").probabilities(
        "the"
    )


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda run: run.corpus(), "holds no text"),
        (lambda run: run.load_model(last=True), "no last weights"),
        (lambda run: resume(run.folder), "no checkpoint"),
    ],
)
def test_what_a_pack_lacks_is_said(folders, tmp_path, ask, message):
    pack(open_run(folders / "char"), tmp_path / "shared")
    with pytest.raises(InputError, match=message):
        ask(open_run(tmp_path / "shared"))


def test_nothing_is_overwritten_and_nothing_stays_of_what_fails(folders, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in ("full", "file"):
        with pytest.raises(InputError, match="no empty folder"):
            pack(open_run(folders / "char"), tmp_path / place)
    (tmp_path / "empty").mkdir()
    pack(open_run(folders / "char"), tmp_path / "empty")
    assert throughtime.load(tmp_path / "empty").generate(length=3)

    def no_space(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("throughtime.lm.packing.write_atomically", no_space)
    with pytest.raises(InputError, match="No space left"):
        pack(open_run(folders / "char"), tmp_path / "new" / "place")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == []


def test_an_empty_folder_on_another_disk_is_filled(folders, tmp_path, monkeypatch):
    out = tmp_path / "mounted"
    out.mkdir()
    replace = Path.replace

    def within_a_disk(path, target):
        if path.is_relative_to(out) != Path(target).is_relative_to(out):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", within_a_disk)
    assert set(pack(open_run(folders / "char"), out)) == {path.name for path in out.iterdir()}
    assert open_run(out).config.packed is not None


def test_every_run_says_what_it_was_written_by(folders):
    versions = {"throughtime": throughtime.__version__, "torch": torch.__version__, "format": FORMAT}
    assert open_run(folders / "char").config.versions == versions


@pytest.mark.parametrize("found", [FORMAT + 1, 10**30])
def test_a_run_of_a_newer_format_is_refused_before_anything_else_of_it_is_read(folders, tmp_path, found):
    shutil.copytree(folders / "char", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    newer = {"versions": {"throughtime": "9.0", "torch": "9.9", "format": found}, "all": "else is new"}
    path.write_text(json.dumps(newer))
    for use in (throughtime.load, open_run, resume):
        with pytest.raises(InputError, match=rf"config\.json: written in format {found} by throughtime 9\.0.*upgrade"):
            use(tmp_path / "run")


def test_a_newer_format_that_this_throughtime_is_said_to_have_written_is_damage(folders, tmp_path):
    """One flipped bit makes 5 of 1, and nobody should be told to upgrade for that."""
    shutil.copytree(folders / "char", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace(f'"format": {FORMAT}', f'"format": {FORMAT + 4}'))
    with pytest.raises(InputError, match=rf"config\.json: altered, it says format {FORMAT + 4} .*; restore it"):
        open_run(tmp_path / "run")


@pytest.mark.parametrize(
    "versions",
    [3, [], *[{"format": value} for value in ("1", -1, True, 1.5)], *[{"torch": value} for value in ("\ud800", None)]],
)
def test_versions_that_are_none_are_refused(folders, tmp_path, versions):
    """They are refused where a run is read by itself; in an opened run the digest refuses them first."""
    from throughtime.lm.config import read_config

    config = json.loads((folders / "char" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"versions": versions}))
    with pytest.raises(InputError, match="not a run's configuration"):
        read_config(tmp_path)


def test_the_options_of_a_pack_train_another_run(folders, tmp_path):
    pack(open_run(folders / "word"), tmp_path / "shared")
    options = TrainingOptions.from_toml(tmp_path / "shared" / "config.toml")
    assert options.budget == Budget(steps=4)
    assert options.tied


def test_what_a_strangers_run_says_stands_in_its_card_as_it_can_be_read(folders, tmp_path):
    shutil.copytree(folders / "char", tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    results = load_json(path, sealed=True)
    results["held_out"]["method"] = "half of a pair \ud800, \x1b[31m and \u202e"
    save_json(path, results, sealed=True)
    pack(open_run(tmp_path / "run"), tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert r"half of a pair \ud800, \x1b[31m and \u202e" in card
