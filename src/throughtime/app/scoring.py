"""Scores of lines, and re-ranked n-best lists, as scripts read them: one line for each, tabs between."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from throughtime.app.terminal import print_json, write
from throughtime.lm.score import parse_hypotheses, read_lines, rerank, score_lines

if TYPE_CHECKING:
    from throughtime.lm.run import Run


def print_scores(run: "Run", file: Path, as_json: bool) -> None:
    """Print ln p of each line of a file."""
    lines = read_lines(file, run.tokenizer)
    scores = score_lines(run.load_model(), run.tokenizer, lines)
    if as_json:
        record = {
            "lines": len(lines),
            "log_probability": -float(scores.nats.sum()),
            "log_probabilities": [-nats for nats in scores.nats.tolist()],
            "eos_log_probabilities": [-nats for nats in scores.eos_nats.tolist()],
            "perplexity_per_line": math.exp(min(float(scores.nats.mean()), 700)),
        }
        print_json(record)
        return
    for nats in scores.nats:
        print(f"{-nats:.4f}")


def print_ranking(run: "Run", file: Path, weight: float, only_best: bool, as_json: bool) -> None:
    """Print the hypotheses of an n-best list, those of a key together, the best first."""
    hypotheses = parse_hypotheses(read_lines(file, run.tokenizer), str(file))
    nats = score_lines(run.load_model(), run.tokenizer, [hypothesis.text for hypothesis in hypotheses]).nats
    ranked = rerank(hypotheses, nats, weight)
    kept = {key: found[:1] if only_best else found for key, found in ranked.items()}
    if as_json:
        print_json({key: [{"score": h.score, "text": h.text} for h in found] for key, found in kept.items()})
        return
    for found in kept.values():
        for hypothesis in found:
            write(f"{hypothesis.key}\t{hypothesis.score:.4f}\t{hypothesis.text}\n")
