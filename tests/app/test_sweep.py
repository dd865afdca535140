import importlib.util
import shlex
import shutil
import tomllib

import pytest

from throughtime.app import errors
from throughtime.lm import study

SMALL = ("--steps", 10, "--hidden", "2..8", "--lr", "1e-3..1e-1", "--batch", 4, "--bptt", 8)


def test_a_sweep_ends_with_a_table_and_what_to_do_next(throughtime, text, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    ended = throughtime("sweep", text, "--out", "study", *SMALL, "--trials", 2)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0] == "study: 2 complete"
    assert lines[1].split() == ["trial", "bits/char", "time", "options"]
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("the best: study/trial-000")
    best = lines[-1].split()[-1]
    assert f"--config {best}/config.toml --steps 40" in ended.err
    assert "optuna-dashboard sqlite:///study/study.db" in ended.err
    assert "trial 0: --hidden" in ended.err
    again = throughtime("sweep", text, "--out", "study", *SMALL, "--trials", 2, "--json").json
    assert [trial["state"] for trial in again["trials"]] == ["complete"] * 2
    assert again["trials"][again["best"]]["run"] == best
    assert throughtime("train", text, "--out", "longer", "--config", f"{best}/config.toml", "--steps", 12).code == 0


def test_options_of_a_file_and_switches(throughtime, text, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.toml").write_text('cell = ["gru", "rnn"]\nhidden = "2..8"\nsteps = 3\nbatch = 4\nbptt = 8\n')
    switches = ("--layer-norm", "--no-layer-norm")
    ended = throughtime("sweep", text, "--out", "study", "--config", "space.toml", *switches, "--trials", 1, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["trials"][0]["options"].keys() == {"cell", "hidden", "layer_norm"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--hidden", "2..8"), "--out STUDY is missing"),
        (("--out", "s", "--hidden", "8..2"), "--hidden 8..2: expected a range LOW..HIGH, the first number below"),
        (("--out", "s", "--hiden", "2..8"), "did you mean --hidden?"),
        (("--out", "s", "--cell", "lstm,gruu"), "did you mean 'gru'"),
        (("--out", "s", "--dropout", "0..1"), "--dropout 1.0: expected a probability from 0 to below 1"),
        (("--out", "s", "--hidden", "2..8", "--trials", 0), "--trials 0: expected a whole number, at least 1"),
        (("--out", "s", "--minutes", 1, "--steps", 2), "expected exactly one of --minutes, --epochs, --steps"),
    ],
)
def test_mistakes_are_answered_in_a_line(throughtime, text, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    ended = throughtime("sweep", text, *arguments)
    assert ended.code == 2
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_without_optuna_it_says_what_to_install(throughtime, text, tmp_path, monkeypatch):
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None if name == "optuna" else importlib.util)
    ended = throughtime("sweep", text, "--out", tmp_path / "study", *SMALL)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "a sweep needs Optuna: pip install 'throughtime[sweep]'" in ended.err


def test_a_best_run_that_is_gone_is_said_to_be_and_its_options_given(throughtime, text, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    arguments = ("sweep", text, "--out", "study", *SMALL, "--trials", 2)
    first = throughtime(*arguments, "--json").json
    best, other = first["best"], 1 - first["best"]
    shutil.rmtree(first["trials"][best]["run"])
    ended = throughtime(*arguments)
    assert ended.out.splitlines()[-2:] == [
        f"the best: trial {best}; its run, study/trial-000{best}, is gone",
        f"the best that is here: study/trial-000{other}",
    ]
    advised = ended.err.splitlines()[-2].removeprefix("its options, for longer: throughtime train ")
    assert "--config" not in advised
    longer = throughtime("train", *shlex.split(advised.replace("RUN", "longer")))
    assert longer.code == 0, longer.err
    trained = tomllib.loads((tmp_path / "longer/config.toml").read_text())
    assert trained["steps"] == 40
    assert {name: trained[name] for name in ("hidden", "lr")} == first["trials"][best]["options"]
    shutil.rmtree(first["trials"][other]["run"])
    assert throughtime(*arguments).out.splitlines()[-1].endswith("is gone")


def test_a_best_run_on_another_machine_is_named_by_its_place(throughtime, text, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    arguments = ("sweep", text, *SMALL, "--trials", 1, "--storage", "journal", "--name", "fox", "--out")
    assert throughtime(*arguments, "there").code == 0
    ended = throughtime(*arguments, "here")
    assert ended.out.splitlines()[-1].startswith("the best: trial 0, ")
    assert ended.out.splitlines()[-1].endswith(str(tmp_path / "there/trial-0000"))
    assert "--config" not in ended.err


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("build_corpus", "stopped; nothing was trained yet\n"),
        ("train", "stopped; the same command goes on with the study\n"),
    ],
)
def test_ctrl_c_outside_of_the_steps_says_what_is_left(throughtime, text, tmp_path, monkeypatch, where, said):
    pytest.importorskip("optuna")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    arguments = ("sweep", text, "--out", tmp_path / "study", *SMALL, "--trials", 1)
    with monkeypatch.context() as patched:
        patched.setattr(study, where, interrupted)
        ended = throughtime(*arguments)
    assert ended.code == errors.INTERRUPTED
    assert ended.err.endswith(said)
    assert throughtime(*arguments).code == 0
