"""Averages of the weights along training, which generalise better than the weights of the last step (Polyak & Juditsky, 1992)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from throughtime.errors import FieldError


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
        raise FieldError("decay", decay, "a share from 0 to below 1, such as 0.999")

    def mix(averages: Sequence[Tensor], weights: Sequence[Tensor], count: Tensor | int) -> None:
        n = int(count)
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=mix)


def mean(model: nn.Module) -> AveragedModel:
    """Return a model whose weights are the mean of another's over all calls of `update_parameters(model)`, as ASGD's are."""
    return AveragedModel(model)


@dataclass
class NonMonotone:
    """The trigger of NT-ASGD (Merity et al., 2018, algorithm 1): validation no longer improves, so averaging may begin.

    Attributes:
        interval: n, how many validations an improvement may take; 5 in the paper.
        losses: What was validated so far.

    Example:
        >>> trigger = NonMonotone(interval=2)
        >>> [trigger.is_met_by(loss) for loss in (4.0, 3.0, 3.1, 2.9, 3.2)]  # 3.2 > min(4.0, 3.0)
        [False, False, False, False, True]
    """

    interval: int
    losses: list[float] = field(default_factory=list)

    def is_met_by(self, loss: float) -> bool:
        """Return whether a loss is worse than the best of those before the last n; take note of it."""
        is_met = len(self.losses) > self.interval and loss > min(self.losses[: -self.interval])
        self.losses.append(loss)
        return is_met
