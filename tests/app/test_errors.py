import errno
import sys

import pytest

from throughtime.app import errors, streams
from throughtime.errors import InputError


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("a\nb  c\x1b[2J"), 2, r"throughtime eval: a b c\x1b[2J"),
        (PermissionError(errno.EACCES, "Permission denied", "a.txt"), 2, "throughtime eval: a.txt: permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "throughtime eval: no space left on device"),
        (MemoryError(), 2, "throughtime eval: out of memory; lower --hidden, --layers, --batch or --bptt"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: …"), 2, "throughtime eval: out of memory;"),
        (
            KeyError("x"),
            1,
            "this is a bug in throughtime, please report it: KeyError: 'x' (THROUGHTIME_TRACEBACK=1 shows",
        ),
    ],
)
def test_an_exception_becomes_one_line_and_an_exit_code(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("THROUGHTIME_TRACEBACK", raising=False)
    assert errors.report(error, command="throughtime eval") == code
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert said in err


def _fail(*_: object, **__: object) -> None:
    raise ZeroDivisionError("ours")


@pytest.fixture
def bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("throughtime.app.explain.explain", _fail)


@pytest.mark.usefixtures("bug")
def test_a_bug_shows_its_traceback_only_when_asked(throughtime, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = throughtime("explain", "ybigta")
    assert (ended.code, ended.err.count("\n")) == (errors.BUG, 1)
    assert "please report it: ZeroDivisionError: ours" in ended.err

    asked = throughtime("--traceback", "explain", "ybigta")
    assert asked.code == errors.BUG
    assert asked.err.startswith("Traceback")

    monkeypatch.setenv("THROUGHTIME_TRACEBACK", "1")
    assert throughtime("explain", "ybigta").err.startswith("Traceback")
    monkeypatch.setenv("THROUGHTIME_TRACEBACK", "0")
    assert "Traceback" not in throughtime("explain", "ybigta").err


def test_a_reader_that_goes_away_is_silent(throughtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    stdout, stderr = sys.stdout, sys.stderr
    monkeypatch.setattr("throughtime.app.explain.explain", gone)
    monkeypatch.setattr(streams, "discard", lambda *_: None)
    try:
        ended = throughtime("explain", "ybigta")
    finally:
        sys.stdout, sys.stderr = stdout, stderr
    assert (ended.code, ended.err) == (errors.BROKEN_PIPE, "")


def test_a_terminal_sees_the_command_in_colour_unless_told_otherwise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    errors.say("throughtime", "no")
    assert capsys.readouterr().err == "\033[1;31mthroughtime\033[0m: no\n"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            errors.say("throughtime", "no")
            assert capsys.readouterr().err == "throughtime: no\n"
