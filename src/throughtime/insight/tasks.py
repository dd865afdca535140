"""Long-memory tasks: what can only be answered by carrying something over many steps.

Each task draws sequences, says what the answer is, and has its published size, its chance level and its criterion. `solve` trains a
small network on it, stops on sequences set aside for that, scores it on others, and measures how far back its gradients
reach at the end, beside how far back the answer lies. Where a task differs from the published one is said with it.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from throughtime import init
from throughtime.errors import InputError, unknown_name
from throughtime.insight.gradient_flow import Horizon, horizon, lag_matrix
from throughtime.insight.recording import record_model
from throughtime.layers import GRU, LSTM, RNN
from throughtime.training.clipping import Clipping
from throughtime.training.denormals import flush_denormals

CELLS = ("mlp", "rnn", "gru", "lstm")
WINDOW = 8  # steps that the mlp sees
BATCH, TEST_ROWS, VALIDATE_EVERY = 64, 512, 100
Part = Literal["training", "validation", "test"]
_SEED_OF = {"validation": 2_000_000, "test": 1_000_000}  # added to the seed of what is trained on


class Example(NamedTuple):
    """A batch: inputs (T, B, I), and the answers: classes (N, B), or numbers (N, B), for the last N steps."""

    inputs: Float[Tensor, "T B I"]
    answers: Tensor


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: What it is called on the command line.
        source: Who published it, at which size.
        deviations: How this one differs from that.
        length: T.
        inputs: I.
        outputs: Width of the output: classes, or 1 for a number.
        lag: How far back, in steps, what the answer needs lies at most.
        chance: The score of who remembers nothing.
        solved_at: The score that counts as solved.
        criterion: What the score is and when the task is solved, in words.
        draw: `(rows, generator, part) -> Example`, for training, validation or the test.
        score: `(outputs of the last N steps (N, B, O), answers) -> ` a number, the higher the better.
    """

    name: str
    source: str
    deviations: str
    length: int
    inputs: int
    outputs: int
    lag: int
    chance: float
    solved_at: float
    criterion: str
    draw: Callable[[int, torch.Generator, Part], Example]
    score: Callable[[Tensor, Tensor], float]

    def loss(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Return the mean loss of the last N steps: cross-entropy in nats, or the squared error."""
        if self.outputs == 1:
            return mse_loss(outputs[..., 0], answers)
        return cross_entropy(outputs.flatten(0, 1), answers.flatten())


class Result(NamedTuple):
    """What training on a task came to.

    Attributes:
        cell: Which cell.
        seed: Which seed.
        hidden_size: H.
        parameters: How many numbers the network learns.
        solved: Whether the score on the test sequences meets the criterion.
        score: On the test sequences, which decided nothing.
        validation: On the sequences that training was stopped by.
        steps: Updates, up to where the validation sequences were solved.
        seconds: Time for them.
        horizon: Where, at the end, 1/1000 of the last step's gradient is left; `None` for an mlp, whose window it is.
    """

    cell: str
    seed: int
    hidden_size: int
    parameters: int
    solved: bool
    score: float
    validation: float
    steps: int
    seconds: float
    horizon: Horizon | None


def task_names() -> list[str]:
    """Return the tasks there are."""
    return list(_TASKS)


def make_task(name: str, length: int | None = None) -> Task:
    """Return a task by its name.

    Args:
        name: One of `task_names()`.
        length: T, or the delay of `copy`; `None` takes a size that is learned in about a minute.

    Raises:
        InputError: The name is unknown, or the length is too short for the task or fixed by its data.

    Example:
        >>> from throughtime import insight
        >>> task = insight.make_task("adding", 100)
        >>> task.lag, task.chance
        (99, 0.1536)
    """
    if name not in _TASKS:
        raise unknown_name("task", name, _TASKS)
    if length is not None and length < 10:
        raise InputError(f"--length {length}: expected at least 10 steps")
    return _TASKS[name](length)


def solve(
    task: Task,
    cell: str,
    *,
    hidden_size: int = 64,
    steps: int = 2000,
    learning_rate: float = 5e-3,
    initialisation: str | None = None,
    clip: float = 1.0,
    seed: int = 1,
    on_step: Callable[[int, float], None] | None = None,
) -> Result:
    """Train a network on a task until it solves sequences set aside for that, or the steps are used up; then test it on others.

    Args:
        task: The task.
        cell: "mlp" (which sees the last 8 steps), "rnn", "gru" or "lstm".
        hidden_size: H, one layer.
        steps: Most updates: Adam, batches of 64.
        learning_rate: Of Adam, falling to a tenth by a cosine.
        initialisation: As `init.initialise_` takes it; `None` is orthogonal, with gates that keep over the task's lag (chrono).
        clip: Largest global gradient norm; 0 is off.
        seed: Draws weights and sequences.
        on_step: Called with each step and its loss.

    Returns:
        What it came to; the score is of 512 sequences that were neither trained on nor stopped by.

    Example:
        >>> from throughtime import insight
        >>> insight.solve(insight.make_task("lag", 10), "gru", hidden_size=8, steps=300).solved
        True
    """
    if cell not in CELLS:
        raise unknown_name("cell", cell, CELLS)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(task, cell, hidden_size, initialisation)
    optimizer = torch.optim.Adam(network.parameters(), learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, learning_rate / 10)
    validation, test = (
        task.draw(TEST_ROWS, torch.Generator().manual_seed(seed + _SEED_OF[part]), part)
        for part in ("validation", "test")
    )
    clipping = Clipping(norm=clip)
    began, done, reached = time.perf_counter(), 0, -math.inf
    while done < steps and not reached >= task.solved_at:
        inputs, answers = task.draw(BATCH, generator, "training")
        with flush_denormals():
            loss = task.loss(network(inputs)[-len(answers) :], answers)
            optimizer.zero_grad()
            loss.backward()
            clipping.apply(network.parameters())
            optimizer.step()
        schedule.step()
        done += 1
        if on_step is not None:
            on_step(done, loss.item())
        if done % VALIDATE_EVERY == 0 or done == steps:
            reached = _score(task, network, validation)
    seconds, score, parameters = time.perf_counter() - began, _score(task, network, test), _count(network)
    outcome = (score >= task.solved_at, score, reached, done, seconds)
    return Result(cell, seed, hidden_size, parameters, *outcome, _horizon(task, network, test))


def equal_width(task: Task, cell: str, hidden_size: int) -> int:
    """Return the width at which a cell learns as many numbers as an LSTM of `hidden_size` units, as nearly as can be.

    Example:
        >>> from throughtime import insight
        >>> insight.equal_width(insight.make_task("adding"), "rnn", 64)
        130
    """
    if cell not in CELLS:
        raise unknown_name("cell", cell, CELLS)
    wanted = count_parameters(task, "lstm", hidden_size)
    low, high = 1, 2
    while count_parameters(task, cell, high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count_parameters(task, cell, middle) < wanted else (low, middle)
    return min((low, high), key=lambda width: abs(count_parameters(task, cell, width) - wanted))


def count_parameters(task: Task, cell: str, hidden_size: int) -> int:
    """Return how many numbers the network of a cell learns on a task."""
    with torch.device("meta"):
        return _count(_Network(task, cell, hidden_size, "default"))


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


class _Network(nn.Module):
    """A recurrent layer, or a window of the last steps, and a linear output at each step."""

    def __init__(self, task: Task, cell: str, hidden_size: int, initialisation: str | None) -> None:
        super().__init__()
        self.output = nn.Linear(hidden_size, task.outputs)
        if cell == "mlp":
            self.window = nn.Conv1d(task.inputs, hidden_size, WINDOW)
            self.recurrent = None
            return
        self.recurrent = {"rnn": RNN, "gru": GRU, "lstm": LSTM}[cell](task.inputs, hidden_size)
        keeping = "" if cell == "rnn" else f"+chrono:{max(3, task.lag)}"
        init.initialise_(self.recurrent, f"orthogonal{keeping}" if initialisation is None else initialisation)

    def forward(self, inputs: Float[Tensor, "T B I"]) -> Float[Tensor, "T B O"]:
        """Answer at each step."""
        if self.recurrent is not None:
            return self.output(self.recurrent(inputs)[0])
        padded = nn.functional.pad(inputs.permute(1, 2, 0), (WINDOW - 1, 0))
        return self.output(torch.tanh(self.window(padded)).permute(2, 0, 1))


@torch.no_grad()
def _score(task: Task, network: _Network, test: Example) -> float:
    return task.score(network(test.inputs)[-len(test.answers) :], test.answers)


def _horizon(task: Task, network: _Network, test: Example) -> Horizon | None:
    """Measure how far back the gradient of the last answer reaches."""
    if network.recurrent is None:
        return None
    rows = Example(test.inputs[:, :32], test.answers[:, :32])
    recorded = record_model(network, (rows.inputs,), lambda y: task.loss(y[-1:], rows.answers[-1:]))
    (lag,) = lag_matrix(*recorded, probes=1)
    return horizon(lag, 1e-3)


# The tasks ----------------------------------------------------------------------------------------------------------


def _adding(length: int | None) -> Task:
    steps = length or 100

    def draw(rows: int, generator: torch.Generator, _: Part) -> Example:
        values = 2 * torch.rand(steps, rows, generator=generator) - 1
        first = torch.randint(min(10, steps // 2 - 1), (rows,), generator=generator)
        second = (first + 1 + torch.randint(steps // 2 - 2, (rows,), generator=generator)) % (steps // 2 - 1)
        marks = torch.zeros(steps, rows)
        marks[0], marks[-1] = -1, -1
        each = torch.arange(rows)
        marks[first, each], marks[second, each] = 1, 1
        total = values[first, each] + values[second, each]
        return Example(torch.stack([values, marks], 2), (0.5 + total / 4)[None])

    return Task(
        "adding",
        "Hochreiter & Schmidhuber (1997), experiment 4: T 100 to 1000; values in [−1, 1], the answer is 0.5 + (X₁ + X₂)/4",
        "T is fixed, where theirs varies from T to 1.1 T; solved is 99 % of 512 sequences, where theirs is 2,000 in a row",
        *(steps, 2, 1, steps - 1),
        *(0.1536, 0.99, "share of answers that err by less than 0.04; solved at 0.99"),
        draw,
        lambda outputs, answers: ((outputs[..., 0] - answers).abs() < 0.04).double().mean().item(),
    )


def _adding_sum(length: int | None) -> Task:
    steps = length or 100

    def draw(rows: int, generator: torch.Generator, _: Part) -> Example:
        values, half, each = torch.rand(steps, rows, generator=generator), steps // 2, torch.arange(rows)
        first = torch.randint(half, (rows,), generator=generator)
        second = half + torch.randint(steps - half, (rows,), generator=generator)
        marks = torch.zeros(steps, rows)
        marks[first, each], marks[second, each] = 1, 1
        return Example(torch.stack([values, marks], 2), (values[first, each] + values[second, each])[None])

    return Task(
        "adding-sum",
        "Le, Jaitly & Hinton (2015) and Arjovsky et al. (2016): T 100 to 750; values in [0, 1], the answer is X₁ + X₂",
        "none but the size: T 100, and what counts as solved, which they don't say",
        *(steps, 2, 1, steps - 1),
        *(-1 / 6, -0.01, "minus the mean squared error, −0.167 for who always says 1; solved at −0.01"),
        draw,
        lambda outputs, answers: -mse_loss(outputs[..., 0], answers).item(),
    )


def _copy(length: int | None) -> Task:
    delay, count, symbols = length or 20, 10, 8
    steps = delay + 2 * count

    def draw(rows: int, generator: torch.Generator, _: Part) -> Example:
        said = torch.randint(symbols, (count, rows), generator=generator)
        ids = torch.full((steps, rows), symbols)  # blank
        ids[:count], ids[delay + count - 1] = said, symbols + 1  # the last: say it now
        return Example(one_hot(ids, symbols + 2).float(), said)

    return Task(
        "copy",
        "Hochreiter & Schmidhuber (1997), as in Arjovsky et al. (2016): 10 of 8 symbols, a delay of 100 to 1000",
        "the delay is 20 if not given; of all steps the ten of the answer are scored, among 8 symbols; theirs scores blanks too",
        *(steps, symbols + 2, symbols, delay + count),
        *(1 / symbols, 0.99, "share of the symbols that are recalled; solved at 0.99"),
        draw,
        _accuracy,
    )


def _order(length: int | None) -> Task:
    steps = length or 50

    def draw(rows: int, generator: torch.Generator, _: Part) -> Example:
        ids = torch.randint(4, (steps, rows), generator=generator)
        ids[0], ids[-1], each = 6, 7, torch.arange(rows)
        tenth = max(1, steps // 10)
        kinds = torch.randint(2, (2, rows), generator=generator)
        for kind, start in zip(kinds, (tenth, 5 * tenth), strict=True):
            at = start + torch.randint(tenth + 1, (rows,), generator=generator)
            ids[at, each] = 4 + kind
        return Example(one_hot(ids, 8).float(), (2 * kinds[0] + kinds[1])[None])

    return Task(
        "order",
        "Hochreiter & Schmidhuber (1997), experiment 6a, temporal order: T 100 to 110; the order of two X or Y among distractors",
        "T is fixed, and 50 if not given; where the symbols lie is scaled with it; solved is 99 % of 512 sequences",
        *(steps, 8, 4, steps - 1 - max(1, steps // 10)),
        *(0.25, 0.99, "share of the four orders told apart; solved at 0.99"),
        draw,
        _accuracy,
    )


def _lag(length: int | None) -> Task:
    steps = length or 100

    def draw(rows: int, generator: torch.Generator, _: Part) -> Example:
        first = torch.randint(2, (rows,), generator=generator)
        ids = torch.arange(1, steps + 1)[:, None].repeat(1, rows)
        ids[0] = first
        return Example(one_hot(ids, steps + 1).float(), first[None])

    return Task(
        "lag",
        "Hochreiter & Schmidhuber (1997), experiment 2a, noise-free sequences: lag 100; the last symbol is the first again",
        "only the last symbol is predicted, of two, where theirs predicts every next one of all symbols",
        *(steps, steps + 1, 2, steps - 1),
        *(0.5, 0.99, "share of the sequences ended rightly; solved at 0.99"),
        draw,
        _accuracy,
    )


def _digits(length: int | None) -> Task:
    if length not in (None, 64):
        raise InputError(f"--length {length}: the digits are 8 × 8, so their length is 64; leave it out")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the task digits needs scikit-learn, which is not installed; pip install 'throughtime[tasks]'"
        ) from error
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    images, fifth = images.float() / 16, torch.arange(len(labels)) % 5
    parts = {"test": fifth == 0, "validation": fifth == 1, "training": fifth > 1}

    def draw(rows: int, generator: torch.Generator, part: Part) -> Example:
        among = parts[part].nonzero()[:, 0]
        chosen = among[torch.randint(len(among), (rows,), generator=generator)] if part == "training" else among
        return Example(images[chosen].T[:, :, None], labels[chosen][None])

    return Task(
        "digits",
        "after the pixel-by-pixel MNIST of Le, Jaitly & Hinton (2015), T 784; here the 1,797 digits of scikit-learn, 8 × 8",
        "8 × 8 digits, 64 steps, in place of MNIST's 28 × 28, 784; a fifth is for the test, a fifth for stopping",
        *(64, 1, 10, 63),
        *(0.1, 0.9, "share of the held-out fifth read rightly; solved at 0.9"),
        draw,
        _accuracy,
    )


def _accuracy(outputs: Tensor, answers: Tensor) -> float:
    return (outputs.argmax(2) == answers).double().mean().item()


_TASKS: dict[str, Callable[[int | None], Task]] = {
    "adding": _adding,
    "adding-sum": _adding_sum,
    "copy": _copy,
    "order": _order,
    "lag": _lag,
    "digits": _digits,
}
