"""Several processes that train one model: each reads its rows of every batch, and the gradients are added up.

All that the processes have to agree on goes through here. What they know alike they decide alike, so none waits for a message that
no other one sends: a step's loss, its time and the signals that anybody got travel with the gradients.
"""

import os
import pathlib
import pickle
import platform
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from throughtime.errors import InputError
from throughtime.launch import launched

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed.distributed_c10d import Store

_LONGEST_WAIT = timedelta(hours=1)  # while the first process reads a text or validates, the others wait for it
_ROWS = 1  # axis of the batch, in windows and in states
_T = TypeVar("_T")


class LostRankError(InputError):
    """Another process of the training is gone, or can't be reached any more; what was saved last is whole."""


class SaidElsewhereError(InputError):
    """The training ends because of what another process has said already; there is nothing to add."""


class Share(NamedTuple):
    """The rows of a window that one process reads.

    Attributes:
        window: Inputs, targets and perhaps lengths, of these rows alone.
        positions: How many steps of all rows count, those of the other processes included.
        weight: Which part of them is in these rows; the mean over all is the sum of each one's mean times this.
    """

    window: tuple[Tensor, ...]
    positions: int
    weight: float

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.window[0].shape[_ROWS]


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, and which of them this one is; by itself, a single one.

    Attributes:
        rank: Which one, from 0 on.
        size: How many there are.
        local_rank: Which one it is on its machine.

    Example:
        >>> import torch
        >>> window = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64)
        >>> share = Ranks(rank=1, size=2).share_of(window)
        >>> share.window[0].shape, share.positions, share.weight
        (torch.Size([3, 4]), 24, 0.5)
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other one."""
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that speaks, measures and writes."""
        return self.rank == 0

    def device(self, chosen: torch.device) -> torch.device:
        """Return where this process computes; each has a GPU of its own.

        Raises:
            InputError: There aren't as many, or the device serves one process only.
        """
        if self.is_alone or chosen.type == "cpu":
            return chosen
        if chosen.type != "cuda":
            raise InputError(f"--device {chosen.type}: serves one process only; expected cpu or cuda of several")
        if chosen.index is not None:
            raise InputError(
                f"--device {chosen}: is one GPU, and {self.size} processes want one each; expected cuda, or --device cpu"
            )
        if self.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {self.local_rank + 1} of this machine finds {torch.cuda.device_count()} GPU(s) here, and each wants one "
                "of its own; start fewer with --nproc-per-node, or give --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def share_of(self, window: Sequence[Tensor]) -> Share:
        """Return this process's rows of a window of all rows, (T, B, …) each, lengths (B,).

        The rows of a sequence of processes are neighbours, the first ones have one more where they can't be divided.
        """
        lengths = window[2] if len(window) > 2 else None
        window = tuple(window)
        targets = window[1]
        positions = targets.shape[0] * targets.shape[_ROWS] if lengths is None else int(lengths.sum())
        if self.is_alone:
            return Share(window, positions, 1.0)
        own = tuple(self._own(tensor, 0 if place == 2 else _ROWS) for place, tensor in enumerate(window))
        here = own[1].shape[0] * own[1].shape[_ROWS] if lengths is None else int(own[2].sum())
        return Share(own, positions, here / max(positions, 1))

    def own_rows(self, state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        """Return this process's rows of a state of all rows; `None` where it has none."""
        if self.is_alone or state is None:
            return state
        own = tuple(self._own(tensor, _ROWS).contiguous() for tensor in state)
        return own if all(tensor.shape[_ROWS] for tensor in own) else None

    def all_rows(self, state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        """Return the state of all rows, on the CPU, from the own rows of each process."""
        if self.is_alone:
            return state
        here = None if state is None else tuple(tensor.detach().cpu() for tensor in state)
        theirs = [each for each in self._everybodys(here) if each is not None]
        return tuple(torch.cat(parts, _ROWS) for parts in zip(*theirs, strict=True)) or None

    def make_alike(self, model: nn.Module) -> None:
        """Give a model, and torch's random numbers on the CPU, what the first process has."""
        if self.is_alone:
            return
        with _in_touch(), torch.no_grad():
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)
        torch.set_rng_state(self.of_first(torch.get_rng_state))

    @contextmanager
    def own_chance(self, device: torch.device) -> Iterator[None]:
        """Let each process draw numbers of its own for a while, after which all generators are alike again.

        They follow from the generator that all share, so a checkpoint needs no more than that one.
        """
        if self.is_alone:
            yield
            return
        seed = int(torch.randint(1 << 62, ())) + self.rank
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed(seed)
            yield

    def add_up(self, parameters: Sequence[nn.Parameter], numbers: Tensor) -> Tensor:
        """Add gradients up over all processes, in place, and return the sums of numbers, (N,); all of it is one message.

        A process whose rows all ended had no backward pass: its parameters get gradients where another one's have.
        """
        if self.is_alone:
            return numbers
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        dtype = torch.float32
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise InputError(
                    "a parameter has a sparse gradient, which several processes can't add up; make it dense"
                )
            dtype = torch.promote_types(dtype, parameter.dtype)
        missing = [parameter.grad is None for parameter in parameters]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        there = torch.tensor([0.0 if lacks else 1.0 for lacks in missing])
        whole = torch.cat([part.reshape(-1).to(numbers.device, dtype) for part in (*parts, there, numbers)])
        with _in_touch():
            dist.all_reduce(whole)
        *sums, there, numbers = whole.split([*(part.numel() for part in parts), len(parts), len(numbers)])
        has_one = there.tolist() if any(missing) else None  # on a GPU, to look is to wait
        for place, (parameter, total) in enumerate(zip(parameters, sums, strict=True)):
            if parameter.grad is not None:
                parameter.grad.copy_(total.view_as(parameter))
            elif has_one is not None and has_one[place]:
                parameter.grad = total.view_as(parameter).to(parameter.dtype, copy=True)
        return numbers

    def of_first(self, make: Callable[[], _T]) -> _T:
        """Return what the first process makes, in all of them."""
        if self.is_alone:
            return make()
        there: list[Any] = [make() if self.is_first else None]
        with _in_touch():
            dist.broadcast_object_list(there, 0)
        return there[0]

    def total(self, number: float) -> float:
        """Return the sum of a number over all processes."""
        return number if self.is_alone else float(sum(self._everybodys(number)))

    def agents(self) -> list[str]:
        """Return, sorted, which programs started all of these processes; they stay the same when all are started again."""
        here = f"{platform.node()} {os.getppid()} {_began(os.getppid())}"
        return sorted(set([here] if self.is_alone else self._everybodys(here)))

    def _everybodys(self, value: _T) -> list[_T]:
        there: list[Any] = [None] * self.size
        with _in_touch():
            dist.all_gather_object(there, value)
        return there

    def _own(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.tensor_split(self.size, axis)[self.rank]


def without_hooks(model: nn.Module) -> Any:
    """Return a context in which a model wrapped in DistributedDataParallel leaves gradients alone; `add_up` sees to them."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def inside(model: nn.Module) -> nn.Module:
    """Return the module that DistributedDataParallel wraps, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the processes that torchrun started with this one, and part from them at the end; a process by itself is alone.

    Where the block ends by an error, the others end too, and only the first error to come is raised as it is; elsewhere it is a
    `SaidElsewhereError`. A process group that is there already is used, and left as it was.

    Raises:
        InputError: The environment says what can't be, or the others can't be met.
    """
    launch = launched()
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), launch.local_rank)
        return
    if launch.size == 1:
        yield Ranks()
        return
    store = _meet(launch.rank, launch.size)
    try:
        yield Ranks(launch.rank, launch.size, launch.local_rank)
    except Exception as error:
        if _was_said(store):
            raise SaidElsewhereError("another process of this training has said why it ends") from error
        raise
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _meet(rank: int, size: int) -> "Store":
    """Make the group of all processes: gloo between CPUs, NCCL between GPUs; return the store by which they found each other."""
    if not dist.is_available():
        raise InputError(
            "this torch was built without torch.distributed, so one process trains alone; unset WORLD_SIZE"
        )
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"

    def find_others() -> "Store":
        store, *_ = next(rendezvous("env://", rank, size, timeout=_LONGEST_WAIT))
        return PrefixStore(_greet(store, rank, size), store)

    try:
        store = _awaited(find_others)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(f"process {rank} of {size} can't meet the others at {where}: {_line(error)}") from error
    return store


def _awaited(find: Callable[[], _T]) -> _T:
    """Return what a function does, in a thread: torch waits in native code, during which no signal would be heard."""
    came = Future[_T]()

    def run() -> None:
        try:
            came.set_result(find())
        except BaseException as error:
            came.set_exception(error)

    threading.Thread(target=run, daemon=True, name="finds the other processes").start()
    return came.result()


def _greet(store: "Store", rank: int, size: int) -> str:
    """Return a name that these processes alone have in common.

    torchrun may give those that it starts again the store of the first ones, with the addresses of the dead; and how often they
    were started again isn't the same on a machine that came later. So each greets with a number of its own, and the first one,
    which may find a greeting of the dead, answers until all have heard it.
    """
    own, met = secrets.token_hex(8), f"throughtime/{secrets.token_hex(8)}"
    if rank:
        store.set(f"throughtime/greeting/{rank}", own)
        met = store.get(f"throughtime/answer/{own}").decode()  # waits for it
        store.add(f"{met}/heard", 1)
        return met
    until, answered = time.monotonic() + _LONGEST_WAIT.total_seconds(), set[str]()
    while store.add(f"{met}/heard", 0) < size - 1:
        for key in (f"throughtime/greeting/{other}" for other in range(1, size)):
            if store.check([key]) and (theirs := store.get(key).decode()) not in answered:
                store.set(f"throughtime/answer/{theirs}", met)
                answered.add(theirs)
        if time.monotonic() > until:
            raise RuntimeError(f"waited for {_LONGEST_WAIT} in vain")
        time.sleep(0.01)
    return met


def _was_said(store: "Store") -> bool:
    """Return whether another process ended by an error before; that may have been the one that held the store."""
    try:
        return store.add("said", 1) > 1
    except RuntimeError:
        return False


@contextmanager
def _in_touch() -> Iterator[None]:
    """Say in a line that another process can't be reached.

    Raises:
        LostRankError: It can't.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise LostRankError(f"another process of this training is gone ({_line(error)})") from error


def _line(error: Exception) -> str:
    """Return what went wrong, without gloo's place in its code before it and its advice after it."""
    line = re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0])
    return " ".join(line.partition(". ")[0].split())


def _began(process: int) -> str:
    """Return when a process began, in the system's own count; "" where there is no telling."""
    with (
        suppress(OSError, IndexError),
        pathlib.Path(f"/proc/{process}/stat").open(encoding="ascii", errors="replace") as file,
    ):
        return file.read().rpartition(")")[2].split()[19]
    return ""
