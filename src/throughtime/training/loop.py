"""The training loop: truncated BPTT of any model that returns (output, state), interruptible, and resumable to the bit."""

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from throughtime.errors import InputError
from throughtime.training.averaging import NonMonotone, exponential_average, mean
from throughtime.training.clipping import Clipping
from throughtime.training.denormals import flush_denormals
from throughtime.training.files import CheckpointError
from throughtime.training.guard import LossWatch, NonFiniteError, check_finite
from throughtime.training.ranks import LostRankError, Ranks, Share, inside, without_hooks
from throughtime.training.restoring import (
    MOST,
    check_average,
    check_generator,
    check_optimizer_state,
    check_state,
    check_tensors,
    optimizer_state,
)
from throughtime.training.schedule import Budget, Schedule
from throughtime.training.tbptt import detach

_SNAPSHOT_EVERY = 100  # steps between two states kept in memory, to roll back to
_PATIENCE = 1.0  # seconds from the first interrupt on in which further ones change nothing
_LOWERED = 0.5  # factor on the learning rate at each rollback
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


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
        scalars: What the loop's probe measured at this step, by name; empty at most steps.
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
    scalars: dict[str, float | None]


@dataclass(frozen=True)
class Rollback:
    """What was done about a loss that diverged.

    Attributes:
        step: At which step it did.
        reason: What happened, in a line.
        to_step: How many steps are done after going back.
        learning_rate: Its peak from now on.
    """

    step: int
    reason: str
    to_step: int
    learning_rate: float


@dataclass(frozen=True)
class Validation:
    """What a measurement on other data came to.

    Attributes:
        step: Steps done.
        seconds: Training time so far.
        loss: What was measured.
        is_best: Whether it is the lowest so far.
    """

    step: int
    seconds: float
    loss: float
    is_best: bool


@dataclass(frozen=True)
class Stage:
    """A part of training with a schedule of its own: what was planned, or what was asked for later.

    Attributes:
        budget: How long it is.
        learning_rate: Its peak.
        step: Steps that were done when it began.
        seconds: Training time until then.
    """

    budget: Budget
    learning_rate: float
    step: int = 0
    seconds: float = 0.0


class Validate(Protocol):
    """Measures a model on data that it isn't trained on."""

    def __call__(self, model: nn.Module, should_stop: Callable[[], bool]) -> float | None:
        """Return the loss, the lower the better; or `None` as soon as `should_stop()`."""
        ...


class Probe(Protocol):
    """Measures something on a window that is about to be trained on, and changes nothing."""

    def __call__(
        self, model: nn.Module, inputs: Tensor, targets: Tensor, state: Any = None, lengths: Tensor | None = None, /
    ) -> dict[str, float | None]:
        """Return numbers by name; `None` is one that can't be told there."""
        ...


