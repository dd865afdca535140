"""What Python and the program give is the same."""

import pytest

import throughtime


@pytest.mark.parametrize("prompt", ["", "the quick", "the quick "])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "length": 30}, {"top_k": 3, "stop": "z"}])
def test_generate_is_sample(program, run, prompt, options):
    flags = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    printed = program("sample", run, "--prompt", prompt, "--seed", 7, *flags).out
    text = throughtime.load(run).generate(prompt, seed=7, **options)
    assert printed == text + ("" if text.endswith("\n") else "\n")


def test_samples_are_those_of_sample(program, run):
    printed = program("sample", run, "--prompt", "the", "--seed", 7, "--samples", 3, "--length", 20).out
    texts = throughtime.load(run).samples("the", 3, seed=7, length=20)
    assert printed == "\n".join(text + "\n" for text in texts)


def test_score_is_score(program, run, tmp_path):
    lines = ["the quick brown fox", "jumps over the lazy dog.", "god yzal"]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    printed = program("score", run, tmp_path / "lines.txt")
    if printed.code:  # a text of one line
        assert "knows no line end" in printed.err
        return
    assert [f"{score:.4f}" for score in throughtime.load(run).score(lines)] == printed.out.split()


@pytest.fixture
def program(request):
    """The program, called in this process."""
    return request.getfixturevalue("throughtime")
