"""Sampling text from a language model, token by token."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from throughtime.errors import InputError
from throughtime.lm.model import LanguageModel
from throughtime.lm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Logits are divided by it: below 1 is safer, above 1 wilder.
        top_k: Only the k likeliest tokens.
        top_p: Only the likeliest tokens that together have this probability (Holtzman et al., 2020).
        greedy: Always the likeliest token.

    Raises:
        InputError: A value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise InputError(
                f"--temperature {self.temperature}: expected a number above 0; for the likeliest token, --greedy"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k {self.top_k}: expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: expected a probability above 0, at most 1")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """Choose a token by its logits (V,)."""
        if self.greedy:
            return int(logits.argmax())
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[-1], -torch.inf)
        probabilities = logits.softmax(0)
        if self.top_p is not None:
            sorted_p, order = probabilities.sort(descending=True)
            beyond = sorted_p.cumsum(0) - sorted_p >= self.top_p  # the token that reaches top_p is still in
            probabilities[order[beyond]] = 0
        return int(torch.multinomial(probabilities, 1, generator=generator))


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    length: int = 500,
    sampling: Sampling = Sampling(),
    seed: int | None = None,
) -> Iterator[str]:
    """Continue a prompt; yield text as it comes.

    The unknown token is never chosen. Without a prompt, the model starts as after a line end, or, where it knows no line end,
    after the last token of its vocabulary.

    Args:
        model: The language model, on any device.
        tokenizer: Its tokenizer.
        prompt: What to continue; it is not repeated. Characters unknown to the model are read as its unknown token.
        length: How many tokens to generate, at least 1.
        sampling: How to choose.
        seed: Makes the text reproducible.

    Raises:
        InputError: `length` is below 1.

    Example:
        >>> from throughtime.lm import ByteTokenizer, LanguageModel, ModelConfig
        >>> model = LanguageModel(ModelConfig(vocabulary_size=256, hidden_size=8))
        >>> text = "".join(generate(model, ByteTokenizer(), "To be", length=20, seed=1))
    """
    if length < 1:
        raise InputError(f"--length {length}: expected at least 1")
    return _generate(model, tokenizer, _first_ids(tokenizer, prompt), length, sampling, seed)


def _first_ids(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    ids = tokenizer.encode(prompt or "\n")
    if not prompt and tokenizer.unknown_id is not None and ids[0] == tokenizer.unknown_id:
        ids = np.array([tokenizer.vocabulary_size - 1])
    return ids


@torch.no_grad()
def _generate(
    model: LanguageModel, tokenizer: Tokenizer, ids: np.ndarray, length: int, sampling: Sampling, seed: int | None
) -> Iterator[str]:
    device = next(model.parameters()).device
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    decoder = tokenizer.decoder()
    model.eval()
    logits, state = model(torch.from_numpy(ids)[:, None].to(device))
    for _ in range(length):
        last = logits[-1, 0].float().cpu()
        if tokenizer.unknown_id is not None:
            last[tokenizer.unknown_id] = -torch.inf
        token = sampling.choose(last, generator)
        if text := decoder.push(token):
            yield text
        logits, state = model(torch.tensor([[token]], device=device), state)