@dataclass
class Loop:
    """A training under way.

    Attributes:
        model: `model(inputs, state) -> (output, state)`, called with `lengths` as a third where the windows have them; the state
            is a tuple of tensors.
        windows: What to train on.
        optimizer: A torch optimiser over the model's parameters.
        loss: `loss(output, targets)`, a scalar.
        budget: How long; `train_longer` begins another one.
        learning_rate: Its peak. A parameter group of the optimiser that has a "rate_factor" learns that much faster.
        schedule: How the learning rate goes along the budget.
        clipping: How gradients are clipped.
        device: Where the model is.
        dtype: What the model computes in, by torch.autocast where it isn't float32; its weights, and what is validated, stay as
            they are.
        forward: What is called instead of the model itself, where the loss reads something else than the model's output.
        average: Decay of an exponential moving average of the weights; 0 is none. The average is what is validated.
        nonmonotone: After how many validations without an improvement the weights are averaged from then on (NT-ASGD, Merity et
            al., 2018); 0 is never.
        validate: Measures the model on other data.
        validate_every: Steps between two validations.
        patience: How many validations without an improvement end training; 0 is off.
        rollbacks: How many times a divergence (a loss or gradient that is no number, or a jump of the loss) is answered by going
            back to a state one or two hundred steps before and halving the learning rate; the next one ends training.
        probe: Measures scalars along the way, which the step's report has; its time counts.
        probe_every: Steps between two of its measurements.
        ranks: The processes that train together, each with a loop of its own that is told the same: windows are those of all rows,
            and each process reads its share of them, rows being axis 1 of windows and of states (and axis 0 of lengths). The loss
            is a mean over the steps that count. What the first process measures counts, and its time.

    Several processes come to what one comes to, whatever their number, but for what is drawn along the way: dropout is drawn by
    each for itself. The model may be wrapped in DistributedDataParallel; gradients are added up here all the same, and its
    hooks rest.

    Raises:
        InputError: The model is wrapped for several processes, and `ranks` isn't given.

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
    schedule: Schedule = field(default_factory=Schedule)
    clipping: Clipping = field(default_factory=Clipping)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    forward: Callable[..., tuple[Any, Any]] | None = None
    average: float = 0.0
    nonmonotone: int = 0
    validate: Validate | None = None
    validate_every: int = 0
    patience: int = 0
    rollbacks: int = 0
    probe: Probe | None = None
    probe_every: int = 0
    ranks: Ranks = field(default_factory=Ranks)

    longer: Stage | None = field(default=None, init=False)
    step: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)
    state: Any = field(default=None, init=False)
    best: float = field(default=math.inf, init=False)
    best_step: int = field(default=0, init=False)
    rolled_back: int = field(default=0, init=False)
    signal: int | None = field(default=None, init=False)
    _validated_at: int = field(default=0, init=False)
    _without_improvement: int = field(default=0, init=False)
    _rate_factor: float = field(default=1.0, init=False)
    _watch: LossWatch = field(default_factory=LossWatch, init=False)
    _snapshots: list[tuple[dict[str, Tensor], dict[str, Any]]] = field(default_factory=list, init=False)
    _clipped_steps: int = field(default=0, init=False)
    _tokens_per_second: float = field(default=0.0, init=False)
    _is_stopped: bool = field(default=False, init=False)
    _took: float = field(default=0.0, init=False)
    _interruption: "_Interruption" = field(default_factory=lambda: _Interruption(), init=False)

    def __post_init__(self) -> None:
        self._module = inside(self.model)
        if self.ranks.is_alone and self._module is not self.model and torch.distributed.get_world_size() > 1:
            raise InputError(
                "the model is wrapped in DistributedDataParallel, but the loop isn't told of other processes, and each would "
                "decide for itself; expected ranks= too, as `with training.joined() as ranks` gives them"
            )
        self._average = exponential_average(self._module, self.average) if self.average else None
        self._trigger = NonMonotone(self.nonmonotone)

    @property
    def trained(self) -> nn.Module:
        """The model that training makes: the average where there is one."""
        return self._module if self._average is None else self._average.module

    @property
    def is_finished(self) -> bool:
        """Whether the budget is spent, or patience is."""
        return self.progress >= 1 or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether validations have stopped improving."""
        return 0 < self.patience <= self._without_improvement

    @property
    def progress(self) -> float:
        """Share of the budget used up."""
        stage = self.stage
        done = stage.budget.progress(self.seconds - stage.seconds, self.step - stage.step, len(self.windows))
        return min(done, 1.0)

    @property
    def stage(self) -> Stage:
        """The part of training that is under way."""
        return self.longer or Stage(self.budget, self.learning_rate)

    @property
    def clip_share(self) -> float:
        """Share of the steps so far that were clipped."""
        return self._clipped_steps / max(self.step, 1)

    def run(
        self,
        observer: Callable[[StepReport], None] | None = None,
        save: Callable[[], object] | None = None,
        save_every: float = 30.0,
        on_event: Callable[[Rollback | Validation], None] | None = None,
    ) -> bool:
        """Train until the budget is spent or somebody interrupts.

        Args:
            observer: Called after each step.
            save: Called before the first step of a stage, every `save_every` seconds, and at the end, also when interrupted.
                Its time doesn't count. Of several processes each calls its own at the same step, so that `checkpoint()` works.
            save_every: Seconds.
            on_event: Called after each validation, and when training went back after a divergence.

        Returns:
            Whether training is finished; `False` after Ctrl-C, SIGTERM or SIGHUP, and then `signal` is which, and after `stop`.

        Raises:
            NonFiniteError: The loss diverged, once more than `rollbacks`. The weights are still those of the step before.
            LostRankError: Another process is gone.
        """
        self.model.train()
        self.ranks.make_alike(self._module)
        if save is not None and self.step == self.stage.step:
            save()  # so that from the first step on there is something to go back to
        saved_at = self.seconds
        self._is_stopped = False
        with _interruptible(self.ranks.is_alone) as self._interruption:
            while self._interruption.agreed is None and not self._is_stopped:
                if self._validation_is_due():
                    validation = self._validate()
                    if validation is not None and on_event is not None:
                        on_event(validation)
                    continue
                try:
                    if self.is_finished:
                        self._check_weights(and_loss=True)
                        break
                    report = self._step()
                    is_due = save is not None and self.seconds - saved_at >= save_every
                    if is_due:
                        self._check_weights()
                except NonFiniteError as error:
                    rollback = self._roll_back(error)
                    if on_event is not None:
                        on_event(rollback)
                    continue
                if observer is not None:
                    observer(report)
                if save is not None and is_due:
                    save()
                    saved_at = self.seconds
            if save is not None and self._weights_are_finite():
                save()
        self.signal = self._interruption.agreed
        return self.is_finished and not self._validation_is_due()

    def stop(self) -> None:
        """Have `run` save and return after the step under way, as after an interrupt; for its observer."""
        self._is_stopped = True

    def measure(self) -> float | None:
        """Return what `validate` says of the model as it is, and take no note of it; `None` where an interrupt came first."""
        assert self.validate is not None
        value = self.validate(self.trained, lambda: self._interruption.signal is not None)
        self.model.train()
        return value

    def train_longer(self, budget: Budget, learning_rate: float | None = None) -> None:
        """Begin another stage where training stands, with a schedule of its own and patience anew.

        Weights, optimiser, carried state and the place in the data stay as they are.

        Args:
            budget: How long it is.
            learning_rate: Its peak; that of the stage before if not given.
        """
        self.longer = Stage(budget, learning_rate or self.stage.learning_rate, self.step, self.seconds)
        self._without_improvement = 0
        self._watch = LossWatch()  # a rate that rises again lifts the loss, which is no divergence
        self._snapshots.clear()

    def _validation_is_due(self) -> bool:
        if not self.validate_every or self.step <= self._validated_at:
            return False
        return self.step % self.validate_every == 0 or self.progress >= 1

    def _validate(self) -> Validation | None:
        """Measure the model on other data, and note whether it is the best so far; `None` if that was stopped."""
        validate, asked = self.validate, self._interruption
        assert validate is not None
        value, asked.agreed = self.ranks.of_first(
            lambda: (validate(self.trained, lambda: asked.signal is not None), asked.signal)
        )
        self.model.train()
        if value is None and asked.agreed is not None:
            return None
        assert value is not None, "validate returned None though nobody asked it to stop"
        self._validated_at = self.step
        self._without_improvement += 1
        is_best = value < self.best
        if is_best:
            self.best, self.best_step, self._without_improvement = value, self.step, 0
        if self.nonmonotone and self._average is None and self._trigger.is_met_by(value):
            self._average = mean(self._module)
        return Validation(self.step, self.seconds, value, is_best)

    def _roll_back(self, error: NonFiniteError) -> Rollback:
        """Go back to the older of the two states in memory, and lower the learning rate; raise if that was done too often."""
        if self.rolled_back >= self.rollbacks:
            if not self.rollbacks:
                raise error
            tried = f"after {self.rolled_back} rollbacks and with the learning rate down to {self._peak:.3g}"
            raise type(error)(f"{tried}: {error}") from error
        at, seconds = self.step + 1, self.seconds
        kept = self.best, self.best_step, self._without_improvement, self.rolled_back + 1, self._rate_factor * _LOWERED
        tensors, state = self._snapshots[0]
        copied = {name: tensor.clone() for name, tensor in tensors.items()}  # an optimiser works in place
        self._apply(copied, state)
        self.seconds = seconds
        self.best, self.best_step, self._without_improvement, self.rolled_back, self._rate_factor = kept
        del self._snapshots[1:]
        return Rollback(at, str(error), self.step, self._peak)

    def _keep_snapshot(self) -> None:
        """Keep the state in memory, beside the one before; what comes next may have to be taken back."""
        tensors, state = self._checkpoint(self.state)
        copied = {name: tensor.clone() for name, tensor in tensors.items()}
        self._snapshots = [*self._snapshots[-1:], (copied, copy.deepcopy(state))]

    @property
    def _peak(self) -> float:
        return self.stage.learning_rate * self._rate_factor

    def _weights_are_finite(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters())

    @flush_denormals()
    @torch.no_grad()
    def _check_weights(self, and_loss: bool = False) -> None:
        """Raise unless the weights are finite, which a step doesn't look at after it; and the loss that they have, too.

        Raises:
            NonFiniteError: They aren't.
        """
        loss = 0.0 if self._weights_are_finite() else math.nan
        if and_loss and not math.isnan(loss):
            share = self.ranks.share_of(self.windows.window_at(self.step))
            self.model.eval()  # so that nothing is drawn
            if share.weight:
                inputs, targets, *lengths = (tensor.to(self.device) for tensor in share.window)
                with self._autocast(), without_hooks(self.model):
                    output, _ = (self.forward or self.model)(inputs, None, *lengths)
                    loss = self.loss(output, targets).item() * share.weight
            loss = self.ranks.total(loss)
            self.model.train()
        check_finite(loss, 0.0, self.step)

    @flush_denormals()
    def _step(self) -> StepReport:
        """Read one window, carry its loss back, and update the weights."""
        began = time.perf_counter()
        if self.rollbacks and (not self._snapshots or self.step % _SNAPSHOT_EVERY == 0):
            self._keep_snapshot()
        rate = self._peak * self.schedule.factor(
            self._rate_progress(), (self.step - self.stage.step) / len(self.windows)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_factor", 1.0)
        if self.windows.begins_epoch(self.step):
            self.state = None
        share = self.ranks.share_of(self.windows.window_at(self.step))
        own = tuple(tensor.to(self.device, non_blocking=True) for tensor in share.window)
        is_probed = self.probe_every and (self.step + 1) % self.probe_every == 0 and self.ranks.is_first
        scalars = self._probed(*own) if is_probed else {}

        self.optimizer.zero_grad()
        loss, state = self._forward_and_back(own, share)
        loss = self._add_up(loss)
        clip = self.clipping.apply(self.model.parameters())
        # One wait for the device a step, before the update: numbers that are none never reach the weights.
        raw, norm, clipped, *agreed = torch.cat(
            [loss[:1], torch.stack([clip.norm.to(loss), clip.clipped.to(loss)]), loss[1:]]
        ).tolist()
        self._agree(agreed)
        check_finite(raw, norm, self.step + 1)
        if self.rollbacks:
            self._watch.check(raw, self.step + 1)
        self.optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self._module)
        self.state = detach(state)

        self.step += 1
        self._clipped_steps += bool(clipped)
        self._watch.see(raw)
        took = time.perf_counter() - began
        if self.ranks.is_alone:
            self.seconds += took
        self._took = took
        pace = share.positions / took
        self._tokens_per_second = 0.9 * self._tokens_per_second + 0.1 * pace if self._tokens_per_second else pace
        return self._report(raw, norm, bool(clipped), rate, scalars)

    def _probed(self, inputs: Tensor, targets: Tensor, *lengths: Tensor) -> dict[str, float | None]:
        """Return what the probe measures on a window."""
        return (
            {} if self.probe is None else self.probe(self._module, inputs, targets, self._state_of_weights(), *lengths)
        )

    def _forward_and_back(self, window: tuple[Tensor, ...], share: Share) -> tuple[Tensor, Any]:
        """Return a share's part of the loss, and the state after it; the gradients are its part of them."""
        inputs, targets, *lengths = window
        loss, state = torch.zeros((), device=self.device), None
        if not share.rows:
            return loss, state
        forward = self.model if self.forward is None else self.forward
        with self.ranks.own_chance(self.device), without_hooks(self.model):
            with self._autocast():
                output, state = forward(inputs, self.state, *lengths)
                if share.weight:
                    loss = self.loss(output, targets)
            if share.weight == 1:
                loss.backward()
            elif share.weight:
                loss = loss * share.weight
                loss.backward()
        return loss.detach(), state

    def _add_up(self, loss: Tensor) -> Tensor:
        """Return the loss, and after it of several processes what they have to agree on; gradients are those of all of them."""
        if self.ranks.is_alone:
            return loss.unsqueeze(0)
        took = self._took if self.ranks.is_first else 0.0
        asked = [float(self._interruption.signal == number) for number in _SIGNALS]
        numbers = torch.cat([loss.unsqueeze(0), torch.tensor([took, *asked], device=self.device).to(loss)])
        return self.ranks.add_up(list(self.model.parameters()), numbers)

    def _agree(self, numbers: list[float]) -> None:
        """Take over how long the first process's last step took, and which signal any process got."""
        if self.ranks.is_alone:
            return
        took, *asked = numbers
        self.seconds += took
        self._interruption.agreed = next((number for number, count in zip(_SIGNALS, asked, strict=True) if count), None)

    def _state_of_weights(self) -> Any:
        """Return the carried state in the dtype of the weights, for what runs outside autocast."""
        if self.state is None or self.dtype == torch.float32:
            return self.state
        return tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in self.state)

    def _rate_progress(self) -> float:
        """Progress by which the learning rate is set: the middle of the step, where steps can be counted beforehand."""
        stage = self.stage
        if stage.budget.minutes is not None:
            return self.progress
        return min((self.step - stage.step + 0.5) / stage.budget.total_steps(len(self.windows)), 1.0)

    def _report(
        self, raw: float, norm: float, clipped: bool, rate: float, scalars: dict[str, float | None]
    ) -> StepReport:
        progress = self.progress
        spent = self.seconds - self.stage.seconds
        return StepReport(
            step=self.step,
            progress=progress,
            seconds=self.seconds,
            seconds_left=spent * (1 - progress) / progress if progress else None,
            epoch=self.step / len(self.windows),
            raw_loss=raw,
            loss=self._watch.slow,
            gradient_norm=norm,
            clipped=clipped,
            clip_share=self.clip_share,
            learning_rate=rate,
            tokens_per_second=self._tokens_per_second,
            scalars=scalars,
        )

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that an exact continuation needs: tensors by name, and a JSON state.

        It is the same whatever the number of processes; of several all have to ask for it.
        """
        return self._checkpoint(self.ranks.all_rows(self.state))

    def _checkpoint(self, carried: tuple[Tensor, ...] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"model.{name}": tensor for name, tensor in self._module.state_dict().items()}
        if self._average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self._average.state_dict().items()}
        plain: dict[str, dict[str, Any]] = {}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": v for key, v in values.items() if isinstance(v, Tensor)}
            plain[str(index)] = {key: v for key, v in values.items() if not isinstance(v, Tensor)}
        for index, tensor in enumerate(carried or ()):
            tensors[f"state.{index}"] = tensor
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "longer": None if self.longer is None else asdict(self.longer),
            "step": self.step,
            "seconds": self.seconds,
            "watch": asdict(self._watch) | {"lowest": min(self._watch.lowest, MOST)},
            "best": min(self.best, MOST),
            "best_step": self.best_step,
            "validated_at": self._validated_at,
            "without_improvement": self._without_improvement,
            "rolled_back": self.rolled_back,
            "rate_factor": self._rate_factor,
            "validations": self._trigger.losses,
            "clipped_steps": self._clipped_steps,
            "optimizer": plain,
        }
        return tensors, state

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from what `checkpoint` returned. A loop that refuses it is spoilt; make another.

        Raises:
            CheckpointError: It belongs to another model or optimiser: a name, a shape, a dtype or a number is not what this loop
                could have written.
        """
        try:
            check_state(state)
            self._check(tensors, state)
            self._apply(tensors, state)
            self.state = self.ranks.own_rows(self.state)
            self._read_on()
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the checkpoint belongs to another model or optimiser: {reason}") from error
        torch.set_rng_state(tensors["rng.cpu"])  # last, since reading on may have drawn

    def _check(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Raise unless tensors are this loop's."""
        prefixes = ("model.", "average.", "optimizer.", "state.", "rng.")
        for name in tensors:
            if not name.startswith(prefixes):
                raise CheckpointError(f"{name} is none of its tensors")
        check_tensors(_under("model.", tensors), self._module.state_dict(), "model.")
        average = self._average_to_restore(tensors)
        check_tensors(_under("average.", tensors), average.state_dict() if average else {}, "average.")
        check_average(tensors.get("average.n_averaged"), state["step"])
        check_tensors(
            {"cpu": tensors["rng.cpu"]} if "rng.cpu" in tensors else {}, {"cpu": torch.get_rng_state()}, "rng."
        )
        check_generator(torch.device("cpu"), tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            check_generator(self.device, tensors["rng.cuda"])
        carried = _under("state.", tensors)
        if carried.keys() != {str(index) for index in range(len(carried))}:
            raise CheckpointError("the parts of the carried state aren't numbered from 0 on")
        kept = optimizer_state(_under("optimizer.", tensors), state["optimizer"])
        check_optimizer_state(self.optimizer, kept, state["step"])

    def _average_to_restore(self, tensors: dict[str, Tensor]) -> AveragedModel | None:
        if not self.nonmonotone:
            return self._average
        return mean(self._module) if "average.n_averaged" in tensors else None  # it may have begun since, or not yet

    def _apply(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take all of a checkpoint over."""
        self._module.load_state_dict(_under("model.", tensors))
        self._trigger = NonMonotone(self.nonmonotone, list(state["validations"]))
        self._average = self._average_to_restore(tensors)
        if self._average is not None:
            self._average.load_state_dict(_under("average.", tensors))
        kept = optimizer_state(_under("optimizer.", tensors), state["optimizer"])
        self.optimizer.load_state_dict({"state": kept, "param_groups": self.optimizer.state_dict()["param_groups"]})
        carried = _under("state.", tensors)
        self.state = tuple(carried[str(index)].to(self.device) for index in range(len(carried))) or None
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        longer = state["longer"]
        self.longer = None if longer is None else Stage(**longer | {"budget": Budget(**longer["budget"])})
        self.step, self.seconds = state["step"], float(state["seconds"])
        self._watch, self._clipped_steps = LossWatch(**state["watch"]), state["clipped_steps"]
        self.best, self.best_step = float(state["best"]), state["best_step"]
        self._validated_at, self._without_improvement = state["validated_at"], state["without_improvement"]
        self.rolled_back, self._rate_factor = state["rolled_back"], float(state["rate_factor"])

    @torch.no_grad()
    def _read_on(self) -> None:
        """Read the next window from the carried state, as the next step will, and raise where that can't be its state."""
        if self.state is None or self.windows.begins_epoch(self.step):
            return
        window = self.ranks.share_of(self.windows.window_at(self.step)).window
        inputs, _, *lengths = (tensor.to(self.device) for tensor in window)
        was_training = self.model.training
        self.model.eval()
        with self._autocast(), without_hooks(self.model):
            _, state = (self.forward or self.model)(inputs, self.state, *lengths)
        self.model.train(was_training)
        expected = {str(index): tensor for index, tensor in enumerate(state)}
        check_tensors({str(index): tensor for index, tensor in enumerate(self.state)}, expected, "state.")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class _Interruption:
    """Which signal asked this process for the end, if one did; and which one all of them end by."""

    signal: int | None = None
    agreed: int | None = None
    noted_at: ClassVar[float] = -math.inf


def seconds_since_interrupt() -> float:
    """Return how long ago a loop in this process was asked to stop; infinity if none was."""
    return time.monotonic() - _Interruption.noted_at


@contextmanager
def _interruptible(decides: bool) -> Iterator[_Interruption]:
    """Take note of the first Ctrl-C, SIGTERM or SIGHUP; one that comes a second later interrupts at once.

    Those that come sooner are the same wish: a key held down, a terminal that closes. A signal that is ignored, as under nohup,
    stays so. The one who started several processes ends them where one is lost: that says no more than the loss.

    Args:
        decides: Whether a signal to this process is enough; else all have to hear of it first.
    """
    interruption = _Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def note(number: int, frame: Any) -> None:
        if interruption.signal is None:
            interruption.signal, _Interruption.noted_at = number, time.monotonic()
            interruption.agreed = number if decides else None
        elif seconds_since_interrupt() >= _PATIENCE:
            for caught, handler in before.items():
                signal.signal(caught, handler)
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield interruption
    except LostRankError:
        _Interruption.noted_at = time.monotonic()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
