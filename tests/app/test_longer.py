"""`train --resume RUN --minutes M`: longer than was planned."""

import os
import re
import shutil
import signal

import pytest

from throughtime.lm import resume
from throughtime.training import Budget


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_a_complete_run_is_trained_longer(throughtime, copied):
    before = throughtime("info", copied, "--json").json["results"]
    ended = throughtime("train", "--resume", copied, "--steps", 30)
    assert ended.code == 0
    assert "30 steps more, on a schedule of its own" in ended.err
    assert f"{before['held_out']['nats_per_token']:.4f} before" in " ".join(ended.out.split())
    again = throughtime("train", "--resume", copied, "--epochs", 1, "--lr", 0.001, "--json")
    assert again.json["longer"]["steps"] == 42
    assert isinstance(again.json["longer"]["is_better"], bool)
    shown = " ".join(throughtime("info", copied).out.split())
    assert f"stages {before['held_out']['nats_per_token']:.4f} after 12 steps" in shown


def test_info_tells_of_a_stage_that_is_not_done(throughtime, copied):
    def stop(report):
        if report.step == 20:
            os.kill(os.getpid(), signal.SIGINT)

    assert resume(copied, stop, longer=Budget(steps=100)).interrupted
    shown = " ".join(throughtime("info", copied).out.split())
    assert "of a stage that isn't done; go on with: throughtime train --resume" in shown
    assert "12 steps" in shown


def test_what_gets_worse_is_said(throughtime, copied):
    ended = throughtime("train", "--resume", copied, "--steps", 3, "--lr", 3)
    assert ended.code == 0
    assert "keeps its weights" in " ".join(ended.out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "complete.*--minutes, --epochs or --steps"),
        (["--lr", 0.1], "--minutes, --epochs or --steps"),
        (["--steps", 5, "--hidden", 9], "expected nothing else"),
        (["--steps", 5, "--cell", "gru"], "expected nothing else"),
        (["--steps", 5, "--epochs", 1], "exactly one of"),
        (["--steps", 0], "above 0"),
        (["--minutes", "nan"], "above 0"),
        (["--minutes", 1, "--lr", "nan"], "--lr"),
        (["--steps", 5, "--out", "x"], "expected nothing else"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(throughtime, copied, options, message):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    ended = throughtime("train", "--resume", copied, *options)
    assert ended.code == 2
    assert re.search(message, ended.err)
    assert len(ended.err.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
