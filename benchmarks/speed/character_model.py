"""A whole training step of a character model: LSTM 512, one-hot input of 65 characters, AdamW, clipped gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from benchmarks.speed.case import Results
from throughtime.lm.model import LanguageModel, ModelConfig

STEPS, BATCH, HIDDEN, VOCABULARY = 64, 32, 512, 65
# Of the products that nobody gets around, forward and backward; those with one-hot input can be had as a choice of rows.
OPERATIONS = 3 * 2.0 * STEPS * BATCH * HIDDEN * (4 * HIDDEN + VOCABULARY)


class TorchModel(nn.Module):
    """The same model as one writes it with torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(VOCABULARY, HIDDEN)
        self.output = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Return the logits (T, B, V), and the state."""
        x = one_hot(ids, VOCABULARY).to(self.output.weight.dtype)
        h, state = self.recurrent(x)
        return self.output(h), state


def by_us(autocast: bool = False) -> Callable[[], Results]:
    """Train the language model of throughtime."""
    model = LanguageModel(ModelConfig(VOCABULARY, "lstm", HIDDEN))
    model.load_state_dict(_module().state_dict())
    return _trainer(model, autocast)


def by_torch(autocast: bool = False, dtype: torch.dtype = torch.float32) -> Callable[[], Results]:
    """Train the model on torch.nn."""
    return _trainer(_module().to(dtype), autocast)


def _module() -> TorchModel:
    torch.manual_seed(1)
    return TorchModel()


def _trainer(model: nn.Module, autocast: bool) -> Callable[[], Results]:
    """Return what takes one step: its loss and clipped gradients."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (STEPS + 1, BATCH), generator=generator)
    parameters = dict(model.named_parameters())
    # A small rate: the weights stay where they are comparable.
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-5, fused=True)

    def step() -> Results:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, _ = model(ids[:-1])
            loss = cross_entropy(logits.flatten(0, 1), ids[1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        gradients = [parameters[name].grad for name in sorted(parameters)]
        return [loss.detach(), *(g for g in gradients if g is not None)]

    return step
