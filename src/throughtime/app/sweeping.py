"""`throughtime sweep`: what is seen of a study while trials are trained, and what it came to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from throughtime.app.progress import Display, display, probe_gradients, said
from throughtime.app.terminal import duration, note, number, under_way
from throughtime.errors import FieldError
from throughtime.lm.options import as_given
from throughtime.lm.space import described
from throughtime.plain import printable, shell_word

if TYPE_CHECKING:
    from throughtime.lm.study import Begun, Study, Tried
    from throughtime.lm.training import StepReport

_SHOWN = 5  # trials in the table


def run_sweep(
    paths: Sequence[Path], out: Path, given: Mapping[str, Any], trials: int, **how: Any
) -> "tuple[Study, Tried | None]":
    """Train a study's trials, as many as it is to have; what is under way is told on stderr.

    Returns:
        The study; and the trial that a signal stopped, or `None`.
    """
    from throughtime.lm.study import open_study

    if trials < 1:
        raise FieldError("trials", trials, "a whole number, at least 1")
    with under_way("reading the text") as show:
        study, reason = open_study(
            paths, out, given, **how, on_encoding=lambda done, total: show(f"reading the text, {done / 1e6:,.1f} MB")
        )
    note(f"searching {described(study.space)}: each trial is a run in {printable(str(out))}")
    if reason is not None:
        note(reason)
    best = min((one.bits_per_character for one in _complete(study)), default=None)
    while (begun := study.begin(trials)) is not None:
        with begun, display(study.level, passing=True) as shown:
            tried = _train(begun, shown)
            if tried.signal is not None:
                return study, tried
            shown.say(f"trial {tried.number}: {_outcome(tried, best)}")
        if tried.state == "complete" and tried.bits_per_character is not None:
            best = min(tried.bits_per_character, tried.bits_per_character if best is None else best)
    return study, None


def print_study(study: "Study", console: Console) -> None:
    """Print the best trials, what made the difference, and what to do with the first of them."""
    tried = study.tried()
    states = [one.state for one in tried]
    counts = [
        f"{states.count(state)} {state}" for state in ("complete", "pruned", "failed", "running") if state in states
    ]
    console.print(Text(f"{study.name}: {', '.join(counts) or 'no trial yet'}", "bold"), soft_wrap=True)
    ranked = _ranked(study)
    best = ranked[:_SHOWN]
    if not best:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("trial", justify="right")
    table.add_column("bits/char", justify="right")
    table.add_column("time", justify="right")
    table.add_column("options", overflow="fold")
    for one in best:
        time = "" if one.seconds is None else duration(one.seconds)
        table.add_row(str(one.number), number(one.bits_per_character), time, Text(_flags(one.options)))
    console.print(table)
    importances = study.importances()
    if importances:
        shares = "  ".join(f"{name} {share:.0%}" for name, share in importances.items())
        console.print(f"what made the difference (PED-ANOVA): {shares}", soft_wrap=True)
    console.print(f"the best: {printable(_place(best[0]))}", soft_wrap=True)
    here = next((one for one in ranked if one.is_here), None)
    if here is not None and here is not best[0]:
        console.print(f"the best that is here: {printable(str(here.run))}", soft_wrap=True)


def print_next_steps(study: "Study", paths: Sequence[Path]) -> None:
    """Say on stderr how the best trial is trained anew for longer, and where the study is looked at."""
    best = next(iter(_ranked(study)), None)
    if best is not None:
        budget = next((name for name in ("epochs", "steps") if study.base.get(name)), "minutes")
        longer = 4 * study.base.get(budget, 3)
        texts = " ".join(shell_word(path) for path in paths)
        chosen = f"--config {shell_word(best.run / 'config.toml')}"
        if not best.is_here:
            values = {name: value for name, value in (study.base | best.options).items() if value is not None}
            chosen = " ".join(as_given(name, value) for name, value in values.items() if name != budget)
        note(f"its options, for longer: throughtime train {texts} --out RUN {chosen} {as_given(budget, longer)}")
    note(f"the study in a browser: optuna-dashboard {shell_word(study.storage)}")


def study_record(study: "Study") -> dict[str, Any]:
    """Return a study as JSON holds it."""
    best = next(iter(_ranked(study)), None)
    trials = [vars(one) | {"run": str(one.run)} for one in study.tried()]
    for trial in trials:
        del trial["signal"]
    return {
        "study": study.name,
        "storage": study.storage,
        "best": None if best is None else best.number,
        "trials": trials,
        "importances": study.importances(),
    }


def _train(begun: "Begun", shown: Display) -> "Tried":
    """Train one trial, and say what it is before its first step."""
    again = ", gone on with" if begun.is_continued else ""
    shown.say(f"trial {begun.number}{again}: {_flags(begun.options)}")

    def observe(report: "StepReport") -> None:
        shown(report)

    return begun.train(observe, said(shown), probe_gradients)


def _outcome(tried: "Tried", best: float | None) -> str:
    bits = tried.bits_per_character
    if tried.state != "complete" or bits is None:
        return f"{tried.state}, {tried.cause or 'by somebody else'}"
    return f"{number(bits)} bits per character" + (", the best so far" * (best is None or bits < best))


def _complete(study: "Study") -> list[Any]:
    return [one for one in study.tried() if one.state == "complete" and one.bits_per_character is not None]


def _ranked(study: "Study") -> list[Any]:
    """Return the complete trials, the best first."""
    return sorted(_complete(study), key=lambda one: one.bits_per_character)


def _place(tried: "Tried") -> str:
    """Return where a trial's run is, or that it is gone."""
    if tried.elsewhere is not None:
        return f"trial {tried.number}, {tried.elsewhere}"
    return str(tried.run) if tried.is_here else f"trial {tried.number}; its run, {tried.run}, is gone"


def _flags(options: Mapping[str, Any]) -> str:
    """Return what was chosen as the command line takes it, to three digits."""
    rounded = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in options.items()}
    return "  ".join(as_given(name, value) for name, value in rounded.items())
