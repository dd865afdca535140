import json

import pytest

from throughtime.app import gradients
from throughtime.app.gradients import plot

SHORT = ("--lags", 24, "--probe", 8)


def test_a_fresh_cell_is_measured_on_one_screen(throughtime):
    ended = throughtime("gradients", "--cell", "lstm", "--hidden", 16, *SHORT)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0] == "LSTM, 1 layer of 16, fresh, init default · on white noise"
    assert lines[1].startswith("vanishing within 200 steps: less than 1/1000 is left beyond lag 1")
    assert lines[3] == "gradient of (h, c), in one norm, left at lag k (layer 0, 8 losses × 16 rows)"
    assert "[a–b] is the 95 % interval over 16 rows that the same weights read" in ended.out
    assert "agreement" not in ended.out  # on white noise κ but counts the losses
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 80
    for word in (
        "horizon",
        "losses",
        "truncation",
        "step",
        "gates",
        "memory",
        "paths",
        "try",
        "Lyapunov",
        "--init forget:3",
    ):
        assert word in ended.out


def test_an_initialisation_changes_the_verdict(throughtime):
    ended = throughtime("gradients", "--cell", "lstm", "--hidden", 16, "--init", "chrono:200", *SHORT)
    assert ended.out.splitlines()[1].startswith("undecided within 200 steps: 24 lags are too few to tell; 0.")
    ended = throughtime("gradients", "--cell", "lstm", "--hidden", 16, "--init", "chrono:200", *SHORT, "--within", 24)
    assert ended.out.splitlines()[1].startswith("healthy within 24 steps: 0.")
    ended = throughtime(
        "gradients", "--cell", "rnn", "--hidden", 32, "--init", "orthogonal:2", "--lags", 60, "--probe", 4
    )
    assert ended.out.splitlines()[1].startswith("exploding within 200 steps: a loss's gradient has grown ×")
    assert "γσ_max(W_hh) 2.00" in ended.out


def test_a_run_is_measured_on_its_held_out_text(throughtime, run):
    ended = throughtime("gradients", run, *SHORT)
    assert ended.code == 0
    assert ended.out.startswith(f"LSTM, 1 layer of 8, trained, {run} · on its held-out text")
    for word in ("clipping", "of 12 steps", "own start", "over 3 seeds", "κ", "over 16 steps", "--bptt 16 loses"):
        assert word in ended.out


def test_a_run_is_judged_within_the_steps_it_was_trained_over(throughtime, run):
    """Whatever window it is measured in."""
    verdicts = {}
    for lags in (8, 16, 40):
        record = throughtime("gradients", run, "--lags", lags, "--probe", 8, "--json").json
        assert record["needed"] == {"steps": 16, "reason": "its --bptt"}
        verdicts[lags] = record["verdict"]
    assert verdicts[8] in ("undecided", "vanishing")
    assert verdicts[16] == verdicts[40]
    asked = throughtime("gradients", run, *SHORT, "--within", 9).out.splitlines()[1]
    assert "within 9 steps: " in asked


def test_states_that_overflow_are_called_exploding(throughtime):
    ended = throughtime("gradients", "--cell", "rnn_relu", "--init", "orthogonal:4", "--hidden", 16, "--lags", 150)
    said = ended.out.splitlines()[1]
    assert said.startswith("exploding: states are too large for float32 from step ")
    assert "; a loss's gradient has grown ×" in said
    assert "×inf" not in ended.out
    assert "nan" not in ended.out


def test_other_weights_are_measured_too(throughtime):
    few = ("--cell", "rnn", "--hidden", 16, *SHORT)
    one = throughtime("gradients", *few, "--json").json
    several = throughtime("gradients", *few, "--seeds", 4, "--json").json
    assert one["fresh"] is None
    assert several["fresh"]["seeds"] == len(several["fresh"]["lags"]) == 4
    assert several["fresh"]["reach"]["low"] < several["fresh"]["reach"]["high"]
    assert [trial["seeds"] for trial in several["trials"]] == [4] * len(several["trials"])
    assert "over 4 seeds: " in throughtime("gradients", *few, "--seeds", 4).out


