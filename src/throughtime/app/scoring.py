"""Scores of lines, and re-ranked n-best lists, as scripts read them: one line for each, tabs between."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from throughtime.app.terminal import Output, note, print_json
from throughtime.lm.score import check_weight, parse_hypotheses, read_lines, rerank, score_lines

if TYPE_CHECKING:
    from throughtime.lm.evaluation import SequenceScores
    from throughtime.lm.run import Run


def print_scores(run: "Run", file: Path, as_json: bool) -> None:
    """Print ln p of each line of a file."""
    lines = read_lines(file, run.tokenizer)
    scores = score_lines(run.load_model(), run.tokenizer, lines)
    without = scores.nats - scores.unknown_nats
    if as_json:
        record = {
            "lines": len(lines),
            "tokens": int(scores.tokens.sum()),
            "unknown": int(scores.unknown.sum()),
            "log_probability": -float(scores.nats.sum()),
            "log_probability_without_unknown": -float(without.sum()),
            "log_probabilities": [-nats for nats in scores.nats.tolist()],
            "log_probabilities_without_unknown": [-nats for nats in without.tolist()],
            "eos_log_probabilities": [-nats for nats in scores.eos_nats.tolist()],
            "unknown_tokens": scores.unknown.tolist(),
            "perplexity_per_line": math.exp(min(float(scores.nats.mean()), 700)),
        }
        print_json(record)
        return
    for nats in scores.nats:
        print(f"{-nats:.4f}")
    _say_unknown(scores)


def print_ranking(run: "Run", file: Path, weight: float, only_best: bool, as_json: bool) -> None:
    """Print the hypotheses of an n-best list, those of a key together, the best first."""
    check_weight(weight)
    hypotheses = parse_hypotheses(read_lines(file, run.tokenizer), str(file))
    scores = score_lines(run.load_model(), run.tokenizer, [hypothesis.text for hypothesis in hypotheses])
    ranked = rerank(hypotheses, scores.nats, weight)
    kept = {key: found[:1] if only_best else found for key, found in ranked.items()}
    if as_json:
        text_of = _text_of_bytes if run.tokenizer.level == "byte" else str
        print_json(
            {text_of(key): [{"score": h.score, "text": text_of(h.text)} for h in found] for key, found in kept.items()}
        )
        return
    output = Output()
    for found in kept.values():
        for hypothesis in found:
            line = f"{hypothesis.key}\t{hypothesis.score:.4f}\t{hypothesis.text}\n"
            output.write(line.encode("latin-1") if run.tokenizer.level == "byte" else line)
    _say_unknown(scores)


def _text_of_bytes(line: str) -> str:
    """Return the text of a line in which each byte is given as the character of its number; what is no UTF-8 by its escapes."""
    return line.encode("latin-1").decode("utf-8", "backslashreplace")


def _say_unknown(scores: "SequenceScores") -> None:
    """Say how much of what was scored is unknown to the run, and what it comes to without."""
    count = int(scores.unknown.sum())
    if count:
        note(
            f"{count:,} of {int(scores.tokens.sum()):,} tokens are unknown to the run, in {np.count_nonzero(scores.unknown):,} of "
            f"{len(scores.unknown):,} lines; ln p of all is {-scores.nats.sum():.4f}, "
            f"without them {-(scores.nats - scores.unknown_nats).sum():.4f}"
        )
