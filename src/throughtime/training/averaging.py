"""Averages of the weights along training, which generalise better than the weights of the last step (Polyak & Juditsky, 1992)."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from throughtime.errors import InputError


def exponential_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return a model whose weights are an exponential moving average of another's; feed it with `update_parameters(model)`.

    After update n, from 0 on, the average keeps min(decay, (1 + n) / (10 + n)) of itself, so that the first weights are soon
    forgotten.

    Args:
        model: The model that is trained.
        decay: Share of the average that stays at each step, from 0 to below 1.

    Raises:
        InputError: `decay` is out of range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> average = exponential_average(model, 0.999)
        >>> average.update_parameters(model)  # the first is a copy
        >>> torch.equal(average.module.weight, model.weight)
        True
    """
    if not 0 <= decay < 1:
        raise InputError(f"--ema {decay}: expected a share from 0 to below 1, such as 0.999")

    def mix(averages: Sequence[Tensor], weights: Sequence[Tensor], count: Tensor | int) -> None:
        n = int(count)
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=mix)
