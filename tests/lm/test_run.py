"""A run is whole or refused, by whatever reads it."""

import json
import os
import shutil
import signal

import pytest
import torch

from throughtime import InputError
from throughtime.app.plotting import plot_losses
from throughtime.lm import TrainingOptions, open_run, resume, train
from throughtime.lm.bpe import train_bpe
from throughtime.lm.run import (
    CHECKPOINT,
    CONFIG,
    DATA,
    GENERATION,
    METRICS,
    MODEL,
    OPTIONS,
    RESULTS,
    TOKENIZER,
    file_digest,
)
from throughtime.lm.tokenizer import tokenizer_from_json
from throughtime.lm.words import WordTokenizer
from throughtime.training.checkpoint import load, load_json, save, save_json
from throughtime.training.files import LARGE, create_beside

SMALL = {"hidden": 16, "batch": 4, "bptt": 16, "steps": 30}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after some steps."""
    folder = tmp_path_factory.mktemp("stopped")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. 한글도 됩니다.\n" * 60)

    def interrupt(report):
        if report.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    train([text], folder / "run", TrainingOptions(**SMALL), interrupt)
    return folder / "run"


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped, tmp_path / "run")


def change_json(path, **entries):
    value = json.loads(path.read_bytes())
    path.write_text(json.dumps(value | entries), encoding="utf-8", errors="surrogatepass")


def renew_digests(run):
    """Bind weights and checkpoint anew to what stands beside them, as a forger would."""
    tensors, state = load(run / MODEL)
    save(run / MODEL, tensors, {name: file_digest(run / name) for name in state})
    tensors, state = load(run / CHECKPOINT)
    save(run / CHECKPOINT, tensors, state | {"files": {name: file_digest(run / name) for name in state["files"]}})


HUGE = {
    CONFIG: open_run,
    TOKENIZER: open_run,
    MODEL: open_run,
    GENERATION: lambda run: open_run(run).generation,
    RESULTS: lambda run: open_run(run).results,
    METRICS: lambda run: open_run(run).metrics(),
    CHECKPOINT: resume,
    f"{DATA}/corpus.json": lambda run: open_run(run).corpus(),
    f"{DATA}/tokens.bin": lambda run: open_run(run).corpus(),
    OPTIONS: lambda run: TrainingOptions.from_toml(run / OPTIONS),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_file_is_refused_unread(run, name, little_memory):
    (run / name).touch()
    os.truncate(run / name, 40 << 30)
    with pytest.raises(
        InputError, match=rf"{name}: ([0-9,]* bytes, expected|truncated or altered \(|line \d* is longer)"
    ):
        HUGE[name](run)


def test_a_large_vocabulary_is_no_huge_file(tmp_path):
    words = [f"0word{number:07}" for number in range(1_000_000)]
    path = tmp_path / TOKENIZER
    save_json(path, WordTokenizer(words).to_json())
    assert tokenizer_from_json(load_json(path, most=LARGE)).vocabulary_size > 1_000_000


READERS = {"open": open_run, "resume": resume}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [CONFIG, TOKENIZER])
def test_altered_files_are_refused_by_whoever_reads_them(run, name, reader):
    change_json(run / name, altered=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=rf"{name}: altered since model\.safetensors was written"):
        READERS[reader](run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_run_is_refused(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    change_json(other / CONFIG, training=open_run(other).options | {"lr": 0.5})
    renew_digests(other)
    shutil.copy(other / CHECKPOINT, run / CHECKPOINT)
    with pytest.raises(InputError, match=r"config\.json: altered since checkpoint/latest\.safetensors was written"):
        resume(run)


def test_an_exchanged_text_is_refused_on_resume(run):
    description = load_json(run / "data" / "corpus.json", sealed=True)
    save_json(run / "data" / "corpus.json", description | {"boundary": 100}, sealed=True)
    with pytest.raises(InputError, match=r"corpus\.json: altered since checkpoint"):
        resume(run)


def test_a_checkpoint_that_names_no_files_is_refused(run):
    tensors, state = load(run / CHECKPOINT)
    del state["files"]
    save(run / CHECKPOINT, tensors, state)
    with pytest.raises(InputError, match="doesn't say which run it is of"):
        resume(run)


def test_a_forged_optimiser_state_is_refused(run):
    """A fused optimiser took the shapes on trust, and the process ended with SIGSEGV."""
    tensors, state = load(run / CHECKPOINT)
    for name in [name for name in tensors if "exp_avg" in name]:
        tensors[name] = torch.zeros(1)
    save(run / CHECKPOINT, tensors, state)
    with pytest.raises(
        InputError, match=r"latest\.safetensors: .* another model or optimiser: optimizer\.0\.exp_avg has"
    ):
        resume(run)


def test_a_run_without_weights_is_said_to_have_none(run):
    (run / MODEL).unlink()
    for reader in READERS.values():
        with pytest.raises(InputError, match=r"has no model\.safetensors"):
            reader(run)


@pytest.mark.parametrize("size", [10**5, 10**9, 2**62])
@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "vocabulary_size", "embedding_size"])
def test_sizes_beyond_the_weights_are_refused_at_once(run, name, size):
    change_json(run / CONFIG, model=json.loads((run / CONFIG).read_bytes())["model"] | {name: size})
    renew_digests(run)
    with pytest.raises(InputError, match=r"don't fit the configuration|but the model's has"):
        open_run(run)


FILES = [CONFIG, TOKENIZER, MODEL, CHECKPOINT, METRICS, GENERATION, RESULTS, "data/corpus.json", "data/tokens.bin"]


def read_all(run):
    """Read whatever a command reads of a run."""
    opened = open_run(run)
    opened.load_model()
    opened.load_model(last=True)
    _ = opened.generation, opened.results, opened.metrics(), opened.corpus()
    resume(run)


@pytest.mark.parametrize("kind", ["link", "pipe", "device", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_nothing_in_a_run_is_followed_or_waited_for(run, tmp_path, name, kind):
    path, outside = run / name, tmp_path / "outside"
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text("{}")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside if kind == "link" else "/dev/zero")
    before = outside.read_bytes()
    signal.alarm(60)
    with pytest.raises(InputError, match="expected a plain file"):
        read_all(run)
    signal.alarm(0)
    assert outside.read_bytes() == before


@pytest.mark.parametrize("name", ["data", "checkpoint", "tensorboard"])
def test_folders_of_a_run_are_no_links(run, tmp_path, name):
    if (run / name).exists():
        (run / name).rename(tmp_path / "outside")
    else:
        (tmp_path / "outside").mkdir()
    (run / name).symlink_to(tmp_path / "outside")
    for reader in READERS.values():
        with pytest.raises(InputError, match="a link, expected a folder"):
            reader(run)


def test_a_text_is_not_encoded_through_a_link(stopped, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="a link, expected a folder"):
        train([stopped.parent / "text.txt"], tmp_path / "run", TrainingOptions(**SMALL))
    assert list((tmp_path / "outside").iterdir()) == []


def test_traps_for_what_is_written_catch_nothing(run, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("somebody else's")
    names = [f".{name}.new" for name in ("model.safetensors", "results.json", "latest.safetensors", "metrics.jsonl")]
    for name in [*names, "results.json", "loss.png", "data/tokens.part", "checkpoint/.latest.safetensors.new"]:
        (run / name).symlink_to(outside)
    (run / "results.json").unlink()
    resume(run)
    plot_losses([open_run(run)])
    assert outside.read_text() == "somebody else's"
    assert not (run / "loss.png").is_symlink()


def test_other_names_of_a_log_dont_see_what_comes(run, tmp_path):
    os.link(run / METRICS, tmp_path / "kept.jsonl")
    before = (tmp_path / "kept.jsonl").read_bytes()
    resume(run)
    assert (tmp_path / "kept.jsonl").read_bytes() == before
    assert (run / METRICS).read_bytes().startswith(before)


def leave(path):
    """Leave what a killed process would of a file that it was writing."""
    beside, file = create_beside(path)
    file.close()
    return beside


def test_what_a_killed_process_left_is_removed_on_resume(run):
    left = [leave(run / name) for name in ("config.json", "checkpoint/latest.safetensors", "data/tokens.bin")]
    resume(run)
    assert not any(path.exists() for path in left)


def test_leftovers_dont_keep_a_folder_from_being_used(stopped, tmp_path):
    (tmp_path / "run").mkdir()
    left = leave(tmp_path / "run" / CONFIG)
    train([stopped.parent / "text.txt"], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 1}))
    assert not left.exists()


def test_two_dont_train_in_one_folder(stopped, run, tmp_path):
    text = stopped.parent / "text.txt"
    refusals = []

    def second(report):
        for call in (
            lambda: train([text], tmp_path / "new", TrainingOptions(**SMALL)),
            lambda: resume(tmp_path / "new"),
        ):
            with pytest.raises(InputError, match=f"process {os.getpid()} is training there") as caught:
                call()
            refusals.append(caught)

    train([text], tmp_path / "new", TrainingOptions(**SMALL | {"steps": 1}), second)
    assert len(refusals) == 2
    assert not (tmp_path / "new" / ".lock").exists()
    before = (tmp_path / "new" / MODEL).read_bytes()
    with pytest.raises(InputError, match="is not empty; nothing is overwritten"):
        train([text], tmp_path / "new", TrainingOptions(**SMALL))
    assert (tmp_path / "new" / MODEL).read_bytes() == before


def test_a_second_training_doesnt_disturb_one_that_still_reads_its_text(stopped, tmp_path):
    def second(done, total):
        with pytest.raises(InputError, match=f"process {os.getpid()} is training there"):
            train([stopped.parent / "text.txt"], tmp_path / "new", TrainingOptions(**SMALL))

    summary = train(
        [stopped.parent / "text.txt"], tmp_path / "new", TrainingOptions(**SMALL | {"steps": 1}), on_encoding=second
    )
    assert summary.steps == 1
    assert open_run(tmp_path / "new").results is not None


def test_a_resume_that_is_refused_holds_nothing(run):
    change_json(run / CONFIG, altered=True)
    for _ in range(2):
        with pytest.raises(InputError, match="altered"):
            resume(run)
    assert not (run / ".lock").exists()


def test_a_text_cut_short_while_it_is_trained_on_ends_with_a_line(stopped, tmp_path):
    def cut(report):
        os.truncate(tmp_path / "new" / "data" / "tokens.bin", 10)

    with pytest.raises(InputError, match="cut short while it was being read"):
        train([stopped.parent / "text.txt"], tmp_path / "new", TrainingOptions(**SMALL), cut)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("boundary", -5),
        ("boundary", 10**9),
        ("boundary", 0),
        ("boundary", 1.5),
        ("tokens", -1),
        ("tokens", True),
        ("dtype", "float32"),
        ("dtype", "object"),
        ("dtype", ["uint8"]),
        ("dtype", 3),
        ("tokens_sha256", None),
        ("tokens_sha256", "0" * 64),
        ("tokenizer", []),
        ("tokenizer", {"level": "char", "characters": "abc"}),
        ("tokenizer", {"level": []}),
        ("tokenizer", {"level": "char", "characters": "", "sequences": {}}),
        ("sources", None),
        ("sources", [3]),
        ("sources", [{"path": 1}]),
        ("left_out", {}),
        ("left_out", [["a"]]),
        ("left_out", [[1, 2, 3]]),
    ],
)
def test_a_forged_description_of_the_text_is_refused(run, name, value):
    path = run / "data" / "corpus.json"
    description = load_json(path, sealed=True)
    save_json(path, description | {name: value}, sealed=True)
    renew_digests(run)
    for reader in (lambda run: open_run(run).corpus(), resume):
        with pytest.raises(InputError):
            reader(run)


def test_a_part_of_the_text_overwritten_is_refused(run):
    tokens = run / "data" / "tokens.bin"
    data = bytearray(tokens.read_bytes())
    data[: len(data) // 3] = bytes(len(data) // 3)
    tokens.write_bytes(data)
    for reader in (lambda run: open_run(run).corpus(), resume):
        with pytest.raises(InputError, match="altered since it was encoded"):
            reader(run)


def test_every_flipped_bit_of_a_file_that_is_read_is_refused(run):
    resume(run)  # so that there are results
    for name in sorted({*FILES} - {GENERATION}):  # that may be edited
        data = (run / name).read_bytes()
        for place in range(0, 8 * len(data), max(8 * len(data) // 12, 1)):
            spoilt = bytearray(data)
            spoilt[place // 8] ^= 1 << place % 8
            (run / name).write_bytes(spoilt)
            with pytest.raises(InputError, match=name.rpartition("/")[2]):
                read_all(run)
        (run / name).write_bytes(data)


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (CONFIG, {"training": {"hidden": "x"}}),
        (CONFIG, {"training": []}),
        (CONFIG, {"model": []}),
        (TOKENIZER, {"level": []}),
        (TOKENIZER, {"level": "word", "words": [3]}),
        (TOKENIZER, {"characters": "abc"}),
        (GENERATION, {"temperature": "hot"}),
        (GENERATION, {"temperature": -1}),
        (GENERATION, {"other": 1}),
    ],
)
def test_wrong_types_are_refused(run, name, change):
    change_json(run / name, **change)
    renew_digests(run)
    with pytest.raises(InputError, match=name):
        read_all(run)


@pytest.mark.parametrize("name", [CONFIG, TOKENIZER, GENERATION])
def test_depth_is_refused(run, name):
    (run / name).write_text('{"a":' + DEEP)
    renew_digests(run)
    with pytest.raises(InputError, match=f"{name}: not JSON"):
        read_all(run)


def test_weights_that_are_no_numbers_are_refused(run):
    tensors, state = load(run / MODEL)
    save(run / MODEL, {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, state)
    with pytest.raises(InputError, match="holds numbers that are none"):
        open_run(run)


@pytest.mark.parametrize("text", ["a = " + DEEP, "hidden = " + "9" * 5000, b"\xff"])
def test_a_configuration_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "options.toml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError, match="not TOML"):
        TrainingOptions.from_toml(tmp_path / "options.toml")


def test_a_pipe_is_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "options.toml")
    signal.alarm(20)
    with pytest.raises(InputError, match="a pipe, expected a plain file"):
        TrainingOptions.from_toml(tmp_path / "options.toml")
    signal.alarm(0)


@pytest.mark.parametrize(
    ("part", "entry", "value"),
    [
        (None, "added_tokens", [{"id": 300, "content": "한"}]),
        (None, "padding", {"strategy": {"Fixed": 10**9}}),
        (None, "normalizer", {"type": "Lowercase"}),
        ("model", "dropout", 0.5),
        ("model", "vocab", {"a": 0}),
        ("model", "type", "WordPiece"),
        ("pre_tokenizer", "type", "Whitespace"),
    ],
)
def test_a_bpe_that_is_something_else_is_refused(part, entry, value):
    described = train_bpe(["to be or not to be "] * 20, 270).to_json()
    place = described["huggingface"] if part is None else described["huggingface"][part]
    place[entry] = value
    with pytest.raises(InputError, match="a bpe tokenizer's description is damaged"):
        tokenizer_from_json(described)


def test_a_run_that_is_moved_while_it_trains_says_what_to_do(run, tmp_path):
    def move(report):
        if report.step == 8:
            run.rename(tmp_path / "moved")

    with pytest.raises(InputError, match=r"run: the run was moved or removed while it was trained.*--resume"):
        resume(run, move)
    assert resume(tmp_path / "moved").steps == SMALL["steps"]


def test_a_toml_file_may_begin_with_a_mark(tmp_path):
    (tmp_path / "options.toml").write_bytes(b"\xef\xbb\xbfhidden = 5\n")
    assert TrainingOptions.from_toml(tmp_path / "options.toml").hidden == 5
