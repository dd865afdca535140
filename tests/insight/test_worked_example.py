import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from throughtime.errors import InputError
from throughtime.insight import worked_example
from throughtime.insight.worked_example import (
    Descent,
    Weights,
    Word,
    backward,
    forward,
    gradient,
    initial_weights,
    spell,
    steps_back,
    train,
    usual_hidden_size,
)

WORDS = st.text(st.sampled_from("abcd한글"), min_size=2, max_size=9).filter(lambda text: len(set(text)) > 1)


def test_a_word_becomes_one_hot_inputs_and_the_letters_that_follow() -> None:
    word = Word.read("ybigta")
    assert "".join(word.vocabulary) == "ybigta"
    assert [word.vocabulary[i] for i in word.inputs[:, 0].argmax(1)] == list("ybigt")
    assert [word.vocabulary[i] for i in word.targets] == list("bigta")
    assert word.inputs.sum() == word.steps == 5


def test_repeated_letters_share_a_place_and_show_where_memory_is_needed() -> None:
    assert Word.read("banana").vocabulary == ("b", "a", "n")
    assert Word.read("banana").followers == {"b": ("a",), "a": ("n",), "n": ("a",)}
    assert Word.read("hello").followers["l"] == ("l", "o")


def test_a_korean_syllable_is_one_letter_however_it_was_typed() -> None:
    decomposed = "\u1112\u1161\u11ab\u1100\u1173\u11af"
    assert Word.read(decomposed).letters == "한글"


