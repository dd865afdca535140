import json
import re
import shutil
from pathlib import Path

import pytest
import typer

from throughtime.app import demo, errors
from throughtime.app.demo import run_demo, source_files
from throughtime.errors import InputError

TINY = {"minutes": 0.02, "most_bytes": 60_000, "hidden": 8}


def test_the_library_is_read_in_a_fixed_order_without_tests_up_to_the_limit() -> None:
    files = list(source_files(300_000))
    assert files == list(source_files(300_000))
    assert sum(path.stat().st_size for path in files) <= 300_000
    assert [path.name for path in files] == sorted(path.name for path in files)
    everything = list(source_files(10**9))
    names = {part for path in everything for part in path.parts}
    assert not names & {"test", "tests", "site-packages", "idle_test"}
    assert any(path.parts[-2:] == ("json", "decoder.py") for path in everything)
    assert all(path.suffix == ".py" and path.stat().st_size for path in everything)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A demo that ran once already, and when its text was encoded."""
    folder = tmp_path_factory.mktemp("demo") / "demo-run"
    run_demo(folder, **TINY)
    return folder, (folder / "data" / "tokens.bin").stat().st_mtime


def test_numbers_stand_beside_those_of_n_grams_and_a_sample_follows(
    twice: tuple[Path, float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "LENGTH", 40)
    folder, encoded = twice
    (folder / "metrics.jsonl").write_text("of the run before")
    run_demo(folder, **TINY)
    out, err = capsys.readouterr()

    rows = re.findall(r"^  ([\w, -]+?) +(\d+\.\d{3}) +(\d+\.\d{3}) +([\d.]+) *$", out, re.MULTILINE)
    assert [name for name, *_ in rows[:3]] == ["unigram", "3-gram", "5-gram"]
    assert rows[3][0].startswith("LSTM")
    held_out = json.loads((folder / "results.json").read_text())["held_out"]
    assert float(rows[3][1]) == pytest.approx(held_out["nats_per_token"], abs=1e-3)
    assert all(float(bits) == pytest.approx(float(nats) / 0.6931, abs=0.002) for _, nats, bits, _ in rows)
    assert f"On {held_out['tokens']:,} characters" in out
    assert "def " in out.partition("A sample")[2]

    assert f"reused the encoded text in {folder / 'data'}" in err
    assert (folder / "data" / "tokens.bin").stat().st_mtime == encoded
    assert "of the run before" not in (folder / "metrics.jsonl").read_text()


def test_the_environment_is_named_where_it_is_beside(
    twice: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.sys, "prefix", str(tmp_path / ".venv"))
    assert demo._reused(Path("demo-run")) == "the encoded text in demo-run/data and the environment in .venv"


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo-run").mkdir()
    (tmp_path / "demo-run" / "config.json").write_text('{"mine": 1}')
    with pytest.raises(InputError):
        run_demo(tmp_path / "demo-run", **TINY)
    assert (tmp_path / "demo-run" / "config.json").read_text() == '{"mine": 1}'
    shutil.rmtree(tmp_path / "demo-run")
    (tmp_path / "demo-run").mkdir()
    (tmp_path / "demo-run" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="move away what stands there"):
        run_demo(tmp_path / "demo-run", **TINY)
    assert [path.name for path in (tmp_path / "demo-run").iterdir()] == ["letter.txt"]
    with pytest.raises(InputError, match="move away what stands there"):
        run_demo(tmp_path / "demo-run" / "letter.txt", **TINY)


def test_ctrl_c_ends_the_demo_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    monkeypatch.setattr(demo, "observed", lambda shown, run: lambda report: signal.raise_signal(signal.SIGINT))
    with pytest.raises(typer.Exit) as ended:
        run_demo(tmp_path / "demo-run", **TINY | {"minutes": 5})
    assert ended.value.exit_code == errors.INTERRUPTED
    assert f"throughtime train --resume {tmp_path / 'demo-run'}" in capsys.readouterr().err