def test_what_is_not_taken_of_wide_states_is_said(throughtime):
    ended = throughtime("gradients", "--cell", "lstm", "--hidden", 257, "--lags", 4, "--probe", 2)
    assert "‖J‖ isn't taken of states wider than 512" in ended.out


def test_a_dead_network_needs_no_longer_chunks(throughtime):
    ended = throughtime("gradients", "--cell", "rnn", "--init", "orthogonal:0.001", "--hidden", 8, *SHORT)
    assert "truncation --bptt 64 loses 0.0" in ended.out
    assert "--bptt 1 loses 10 %" in ended.out


def test_what_takes_long_is_told(throughtime, monkeypatch):
    monkeypatch.setattr(gradients, "FIRST_WORD", 0.0)
    ended = throughtime("gradients", "--cell", "gru", "--hidden", 8, *SHORT)
    assert len(ended.err.splitlines()) == 1
    monkeypatch.setattr(gradients, "FIRST_WORD", 600.0)
    assert throughtime("gradients", "--cell", "gru", "--hidden", 8, *SHORT).err == ""


def test_a_run_is_measured_on_another_text(throughtime, run, text):
    ended = throughtime("gradients", run, "--text", text, *SHORT, "--json")
    assert ended.json["rows"] == 16
    assert ended.json["source"] == f"on {text}"


def test_a_fresh_language_model_reads_bytes(throughtime, text):
    ended = throughtime("gradients", "--cell", "gru", "--hidden", 8, "--text", text, *SHORT, "--json")
    assert ended.json["cell"] == "gru"
    assert len(ended.json["lanes"][0]["curve"]) == 24
    assert [trial["init"] for trial in ended.json["trials"]] == ["update:1", "update:3", "chrono:24"]


def test_files_are_written(throughtime, tmp_path):
    pytest.importorskip("matplotlib")
    ended = throughtime("gradients", "--cell", "rnn", "--hidden", 8, *SHORT, "--out", tmp_path / "figures", "--json")
    assert json.loads((tmp_path / "figures" / "gradients.json").read_text()) == ended.json
    assert (tmp_path / "figures" / "gradients.png").stat().st_size > 10_000
    assert (tmp_path / "figures" / "gradients.html").stat().st_size > 10_000
    assert "wrote" in ended.err


def test_the_json_is_written_without_matplotlib(throughtime, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    ended = throughtime("gradients", "--cell", "rnn", "--hidden", 8, *SHORT, "--out", tmp_path)
    assert ended.code == 0
    assert "pip install 'throughtime[plot]'" in ended.err
    assert (tmp_path / "gradients.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--hidden", 8), "expected either RUN or --cell NAME"),
        (("nowhere",), "nowhere: no such run"),
        (("gru",), "gru: no such run; for a fresh cell give --cell gru"),
        (("--cell", "lstn"), "did you mean 'lstm'"),
        (("--cell", "lstm", "--init", "update:1"), "is for GRU, not for LSTM"),
        (("--cell", "lstm", "--lags", 0), "--lags 0: expected a whole number, at least 1"),
        (("--cell", "lstm", "--probe", -1), "--probe -1: expected a whole number, at least 1"),
        (("--cell", "lstm", "--within", 0), "--within 0: expected a whole number, at least 1"),
        (("--cell", "lstm", "--seeds", 0), "--seeds 0: expected a whole number from 1 to 100"),
        (("nowhere", "--seeds", 101), "--seeds 101: expected a whole number from 1 to 100; for more, call again"),
        (("--cell", "lstm", "--layers", 101), "--layers 101: expected a whole number from 1 to 100"),
    ],
)
def test_mistakes_are_answered_in_a_line(throughtime, arguments, said):
    ended = throughtime("gradients", *arguments)
    assert ended.code == 2
    assert said in ended.err
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize(("flag", "value"), [("--hidden", 8), ("--layers", 1), ("--init", "forget:1")])
def test_what_a_run_has_already_is_refused(throughtime, run, flag, value):
    ended = throughtime("gradients", run, flag, value)
    assert ended.code == 2
    assert f"{flag} {value}: {run} has its own; expected it with --cell only" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_advice_is_an_option_of_train_and_reaches_further(throughtime, text, tmp_path):
    small = ("--steps", 4, "--hidden", 8, "--batch", 4, "--bptt", 16)
    ended = throughtime("train", text, "--out", tmp_path / "kept", *small, "--init", "forget:3")
    assert ended.code == 0
    plain = throughtime("train", text, "--out", tmp_path / "plain", *small)
    assert plain.code == 0
    record = throughtime("gradients", tmp_path / "plain", *SHORT, "--json").json
    own = record["lanes"][-1]
    advised = [trial for trial in record["trials"] if trial["reaches_further"]]
    assert advised
    beyond = {None: 1e9}
    start = record["fresh"]
    for trial in record["trials"]:
        lag, own_lag, fresh_lag = (
            beyond.get(h["lag"], h["lag"]) for h in (trial["reach"], own["horizons"][-1], start["reach"])
        )
        least = max((own_lag, own["curve"][-1]), (fresh_lag, start["at_last_lag"]))
        assert trial["reaches_further"] == ((lag, trial["at_last_lag"]) > least)
        assert trial["seeds"] == 3
    ended = throughtime("gradients", tmp_path / "kept", *SHORT)
    for line in ended.out.splitlines():
        assert "--init forget:1 " not in line


