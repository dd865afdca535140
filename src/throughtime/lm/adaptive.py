"""Evaluation that learns from the text it has read: dynamic evaluation, and a neural cache. The model itself stays as it is.

Both predict every token before they learn anything from it, so their figures are honest predictions; but they are not those
of the saved weights alone, and are to be reported as what they are.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from throughtime.errors import InputError, unknown_name
from throughtime.lm.evaluation import CARRIED, FRESH, Evaluation, Lost, summarise
from throughtime.lm.model import LanguageModel
from throughtime.training import Streams
from throughtime.training.tbptt import Tokens, detach

RULES = ("rms", "sgd")
_SEGMENT = 256  # tokens read at a time where nothing is learned from a segment
_STATISTICS_BATCH, _STATISTICS_STEPS = (
    100,
    200,
)  # streams of training text, and segments of each, whose gradients are measured


@dataclass(frozen=True)
class DynamicEvaluation:
    """Gradient descent on each segment of the text, after it was predicted (Krause et al., 2017).

    With g the gradient of the segment's mean loss, θ₀ the trained weights and RMS the root mean square of each weight's gradient
    on the training text:

        "sgd":  θ ← θ − η g
        "rms":  θ ← θ − η g / (RMS + ε) + λ min(RMS / mean(RMS), 1/λ) (θ₀ − θ)

    Attributes:
        rule: "rms" or "sgd".
        learning_rate: η; 0.002 for rms and 0.1 for sgd if not given.
        decay: λ, how fast weights go back to the trained ones; 0 is never. Only of rms.
        segment: Tokens between two updates.
        epsilon: ε.

    Raises:
        InputError: A name or a number can't be.
    """

    rule: str = "rms"
    learning_rate: float | None = None
    decay: float = 0.02
    segment: int = 20
    epsilon: float = 0.001

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise unknown_name("rule of dynamic evaluation", self.rule, RULES)
        if not 0 < self.rate < float("inf"):
            raise InputError(f"--dynamic-lr {self.rate}: expected a number above 0")
        if not 0 <= self.decay <= 1:
            raise InputError(f"--dynamic-decay {self.decay}: expected a share from 0 to 1")
        if self.segment < 1:
            raise InputError(f"--segment {self.segment}: expected a number of tokens, at least 1")

    @property
    def rate(self) -> float:
        """η."""
        return {"rms": 0.002, "sgd": 0.1}[self.rule] if self.learning_rate is None else self.learning_rate

    def __str__(self) -> str:
        decay = f", decay {self.decay:g}" if self.rule == "rms" else ""
        return f"dynamic evaluation ({self.rule}, rate {self.rate:g}{decay}, segments of {self.segment})"


@dataclass(frozen=True)
class NeuralCache:
    """What was read is likelier to come again where h is as it was then (Grave et al., 2017).

        p(w) = (1 − λ) p_model(w) + λ p_cache(w),   p_cache(w) ∝ Σ_i 1[x_{i+1} = w] exp(θ h_tᵀ h_i)

    over the last N positions i before t; h is the last layer's output.

    Attributes:
        size: N.
        weight: λ.
        sharpness: θ.

    Raises:
        InputError: A number can't be.
    """

    size: int = 500
    weight: float = 0.1
    sharpness: float = 0.3

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"--cache {self.size}: expected a number of tokens to remember, at least 1")
        if not 0 < self.weight < 1:
            raise InputError(f"--cache-weight {self.weight}: expected a share above 0 and below 1")
        if not 0 < self.sharpness < float("inf"):
            raise InputError(f"--cache-sharpness {self.sharpness}: expected a number above 0")

    def __str__(self) -> str:
        return f"neural cache ({self.size:,} tokens, weight {self.weight:g}, sharpness {self.sharpness:g})"


def evaluate_adaptively(
    model: LanguageModel,
    tokens: NDArray[np.integer],
    *,
    dynamic: DynamicEvaluation | None = None,
    cache: NeuralCache | None = None,
    training: Tokens | None = None,
    characters: int | None = None,
    bytes: int | None = None,
    unknown_id: int | None = None,
    eos_id: int | None = None,
) -> Evaluation:
    """Score a text in one pass from its first token to its last, learning on the way.

    Args:
        model: The language model; a copy of it learns.
        tokens: Ids (N,), N ≥ 2; or sequences, each ended by `eos_id` and read from a fresh state.
        dynamic: How the copy's weights follow the text; `None` leaves them.
        cache: What is remembered of it; `None` is nothing.
        training: Training text (M,), M ≥ 2, on which the rule "rms" measures the size of each weight's gradient.
        characters: How many characters the N tokens stand for; N if not given.
        bytes: How many bytes; N if not given.
        unknown_id: The id that is counted as unknown.
        eos_id: The id that ends a sequence; `None` where the text is one stream.

    Raises:
        InputError: There are too few tokens; the rule "rms" has no training text; or the cache is asked of a model without a
            recurrent state.

    Example:
        >>> import numpy as np
        >>> from throughtime.lm import LanguageModel, ModelConfig, evaluate
        >>> model, tokens = LanguageModel(ModelConfig(vocabulary_size=5, hidden_size=8)), np.arange(500) % 5
        >>> adapted = evaluate_adaptively(model, tokens, dynamic=DynamicEvaluation("sgd"))
        >>> adapted.nats_per_token < evaluate(model, tokens).nats_per_token
        True
    """
    if eos_id is None and len(tokens) < 2:
        raise InputError(f"{len(tokens)} tokens to evaluate on; at least 2 are needed, one to read and one to predict")
    if cache is not None and model.config.cell == "mlp":
        raise InputError("--cache compares recurrent states, and an mlp has none; leave it out")
    if dynamic is not None and dynamic.rule == "rms" and (training is None or len(training) < 2):
        raise InputError(
            "dynamic evaluation by rms measures gradients on training text, and none was given; or take sgd"
        )
    model = copy.deepcopy(model).eval()
    update = _Update(model, dynamic, training) if dynamic is not None else None
    memory = _Memory(cache) if cache is not None else None
    predicted = tokens[1:] if eos_id is None else tokens
    nats = np.concatenate(list(_nats(model, tokens, eos_id, dynamic.segment if dynamic else _SEGMENT, update, memory)))
    method = " and ".join([CARRIED if eos_id is None else FRESH, *(str(how) for how in (dynamic, cache) if how)])
    lost = Lost.of(nats, predicted, unknown_id, eos_id)
    return summarise(lost, tokens, method, characters=characters, bytes=bytes, unknown_id=unknown_id, eos_id=eos_id)


def _nats(
    model: LanguageModel,
    tokens: NDArray[np.integer],
    eos_id: int | None,
    segment: int,
    update: "_Update | None",
    memory: "_Memory | None",
) -> Iterator[NDArray[np.float64]]:
    device = next(model.parameters()).device
    state = None
    for begin, end, is_fresh in _segments(tokens, eos_id, segment):
        inputs, targets = tokens[begin : end - 1], tokens[begin + 1 : end]
        if is_fresh:
            state = None
            if eos_id is not None:
                inputs, targets = np.append(eos_id, tokens[begin : end - 1]), tokens[begin:end]
        ids, targets = (torch.from_numpy(part.astype(np.int64)).to(device) for part in (inputs, targets))
        with torch.set_grad_enabled(update is not None):
            h, state = model.hidden(ids[:, None], state)
            lost = cross_entropy(model.readout(h)[:, 0].float(), targets, reduction="none")
        state = detach(state)
        nats = lost.detach().double()
        yield (nats if memory is None else memory.mixed(nats, h.detach()[:, 0], targets)).cpu().numpy()
        if update is not None:
            update.step(lost.mean())


def _segments(tokens: NDArray[np.integer], eos_id: int | None, segment: int) -> Iterator[tuple[int, int, bool]]:
    """Yield the tokens begin … end−1 of a segment, of which the first is read only unless it is fresh in a sequence.

    Segments overlap by that one token.
    """
    if eos_id is None:
        for begin in range(0, len(tokens) - 1, segment):
            yield begin, min(begin + segment + 1, len(tokens)), begin == 0
        return
    start = 0
    for end in (np.flatnonzero(np.asarray(tokens) == eos_id) + 1).tolist():
        yield start, min(start + segment, end), True
        for begin in range(start + segment - 1, end - 1, segment):
            yield begin, min(begin + segment + 1, end), False
        start = end


class _Update:
    """The step that follows a segment."""

    def __init__(self, model: LanguageModel, how: DynamicEvaluation, training: Tokens | None) -> None:
        self._weights = list(model.parameters())
        self._how = how
        if how.rule == "rms":
            assert training is not None
            self._trained = [weight.detach().clone() for weight in self._weights]
            squares = _mean_squares(model, training, how.segment)
            self._rms = [square.sqrt_() for square in squares]
            mean = sum(rms.sum() for rms in self._rms) / sum(rms.numel() for rms in self._rms)
            most = 1 / how.decay if how.decay else 1.0
            self._back = [how.decay * (rms / mean).clamp_max(most) for rms in self._rms]

    def step(self, loss: Tensor) -> None:
        """Follow the gradient of a segment's loss."""
        gradients = torch.autograd.grad(loss, self._weights, allow_unused=True)
        how = self._how
        with torch.no_grad():
            for place, (weight, gradient) in enumerate(zip(self._weights, gradients, strict=True)):
                if gradient is None:
                    continue
                if how.rule == "sgd":
                    weight.sub_(gradient, alpha=how.rate)
                    continue
                step = how.rate * gradient / (self._rms[place] + how.epsilon)
                weight.add_(self._back[place] * (self._trained[place] - weight) - step)


