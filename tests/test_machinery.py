"""docs/torch.md says what happens: each row of its table is computed again, and its examples run."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import machinery

PAGE = (Path(__file__).parents[1] / "docs" / "torch.md").read_text()
TABLES = {
    "machinery": (machinery.MACHINERY, machinery.LAYERS),
    "machinery of cells": (machinery.OF_CELLS, machinery.CELLS),
}


def lines(name: str) -> list[str]:
    return PAGE.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0].splitlines()


ROWS = [
    pytest.param(
        name,
        line,
        id=re.sub(r"\W+", " ", f"{name} {line.split(' | ')[0]}").strip(),
        marks=[pytest.mark.slow, pytest.mark.timeout(900)] if "dynamo=True" in line else [],
    )
    for name in TABLES
    for line in lines(name)[2:]
]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", TABLES)
def test_the_page_has_a_row_for_all_there_is_and_nothing_wrong(name):
    rows, columns = TABLES[name]
    head, _, *said = lines(name)
    assert head == f"|  | {' | '.join(columns)} |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in said] == list(rows)
    fields = [field.strip() for line in said for field in line.strip("| ").split(" | ")[1:]]
    assert set(fields) <= {machinery.WORKS, machinery.REFUSED, machinery.NONE}


@pytest.mark.parametrize(("table", "line"), ROWS)
def test_each_row_is_what_happens(table, line):
    rows, columns = TABLES[table]
    name, *said = (field.strip() for field in line.removeprefix("| ").removesuffix(" |").split(" | "))
    assert dict(zip(columns, said, strict=True)) == {
        column: machinery.outcome(rows[name], make) for column, make in columns.items()
    }


def test_whatever_fails_otherwise_is_wrong():
    def fails(make):
        raise RuntimeError("expected something else")

    def differs(make):
        torch.testing.assert_close(torch.zeros(1), torch.ones(1))

    def refuses(make):
        raise TypeError("use throughtime.to_torch(model)")

    outcomes = [
        machinery.outcome(check, machinery.LAYERS["GRU"]) for check in (fails, differs, refuses, lambda make: None)
    ]
    assert [o.split(":")[0] for o in outcomes] == ["wrong", "wrong", "refused", "works"]


def test_the_examples_run(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="the extra throughtime[onnx] isn't installed")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    assert type(names["known"][0]) is torch.nn.LSTM
    assert repr(names["layers"]) == "{'all_0': GRU(5, 8)}"
    assert [part.requires_grad for part in names["learned"]] == [True, True]