def test_nothing_is_advised_where_nothing_reaches_further(throughtime):
    ended = throughtime("gradients", "--cell", "lstm", "--hidden", 16, "--init", "forget:12", *SHORT)
    assert "nothing: none of --init forget:1, --init forget:3, --init chrono:24 reaches further" in ended.out


def test_a_text_that_is_too_short_is_refused(throughtime, run, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the quick brown fox")
    ended = throughtime("gradients", run, "--text", short, *SHORT)
    assert ended.code == 2
    assert "the text has 19 tokens; expected at least 32: give more text, or lower --lags or --probe" in ended.err


def test_what_few_rows_mean_is_said(throughtime, run, tmp_path):
    """A short text has few rows, and intervals over few are wide; of one there is none."""
    said = {}
    for rows in (1, 4, 8):
        short = tmp_path / f"{rows}.txt"
        short.write_text("the quick brown fox jumps over "[:31] * rows + "the")
        ended = throughtime("gradients", run, "--text", short, *SHORT)
        assert f"8 losses × {rows} row{'s' * (rows > 1)})" in ended.out
        assert ("over the rows" in ended.out) == (rows > 1)
        assert max(map(len, ended.out.splitlines()[2:])) <= 80
        said[rows] = ("one row has no interval" in ended.out, "few rows make it wide" in ended.out)
    assert said == {1: (True, False), 4: (False, True), 8: (False, False)}


def test_the_plot_shows_growth_decay_and_flatness():
    assert plot([1.0] * 5)[0].endswith("┤•••••")
    growth = plot([10.0**k for k in range(4)])
    assert growth[0].split("┤")[1].rstrip() == "   •"
    assert growth[0].strip().startswith("1e+03")
    long = plot([0.9**k for k in range(500)], [0.8**k for k in range(500)])
    assert "lag 132" in long[-1]  # 0.9¹³² is below 10⁻⁶; the rest is not drawn
    assert any("·" in line for line in long)
    assert max(map(len, long)) <= 80


def test_training_logs_how_far_gradients_reach(throughtime, text, tmp_path):
    small = ("--steps", 12, "--hidden", 8, "--batch", 4, "--bptt", 16)
    assert throughtime("train", text, "--out", tmp_path / "run", *small, "--gradients-every", 4).code == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    watched = {line["step"]: line for line in lines if "horizon" in line}
    assert list(watched) == [4, 8, 12]
    for line in watched.values():
        assert 1 <= line["horizon"] <= 16
        assert 0 < line["cancellation"] <= 1
        assert 0 < line["decay"] < 2
        assert "clip_share" in line
    ended = throughtime("train", text, "--out", tmp_path / "mlp", *small, "--cell", "mlp", "--gradients-every", 4)
    assert ended.code == 2
    assert "an mlp carries no state" in ended.err
