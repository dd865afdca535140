"""`throughtime task`: train small networks on a long-memory task and say who solves it."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from throughtime.app.terminal import Show, duration, number, under_way
from throughtime.errors import InputError

if TYPE_CHECKING:
    from throughtime.insight.tasks import Result, Task


def run_task(task: "Task", cells: Sequence[str], **options: Any) -> "Iterator[Result]":
    """Train each cell in turn; what is under way is told on stderr."""
    from throughtime.insight.tasks import solve

    for cell in cells:
        with under_way(f"{cell}: starting") as show:

            def on_step(step: int, loss: float, cell: str = cell, show: Show = show) -> None:
                show(f"{cell}: step {step:,} of {options['steps']:,}, loss {loss:.4f}")

            result = solve(task, cell, **options, on_step=on_step)
        yield result


def check_sizes(task: "Task", hidden: int, steps: int) -> None:
    """Refuse what can't be trained.

    Raises:
        InputError: A number is below 1, or there is not enough memory for it.
    """
    from throughtime.insight.tasks import TEST_ROWS
    from throughtime.lm.memory import check_free

    for flag, value in (("--hidden", hidden), ("--steps", steps)):
        if value < 1:
            raise InputError(f"{flag} {value}: expected a whole number, at least 1")
    weights, activity = 4 * hidden * (hidden + task.inputs + 2), task.length * TEST_ROWS * (6 * hidden + task.inputs)
    check_free(
        4 * (4 * weights + activity), f"{task.name} with T {task.length} and --hidden {hidden}", "--length or --hidden"
    )


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
