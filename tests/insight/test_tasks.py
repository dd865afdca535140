import itertools
from dataclasses import replace

import pytest
import torch

from throughtime import insight
from throughtime.errors import InputError
from throughtime.insight import tasks


def examples(name, length=None, rows=400, part="training"):
    return insight.make_task(name, length).draw(rows, torch.Generator().manual_seed(1), part)


def test_adding_is_hochreiters():
    inputs, answers = examples("adding", 40)
    values, marks = inputs.unbind(2)
    assert inputs.shape == (40, 400, 2)
    assert values.min() >= -1
    assert values.max() <= 1
    assert (marks[0] != 0).all()
    assert (marks[-1] == -1).all()
    marked = marks == 1
    assert (marked.sum(0) == 2).all()
    torch.testing.assert_close(answers[0], 0.5 + (values * marked).sum(0) / 4)


def test_adding_sum_is_the_later_variant():
    inputs, answers = examples("adding-sum", 40)
    values, marks = inputs.unbind(2)
    assert values.min() >= 0
    assert (marks[:20].sum(0) == 1).all()
    assert (marks[20:].sum(0) == 1).all()
    torch.testing.assert_close(answers[0], (values * marks).sum(0))


def test_copy_asks_for_what_was_said():
    inputs, answers = examples("copy", 15)
    ids = inputs.argmax(2)
    assert inputs.shape == (35, 400, 10)
    assert torch.equal(ids[:10], answers)
    assert (ids[24] == 9).all()  # from here on the ten answers are due
    assert (ids[10:24] == 8).all()
    assert (ids[25:] == 8).all()


def test_order_is_that_of_two_symbols():
    inputs, answers = examples("order", 50)
    ids = inputs.argmax(2)
    relevant = (ids == 4) | (ids == 5)
    assert (relevant.sum(0) == 2).all()
    for row in range(400):
        first, second = relevant[:, row].nonzero()[:, 0].tolist()
        assert 5 <= first <= 10
        assert 25 <= second <= 30
        assert answers[0, row] == 2 * (ids[first, row] - 4) + ids[second, row] - 4
    assert set(answers[0].tolist()) == {0, 1, 2, 3}


def test_lag_hides_the_answer_in_the_first_symbol():
    inputs, answers = examples("lag", 20)
    ids = inputs.argmax(2)
    assert torch.equal(ids[0], answers[0])
    assert (ids[1:] == ids[1:, :1]).all()


def test_digits_are_kept_apart():
    pytest.importorskip("sklearn")
    parts = {part: examples("digits", rows=2000, part=part) for part in ("training", "validation", "test")}
    assert parts["test"].inputs.shape == (64, 360, 1)
    assert parts["training"].answers.shape == (1, 2000)
    assert set(parts["test"].answers[0].tolist()) == set(range(10))
    seen = {part: {tuple(column) for column in drawn.inputs[:, :, 0].T.tolist()} for part, drawn in parts.items()}
    for one, other in itertools.combinations(seen.values(), 2):
        assert not one & other


@pytest.mark.parametrize("name", ["adding", "adding-sum", "copy", "order", "lag"])
def test_the_chance_level_is_what_ignorance_scores(name):
    """Who always gives the best constant answer."""
    task = insight.make_task(name)
    answers = task.draw(20_000, torch.Generator().manual_seed(1), "training").answers
    if task.outputs == 1:
        outputs = answers.mean().expand(1, len(answers[0]), 1)
    else:
        outputs = torch.zeros(*answers.shape, task.outputs)
        outputs[..., 0] = 1
    assert task.score(outputs, answers) == pytest.approx(task.chance, abs=0.01)
    assert task.chance < task.solved_at


def test_who_remembers_solves_and_who_sees_a_window_does_not():
    task = insight.make_task("lag", 20)
    gru = insight.solve(task, "gru", hidden_size=16, steps=400)
    assert (gru.cell, gru.seed, gru.hidden_size) == ("gru", 1, 16)
    assert gru.parameters == 3 * 16 * (21 + 16 + 2) + 2 * 17
    assert gru.solved
    assert gru.score == 1
    assert gru.horizon is not None
    assert gru.horizon.lag >= task.lag
    mlp = insight.solve(task, "mlp", hidden_size=16, steps=200)
    assert not mlp.solved
    assert 0.35 < mlp.score < 0.65
    assert mlp.steps == 200
    assert mlp.horizon is None


def test_the_test_decides_nothing():
    """Training stops by the validation sequences, however well the test would go."""
    task, drawn = insight.make_task("lag", 12), []

    def draw(rows, generator, part):
        drawn.append(part)
        return task.draw(rows, generator, part)

    scores = iter([0.5, 1.0, 0.25])  # validation at 100 and at 200 steps, then the test
    posed = replace(task, draw=draw, score=lambda outputs, answers: next(scores))
    result = insight.solve(posed, "rnn", hidden_size=4, steps=1000)
    assert (result.steps, result.validation, result.score, result.solved) == (200, 1.0, 0.25, False)
    assert drawn[:2] == ["validation", "test"]
    assert set(drawn[2:]) == {"training"}


def test_what_stops_and_what_tests_are_other_sequences():
    task = insight.make_task("adding", 20)
    generators = {part: torch.Generator().manual_seed(3 + tasks._SEED_OF[part]) for part in ("validation", "test")}
    one, other = (task.draw(64, generator, part).inputs for part, generator in generators.items())
    assert not torch.equal(one, other)


@pytest.mark.parametrize("cell", ["mlp", "rnn", "gru", "lstm"])
def test_at_equal_size_cells_learn_as_many_numbers(cell):
    task = insight.make_task("adding")
    wanted = tasks.count_parameters(task, "lstm", 64)
    width = insight.equal_width(task, cell, 64)
    apart = [abs(tasks.count_parameters(task, cell, w) - wanted) for w in (width - 1, width, width + 1)]
    assert min(apart) == apart[1]
    assert insight.solve(task, cell, hidden_size=width, steps=1).parameters == tasks.count_parameters(task, cell, width)


@pytest.mark.parametrize("name", insight.task_names())
def test_how_a_task_differs_from_the_published_one_is_said(name):
    assert len(insight.make_task(name).deviations) > 20


def test_a_run_is_repeatable_and_leaves_the_generator_alone():
    task = insight.make_task("order", 20)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    runs = [insight.solve(task, "lstm", hidden_size=8, steps=20, seed=3) for _ in range(2)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert runs[0].score == runs[1].score
    losses = []
    insight.solve(task, "lstm", hidden_size=8, steps=7, on_step=lambda step, loss: losses.append((step, loss)))
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: insight.make_task("adding-some"), "did you mean 'adding-sum'"),
        (lambda: insight.make_task("adding", 5), "--length 5: expected at least 10"),
        (lambda: insight.make_task("digits", 100), "their length is 64"),
        (lambda: insight.solve(insight.make_task("lag"), "gpu"), "did you mean 'gru'"),
    ],
)
def test_what_can_not_be_is_said(call, said):
    with pytest.raises(InputError, match=said):
        call()


def test_without_scikit_learn_it_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="needs scikit-learn, which is not installed; pip install"):
        insight.make_task("digits")