def test_the_beginning_of_a_very_long_word_is_taken() -> None:
    word = Word.read("ab" * 5000)
    assert (len(word.letters), word.given) == (worked_example.LONGEST, 10_000)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no letters; expected two or more"),
        ("y", "'y' has one letter; expected two or more"),
        ("\u1112\u1161\u11ab", "'한' has one letter"),
        ("aaa", "'aaa' has one distinct letter; expected two or more"),
        ("a" * 100, "'aaaaaaaaaaaaaaa…' has one distinct letter"),
    ],
)
def test_a_word_without_anything_to_predict_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        Word.read(text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("hidden_size", [0, -1, 257])
def test_a_hidden_size_out_of_range_is_refused(hidden_size: int) -> None:
    with pytest.raises(InputError, match=f"--hidden {hidden_size}: expected a whole number from 1 to 256"):
        initial_weights(Word.read("ybigta"), hidden_size)


@pytest.mark.parametrize(
    "settings_", [{"learning_rate": 0.0}, {"learning_rate": math.nan}, {"clip": -1.0}, {"clip": math.inf}]
)
def test_a_descent_that_cannot_be_is_refused(settings_: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected"):
        Descent(**settings_)


def test_forward_is_the_textbooks() -> None:
    word = Word.read("hello")
    weights = initial_weights(word, hidden_size=3)
    shown = forward(word, weights)
    h = torch.zeros(3, dtype=torch.float64)
    for t, (x, target) in enumerate(zip(word.inputs[:, 0], word.targets, strict=True)):
        torch.testing.assert_close(shown.from_input[t], weights.xh @ x)
        torch.testing.assert_close(shown.from_state[t], weights.hh @ h)
        h = torch.tanh(weights.xh @ x + weights.hh @ h)
        torch.testing.assert_close(shown.h[t], h)
        torch.testing.assert_close(shown.y[t], weights.hy @ h)
        torch.testing.assert_close(shown.p[t], torch.softmax(weights.hy @ h, 0))
        torch.testing.assert_close(shown.losses[t], -torch.log(shown.p[t, target]))


def test_forward_is_torchs_rnn() -> None:
    word = Word.read("banana")
    weights = initial_weights(word, hidden_size=4)
    rnn = torch.nn.RNN(3, 4, bias=False, dtype=torch.float64)
    rnn.load_state_dict({"weight_ih_l0": weights.xh, "weight_hh_l0": weights.hh})
    torch.testing.assert_close(forward(word, weights).h[:, None], rnn(word.inputs)[0])


@settings(max_examples=25, deadline=None)
@given(text=WORDS, hidden_size=st.integers(1, 5), seed=st.integers(0, 1000))
def test_the_gradient_is_the_sum_over_time_and_autograds(text: str, hidden_size: int, seed: int) -> None:
    word = Word.read(text)
    weights = initial_weights(word, hidden_size, seed)
    shown = backward(word, weights)
    torch.testing.assert_close(shown.per_step.sum(0), shown.autograd.hh, rtol=0, atol=1e-12)
    for by_hand, by_torch in zip(shown.gradient, shown.autograd, strict=True):
        torch.testing.assert_close(by_hand, by_torch, rtol=0, atol=1e-12)
    assert shown.discrepancy < 1e-12


def test_each_steps_gradient_is_that_of_its_own_loss() -> None:
    word = Word.read("ybigta")
    weights = initial_weights(word, hidden_size=3)
    shown = backward(word, weights)
    leaf = weights.hh.clone().requires_grad_()
    for t in range(word.steps):
        loss = forward(word, weights._replace(hh=leaf)).losses[t]
        torch.testing.assert_close(shown.per_step[t], torch.autograd.grad(loss, leaf)[0])
    assert not shown.per_step[0].any()  # h_0 = 0


def test_reach_is_the_norm_of_each_loss_gradient_at_each_state() -> None:
    word = Word.read("hello")
    weights = initial_weights(word, hidden_size=3)
    states = [torch.zeros(3, dtype=torch.float64)]
    losses = []
    for x, target in zip(word.inputs[:, 0], word.targets, strict=True):
        states.append(torch.tanh(weights.xh @ x + weights.hh @ states[-1]).requires_grad_())
        losses.append(torch.nn.functional.cross_entropy(weights.hy @ states[-1], target))
    reach = backward(word, weights).reach
    for t, loss in enumerate(losses):
        for k, grad in enumerate(torch.autograd.grad(loss, states[1 : t + 2], retain_graph=True)):
            torch.testing.assert_close(reach[t, k], grad.norm())
    assert not reach.triu(1).any()


def test_a_large_gradient_is_scaled_to_the_norm_and_a_small_one_is_left() -> None:
    weights = Weights(*(torch.zeros(shape, dtype=torch.float64) for shape in ((1, 2), (1, 1), (2, 1))))
    grad = Weights(torch.tensor([[3.0, 0.0]]).double(), torch.tensor([[4.0]]).double(), torch.zeros(2, 1).double())
    clipped = Descent(learning_rate=0.5, clip=1.0).update(weights, grad)
    assert (clipped.norm, clipped.scale) == (5.0, pytest.approx(0.2))
    torch.testing.assert_close(clipped.gradient.hh, torch.tensor([[0.8]]).double())
    torch.testing.assert_close(clipped.weights.hh, torch.tensor([[-0.4]]).double())
    assert Descent(clip=6.0).update(weights, grad).scale == 1
    assert Descent(clip=0.0).update(weights, grad).gradient.hh.item() == 4
    nothing = Weights(*(torch.zeros_like(g) for g in grad))
    assert Descent().update(weights, nothing).scale == 1


@pytest.mark.parametrize(
    "text", ["ybigta", "banana", "mississippi", "안녕하세요", "ab", "aab", "supercalifragilisticexpialidocious"]
)
@pytest.mark.parametrize("seed", [1, 2])
def test_training_goes_on_until_the_word_is_spelled(text: str, seed: int) -> None:
    word = Word.read(text)
    weights = initial_weights(word, usual_hidden_size(word), seed)
    *_, last = progress = list(train(word, weights, Descent()))
    assert last.spelled == text
    assert all(p.spelled != text for p in progress[:-1])
    assert [p.updates for p in progress] == list(range(len(progress)))
    assert last.loss < progress[0].loss or len(progress) == 1


def test_one_update_of_training_is_the_one_shown() -> None:
    word = Word.read("ybigta")
    weights = initial_weights(word, hidden_size=3)
    grad, loss = gradient(word, weights)
    update = Descent().update(weights, grad)
    first, second = list(train(word, weights, Descent()))[:2]
    assert (first.loss, first.norm, first.clipped) == (loss, update.norm, update.scale < 1)
    assert second.loss == gradient(word, update.weights)[1]
    assert first.spelled == spell(word, weights)


def test_training_that_does_not_succeed_ends() -> None:
    word = Word.read("ybigta")
    progress = list(train(word, initial_weights(word, hidden_size=3), Descent(), at_most=3))
    assert len(progress) == 4
    assert progress[-1].spelled != "ybigta"


def test_a_learning_rate_that_blows_up_is_named() -> None:
    word = Word.read("ybigta")
    with pytest.raises(InputError, match=r"--lr 1.7e\+308: the loss isn.t finite after"):
        list(train(word, initial_weights(word, hidden_size=3), Descent(learning_rate=1.7e308, clip=0)))


@given(WORDS)
def test_the_backward_steps_are_the_one_pass_taken_apart(text: str) -> None:
    word = Word.read(text)
    weights = initial_weights(word, 3)
    steps, ahead, back = steps_back(word, weights), forward(word, weights), backward(word, weights)
    close = {"rtol": 1e-12, "atol": 1e-12}
    for i, total in enumerate(back.gradient):
        torch.testing.assert_close(sum(step.parts[i] for step in steps), total, **close)
    for t, step in enumerate(steps):
        x, before = word.inputs[t, 0], ahead.h[t - 1] if t else torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(step.own, weights.hy.T @ step.y, **close)
        torch.testing.assert_close(step.h, step.own + step.later, **close)
        torch.testing.assert_close(step.a, step.h * (1 - ahead.h[t] ** 2), **close)
        for part, wanted in zip(
            step.parts, (step.a.outer(x), step.a.outer(before), step.y.outer(ahead.h[t])), strict=True
        ):
            torch.testing.assert_close(part, wanted, **close)
        if t:
            torch.testing.assert_close(steps[t - 1].later, weights.hh.T @ step.a, **close)
