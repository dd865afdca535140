import shutil
import sys
from pathlib import Path

import pytest

from throughtime import InputError
from throughtime.app.plotting import _curve, plot_losses
from throughtime.lm.run import open_run


def test_a_picture_of_the_loss_is_put_in_the_run(throughtime, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    ended = throughtime("plot", tmp_path / "run")
    assert ended.code == 0
    assert ended.out.strip() == str(tmp_path / "run" / "loss.png")
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert throughtime("plot", tmp_path / "run", run, "--out", tmp_path / "both.svg").code == 0
    drawn = (tmp_path / "both.svg").read_text()
    assert "held out" in drawn or "<svg" in drawn


def test_steps_that_were_taken_anew_are_drawn_once(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    lines = [(1, 3.0), (5, 2.0), (9, 9.0), (4, 2.5), (8, 1.5)]
    text = "".join(f'{{"step": {step}, "seconds": {step}, "loss": {loss}}}\n' for step, loss in lines)
    (tmp_path / "run" / "metrics.jsonl").write_text(text + '{"event": "rollback", "step": 9, "to_step": 3}\n')
    opened = open_run(tmp_path / "run")
    assert [point["step"] for point in _curve(opened)] == [1, 4, 8]
    assert plot_losses([opened]).exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plot", "NEW"], "no such run"),
        (["plot", "RUN", "--out", "NEW/nowhere/loss.png"], "can't be drawn there: No such file"),
        (["plot", "RUN", "--out", "NEW.txt"], "can't be drawn there: "),
    ],
)
def test_what_cant_be_drawn(throughtime, run: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    placed = [word.replace("RUN", str(run)).replace("NEW", str(tmp_path / "new")) for word in arguments]
    ended = throughtime(*placed)
    assert ended.code == 2
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_a_run_without_metrics_and_a_missing_library_are_named(run: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="no metrics yet; train first"):
        plot_losses([open_run(tmp_path / "run")])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"needs matplotlib: pip install 'throughtime\[plot\]'"):
        plot_losses([open_run(run)])
