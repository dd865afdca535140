"""What a run is given to go on from, and what it writes, to the byte."""

import io
import os
import sys

import pytest

from throughtime.app.cli import main
from throughtime.app.sampling import stop_texts

LATIN1 = "il était café, à la fenêtre. ".encode("latin-1")


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory):
    """A run that has read Latin-1."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "latin1.txt").write_bytes(LATIN1 * 60)
    options = ["--level", "byte", "--steps", "200", "--hidden", "32", "--batch", "4", "--bptt", "16"]
    assert main(["train", str(folder / "latin1.txt"), "--out", str(folder / "run"), *options]) == 0
    return folder / "run"


def test_a_run_of_bytes_writes_them_as_they_are_and_takes_them_as_a_prompt(of_bytes, tmp_path, capfdbinary):
    prompt = "il était".encode("latin-1")
    (tmp_path / "prompt").write_bytes(prompt)
    for given in (["--prompt-file", str(tmp_path / "prompt")], ["--prompt", os.fsdecode(prompt)]):
        capfdbinary.readouterr()
        assert main(["sample", str(of_bytes), "--length", "40", "--greedy", *given]) == 0
        assert capfdbinary.readouterr().out == (LATIN1 * 2)[:48]  # not even a line end is added
        assert main(["sample", str(of_bytes), "--length", "9", "--beams", "1", *given]) == 0
        assert capfdbinary.readouterr().out == LATIN1[:17] + b"\n"
        assert main(["sample", str(of_bytes), "--length", "30", "--greedy", "--stop", "\udce0", *given]) == 0
        assert capfdbinary.readouterr().out == LATIN1.partition(b"\xe0")[0]
        assert main(["sample", str(of_bytes), "--length", "9", "--greedy", "--samples", "2", *given]) == 0
        assert capfdbinary.readouterr().out == LATIN1[:17] + b"\n\n" + LATIN1[:17] + b"\n"


def test_a_terminal_sees_bytes_by_their_escapes(throughtime, of_bytes, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    ended = throughtime("sample", of_bytes, "--length", 40, "--greedy", "--prompt", "il \udce9tait")
    assert ended.out == (LATIN1 * 2)[:48].decode("ascii", "backslashreplace") + "\n"


def test_a_prompt_from_a_file_or_standard_input(throughtime, run, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("the quick")
    expected = throughtime("sample", run, "--prompt", "the quick", "--seed", 7).out
    assert throughtime("sample", run, "--prompt-file", tmp_path / "prompt.txt", "--seed", 7).out == expected
    for data, code in ((b"the quick", 0), (b"", 2), (b"caf\xe9 ", 2)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        ended = throughtime("sample", run, "--prompt-file", "-", "--seed", 7)
        assert ended.code == code, ended.err
        assert ended.out == (expected if code == 0 else "")
        assert code == 0 or ended.err.startswith("throughtime sample: standard input")


def test_nothing_is_written_of_a_sample_that_is_refused(throughtime, run, of_bytes):
    for given in (("--length", 0), ("--length", 2**63), ("--samples", 2**63), ("--alphabet", "")):
        for folder in (run, of_bytes):
            ended = throughtime("sample", folder, "--prompt", "the ", *given)
            assert (ended.code, ended.out) == (2, ""), given


def test_a_stop_text_is_taken_as_it_is_and_as_its_escapes_mean():
    assert stop_texts([r"\n", "end"]) == [r"\n", "\n", "end"]
    assert stop_texts([r"\\n"]) == [r"\\n", r"\n"]
    assert stop_texts([r"\textbf", r"\d"]) == [r"\textbf", "\textbf", r"\d"]


def test_a_shells_backslash_n_stops_at_a_line_end(throughtime, tmp_path):
    (tmp_path / "lines.txt").write_text("ab\n" * 400)
    small = ("--steps", 12, "--hidden", 8, "--batch", 4, "--bptt", 16)
    assert throughtime("train", tmp_path / "lines.txt", "--out", tmp_path / "run", *small).code == 0
    sampled = ("sample", tmp_path / "run", "--prompt", "a", "--seed", 3, "--length", 60)
    whole = throughtime(*sampled).out
    assert whole.count("\n") > 1
    assert throughtime(*sampled, "--stop", r"\n").out == whole.partition("\n")[0] + "\n"


def test_samples_of_neighbouring_seeds_differ(throughtime, run):
    first, second = (
        throughtime("sample", run, "--seed", seed, "--samples", 3, "--length", 30).out.split("\n\n") for seed in (1, 2)
    )
    assert len({text.strip("\n") for text in first + second}) == 6


def test_indentation_of_a_prompt_is_written_as_it_was_given(throughtime, tmp_path):
    (tmp_path / "code.py").write_text("def f(x):\n    if x:\n        return  x\n\n" * 60)
    for level, more in (("word", []), ("bpe", ["--vocabulary", 300])):
        small = ("--steps", 3, "--hidden", 8, "--batch", 4, "--bptt", 16)
        out = tmp_path / level
        assert throughtime("train", tmp_path / "code.py", "--out", out, "--level", level, *more, *small).code == 0
        prompt = "def f(x):\n        "
        for flags in (["--seed", 1], ["--beams", 2]):
            ended = throughtime("sample", out, "--prompt", prompt, *flags, "--length", 5)
            assert prompt in ended.out
            assert not ended.err
