"""A model card as Hugging Face reads them: front matter in YAML, how to use the model, and what was measured."""

import json
from collections.abc import Mapping
from typing import Any

from throughtime.lm.config import RunConfig
from throughtime.lm.tokenizer import Tokenizer

_TOKENS = {"char": "characters", "byte": "bytes", "word": "words", "bpe": "byte-pair tokens"}
_FIGURES = {
    "nats_per_token": ("nats per token", ".4f"),
    "bits_per_character": ("bits per character", ".4f"),
    "bits_per_byte": ("bits per byte", ".4f"),
    "perplexity": ("perplexity", ",.3f"),
    "perplexity_without_eos": ("perplexity without the ends of sequences", ",.3f"),
}


def model_card(name: str, config: RunConfig, tokenizer: Tokenizer, results: Mapping[str, Any] | None) -> str:
    """Return the card of a packed run.

    Args:
        name: What it is called.
        config: What its config.json says.
        tokenizer: Its tokenizer.
        results: Its results.json, or `None` where training wasn't finished and nothing was measured.
    """
    model, level = config.model, tokenizer.level
    title = " ".join("".join(c if c.isprintable() else " " for c in name).split()) or "model"
    what = f"A language model of {_TOKENS[level]}: {model.describe()}, a vocabulary of {model.vocabulary_size:,}."
    versions = ", ".join(f"{part} {version}" for part, version in config.versions.items()) or "an early throughtime"
    parts = [
        f"---\n{_front_matter(title, model.cell, level, results)}\n---",
        f"# {title}",
        f"{what} {'Each sequence ends with a token of its own' if tokenizer.sequences else 'A text is one stream'}.",
        f"## Use\n\n{_use(title)}",
        f"## Measured\n\n{_measured(results)}",
        f"## Training\n\n{_training(config.packed or {}, results, level)}",
        f"Written by {versions}. The text that it was trained on is not here; its vocabulary is.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(title: str, cell: str, level: str, results: Mapping[str, Any] | None) -> str:
    """Return the YAML that a card begins with; a string in JSON is one in YAML too."""
    lines = [
        "library_name: throughtime",
        "pipeline_tag: text-generation",
        "tags:",
        *(
            f"- {tag}"
            for tag in ("recurrent-neural-network", "language-model", cell.replace("_", "-"), f"level-{level}")
        ),
    ]
    if results is None:
        return "\n".join(lines)
    lines += [
        "model-index:",
        f"- name: {json.dumps(title)}",
        "  results:",
        "  - task:",
        "      type: text-generation",
        "    dataset:",
        "      name: held-out part of the training text, not shared",
        "      type: text",
        "    metrics:",
    ]
    for key, (figure, _) in _FIGURES.items():
        if results["held_out"].get(key) is not None:
            lines += [
                f"    - type: {key}",
                f"      name: {figure}",
                f"      value: {json.dumps(results['held_out'][key])}",
            ]
    return "\n".join(lines)


def _use(title: str) -> str:
    folder = json.dumps(title, ensure_ascii=False)
    return (
        f"`pip install throughtime`; with this folder as {folder}:\n\n"
        f"```python\nimport throughtime\n\nrun = throughtime.load({folder})\nprint(run.generate(length=300, temperature=0.8))\n"
        "run.probabilities()  # of every token that may come next\n```\n\n"
        "or, in a shell, `throughtime sample`, `eval`, `score` and `info` with the folder's name."
    )


def _measured(results: Mapping[str, Any] | None) -> str:
    if results is None:
        return "Nothing: training was not finished."
    held_out = results["held_out"]
    unknown = f", {held_out['unknown']:,} of them unknown to it" if held_out.get("unknown") else ""
    rows = [
        f"| {figure} | {held_out[key]:{shown}} |"
        for key, (figure, shown) in _FIGURES.items()
        if held_out.get(key) is not None
    ]
    return (
        f"On {held_out['tokens']:,} tokens that were held out{unknown} ({held_out['method']}):\n\n"
        "| figure | value |\n|---|---|\n" + "\n".join(rows)
    )


def _training(counts: Mapping[str, int], results: Mapping[str, Any] | None, level: str) -> str:
    on = f"On {counts['train_tokens']:,} {_TOKENS[level]}" if "train_tokens" in counts else f"On {_TOKENS[level]}"
    took = ""
    if results is not None:
        training = results["training"]
        best = f", the weights are those of step {training['best_step']:,}" if training.get("best_step") else ""
        took = f": {training['steps']:,} steps in {training['seconds'] / 60:.1f} minutes{best}"
    return (
        f"{on}{took}. `throughtime train TEXT --config config.toml --out RUN` trains another text with the same options "
        "(all but those that told about files and devices)."
    )
