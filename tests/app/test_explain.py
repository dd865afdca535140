import re

import pytest
from rich.cells import cell_len

from throughtime.app import explain as page
from throughtime.app.terminal import number, visible
from throughtime.insight.worked_example import Descent, Word, backward, forward, initial_weights


def numbers(text: str) -> set[str]:
    return set(re.findall(r"−?\d+\.\d{3}", text))


def flowing(text: str) -> str:
    return " ".join(text.split())


def test_every_number_of_the_word_is_shown(throughtime) -> None:
    ended = throughtime("explain", "ybigta")
    assert ended.code == 0
    assert not ended.err
    word = Word.read("ybigta")
    weights = initial_weights(word, hidden_size=3)
    ahead, back = forward(word, weights), backward(word, weights)
    update = Descent().update(weights, back.gradient)
    tensors = [*weights, *ahead, back.per_step, back.total, back.autograd.hh, *update.gradient, *update.weights]
    wanted = {number(float(value)) for tensor in tensors for value in tensor.flatten()}
    wanted |= {number(float(value)) for value in back.reach[back.reach > 0]}
    assert wanted <= numbers(ended.out)


def test_the_losses_add_up_and_the_gradients_are_said_to_be_equal(throughtime) -> None:
    out = throughtime("explain", "ybigta").out
    rows = re.findall(r"p_t .* (\d\.\d{3}) *$", out, re.MULTILINE)
    total = re.search(r"L = Σ_t L_t +(\d\.\d{3})", out)
    assert total
    assert len(rows) == 5
    assert sum(map(float, rows)) == pytest.approx(float(total[1]), abs=0.003)
    assert re.search(r"they differ by at most \de-1\d", out)
    assert "The loss goes from 8.293 to 7.979 nats." in out


def test_training_is_followed_until_the_word_is_spelled(throughtime) -> None:
    out = throughtime("explain", "ybigta").out
    lines = re.findall(r"^ +(\d+) +(\d+\.\d{3}) .* (\w+)$", out.partition("7  Training")[2], re.MULTILINE)
    assert [int(updates) for updates, _, _ in lines][:6] == [0, 1, 2, 5, 10, 20]
    losses = [float(loss) for _, loss, _ in lines]
    assert losses == sorted(losses, reverse=True)
    assert [spelled == "ybigta" for *_, spelled in lines] == [False] * (len(lines) - 1) + [True]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "text", ["ybigta", "banana", "안녕하세요", "supercalifragilisticexpialidocious", "ab" * 5000, "a b\n\x1b😀"]
)
def test_no_line_is_wider_than_the_terminal(
    text: str, columns: int, throughtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    ended = throughtime("explain", text)
    assert ended.code == 0
    assert max(map(cell_len, ended.out.splitlines())) <= columns
    assert "\x1b" not in ended.out
    assert "\n\n\n" not in ended.out


def test_memory_is_pointed_out_where_a_letter_has_several_followers(throughtime) -> None:
    assert "l is followed by l, o" in throughtime("explain", "hello").out
    assert "not needed" in throughtime("explain", "banana").out


def test_a_long_word_is_abbreviated_and_says_so(throughtime) -> None:
    out = throughtime("explain", "abcd" * 100).out
    assert "The first 64 of its 400 letters." in out
    assert "⋮" in out
    assert "⋯" in out


def test_what_a_long_word_is_spelled_as_stays_on_its_line(throughtime) -> None:
    training = throughtime("explain", "supercalifragilisticexpialidocious").out.partition("spells\n")[2].splitlines()
    rows = training[: next(i for i, line in enumerate(training) if "It spells" in line)]
    assert len(rows) > 3
    assert all(re.match(r" +\d+ +\d+\.\d{3} .*…$", row) for row in rows)


def test_clipping_is_told_in_all_three_cases(throughtime) -> None:
    assert "is above c = 1: g is scaled by" in flowing(throughtime("explain", "ybigta").out)
    assert "is at most c = 9: g is left as it is" in flowing(throughtime("explain", "ybigta", "--clip", 9).out)
    assert "no clipping (--clip 0)" in flowing(throughtime("explain", "ybigta", "--clip", 0).out)


def test_a_network_that_cannot_spell_its_word_says_so(throughtime) -> None:
    ended = throughtime("explain", "aabbab", "--hidden", 1)
    assert ended.code == 0
    assert "It doesn't spell aabbab after 2,000 updates: try a larger --hidden or another --seed." in flowing(ended.out)


def test_seed_and_size_change_the_network(throughtime) -> None:
    usual, other = (
        throughtime("explain", "ybigta").out,
        throughtime("explain", "ybigta", "--seed", 2, "--hidden", 4).out,
    )
    assert "H = 4" in other
    assert "seed 2" in other
    assert numbers(usual) != numbers(other)


@pytest.mark.parametrize(
    ("count", "most", "indices"),
    [(3, 5, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (9, 5, [0, 1, 2, None, 8]), (100, 12, [*range(8), None, 97, 98, 99])],
)
def test_the_middle_of_an_axis_is_left_out(count: int, most: int, indices: list[int | None]) -> None:
    assert page._abbreviate(count, most) == indices


def test_round_numbers_follow_each_other() -> None:
    due = [1]
    while due[-1] < 1000:
        due.append(page._next_round_number(due[-1]))
    assert due == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


def test_a_left_out_target_stands_in_the_gap() -> None:
    import torch

    row = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert [cell.plain for cell in page._numbers(row, [0, None, 3], marked=2)] == ["0.100", "0.300", "0.400"]
    assert [cell.plain for cell in page._numbers(row, [0, None, 3], marked=3)] == ["0.100", "⋯", "0.400"]
    assert [cell.plain for cell in page._numbers(row, [0, None, 3])] == ["0.100", "⋯", "0.400"]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0.000"), (-0.0004, "0.000"), (-1.5, "−1.500"), (12.3456, "12.346")]
)
def test_numbers_have_a_true_minus_and_no_negative_zero(value: float, shown: str) -> None:
    assert number(value) == shown


def test_every_character_is_made_visible() -> None:
    assert visible("a b\t\r\n\x00\udc80한") == "a␣b⇥↤↵\\x00\\udc80한"


def test_a_page_is_written_instead(throughtime, tmp_path, monkeypatch) -> None:
    ended = throughtime("explain", "ybigta", "--html", tmp_path / "made" / "word.html")
    assert ended.code == 0
    assert not ended.out
    assert "open it in a browser" in ended.err
    assert "<title>throughtime explain ybigta</title>" in (tmp_path / "made" / "word.html").read_text()
    monkeypatch.chdir(tmp_path)
    assert throughtime("explain", "ybigta", "--html").code == 0
    assert (tmp_path / "explain.html").exists()


def test_a_page_that_cannot_be_written_is_answered_in_a_line(throughtime, tmp_path) -> None:
    (tmp_path / "file").touch()
    ended = throughtime("explain", "ybigta", "--html", tmp_path / "file" / "page.html")
    assert ended.code == 2
    assert "can't be written" in ended.err
    ended = throughtime("explain", "ybigta", "page.html")
    assert ended.code == 2
    assert "expected a file with --html only" in ended.err
