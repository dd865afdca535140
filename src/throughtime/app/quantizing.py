"""What `throughtime quantize` measures, and how it is shown."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from throughtime.app.reports import UNITS, Facts, Row, evaluation_record
from throughtime.app.terminal import results, under_way
from throughtime.lm.corpus import read_tokens
from throughtime.lm.precision import Cost, costs

if TYPE_CHECKING:
    from throughtime.lm.run import Run


def measure_precisions(run: "Run", file: Path | None, *, last: bool) -> list[Cost]:
    """Measure a run in each precision on a file, or on its held-out text.

    Raises:
        InputError: The text or the run can't be used, or no stream can read its model.
    """
    tokenizer = run.tokenizer
    tokens = run.corpus().held_out if file is None else read_tokens(file, tokenizer)
    found, model = [], run.load_model("cpu", last=last)
    with under_way("float32, bfloat16, int8") as show:
        units = {"unknown_id": tokenizer.unknown_id, "eos_id": tokenizer.eos_id}
        for cost in costs(model, tokens, characters=tokenizer.characters_of(tokens), **units):
            found.append(cost)
            show(f"{cost.precision} is measured on {len(tokens):,} {UNITS[tokenizer.level]}")
    return found


def records(found: list[Cost]) -> list[dict[str, Any]]:
    """Return it for a script."""
    return [cost._asdict() | {"evaluation": evaluation_record(cost.evaluation)} for cost in found]


def print_costs(found: list[Cost], run: "Run", title: str) -> None:
    """Print it for a reader."""
    results().print(Facts(title, [_row(cost, UNITS[run.tokenizer.level]) for cost in found]))
    *_, narrowest = found
    results().print(
        f"\nthroughtime sample {run.folder} --precision {narrowest.precision}", markup=False, soft_wrap=True
    )


def _row(cost: Cost, units: str) -> Row:
    nats, perplexity = cost.evaluation.nats_per_token, cost.evaluation.perplexity
    lost = "" if cost.precision == "float32" else f" ({round(cost.lost, 4) + 0.0:+.2%})"  # no "-0.00%"
    brought = f"{cost.weights / 1e6:.1f} MB, {cost.tokens_a_second:,.0f} {units}/s"
    return cost.precision, f"{nats:.4f} nats, perplexity {perplexity:.4g}{lost}, {brought}"
