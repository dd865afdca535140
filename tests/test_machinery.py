"""docs/torch.md says what happens: each row of its table is computed again, and its examples run."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import machinery

PAGE = (Path(__file__).parents[1] / "docs" / "torch.md").read_text()
TABLE = PAGE.split("<!-- machinery -->\n")[1].split("<!-- /machinery -->")[0].splitlines()

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_page_has_a_row_for_all_there_is_and_nothing_wrong():
    assert TABLE[0] == f"|  | {' | '.join(machinery.CELLS)} |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in TABLE[2:]] == list(machinery.MACHINERY)
    fields = [field.strip() for line in TABLE[2:] for field in line.strip("| ").split(" | ")[1:]]
    assert set(fields) <= {machinery.WORKS, machinery.REFUSED, machinery.NONE}


@pytest.mark.parametrize("line", TABLE[2:], ids=lambda line: re.sub(r"\W+", " ", line.split(" | ")[0]).strip())
def test_each_row_is_what_happens(line):
    name, *said = (field.strip() for field in line.removeprefix("| ").removesuffix(" |").split(" | "))
    check = machinery.MACHINERY[name]
    assert dict(zip(machinery.CELLS, said, strict=True)) == {
        cell: machinery.outcome(check, make) for cell, make in machinery.CELLS.items()
    }


def test_whatever_fails_otherwise_is_wrong():
    def fails(make):
        raise RuntimeError("expected something else")

    def differs(make):
        torch.testing.assert_close(torch.zeros(1), torch.ones(1))

    def refuses(make):
        raise TypeError("use throughtime.to_torch(model)")

    outcomes = [
        machinery.outcome(check, machinery.CELLS["GRU"]) for check in (fails, differs, refuses, lambda make: None)
    ]
    assert [o.split(":")[0] for o in outcomes] == ["wrong", "wrong", "refused", "works"]


def test_the_examples_run():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    assert type(names["known"][0]) is torch.nn.LSTM
    assert [part.requires_grad for part in names["learned"]] == [True, True]
