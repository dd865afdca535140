"""`train --from RUN TEXT`: from trained weights to another text."""

import pytest


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("The Lazy dog? The lazy fox: 7 foxes. " * 40)
    return path


def test_what_is_new_is_said_and_info_tells_where_it_came_from(throughtime, run, other, tmp_path):
    ended = throughtime("train", "--from", run, other, "--out", tmp_path / "b", "--steps", 4)
    assert ended.code == 0
    assert "5 tokens new to them: 7 : ? L T" in ended.err
    shown = " ".join(throughtime("info", tmp_path / "b").out.split())
    assert "from fox, weights" in shown
    assert str(run.parent) not in shown.split("options")[0].split("from fox")[1]
    record = throughtime("info", tmp_path / "b", "--json").json
    assert (record["origin"]["run"], record["origin"]["new_tokens"], len(record["origin"]["weights"])) == ("fox", 5, 64)
    assert str(run) not in (tmp_path / "b" / "config.json").read_text()
    ended = throughtime(
        "train", "--from", run, other, "--out", tmp_path / "c", "--steps", 4, "--no-grow-vocabulary", "--freeze", "1"
    )
    assert ended.code == 0
    assert "no token new to them" in ended.err
    assert "of the text unknown" in ended.err
    assert "1 held still" in " ".join(throughtime("info", tmp_path / "c").out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden", 9], "--hidden 9: the weights of"),
        (["--cell", "gru"], "--cell gru: the weights of"),
        (["--freeze", "output"], "new to"),
        (["--resume", "x"], "expected nothing else"),
        (["--init-range", 0.1], "--init-range"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(throughtime, run, other, tmp_path, options, message):
    ended = throughtime("train", "--from", run, other, "--out", tmp_path / "b", "--steps", 4, *options)
    assert ended.code == 2
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not (tmp_path / "b").exists()


def test_what_needs_trained_weights_says_so(throughtime, other, tmp_path):
    ended = throughtime("train", other, "--out", tmp_path / "b", "--freeze", "1")
    assert (ended.code, "expected --from RUN" in ended.err) == (2, True)


def test_a_short_text_gets_a_smaller_window_than_the_runs_unless_one_is_given(throughtime, run, other, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(other.read_text()[:60])
    ended = throughtime("train", "--from", run, short, "--out", tmp_path / "b", "--steps", 3)
    assert (ended.code, "the text is short, 54 tokens to train on: chosen --batch" in ended.err) == (0, True), ended.err
    ended = throughtime("train", "--from", run, short, "--out", tmp_path / "c", "--steps", 3, "--batch", 8)
    assert (ended.code, "54 tokens to train on, but a batch of 8 windows" in ended.err) == (2, True), ended.err


def test_the_window_is_the_runs_where_the_text_is_long_enough(throughtime, run, other, tmp_path):
    ended = throughtime("train", "--from", run, other, "--out", tmp_path / "b", "--steps", 3)
    assert (ended.code, "the text is short" in ended.err) == (0, False)
    ours, theirs = (throughtime("info", folder, "--json").json["options"] for folder in (tmp_path / "b", run))
    assert [ours[name] for name in ("batch", "bptt")] == [theirs[name] for name in ("batch", "bptt")]
