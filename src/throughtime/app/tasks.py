"""`throughtime task`: train small networks on a long-memory task and say who solves it."""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from throughtime.app.counts import check_counts
from throughtime.app.terminal import Show, duration, number, under_way

if TYPE_CHECKING:
    from throughtime.insight.tasks import Result, Task


def run_task(
    task: "Task", cells: Sequence[str], widths: Mapping[str, int], seeds: Sequence[int], **options: Any
) -> "Iterator[Result]":
    """Train each cell in turn with each seed; what is under way is told on stderr."""
    from throughtime.insight.tasks import solve

    for cell, seed in itertools.product(cells, seeds):
        name = f"{cell}, seed {seed}" if len(seeds) > 1 else cell
        with under_way(f"{name}: starting") as show:

            def on_step(step: int, loss: float, name: str = name, show: Show = show) -> None:
                show(f"{name}: step {step:,} of {options['steps']:,}, loss {loss:.4f}")

            result = solve(task, cell, hidden_size=widths[cell], seed=seed, **options, on_step=on_step)
        yield result


def widths_of(task: "Task", cells: Sequence[str], hidden: int, equal_size: bool) -> dict[str, int]:
    """Return each cell's width: the same, or that at which it learns as many numbers as an LSTM of `hidden` units."""
    from throughtime.insight.tasks import equal_width

    return {cell: equal_width(task, cell, hidden) if equal_size else hidden for cell in cells}


def check_sizes(task: "Task", hidden: int, steps: int, seeds: int) -> None:
    """Refuse what can't be trained.

    Raises:
        InputError: A number is out of its range, or there is not enough memory for it.
    """
    from throughtime.insight.tasks import TEST_ROWS
    from throughtime.lm.memory import check_free

    check_counts(hidden=hidden, steps=steps, seeds=seeds)
    weights, activity = 4 * hidden * (hidden + task.inputs + 2), task.length * TEST_ROWS * (6 * hidden + task.inputs)
    check_free(
        4 * (4 * weights + activity), f"{task.name} with T {task.length} and --hidden {hidden}", "--length or --hidden"
    )


def describe(task: "Task", console: Console) -> None:
    """Print what a task is."""
    console.print(Text(f"{task.name}: T {task.length}, the answer lies up to {task.lag} steps back", "bold"))
    console.print(f"after {task.source.removeprefix('after ')}", soft_wrap=True)
    console.print(f"differs: {task.deviations}", soft_wrap=True)
    console.print(f"score: {task.criterion}; by chance {number(task.chance)}", soft_wrap=True)
    console.print("it is of sequences kept for this test; others say when to stop training\n")
    console.print(
        f"{'cell':6}{'H':>4}{'weights':>9}  {'':11}{'score':>8}{'steps':>8}{'time':>8}   1/1000 of the answer's gradient"
    )


def print_result(result: "Result", task: "Task", console: Console) -> None:
    """Print what one cell came to: its score, and the horizon it has beside the one that it needs."""
    verdict = "solved" if result.solved else "not solved"
    figures = f"{number(result.score):>8}{result.steps:>8,}{duration(result.seconds):>8}"
    sizes = f"{result.hidden_size:>4}{result.parameters:>9,}"
    line = f"{result.cell:6}{sizes}  {verdict:11}{figures}   {_reach(result, task)}"
    console.print(Text(line, "green" if result.solved else ""), soft_wrap=True)


def print_spread(results: "Sequence[Result]", console: Console) -> None:
    """Print what each cell came to over its seeds."""
    console.print()
    for cell in dict.fromkeys(result.cell for result in results):
        of_cell = [result for result in results if result.cell == cell]
        scores, steps = [r.score for r in of_cell], [r.steps for r in of_cell]
        solved = f"solved {sum(r.solved for r in of_cell)} of {len(of_cell)}"
        middle, low, high = statistics.median(scores), min(scores), max(scores)
        spread = f"score {number(middle)} ({number(low)} to {number(high)}), steps {min(steps):,} to {max(steps):,}"
        console.print(f"{cell:6}{solved}, {spread}", soft_wrap=True)


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
        return f"at lag {WINDOW}, its window; {task.lag} needed"
    lag = result.horizon.lag
    return f"at lag {lag:.0f}; {task.lag} needed" if lag < math.inf else f"nowhere; {task.lag} needed"