def _mean_squares(model: LanguageModel, training: Tokens, segment: int) -> list[Tensor]:
    """Return the mean square of each weight's gradient over segments of training text, read in parallel streams."""
    device = next(model.parameters()).device
    weights = list(model.parameters())
    squares = [torch.zeros_like(weight) for weight in weights]
    batch = max(min(_STATISTICS_BATCH, (len(training) - 1) // segment), 1)
    streams = Streams(training, batch, min(segment, len(training) - 1))
    steps = min(len(streams), _STATISTICS_STEPS)
    state = None
    for step in range(steps):
        inputs, targets = (part.to(device) for part in streams.window_at(step))
        logits, state = model(inputs, state)
        state = detach(state)
        loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        for square, gradient in zip(squares, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            if gradient is not None:
                square.addcmul_(gradient, gradient, value=1 / steps)
    return squares


class _Memory:
    """The last N states, and the token that came after each."""

    def __init__(self, how: NeuralCache) -> None:
        self._how = how
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @torch.no_grad()
    def mixed(self, nats: Tensor, h: Tensor, targets: Tensor) -> Tensor:
        """Return −ln p of the targets (T,) given the model's own, and remember them and their states h (T, H)."""
        keys = h if self._keys is None else torch.cat([self._keys, h])
        values = targets if self._values is None else torch.cat([self._values, targets])
        now = torch.arange(len(keys) - len(h), len(keys), device=h.device)[:, None]
        places = torch.arange(len(keys), device=h.device)
        seen = (places < now) & (places >= now - self._how.size)
        similar = (self._how.sharpness * (h @ keys.T)).double().masked_fill(~seen, -torch.inf)
        agrees = torch.where(values == targets[:, None], similar, -torch.inf)
        weight = torch.tensor(self._how.weight, dtype=torch.float64, device=h.device)
        from_cache = agrees.logsumexp(1) - similar.logsumexp(1)
        mixed = -torch.logaddexp(-nats + (-weight).log1p(), from_cache + weight.log())
        self._keys, self._values = keys[-self._how.size :], values[-self._how.size :]
        return torch.where(seen.any(1), mixed, nats)
