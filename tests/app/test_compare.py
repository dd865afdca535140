import json

import pytest

SHORT = ("--lags", 24, "--probe", 8)


def test_cells_are_overlaid_on_one_screen(throughtime):
    ended = throughtime("compare-gradients", "rnn", "lstm", "lstm@chrono:200", "--hidden", 16, *SHORT)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[0] == "gradient left of a loss at lag k, top layer, over 24 lags"
    rows = {line.split()[1]: line.split() for line in lines[-3:]}
    assert [row[0] for row in rows.values()] == ["a", "b", "c"]
    assert [rows[name][2] for name in ("rnn", "lstm", "lstm@chrono:200")] == ["vanishing", "vanishing", "undecided"]
    assert rows["lstm@chrono:200"][3] == "200"  # the steps that the verdict is for
    assert rows["lstm@chrono:200"][6] == "beyond"
    assert all(any(f" {mark}" in line or f"{mark}{mark}" in line for line in lines[1:9]) for mark in "abc")


def test_each_is_measured_as_alone(throughtime, run):
    both = throughtime("compare-gradients", run, "gru@update:3", "--hidden", 8, "--layers", 2, *SHORT, "--json").json
    assert list(both["subjects"]) == [str(run), "gru@update:3"]
    alone = throughtime(
        "gradients", "--cell", "gru", "--init", "update:3", "--hidden", 8, "--layers", 2, *SHORT, "--json"
    )
    assert both["subjects"]["gru@update:3"] == alone.json | {"trials": []}
    alone = throughtime("gradients", run, *SHORT, "--json")
    assert both["subjects"][str(run)] == alone.json | {"trials": [], "fresh": None}


def test_other_weights_are_measured_too(throughtime):
    ended = throughtime("compare-gradients", "rnn", "gru", "--hidden", 8, *SHORT, "--seeds", 3)
    first, second = ended.out.splitlines()[-2:]
    assert first.startswith("a  1/1000 at ")
    assert second.startswith("b  ")
    assert "over 3 seeds: " in second


def test_each_is_followed_as_far_as_the_longest_training_needs(throughtime, text, tmp_path, run):
    small = ("--steps", 2, "--hidden", 4, "--batch", 2, "--bptt", 230)
    assert throughtime("train", text, "--out", tmp_path / "long", *small).code == 0
    both = throughtime("compare-gradients", tmp_path / "long", "gru", "--hidden", 4, "--probe", 2, "--json").json
    assert [report["lags"] for report in both["subjects"].values()] == [230, 230]
    assert both["subjects"][str(tmp_path / "long")]["needed"]["steps"] == 230


def test_files_are_written(throughtime, tmp_path, monkeypatch):
    ended = throughtime("compare-gradients", "rnn", "gru", "--hidden", 8, *SHORT, "--out", tmp_path / "a", "--json")
    assert json.loads((tmp_path / "a" / "compare-gradients.json").read_text()) == ended.json
    pytest.importorskip("matplotlib")
    assert (tmp_path / "a" / "compare-gradients.png").stat().st_size > 10_000
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    ended = throughtime("compare-gradients", "rnn", "gru", "--hidden", 8, *SHORT, "--out", tmp_path / "b")
    assert "pip install 'throughtime[plot]'" in ended.err
    assert (tmp_path / "b" / "compare-gradients.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("lstm",), "1 given; expected from 2 to 26 runs or cells"),
        (("lstm", "lstm"), "lstm is given twice"),
        (("lstm", "lstn@forget:1"), "did you mean 'lstm'"),
        (("lstm", "gru@forget:1"), "is for LSTM, not for GRU"),
        (("lstm", "gru", "--lags", 0), "--lags 0: expected a whole number, at least 1"),
        (("lstm", "gru", "--seeds", 1000), "--seeds 1000: expected a whole number from 1 to 100; for more, call again"),
        (("lstm", "gru", "--layers", 1000), "--layers 1000: expected a whole number from 1 to 100"),
        (("lstm", "gru", "--text", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_mistakes_are_answered_in_a_line(throughtime, arguments, said):
    ended = throughtime("compare-gradients", *arguments)
    assert ended.code == 2
    assert said in ended.err
    assert len(ended.err.splitlines()) == 1


def test_sizes_are_for_cells(throughtime, run, tmp_path):
    (tmp_path / "copy").symlink_to(run)
    ended = throughtime("compare-gradients", run, tmp_path / "copy", "--hidden", 8, *SHORT)
    assert ended.code == 2
    assert "--hidden 8: a run has its own; expected it with a cell among them" in ended.err
