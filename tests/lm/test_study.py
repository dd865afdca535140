"""Studies: what a trial is, how a study goes on after whatever ended a process, and several processes at one."""

import errno
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from throughtime.errors import InputError
from throughtime.lm import study as studies
from throughtime.lm.run import open_run
from throughtime.lm.study import open_study
from throughtime.lm.training import TrainingOptions, train
from throughtime.training import NonFiniteError

optuna = pytest.importorskip("optuna")
SMALL = {"steps": 10, "hidden": "2..8", "lr": "1e-3..1e-1", "batch": 4, "bptt": 8}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    return path


def opened(text: Path, folder: Path, given: dict | None = None, **how):
    return open_study([text], folder, given or SMALL, **how)[0]


def work(study, trials: int, observer=None) -> list:
    """Train until the study has so many trials, or one is stopped."""
    came = []
    while (begun := study.begin(trials)) is not None:
        with begun:
            came.append(begun.train(observer))
        if came[-1].signal is not None:
            break
    return came


def what_came(study) -> list:
    return [(one.state, one.options, one.bits_per_character) for one in study.tried()]


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A study that nobody stopped; tests only read it."""
    study = opened(text, tmp_path_factory.mktemp("whole") / "study")
    work(study, 3)
    return study


def test_a_trial_is_what_train_makes_of_its_options(whole, text, tmp_path):
    one = whole.tried()[1]
    assert one.state == "complete"
    alone = train([text], tmp_path / "run", TrainingOptions.from_toml(one.run / "config.toml"))
    assert alone.evaluation.bits_per_character == one.bits_per_character
    assert (tmp_path / "run" / "model.safetensors").stat().st_size == (one.run / "model.safetensors").stat().st_size
    assert open_run(one.run).options["hidden"] == one.options["hidden"]
    assert (one.run / "data/tokens.bin").samefile(whole.folder / "data/tokens.bin")


def test_optuna_has_all_of_it(whole):
    kept = optuna.load_study(study_name="study", storage=whole.storage)
    assert [trial.state.name for trial in kept.trials] == ["COMPLETE"] * 3
    assert sorted(kept.trials[0].intermediate_values) == list(range(1, 10))
    assert kept.trials[2].value == whole.tried()[2].bits_per_character
    assert "trial-0002" in kept.trials[2].user_attrs["run"]


def test_a_study_that_was_stopped_comes_to_the_same(whole, text, tmp_path):
    stopped_at = []

    def stop(report):
        if report.step == 6 and not stopped_at:
            stopped_at.append(report.step)
            signal.raise_signal(signal.SIGINT)

    study = opened(text, tmp_path / "study")
    (first,) = work(study, 3, stop)
    assert (first.state, first.signal) == ("running", signal.SIGINT)
    again = opened(text, tmp_path / "study")
    assert again.begin(3).is_continued  # and let go of it again at once
    work(again, 3)
    assert what_came(again) == what_came(whole)


KILLED = """
import os, signal, sys
from throughtime.lm.study import open_study
study = open_study([sys.argv[1]], sys.argv[2], {given!r})[0]
while (begun := study.begin(3)) is not None:
    with begun:
        begun.train(lambda report: report.step == 7 and begun.number == 1 and os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_trial_whose_process_was_killed_is_gone_on_with(whole, text, tmp_path):
    command = [sys.executable, "-c", KILLED.format(given=SMALL), str(text), str(tmp_path / "study")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    study = opened(text, tmp_path / "study")
    assert [one.state for one in study.tried()] == ["complete", "running"]
    work(study, 3)
    assert what_came(study) == what_came(whole)


def test_a_trial_that_kills_every_process_is_given_up(text, tmp_path, monkeypatch):
    study = opened(text, tmp_path / "study")
    with study.begin(1) as begun:
        begun._count_starts(3)
    (one,) = work(study, 1)
    assert one.state == "pruned"
    assert "its process was killed 3 times" in one.cause


def test_kills_between_which_a_trial_gets_on_dont_count(text, tmp_path):
    study = opened(text, tmp_path / "study", storage=str(tmp_path / "journal"))
    with study.begin(1) as begun:
        begun._count_starts(3)
        (begun.run / "checkpoint").mkdir(parents=True)
        (begun.run / "checkpoint/latest.safetensors").touch()
        assert begun._starts_without_progress() == 0
        begun._count_starts(3)
        assert begun._starts_without_progress() == 3


def test_two_processes_work_on_one_study(text, tmp_path):
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    command = [
        sys.executable,
        "-m",
        "throughtime",
        "sweep",
        str(text),
        "--out",
        str(tmp_path / "study"),
        *options,
        "--trials=6",
    ]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    tried = opened(text, tmp_path / "study").tried()
    assert [one.number for one in tried] == list(range(6))
    assert {one.state for one in tried} <= {"complete", "pruned"}
    assert len({str(one.options) for one in tried}) == 6
    assert not list((tmp_path / "study").glob(".*lock"))


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (NonFiniteError("the loss became nan at step 3"), "diverged: the loss became nan"),
        (RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
        (InputError("--tied needs an embedding"), "refused: --tied needs an embedding"),
    ],
)
def test_a_trial_that_comes_to_nothing_is_pruned_with_its_cause(text, tmp_path, monkeypatch, error, cause):
    study = opened(text, tmp_path / "study", storage=str(tmp_path / "journal"))
    true = studies.train

    def failing(paths, out, *rest, **more):
        if out.name == "trial-0000":
            raise error
        return true(paths, out, *rest, **more)

    monkeypatch.setattr(studies, "train", failing)
    first, second = work(study, 2)
    assert (first.state, second.state) == ("pruned", "complete")
    assert first.cause.startswith(cause)
    assert not first.run.exists()


def test_a_bug_ends_the_sweep_and_not_the_trial(text, tmp_path, monkeypatch):
    study = opened(text, tmp_path / "study", storage=str(tmp_path / "journal"))
    monkeypatch.setattr(studies, "train", lambda *arguments, **more: [][1])
    with pytest.raises(IndexError):
        work(study, 1)
    monkeypatch.undo()
    assert [one.state for one in work(study, 1)] == ["complete"]


def test_trials_that_can_never_be_trained_end_the_sweep(text, tmp_path, monkeypatch):
    study = opened(text, tmp_path / "study", storage=str(tmp_path / "journal"))

    def refuse(*arguments, **more):
        raise InputError("no")

    monkeypatch.setattr(studies, "train", refuse)
    with pytest.raises(InputError, match="the last 5 trials couldn't be trained"):
        work(study, 20)


def test_what_is_worse_than_the_median_is_pruned(text, tmp_path):
    given = SMALL | {"lr": "1e-6,0.1", "hidden": "8", "dropout": "0..0.1"}
    study = opened(text, tmp_path / "study", given, storage=str(tmp_path / "journal"))
    tried = work(study, 14)
    pruned = [one for one in tried if one.state == "pruned"]
    assert pruned
    assert all(re.fullmatch(r"worse than the median after [3-9]0 % of its budget", one.cause) for one in pruned)
    assert open_run(pruned[0].run).results is None
    assert open_run(pruned[0].run).load_model() is not None
    assert study.importances().keys() <= {"lr", "dropout"}


def test_other_options_texts_and_folders_are_refused(whole, text, tmp_path):
    with pytest.raises(InputError, match=r"began with --hidden 2..8, not with --hidden 2..9; give"):
        opened(text, whole.folder, SMALL | {"hidden": "2..9"})
    with pytest.raises(InputError, match=r"began with no --layers, not with --layers 2"):
        opened(text, whole.folder, SMALL | {"layers": 2})
    with pytest.raises(InputError, match="its study isn't in"):
        opened(text, whole.folder, storage=str(tmp_path / "journal"))
    with pytest.raises(InputError, match="is study; leave it out"):
        opened(text, whole.folder, name="another")
    (tmp_path / "other.txt").write_text("another text, of which there is enough to hold some of it out " * 20)
    with pytest.raises(InputError, match="began with another text"):
        open_study([tmp_path / "other.txt"], whole.folder, SMALL)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/a.txt").write_text("a")
    with pytest.raises(InputError, match=r"not a study, it holds a.txt"):
        opened(text, tmp_path / "letters")
    assert len(opened(text, whole.folder).tried()) == 3


@pytest.mark.parametrize("storage", ["sqlite:////nowhere/x.db", "nonsense://x", "/nowhere/journal"])
def test_a_storage_that_cant_be_used_leaves_nothing(text, tmp_path, storage):
    with pytest.raises(InputError, match=r"--storage .*can't be used"):
        opened(text, tmp_path / "deep" / "study", storage=storage)
    assert not (tmp_path / "deep").exists()


def test_a_password_is_never_shown(text, tmp_path):
    with pytest.raises(InputError) as caught:
        opened(text, tmp_path / "study", storage="nonsense://me:secret@host/x")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "storage",
    ["nonsense://me:se/cret@host/x", "nonsense://me:a@secret@host/x", "nonsense://host/x?y=1&password=secret"],
)
def test_no_part_of_a_password_is_shown(text, tmp_path, storage):
    with pytest.raises(InputError) as caught:
        opened(text, tmp_path / "study", storage=storage)
    assert "***" in str(caught.value)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("", "is empty"),
        ("sqlite://", "is in memory"),
        ("sqlite:///", "is in memory"),
        ("sqlite:///:memory:", "is in memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "is in memory"),
        ("{}/fox.txt", "not a journal of Optuna's"),
        ("{}/line", "not a journal of Optuna's"),
        ("{}/numbers", "not a journal of Optuna's"),
        ("{}/study.db", "not a journal of Optuna's"),
    ],
)
def test_a_storage_that_is_none_is_refused(text, tmp_path, storage, said):
    (tmp_path / "fox.txt").write_text("the quick brown fox\n")
    (tmp_path / "line").write_text("no line end")
    (tmp_path / "numbers").write_text("1\n[]\n")
    (tmp_path / "study.db").write_bytes(b"SQLite format 3\0\xff\n")
    there = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=said):
        opened(text, tmp_path / "study", storage=storage.format(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == there


def test_an_empty_name_is_refused(text, tmp_path):
    with pytest.raises(InputError, match="--name is empty"):
        opened(text, tmp_path / "study", name="")


@pytest.mark.parametrize("name", ["%41%2f", "a?b#c", "{x}{SCHEMA_VERSION}", "한글 '\"", "b\udcff"])
def test_a_folder_may_have_any_name(text, tmp_path, name):
    try:
        (tmp_path / name).mkdir()
    except (OSError, UnicodeError):
        pytest.skip("the file system knows no such name")
    study = opened(text, tmp_path / name)
    work(study, 1)
    assert (tmp_path / name / "study.db").stat().st_size
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert len(opened(text, tmp_path / name).tried()) == 1
    assert optuna.load_study(study_name=study.name, storage=study.storage).trials


def test_what_no_trial_could_have_here_is_refused_at_once(text, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--device nowhere: can't be used here"):
        opened(text, tmp_path / "study", SMALL | {"device": "nowhere"})
    monkeypatch.setattr(studies.tensorboard.importlib.util, "find_spec", lambda name: None if "X" in name else name)
    with pytest.raises(InputError, match="--tensorboard needs tensorboardX"):
        opened(text, tmp_path / "study", SMALL | {"tensorboard": True})
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("tied", [[True, False], [False, True]])
def test_the_order_of_choices_decides_nothing(text, tmp_path, tied):
    study = opened(text, tmp_path / "study", SMALL | {"tied": tied, "embedding": [0, 8]})
    assert study.space.keys() == {"hidden", "lr", "tied", "embedding"}


def test_a_study_in_the_folder_of_its_text(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    study = opened(tmp_path / "notes", tmp_path / "notes/study")
    assert [one.state for one in work(study, 2)] == ["complete"] * 2
    corpus = open_run(study.run_folder(1)).corpus()
    assert [source["path"] for source in corpus.sources] == [str(tmp_path / "notes/fox.txt")]


def test_nothing_warns(text, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        work(opened(text, tmp_path / "study", storage=str(tmp_path / "journal")), 1)


def test_a_file_that_cant_be_written_is_no_damage_and_no_kill(text, tmp_path, monkeypatch):
    study = opened(text, tmp_path / "study")

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for _ in range(4):
        with monkeypatch.context() as patched, study.begin(1) as begun:
            patched.setattr("throughtime.training.files.create_beside", full)
            with pytest.raises(InputError, match=r"can't be written: No space left on device") as caught:
                begun.train()
            assert "delete" not in str(caught.value)
    (one,) = work(study, 1)
    assert one.state == "complete", one.cause


def test_a_damaged_run_is_no_kill(text, tmp_path):
    study = opened(text, tmp_path / "study")
    with study.begin(1) as begun:
        checkpoint = begun.run / "checkpoint/latest.safetensors"
        begun.train(lambda report: report.step == 4 and signal.raise_signal(signal.SIGINT))
    checkpoint.write_bytes(b"damaged")
    for _ in range(4):
        with study.begin(1) as begun, pytest.raises(InputError, match=r"or delete .*, to train this trial anew"):
            begun.train()
    assert [one.state for one in study.tried()] == ["running"]


def test_a_study_that_is_refused_takes_nothing_from_those_at_work(whole, text, monkeypatch):
    others = [whole.folder / "trial-0003", whole.folder / "study.db-journal"]
    encoded = studies._encoded

    def meanwhile(*arguments):
        others[0].mkdir()
        others[1].touch()
        return encoded(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(studies, "_encoded", meanwhile)
        with pytest.raises(InputError, match="this study began with"):
            opened(text, whole.folder, SMALL | {"hidden": "2..9"})
    assert all(other.exists() for other in others)
    others[0].rmdir()
    others[1].unlink()


def test_a_lost_database_is_to_be_restored(text, tmp_path):
    study = opened(text, tmp_path / "study")
    (study.folder / "study.db").unlink()
    with pytest.raises(InputError, match=r"its study isn't in .*; restore .*study.db, or give the --storage"):
        opened(text, tmp_path / "study")
    assert not (study.folder / "study.db").exists()
