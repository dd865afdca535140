"""The training loop: truncated BPTT of any model that returns (output, state), interruptible, and resumable to the bit."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from throughtime.training.checkpoint import CheckpointError
from throughtime.training.clipping import Clipping
from throughtime.training.guard import check_finite
from throughtime.training.schedule import Budget, warmup_cosine
from throughtime.training.tbptt import detach

_SMOOTHING = 0.98  # weight of the past in the running mean of the loss


class Windows(Protocol):
    """What the loop trains on: windows of parallel streams, in order. `Streams` is one, `Sequences` another."""

    def __len__(self) -> int:
        """How many windows an epoch has."""
        ...

    def window_at(self, step: int) -> tuple[Tensor, ...]:
        """Return the inputs (T, B, …) and targets (T, B, …) of a step counted from the start of training.

        Where the rows have lengths, these (B,) are the third.
        """
        ...

    def begins_epoch(self, step: int) -> bool:
        """Return whether the state starts anew at a step."""
        ...


@dataclass(frozen=True)
class StepReport:
    """What one step came to.

    Attributes:
        step: Steps done, this one included.
        progress: Share of the budget used up, 0 … 1.
        seconds: Training time so far.
        seconds_left: Training time to come, as far as can be told.
        epoch: Passes over the data so far.
        raw_loss: This step's loss.
        loss: Running mean of the loss.
        gradient_norm: Global norm before clipping.
        clipped: Whether this step was clipped.
        clip_share: Share of all steps that were.
        learning_rate: What the step was taken with.
        tokens_per_second: Positions read per second, lately.
    """

    step: int
    progress: float
    seconds: float
    seconds_left: float | None
    epoch: float
    raw_loss: float
    loss: float
    gradient_norm: float
    clipped: bool
    clip_share: float
    learning_rate: float
    tokens_per_second: float


@dataclass
class Loop:
    """A training under way.

    Attributes:
        model: `model(inputs, state) -> (output, state)`, called with `lengths` as a third where the windows have them; the state
            is a tuple of tensors.
        windows: What to train on.
        optimizer: A torch optimiser over the model's parameters.
        loss: `loss(output, targets)`, a scalar.
        budget: How long.
        learning_rate: Its peak; warm-up and cosine follow the budget's progress.
        warmup: Share of the budget that the warm-up takes.
        final: Factor on the learning rate at the end.
        clipping: How gradients are clipped.
        device: Where the model is.

    Example:
        >>> import numpy as np, torch
        >>> from throughtime.training import Budget, Loop, Streams
        >>> class Forecast(torch.nn.Module):  # of a series of ids, for brevity
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embedding, self.gru = torch.nn.Embedding(4, 8), torch.nn.GRU(8, 4)
        ...     def forward(self, ids, state=None):
        ...         output, h = self.gru(self.embedding(ids), None if state is None else state[0])
        ...         return output, (h,)
        >>> model = Forecast()
        >>> loop = Loop(
        ...     model=model,
        ...     windows=Streams(np.arange(100) % 4, batch=2, window=10),
        ...     optimizer=torch.optim.AdamW(model.parameters()),
        ...     loss=lambda output, targets: torch.nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten()),
        ...     budget=Budget(steps=5),
        ...     learning_rate=1e-2,
        ... )
        >>> loop.run(), loop.step
        (True, 5)
    """

    model: nn.Module
    windows: Windows
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    budget: Budget
    learning_rate: float
    warmup: float = 0.02
    final: float = 0.02
    clipping: Clipping = field(default_factory=Clipping)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    step: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)
    state: Any = field(default=None, init=False)
    _smoothed: float = field(default=0.0, init=False)
    _clipped_steps: int = field(default=0, init=False)
    _tokens_per_second: float = field(default=0.0, init=False)

    @property
    def progress(self) -> float:
        """Share of the budget used up."""
        return min(self.budget.progress(self.seconds, self.step, len(self.windows)), 1.0)

    @property
    def clip_share(self) -> float:
        """Share of the steps so far that were clipped."""
        return self._clipped_steps / max(self.step, 1)

    def run(
        self,
        observer: Callable[[StepReport], None] | None = None,
        save: Callable[[], None] | None = None,
        save_every: float = 30.0,
    ) -> bool:
        """Train until the budget is spent or somebody interrupts.

        Args:
            observer: Called after each step.
            save: Called before the first step, every `save_every` seconds, and at the end, also when interrupted. Its time
                doesn't count.
            save_every: Seconds.

        Returns:
            Whether the budget was spent; `False` after Ctrl-C or SIGTERM.

        Raises:
            NonFiniteError: The loss or the gradient is no number. The weights are still those of the step before.
        """
        self.model.train()
        if save is not None and self.step == 0:
            save()  # so that from the first step on there is something to go back to
        saved_at = self.seconds
        with _interruptible() as interrupted:
            while self.progress < 1 and not interrupted.is_set():
                report = self._step()
                if observer is not None:
                    observer(report)
                if save is not None and self.seconds - saved_at >= save_every:
                    save()
                    saved_at = self.seconds
            if save is not None:
                save()
        return self.progress >= 1

    def _step(self) -> StepReport:
        """Read one window, carry its loss back, and update the weights."""
        began = time.perf_counter()
        rate = self.learning_rate * warmup_cosine(self._rate_progress(), self.warmup, self.final)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.windows.begins_epoch(self.step):
            self.state = None
        window = self.windows.window_at(self.step)
        inputs, targets, *lengths = (tensor.to(self.device, non_blocking=True) for tensor in window)

        output, state = self.model(inputs, self.state, *lengths)
        loss = self.loss(output, targets)
        self.optimizer.zero_grad()
        loss.backward()
        clip = self.clipping.apply(self.model.parameters())
        # One wait for the device a step, before the update: numbers that are none never reach the weights.
        raw, norm, clipped = torch.stack([loss.detach(), clip.norm.to(loss), clip.clipped.to(loss)]).tolist()
        check_finite(raw, norm, self.step + 1)
        self.optimizer.step()
        self.state = detach(state)

        self.step += 1
        self._clipped_steps += bool(clipped)
        self._smoothed = raw if self.step == 1 else _SMOOTHING * self._smoothed + (1 - _SMOOTHING) * raw
        took = time.perf_counter() - began
        self.seconds += took
        positions = int(window[2].sum()) if lengths else targets.shape[0] * targets.shape[1]
        pace = positions / took
        self._tokens_per_second = 0.9 * self._tokens_per_second + 0.1 * pace if self._tokens_per_second else pace
        return self._report(raw, norm, bool(clipped), rate)

    def _rate_progress(self) -> float:
        """Progress by which the learning rate is set: the middle of the step, where steps can be counted beforehand."""
        if self.budget.minutes is not None:
            return self.progress
        return min((self.step + 0.5) / self.budget.total_steps(len(self.windows)), 1.0)

    def _report(self, raw: float, norm: float, clipped: bool, rate: float) -> StepReport:
        progress = self.progress
        return StepReport(
            step=self.step,
            progress=progress,
            seconds=self.seconds,
            seconds_left=self.seconds * (1 - progress) / progress if progress else None,
            epoch=self.step / len(self.windows),
            raw_loss=raw,
            loss=self._smoothed,
            gradient_norm=norm,
            clipped=clipped,
            clip_share=self.clip_share,
            learning_rate=rate,
            tokens_per_second=self._tokens_per_second,
        )

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that an exact continuation needs: tensors by name, and a JSON state."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        optimizer_state: dict[str, dict[str, Any]] = {}
        for index, values in self.optimizer.state_dict()["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value
                else:
                    optimizer_state.setdefault(str(index), {})[key] = value
        for index, tensor in enumerate(self.state or ()):
            tensors[f"state.{index}"] = tensor
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "smoothed_loss": self._smoothed,
            "clipped_steps": self._clipped_steps,
            "optimizer": optimizer_state,
        }
        return tensors, state

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from what `checkpoint` returned.

        Raises:
            CheckpointError: It belongs to another model or optimiser.
        """
        try:
            self.model.load_state_dict(_under("model.", tensors))
            self._restore_optimizer(tensors, state["optimizer"])
            carried = _under("state.", tensors)
            self.state = tuple(carried[str(index)].to(self.device) for index in range(len(carried))) or None
            torch.set_rng_state(tensors["rng.cpu"])
            if self.device.type == "cuda" and "rng.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self._smoothed, self._clipped_steps = float(state["smoothed_loss"]), int(state["clipped_steps"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the checkpoint belongs to another model or optimiser: {reason}") from error

    def _restore_optimizer(self, tensors: dict[str, Tensor], plain: dict[str, dict[str, Any]]) -> None:
        values: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in plain.items()}
        for name, tensor in _under("optimizer.", tensors).items():
            index, _, key = name.partition(".")
            values.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": values, "param_groups": self.optimizer.state_dict()["param_groups"]})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event; a second one interrupts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        interrupted.set()
        for caught, handler in before.items():
            signal.signal(caught, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
