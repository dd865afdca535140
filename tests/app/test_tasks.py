import pytest

from throughtime.app import terminal


def test_every_cell_is_tried_on_a_task(throughtime):
    ended = throughtime("task", "lag", "--length", 12, "--hidden", 16, "--steps", 300)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0] == "lag: T 12, the answer lies up to 11 steps back"
    assert [line.split()[0] for line in lines[-4:]] == ["mlp", "rnn", "gru", "lstm"]
    assert "not solved" in lines[-4]
    assert "at lag 8, its window; 11 needed" in lines[-4]
    assert "not solved" not in lines[-2]
    assert "nowhere; 11 needed" in lines[-2]
    assert any(line.startswith("differs: only the last symbol is predicted") for line in lines)
    assert [line.split()[1] for line in lines[-4:]] == ["16"] * 4
    assert lines[-2].split()[2] == f"{3 * 16 * (13 + 16 + 2) + 2 * 17:,}"  # a GRU's weights, and the output's


def test_seeds_and_equal_size(throughtime):
    few = ("--length", 12, "--hidden", 8, "--steps", 3)
    ended = throughtime("task", "lag", *few, "--seeds", 2, "--equal-size", "--json")
    results = ended.json["results"]
    assert [(r["cell"], r["seed"]) for r in results[:4]] == [("mlp", 1), ("mlp", 2), ("rnn", 1), ("rnn", 2)]
    sizes = {r["cell"]: r["parameters"] for r in results}
    assert all(abs(size - sizes["lstm"]) < 0.1 * sizes["lstm"] for size in sizes.values())
    assert {r["cell"]: r["hidden_size"] for r in results}["lstm"] == 8
    ended = throughtime("task", "lag", *few, "--seeds", 2, "--cell", "gru")
    assert ended.out.splitlines()[-1].startswith("gru   solved 0 of 2, score 0.")


def test_one_cell_as_json(throughtime):
    ended = throughtime("task", "adding", "--length", 20, "--cell", "lstm", "--steps", 5, "--json")
    (result,) = ended.json["results"]
    assert result["cell"] == "lstm"
    assert result["steps"] == 5
    assert result["solved"] is False
    assert result["chance"] == 0.1536


def test_a_long_training_is_not_silent_on_a_pipe(throughtime, monkeypatch):
    monkeypatch.setattr(terminal, "SILENCE", 0.0)
    ended = throughtime("task", "adding", "--length", 20, "--cell", "gru", "--steps", 3, "--json")
    assert "gru: step 2 of 3, loss" in ended.err
    assert ended.json["results"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("task", "addding"), "did you mean 'adding'"),
        (("task", "lag", "--cell", "lsm"), "did you mean 'lstm'"),
        (("task", "lag", "--steps", 0), "--steps 0: expected a whole number, at least 1"),
        (("task", "lag", "--seeds", 0), "--seeds 0: expected a whole number from 1 to 100"),
        (("task", "lag", "--seeds", 1000), "--seeds 1000: expected a whole number from 1 to 100; for more, call again"),
        (("task", "lag", "--hidden", 0), "--hidden 0: expected a whole number, at least 1"),
        (("task", "lag", "--cell", "lstm", "--init", "update:1"), "is for GRU, not for LSTM"),
    ],
)
def test_mistakes_are_answered_in_a_line(throughtime, arguments, said):
    ended = throughtime(*arguments)
    assert ended.code == 2
    assert said in ended.err
