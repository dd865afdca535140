"""`throughtime task`: train small networks on a long-memory task and say who solves it."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from throughtime.app.progress import duration
from throughtime.app.terminal import messages, number
from throughtime.errors import InputError

if TYPE_CHECKING:
    from throughtime.insight.tasks import Result, Task


def run_task(task: "Task", cells: Sequence[str], **options: Any) -> "Iterator[Result]":
    """Train each cell in turn; what is under way shows on stderr where that is a terminal."""
    from throughtime.insight.tasks import solve

    for name, value in options.items():
        if value is not None and name in ("hidden_size", "steps") and value < 1:
            raise InputError(f"--{name.split('_')[0]} {value}: expected a whole number, at least 1")
    console = messages()
    for cell in cells:
        if not console.is_terminal:
            yield solve(task, cell, **options)
            continue
        with console.status(f"{cell}: starting") as status:

            def show(step: int, loss: float, cell: str = cell) -> None:
                status.update(f"{cell}: step {step:,} of {options['steps']:,}, loss {loss:.4f}")

            result = solve(task, cell, **options, on_step=show)
        yield result


def describe(task: "Task", console: Console) -> None:
    """Print what a task is."""
    console.print(Text(f"{task.name}: T {task.length}, the answer lies up to {task.lag} steps back", "bold"))
    console.print(task.source, soft_wrap=True)
    console.print(f"score: {task.criterion}; by chance {number(task.chance)}\n", soft_wrap=True)
    console.print(f"{'cell':6}{'':12}{'score':>8}{'steps':>8}{'time':>8}   gradient of the answer: 1/1000 is left at")


def print_result(result: "Result", task: "Task", console: Console) -> None:
    """Print what one cell came to: its score, and the horizon it has beside the one that it needs."""
    verdict = "solved" if result.solved else "not solved"
    figures = f"{number(result.score):>8}{result.steps:>8,}{duration(result.seconds):>8}"
    line = f"{result.cell:6}{verdict:12}{figures}   {_reach(result, task)}"
    console.print(Text(line, "green" if result.solved else ""), soft_wrap=True)


def task_record(result: "Result", task: "Task") -> dict[str, Any]:
    """Return a result as JSON holds it; a horizon beyond the sequence is null."""
    reach = result.horizon
    return {
        "task": task.name,
        "length": task.length,
        "lag": task.lag,
        "chance": task.chance,
        "solved_at": task.solved_at,
        **result._asdict(),
        "horizon": None if reach is None or reach.lag == math.inf else reach.lag,
    }


def _reach(result: "Result", task: "Task") -> str:
    from throughtime.insight.tasks import WINDOW

    if result.horizon is None:
        return f"lag {WINDOW}, its window; {task.lag} needed"
    lag = result.horizon.lag
    return f"lag {lag:.0f}; {task.lag} needed" if lag < math.inf else f"no lag; {task.lag} needed"
