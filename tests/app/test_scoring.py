"""Scores as scripts read them: how much was unknown, and lists of hypotheses to the byte."""

import pytest

from throughtime.app.cli import main

SMALL = ("--steps", 12, "--hidden", 8, "--batch", 4, "--bptt", 16)


@pytest.fixture(scope="module")
def of_words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "words.txt").write_text("the cat sees a red ball.\nno.\n" * 90)
    assert (
        main(["train", str(folder / "words.txt"), "--out", str(folder / "run"), "--level", "word", *map(str, SMALL)])
        == 0
    )
    return folder / "run"


def test_eval_tells_how_much_is_unknown_and_the_figures_without_it(throughtime, of_words, tmp_path):
    (tmp_path / "new.txt").write_text("the zebra sees a red zebra.\n" * 9)
    measured = throughtime("eval", of_words, tmp_path / "new.txt", "--json").json
    assert measured["unknown"] == 18
    assert measured["tokens"] == 8 * 9 - 1
    assert measured["nats_per_token_without_unknown"] != measured["nats_per_token"]
    assert measured["perplexity_without_unknown"] != measured["perplexity"]
    table = throughtime("eval", of_words, tmp_path / "new.txt").out
    assert "18 of 71 tokens, 25.35%" in table
    assert f"{measured['nats_per_token_without_unknown']:.4f} nats per token, perplexity" in table


def test_score_tells_how_much_is_unknown(throughtime, of_words, tmp_path):
    (tmp_path / "new.txt").write_text("the zebra sees\nno.\na zebra, a zebra\n")
    scored = throughtime("score", of_words, tmp_path / "new.txt", "--json").json
    assert scored["unknown_tokens"] == [1, 0, 3]  # the comma too
    assert scored["unknown"] == 4
    assert scored["tokens"] == 4 + 3 + 6
    assert scored["log_probabilities"][1] == scored["log_probabilities_without_unknown"][1]
    assert scored["log_probabilities"][0] < scored["log_probabilities_without_unknown"][0]
    assert scored["log_probability_without_unknown"] == pytest.approx(sum(scored["log_probabilities_without_unknown"]))
    ended = throughtime("score", of_words, tmp_path / "new.txt")
    assert ended.out.count("\n") == 3
    assert ended.err.startswith("4 of 13 tokens are unknown to the run, in 2 of 3 lines; ln p of all is -")
    (tmp_path / "list.txt").write_text("k\tthe zebra\nk\tno.\n")
    assert throughtime("score", of_words, tmp_path / "list.txt", "--nbest").err.startswith("1 of 6 tokens are unknown")


def test_lists_that_are_no_numbers_are_refused(throughtime, of_words, tmp_path):
    for line in ("b\tnan\tx", "b\tinf\tx"):
        (tmp_path / "list.txt").write_text(f"a\t-1\tthe cat\n{line}\n")
        for flags in ([], ["--json"]):
            ended = throughtime("score", of_words, tmp_path / "list.txt", "--nbest", *flags)
            assert ended.code == 2
            assert "line 2: score" in ended.err
    for weight in ("nan", "inf"):
        ended = throughtime("score", of_words, tmp_path / "list.txt", "--nbest", "--weight", weight)
        assert ended.code == 2
        assert f"--weight {weight}" in ended.err


def test_a_list_is_printed_to_the_byte_by_a_run_of_bytes(tmp_path, capfdbinary):
    (tmp_path / "text.txt").write_bytes("café crème\nété\n".encode("latin-1") * 60)
    lines = "clé\tcafé\nclé\tété".encode("latin-1")
    (tmp_path / "list.txt").write_bytes(lines)
    run = str(tmp_path / "run")
    assert main(["train", str(tmp_path / "text.txt"), "--out", run, "--level", "byte", *map(str, SMALL)]) == 0
    capfdbinary.readouterr()
    assert main(["score", run, str(tmp_path / "list.txt"), "--nbest"]) == 0
    printed = capfdbinary.readouterr().out.splitlines()
    assert sorted((line.split(b"\t")[0], line.split(b"\t")[2]) for line in printed) == sorted(
        tuple(line.split(b"\t")) for line in lines.splitlines()
    )
    assert main(["score", run, str(tmp_path / "list.txt"), "--nbest", "--json"]) == 0
    assert rb'{"cl\\xe9": [{"score": ' in capfdbinary.readouterr().out
