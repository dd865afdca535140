"""`throughtime explain WORD`: the worked example as tables that a student can follow with a pencil."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor

from throughtime.app import pages
from throughtime.app.terminal import number, visible
from throughtime.insight.worked_example import (
    Backward,
    Descent,
    Forward,
    Progress,
    Update,
    Weights,
    Word,
    backward,
    forward,
    initial_weights,
    steps_back,
    train,
    usual_hidden_size,
)

MOST_STEPS = 12  # rows of a table; a longer word shows its first and last steps
MOST_UNITS = 6  # rows and columns of a matrix over hidden units
_BAR = 24
_NUMBER = 7  # columns that a number takes, with its sign and a space

Indices = list[int | None]  # what to show of an axis; None stands for what is left out


def explain(text: str, console: Console, *, hidden_size: int | None = None, seed: int = 1, descent: Descent) -> None:
    """Print the one-hot recurrent network of a word, every number of it, and train it until it spells the word.

    Args:
        text: The word; of more than `worked_example.LONGEST` letters the first ones are explained.
        console: Where to print; its width decides how much of a wide table is shown.
        hidden_size: H; `None` takes 3, or half the letters of a long word.
        seed: Draws the initial weights.
        descent: Learning rate and clipping.

    Raises:
        InputError: The word or a setting can't be used.
    """
    word = Word.read(text)
    weights = initial_weights(word, usual_hidden_size(word) if hidden_size is None else hidden_size, seed)
    page = _Page(console, word, weights)
    ahead, back = forward(word, weights), backward(word, weights)
    update = descent.update(weights, back.gradient)

    page.introduce(seed)
    page.show_weights()
    page.show_states(ahead)
    page.show_losses(ahead)
    page.show_gradient(back)
    page.show_reach(back)
    page.show_update(ahead, update, descent)
    page.show_training(train(word, weights, descent))


def write_page(text: str, path: Path, *, hidden_size: int | None = None, seed: int = 1, descent: Descent) -> None:
    """Write the same worked example as a web page that is stepped through; arguments and errors as in `explain`."""
    word = Word.read(text)
    weights = initial_weights(word, usual_hidden_size(word) if hidden_size is None else hidden_size, seed)
    name = visible(word.letters)
    pages.write(path, "explain", f"throughtime explain {name}", page_data(word, weights, seed, descent))


def page_data(word: Word, weights: Weights, seed: int, descent: Descent) -> dict[str, Any]:
    """Return every number of the worked example as JSON holds it."""
    ahead, back = forward(word, weights), backward(word, weights)
    update = descent.update(weights, back.gradient)
    trained = list(train(word, weights, descent))
    due = [0, 1]
    while due[-1] < len(trained):
        due.append(_next_round_number(due[-1]))
    shown = [i for i in due if i < len(trained) - 1] + [len(trained) - 1]
    return {
        "word": visible(word.letters),
        "given": word.given,
        "letters": [visible(letter) for letter in word.vocabulary],
        "ids": word.ids,
        "seed": seed,
        "descent": {"learning_rate": descent.learning_rate, "clip": descent.clip},
        "weights": _lists(weights),
        "forward": _lists(ahead),
        "backward": {
            "steps": [
                _lists(step.parts) | {name: getattr(step, name).tolist() for name in ("y", "own", "later", "h", "a")}
                for step in steps_back(word, weights)
            ],
            "per_loss": back.per_step.tolist(),
            "reach": back.reach.tolist(),
            "gradient": _lists(back.gradient),
            "autograd": back.autograd.hh.tolist(),
            "discrepancy": back.discrepancy,
        },
        "update": {
            "norm": update.norm,
            "scale": update.scale,
            "gradient": _lists(update.gradient),
            "weights": _lists(update.weights),
            "loss_before": float(ahead.losses.sum()),
            "loss_after": float(forward(word, update.weights).losses.sum()),
        },
        "training": {
            "losses": [at.loss for at in trained],
            "norms": [at.norm for at in trained],
            "shown": shown,
            "spelled": [visible(trained[i].spelled) for i in shown],
            "is_spelled": trained[-1].spelled == word.letters,
        },
    }


def _lists(tensors: Weights | Forward) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in tensors._asdict().items()}


class _Page:
    """One word's tables on one console."""

    def __init__(self, console: Console, word: Word, weights: Weights) -> None:
        self.console = console
        self.word = word
        self.weights = weights
        self.letters = [visible(letter) for letter in word.vocabulary]
        self.steps = _abbreviate(word.steps, MOST_STEPS)
        self._at_gap = False
        self.units = _abbreviate(weights.hh.shape[0], MOST_UNITS)

    def introduce(self, seed: int) -> None:
        word, (hidden, size) = self.word, self.weights.xh.shape
        self._heading(f"{visible(word.letters)}: the one-hot recurrent network of a word")
        if word.given > len(word.letters):
            self._say(f"The first {len(word.letters)} of its {word.given:,} letters.")
        table = Table.grid(padding=(0, 3))
        table.add_column(style="dim")
        table.add_row("input", Text(" ".join(visible(letter) for letter in word.letters[:-1])))
        table.add_row("target", Text(" ".join(visible(letter) for letter in word.letters[1:])))
        table.add_row("vocabulary", Text(f"{' '.join(self.letters)}   (V = {size}; x_t has a 1 at its letter's place)"))
        table.add_row("hidden units", f"H = {hidden}, h_0 = 0")
        table.add_row(
            "parameters",
            f"{2 * hidden * size + hidden**2} in W_xh, W_hh, W_hy: drawn between −1/√H and 1/√H, seed {seed}",
        )
        table.add_row("memory", self._memory())
        self._print(table)

    def show_weights(self) -> None:
        self._heading("1  Weights")
        letters = self._letters(fixed=4)
        self._matrices(
            [
                self._matrix("W_xh", self.weights.xh, self.units, letters, column_names=self.letters),
                self._matrix("W_hh", self.weights.hh, self.units, self.units),
                self._matrix("W_hy", self.weights.hy, letters, self.units, row_names=self.letters),
            ]
        )

    def show_states(self, ahead: Forward) -> None:
        self._heading("2  Hidden state", "h_t = tanh(W_xh x_t + W_hh h_{t−1})")
        wide = len(self.letters) <= 12
        table = _table(
            "t", "in", "x_t" if wide else "x_t is 1 at", "unit", "W_xh x_t", "W_hh h_{t−1}", "h_t", left=("in", "x_t")
        )
        for t in self.steps:
            if t is None:
                table.add_row(*["⋮"] * 7, style="dim")
                continue
            place = self.word.ids[t]
            x = " ".join("1" if v == place else "0" for v in range(len(self.letters))) if wide else str(place + 1)
            start = [str(t + 1), self.letters[place], x]
            for unit in self.units:
                if unit is None:
                    table.add_row("", "", "", *["⋮"] * 4, style="dim")
                    continue
                values = (ahead.from_input[t, unit], ahead.from_state[t, unit])
                table.add_row(
                    *start,
                    str(unit + 1),
                    *(number(float(v)) for v in values),
                    Text(number(float(ahead.h[t, unit])), "bold"),
                )
                start = ["", "", ""]
        self._print(table)

    def show_losses(self, ahead: Forward) -> None:
        self._heading("3  Output and loss", "y_t = W_hy h_t    p_t = softmax(y_t)    L_t = −ln p_t[target]")
        letters = self._letters(fixed=28)
        names = ["…" if v is None else self.letters[v] for v in letters]
        table = _table("t", "in → target", "", *names, "L_t", left=("in → target",))
        for t in self.steps:
            if t is None:
                table.add_row(*["⋮"] * (4 + len(letters)), style="dim")
                continue
            target = self.word.ids[t + 1]
            arrow = Text(f"{self.letters[self.word.ids[t]]} → {self.letters[target]}")
            table.add_row(str(t + 1), arrow, "y_t", *_numbers(ahead.y[t], letters), "")
            row = _numbers(ahead.p[t], letters, marked=target)
            table.add_row("", "", "p_t", *row, Text(number(float(ahead.losses[t])), "bold"))
        total = Text(number(float(ahead.losses.sum())), "bold")
        table.add_section()
        table.add_row("", "L = Σ_t L_t", "", *[""] * len(letters), total)
        self._print(table)
        guessing = self.word.steps * math.log(len(self.letters))
        self._say(f"For comparison, guessing every letter alike costs T ln V = {number(guessing)} nats.")

    def show_gradient(self, back: Backward) -> None:
        self._heading("4  Backpropagation through time", "∂L/∂W_hh = Σ_t ∂L_t/∂W_hh")
        self._say("Each step's loss, sent back through time on its own:")
        matrices: list[RenderableType] = [
            Text("…", "dim")
            if t is None
            else self._matrix(f"∂L_{t + 1}/∂W_hh", back.per_step[t], self.units, self.units)
            for t in _abbreviate(self.word.steps, 6)
        ]
        self._matrices(matrices)
        self._say("Their sum, the gradient of one backward pass, and torch.autograd's:")
        self._matrices(
            [
                self._matrix("Σ_t ∂L_t/∂W_hh", back.total, self.units, self.units),
                self._matrix("one pass", back.gradient.hh, self.units, self.units),
                self._matrix("torch.autograd", back.autograd.hh, self.units, self.units),
            ]
        )
        self._say(f"Equal: they differ by at most {back.discrepancy:.0e} (rounding in float64).")

    def show_reach(self, back: Backward) -> None:
        self._heading("5  How far each loss reaches back", "‖∂L_t/∂h_k‖, k ≤ t")
        columns = _abbreviate(self.word.steps, max(3, (self._width() - 10) // (_NUMBER + 1)))
        table = _table("", *("…" if k is None else f"k = {k + 1}" for k in columns))
        for t in self.steps:
            if t is None:
                table.add_row(*["⋮"] * (1 + len(columns)), style="dim")
                continue
            row = ["⋯" if k is None else number(float(back.reach[t, k])) if k <= t else "" for k in columns]
            table.add_row(f"L_{t + 1}", *row)
        self._print(table)
        self._say(
            "Each step to the left multiplies by W_hhᵀ diag(1 − h_k²): this is where gradients vanish or explode."
        )

    def show_update(self, ahead: Forward, update: Update, descent: Descent) -> None:
        self._heading(
            "6  One update", f"g ← g · min(1, c/‖g‖)    W ← W − η g, learning rate η = {descent.learning_rate:g}"
        )
        self._say(_clipping(update, descent))
        letters = self._letters(fixed=4)
        axes = {"xh": (self.units, letters), "hh": (self.units, self.units), "hy": (letters, self.units)}
        rate = f"{descent.learning_rate:g}"
        for name, (rows, columns) in axes.items():
            names = (
                {"column_names": self.letters} if name == "xh" else {"row_names": self.letters} if name == "hy" else {}
            )
            old, grad, new = (getattr(source, name) for source in (self.weights, update.gradient, update.weights))
            self._matrices(
                [
                    self._matrix(f"W_{name}", old, rows, columns, **names),
                    self._matrix(f"g = ∂L/∂W_{name}", grad, rows, columns, **names),
                    self._matrix(f"W_{name} − {rate} g", new, rows, columns, **names),
                ]
            )
        after = float(forward(self.word, update.weights).losses.sum())
        self._say(f"The loss goes from {number(float(ahead.losses.sum()))} to {number(after)} nats.")

    def show_training(self, training: Iterator[Progress]) -> None:
        self._heading("7  Training", "the same update again, until the network spells the word")
        began = time.perf_counter()
        self._print(Text(f"{'updates':>7}  {'loss':>7}  {'‖g‖':>14}  {'':{_BAR}}  spells", "dim"))
        first = last = next(training)
        self._say_progress(first, first.loss)
        due = 1
        for last in training:
            spelled = last.spelled == self.word.letters
            if last.updates >= due or spelled:
                self._say_progress(last, first.loss)
                due = _next_round_number(due)
        seconds = time.perf_counter() - began
        name = visible(self.word.letters)
        if last.spelled == self.word.letters:
            self._say(f"It spells {name} after {last.updates:,} updates, {seconds:.2f} s of training.")
        else:
            self._say(
                f"It doesn't spell {name} after {last.updates:,} updates: try a larger --hidden or another --seed."
            )

    def _say_progress(self, progress: Progress, first_loss: float) -> None:
        filled = "━" * round(_BAR * min(1.0, progress.loss / first_loss))
        norm = number(progress.norm) + (" clipped" if progress.clipped else " " * 8)
        line = Text(f"{progress.updates:>7,}  {number(progress.loss):>7}  {norm:>14}  ")
        line.append(f"{filled:{_BAR}}", "cyan").append("  ")
        done = progress.spelled == self.word.letters
        self.console.print(
            Text("  ") + line.append(visible(progress.spelled), "bold green" if done else ""),
            no_wrap=True,
            overflow="ellipsis",
        )

    def _memory(self) -> Text:
        """Say which letter, if any, is followed by different ones."""
        several = {letter: after for letter, after in self.word.followers.items() if len(after) > 1}
        if not several:
            return Text("not needed: each letter is always followed by the same one")
        letter, after = max(several.items(), key=lambda item: len(item[1]))
        return Text(
            f"needed: {visible(letter)} is followed by {', '.join(map(visible, after))}; only h_{{t−1}} tells which"
        )

    def _heading(self, title: str, equations: str = "") -> None:
        self._gap()
        beside = cell_len(f"{title}   {equations}") <= self.console.width
        self.console.print(
            Text(title, "bold").append(f"   {equations}" if equations and beside else "", "not bold cyan")
        )
        if equations and not beside:
            self._print(Text(equations, "cyan"))

    def _say(self, line: str) -> None:
        self._print(Text(line))

    def _gap(self) -> None:
        """Leave one empty line, however many ask for it."""
        if not self._at_gap:
            self.console.print()
        self._at_gap = True

    def _print(self, what: RenderableType) -> None:
        self._at_gap = False
        self.console.print(Padding(what, (0, 0, 0, 2), expand=False))

    def _width(self) -> int:
        return self.console.width - 2

    def _letters(self, fixed: int) -> Indices:
        """Choose the letters whose columns fit beside `fixed` other columns of text."""
        return _abbreviate(len(self.letters), max(3, (self._width() - fixed) // (_NUMBER + 1)))

    def _matrix(self, name: str, matrix: Tensor, rows: Indices, columns: Indices, **names: list[str]) -> RenderableType:
        """Lay out a matrix under its name, with the letters or the numbers of the units around it."""
        row_names, column_names = names.get("row_names"), names.get("column_names")
        table = Table(
            box=None,
            padding=(0, 1, 0, 0),
            title=Text(name),
            title_justify="left",
            title_style="",
            header_style="dim",
            show_edge=False,
        )
        table.add_column(style="dim")
        for column in columns:
            table.add_column(_label(column, column_names), justify="right", min_width=_NUMBER - 1)
        for row in rows:
            cells = ["⋮"] * len(columns) if row is None else _numbers(matrix[row], columns)
            table.add_row(_label(row, row_names), *cells)
        return table

    def _matrices(self, matrices: list[RenderableType]) -> None:
        self._print(Columns(matrices, padding=(0, 3)))
        self._gap()


def _clipping(update: Update, descent: Descent) -> str:
    over = "over W_xh, W_hh and W_hy together"
    if not descent.clip:
        return f"‖g‖ = {number(update.norm)} {over}; no clipping (--clip 0)."
    if update.scale < 1:
        return (
            f"‖g‖ = {number(update.norm)} {over} is above c = {descent.clip:g}: g is scaled by {number(update.scale)}."
        )
    return f"‖g‖ = {number(update.norm)} {over} is at most c = {descent.clip:g}: g is left as it is."


def _abbreviate(count: int, most: int) -> Indices:
    """Return the indices 0 … count−1; of more than `most`, the first ones, `None`, and the last."""
    if count <= most:
        return list(range(count))
    tail = max(1, (most - 1) // 3)
    return [*range(most - 1 - tail), None, *range(count - tail, count)]


def _next_round_number(n: int) -> int:
    """Return what follows n in 1, 2, 5, 10, 20, 50, 100 …"""
    lead = int(str(n)[0])
    return n * 5 // 2 if lead == 2 else n * 2


def _label(index: int | None, names: list[str] | None) -> Text:
    if index is None:
        return Text("…")
    return Text(names[index] if names else str(index + 1))


def _numbers(row: Tensor, indices: Indices, marked: int | None = None) -> list[Text]:
    """Return the numbers to show of a row, the marked one in bold; one that is left out stands in the place of what is left out."""
    cells = []
    for i in indices:
        shown = marked if i is None and marked not in indices else i
        if shown is None:
            cells.append(Text("⋯", "dim"))
        else:
            cells.append(Text(number(float(row[shown])), "bold green" if shown == marked else ""))
    return cells


def _table(*columns: str, left: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    for column in columns:
        table.add_column(Text(column), justify="left" if column in left else "right", no_wrap=True)
    return table
