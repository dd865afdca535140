"""What a person reads who asks what there is."""

import os
import re
import subprocess
import sys

import pytest

from throughtime.app import cli

GROUP = cli.typer.main.get_command(cli.app)
COMMANDS = sorted(GROUP.commands)


def _options(command: str) -> list:
    context = cli.typer.Context(GROUP.commands[command])
    return [p for p in GROUP.commands[command].get_params(context) if p.param_type_name == "option"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_eighty_columns_and_cuts_no_name(command, throughtime):
    shown = throughtime(command, "--help").out
    for line in shown.splitlines():
        assert len(line) <= 80 or line.startswith("  Example")
    assert "…" not in shown.replace("FILE_OR_FOLDER…", "").replace("RUN_OR_CELL…", "").replace("RUN…", "").replace(
        "train …", ""
    )
    for option in _options(command):
        for name in option.opts:
            assert name in shown or name.replace("--", "--[no-]", 1) in shown
    for kind in ("<bool>", "<path>", "<str>", "list["):
        assert kind not in shown
    assert throughtime(command, "-h").out == shown


def test_the_list_of_commands_says_in_a_sentence_or_two_what_each_is_for(throughtime):
    shown = throughtime("--help").out
    panel = re.split(r"^\s*$", shown.partition("Commands\n")[2], maxsplit=1, flags=re.M)[0]
    told = re.split(r"^  (?=\w)", panel, flags=re.M)[1:]
    assert [row.split()[0] for row in told] == [*GROUP.commands]
    for row in told:
        assert len(row.strip().splitlines()) <= 2, row


def test_a_flag_that_can_be_turned_off_is_one_name(throughtime):
    assert "--[no-]split-punctuation" in throughtime("train", "-h").out


def test_no_panel_of_training_is_longer_than_a_screen(throughtime):
    panels = re.split(r"^(?=\w)", throughtime("train", "-h").out, flags=re.M)
    assert len(panels) > 8
    for panel in panels:
        assert panel.count("\n  --") <= 12, panel.partition("\n")[0]
    (optimisation,) = (panel for panel in panels if panel.startswith("Optimisation"))
    assert "--device" not in optimisation
    assert "--tensorboard" not in optimisation


def test_the_version_is_told(throughtime):
    ended = throughtime("--version")
    assert ended.code == 0
    assert re.fullmatch(r"throughtime \S+ \(torch \S+, Python \S+\)\n", ended.out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "x", "--temp", "1"], "did you mean --temperature?"),
        (["version"], "unknown command 'version'; did you mean --version?"),
        (["hlep"], "unknown command 'hlep'. Known: train, "),
        (["train", "x", "--no-locke"], "did you mean --no-locked?"),
        (["train", "x", "--zz", "1"], "unknown option --zz; 'throughtime train --help' explains the options"),
    ],
)
def test_what_is_meant_is_guessed_by_its_letters_and_not_by_its_dashes(arguments, said, throughtime):
    ended = throughtime(*arguments)
    assert ended.code == 2
    assert said in ended.err


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("throughtime tr", "train"),
        ("throughtime train --hid", "--hidden"),
        ("throughtime sample --temp", "--temperature"),
    ],
)
def test_a_shell_completes_commands_and_options(words, completed):
    asked = {
        "_THROUGHTIME_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    ended = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'throughtime'; from throughtime.app.cli import main; sys.exit(main())"],
        env=os.environ | asked, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 0
    assert completed in ended.stdout.split()


def test_completion_is_shown_for_a_shell_and_an_unknown_shell_is_bad_input():
    command = [sys.executable, "-m", "throughtime"]
    asked = os.environ | {"_THROUGHTIME_COMPLETE": "source_zsh"}
    assert (
        "compdef" in subprocess.run(command, env=asked, capture_output=True, text=True, timeout=60, check=True).stdout
    )
    asked = os.environ | {"_THROUGHTIME_COMPLETE": "source_nosuch"}
    assert subprocess.run(command, env=asked, capture_output=True, text=True, timeout=60, check=False).returncode == 2
