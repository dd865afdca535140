import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from throughtime import InputError
from throughtime.app.plotting import _drawn, plot_losses
from throughtime.lm.metrics import line_of
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
    records = [{"step": step, "seconds": step, "loss": loss} for step, loss in lines]
    records.append({"event": "rollback", "step": 9, "to_step": 3})
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(map(line_of, records)))
    opened = open_run(tmp_path / "run")
    assert [point["step"] for point in _drawn(opened, False).curve] == [1, 4, 8]
    assert plot_losses([opened]).exists()


def _named(run: Path, folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        shutil.copytree(run, path)
    return paths


def test_a_file_without_a_suffix_is_the_file_that_is_said(throughtime, run: Path, tmp_path: Path) -> None:
    ended = throughtime("plot", run, "--out", tmp_path / "picture")
    assert ended.out.strip() == str(tmp_path / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_every_name_is_in_the_legend_as_it_is(throughtime, run: Path, tmp_path: Path, monkeypatch) -> None:
    """Warnings are errors here: a letter that no font has may not warn either."""
    from matplotlib.figure import Figure

    drawn: list[list[str]] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *args, **more: (
            drawn.append([text.get_text() for text in self.axes[0].get_legend().get_texts()]),
            save(self, *args, **more),
        ),
    )
    names = ["_x", "a$^$b", "$", "b\udce9", "e\x1b[2Jf", "g\u202eh"]
    paths = _named(run, tmp_path, *names, "中文", "\U000e0041\U0001fae8")
    ended = throughtime("plot", *paths, "--out", tmp_path / "all.png")
    assert ended.code == 0
    shown = [name for name in drawn[0] if not name.startswith("held out")]
    assert shown[:6] == ["_x", "a$^$b", "$", "b\\udce9", "e\\x1b[2Jf", "g\\u202eh"]
    assert shown[6] in ("中文", "\\u4e2d\\u6587")
    assert throughtime("plot", paths[3]).out.strip() == str(tmp_path / "b\\udce9" / "loss.png")


def test_tokens_of_different_kinds_are_drawn_in_bits_per_character(
    throughtime, run: Path, text: Path, tmp_path: Path
) -> None:
    small = ("--steps", 12, "--hidden", 8, "--batch", 4, "--bptt", 16)
    assert throughtime("train", text, "--out", tmp_path / "words", "--level", "word", *small).code == 0
    assert throughtime("plot", run, "--out", tmp_path / "one.svg").code == 0
    assert throughtime("plot", run, tmp_path / "words", "--out", tmp_path / "two.svg").code == 0
    assert "nats per token" in (tmp_path / "one.svg").read_text()
    assert "bits per character" in (tmp_path / "two.svg").read_text()
    assert (
        f"held out: {open_run(tmp_path / 'words').results['held_out']['bits_per_character']:.3f}"
        in (tmp_path / "two.svg").read_text()
    )


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


def test_a_picture_that_cant_be_written_leaves_the_one_that_is_there(
    throughtime, run: Path, tmp_path: Path, monkeypatch
) -> None:
    picture, link = tmp_path / "picture.png", tmp_path / "link.png"
    picture.write_bytes(b"before")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("throughtime.training.files.put_in_place", full)
        ended = throughtime("plot", run, "--out", picture)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "picture.png: can't be drawn there: No space left on device" in ended.err
    assert picture.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    link.symlink_to(picture)
    assert throughtime("plot", run, "--out", link).code == 0
    assert link.is_symlink()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_matplotlib_notes_of_its_folders_is_not_said(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    command = [sys.executable, "-m", "throughtime", "plot", str(run), "--out", str(tmp_path / "loss.png")]
    settings = os.environ | {"MPLCONFIGDIR": str(tmp_path / "file")}
    ended = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
