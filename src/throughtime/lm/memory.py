"""Whether a model can be trained in the memory there is: asked before it is made, since afterwards it is too late."""

from pathlib import Path

from throughtime.errors import InputError
from throughtime.lm.loss import logits_held
from throughtime.lm.model import ModelConfig

_COPIES = 4  # of each weight: itself, its gradient, and an optimiser's two moments
_LOGITS = 3  # of those held at a time: themselves, their gradient, and either in bfloat16
_FLOAT = 4  # bytes


def bytes_to_train(config: ModelConfig, batch: int, window: int) -> int:
    """Return about how many bytes it takes to train a model on windows (T, B)."""
    return _FLOAT * (_COPIES * config.parameter_count + _LOGITS * logits_held(batch * window, config.vocabulary_size))


def free_bytes() -> int | None:
    """Return how much memory a process may still take here, or `None` where that can't be told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
        if limit != "max":
            free.append(int(limit) - int((group / "memory.current").read_text()))
        return max(min(free), 0)
    except (OSError, StopIteration, ValueError):
        return None


def check_fits(config: ModelConfig, batch: int, window: int, level: str) -> None:
    """Refuse a model that can't be trained in the memory there is.

    Raises:
        InputError: With its size, what is free, and what to lower.
    """
    vocabulary = "--vocabulary, " if level in ("word", "bpe") else ""
    other = "" if level in ("byte", "bpe") else ", or use --level byte or bpe"
    sizes = f"--hidden {config.hidden_size}, --batch {batch} and --bptt {window}"
    check_free(
        bytes_to_train(config, batch, window),
        f"training a vocabulary of {config.vocabulary_size:,} with {sizes}",
        f"{vocabulary}--hidden, --batch or --bptt{other}",
    )


def check_free(needed: int, what: str, lower: str) -> None:
    """Refuse what doesn't fit in the memory there is.

    Args:
        needed: Bytes.
        what: Takes them, as the message says it.
        lower: Which options to lower.

    Raises:
        InputError: With what is needed, what is free, and what to lower.
    """
    free = free_bytes()
    if free is not None and needed > free:
        about = f"about {needed / 1e9:,.1f}" if needed < 1e15 else "more than a million"
        raise InputError(f"{what} needs {about} GB, but {free / 1e9:.1f} GB are free; lower {lower}")
