from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from throughtime.app import progress
from throughtime.app.progress import LiveLine, PlainLines, display, figures
from throughtime.app.terminal import duration


def report(share: float, **changes: object) -> SimpleNamespace:
    usual = {
        "progress": share, "step": round(1000 * share), "loss": 1.53218, "bits_per_character": 2.2104,
        "tokens_per_second": 41203.4, "gradient_norm": 0.5249, "seconds_left": 103.4,
    }  # fmt: skip
    return SimpleNamespace(**usual | changes)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(progress, "REFRESH", 0.0)


def test_the_figures_are_loss_bits_speed_norm_and_time() -> None:
    assert figures(report(0.5), "char", roomy=False).plain == "loss 1.532  2.21 bpc  41.2k char/s  ‖g‖ 0.52  1:43 left"
    roomy = figures(report(0.5), "byte", roomy=True).plain
    assert roomy == "loss 1.532  2.21 bits/char  41,203 bytes/s  gradient norm 0.52  1:43 left"
    assert figures(report(0.0, seconds_left=None), "char", roomy=False).plain.endswith("–:–– left")
    assert figures(report(1.0), "char", roomy=False, ending="done").plain.endswith("done")


@pytest.mark.parametrize(
    ("count", "shown"), [(950, "950 char/s"), (41_203, "41.2k char/s"), (1_300_000, "1.3M char/s")]
)
def test_a_speed_is_short_where_room_is(count: float, shown: str) -> None:
    assert shown in figures(report(0.5, tokens_per_second=count), "char", roomy=False).plain


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3700, "1:01:40"), (-1, "0:00")]
)
def test_a_duration_reads_like_a_clock(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_pipe_gets_a_line_at_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with display("char") as shown:
        assert isinstance(shown, PlainLines)
        for step in range(1, 101):
            shown(report(step / 100))
    out, err = capsys.readouterr()
    assert not out
    lines = err.splitlines()
    assert [line[:4] for line in lines] == [
        " 10%",
        " 20%",
        " 30%",
        " 40%",
        " 50%",
        " 60%",
        " 70%",
        " 80%",
        " 90%",
        "100%",
    ]
    assert lines[4] == " 50%  step 500  " + figures(report(0.5), "char", roomy=True).plain


def test_a_pipe_is_never_silent_for_long(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LONGEST_SILENCE", 0.0)
    shown = PlainLines("char")
    shown.reading(1_500_000, 3_000_000)
    shown(report(0.01))
    assert capsys.readouterr().err.splitlines()[0] == "reading text, 1.5 of 3.0 MB"


@pytest.mark.usefixtures("terminal")
def test_a_terminal_gets_a_bar_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    with display("char") as shown:
        assert isinstance(shown, LiveLine)
        shown.reading(1_500_000, 3_000_000)
        shown.say("a line above")
        shown(report(0.42))
        shown(report(1.0))
    out, err = capsys.readouterr()
    assert not out
    assert "reading text, 1.5 of 3.0 MB" in err
    assert "a line above" in err
    assert " 42%  " in err
    assert "measuring" in err
    assert err.rindex("done") > err.rindex("measuring")


@pytest.mark.usefixtures("terminal")
def test_a_mistake_before_the_first_step_leaves_a_terminal_clean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="mistake"), LiveLine("char"):
        raise ValueError("mistake")
    assert "━" not in capsys.readouterr().err


def test_what_is_trained_is_said_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = torch.get_rng_state()
    observe = progress.observed(PlainLines("char"), run)
    for share in (0.1, 0.2):
        observe(report(share))
    err = capsys.readouterr().err
    assert err.count("model: LSTM, 1 layer of 8, one-hot input: ") == 1
    assert err.count(" characters to train on, ") == 1
    assert err.count("step ") == 2
    assert torch.equal(torch.get_rng_state(), drawn)  # or a resumed run would differ from one that was never stopped
