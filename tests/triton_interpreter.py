"""Triton's interpreter with the programs of a launch side by side, as on a GPU.

By itself it runs one program after the other, and one that waits for another's numbers would wait for ever. Here each program
is a thread and one of them has the turn: where it loads what others may write (a volatile load), a random one goes on. So a
seed is a schedule, and a launch in which nobody gets anywhere ends with a `DeadlockError`. Products of bfloat16, which the
interpreter takes for integers, are made of their values.

What a GPU would forgive by chance is an error or a NaN: a load or store beyond what the launch was given, and what is masked in a
load that doesn't say what stands for it.
"""

import inspect
import random
import threading
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_PATIENCE = 300  # turns of all programs without a store


class DeadlockError(RuntimeError):
    """All programs wait for each other."""


class OutsideError(RuntimeError):
    """A program reads or writes what it wasn't given."""


class Turns:
    """Whose turn it is."""

    def __init__(self) -> None:
        self.random = random.Random(0)
        self.running: int | None = None
        self.begins = self.ends = np.zeros(0, dtype=np.uint64)

    def give(self, arguments: Any) -> None:
        """Say what the programs of a launch may read and write."""
        tensors = [a for a in arguments if isinstance(a, torch.Tensor) and a.numel()]
        begins = [t.data_ptr() for t in tensors]
        reach = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 for t in tensors]
        ends = [begin + n * t.element_size() for begin, n, t in zip(begins, reach, tensors, strict=True)]
        order = np.lexsort((ends, begins))  # of views that begin alike the longest is the last
        self.begins, self.ends = np.array(begins, np.uint64)[order], np.array(ends, np.uint64)[order]

    def check(self, pointers: Any, mask: Any) -> None:
        """Refuse to read or write beyond what was given."""
        found = pointers.data[mask.data.astype(bool)]
        size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        which = np.searchsorted(self.begins, found, side="right").astype(np.int64) - 1
        if (which < 0).any() or (found + np.uint64(size) > self.ends[which]).any():
            raise OutsideError("beyond what the launch was given")

    def run(self, function: Any, arguments: dict[str, Any], grid: tuple[int, int, int]) -> None:
        """Run all programs of a launch."""
        self.places = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        self.left = list(range(len(self.places)))
        self.turns = [threading.Semaphore(0) for _ in self.places]
        self.done, self.idle = threading.Semaphore(0), 0
        self.error: BaseException | None = None
        threads = [threading.Thread(target=self._program, args=(n, function, arguments)) for n in self.left]
        for thread in threads:
            thread.start()
        self._pass_on()
        self.done.acquire()
        for thread in threads:
            thread.join()
        self.running = None
        if self.error is not None:
            raise self.error

    def _program(self, number: int, function: Any, arguments: dict[str, Any]) -> None:
        try:
            self._take(number)
            function(**arguments)
        except BaseException as error:
            self.error = self.error or error
        self.left.remove(number)
        self.idle = 0
        self._pass_on()

    def _take(self, number: int) -> None:
        self.turns[number].acquire()
        if self.error is not None:
            raise self.error
        self.running = number
        interpreter.interpreter_builder.set_grid_idx(*self.places[number])

    def _pass_on(self) -> None:
        (self.turns[self.random.choice(self.left)] if self.left else self.done).release()

    def wait(self) -> None:
        """Let another program go on."""
        number = self.running
        if number is None:
            return
        self.idle += 1
        if self.idle > _PATIENCE * len(self.places):
            raise DeadlockError("all programs wait for each other")
        self._pass_on()
        self._take(number)


turns = Turns()


def _launch(self: Any, *given: Any, **named: Any) -> None:
    """Stand for `GridExecutor.__call__`."""
    known = inspect.getfullargspec(self.fn).args
    given, named = self._init_args_hst(given, {name: value for name, value in named.items() if name in known})
    scope = interpreter._patch_lang(self.fn)
    try:
        arguments = inspect.getcallargs(self.fn, *given, **named)
        turns.give(arguments.values())
        arguments = {n: a if n in self.constexprs else interpreter._implicit_cvt(a) for n, a in arguments.items()}
        grid = (*self.grid, *[1] * (3 - len(self.grid)))
        interpreter.interpreter_builder.set_grid_dim(*grid)
        turns.run(self.fn, arguments, grid)
    finally:
        scope.restore()


def install(monkeypatch: Any) -> Turns:
    """Have launches run so within a test."""
    builder = interpreter.InterpreterBuilder
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(
            tensor, scope
        )  # whose index numpy 2.4 refuses: it makes no number of an array of one element any more
        scope.set_attr(tensor, "__index__", lambda own: int(np.asarray(own.handle.data).item()))

    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def load_in_turn(self: Any, pointers: Any, mask: Any, other: Any, *how: Any) -> Any:
        if how[-1]:
            turns.wait()
        turns.check(pointers, mask)
        if other is None:
            kind = pointers.get_element_ty()
            bits = np.full((*pointers.data.shape, interpreter._get_np_dtype(kind).itemsize), 0xFF, np.uint8)
            other = interpreter.TensorHandle(bits.view(interpreter._get_np_dtype(kind))[..., 0], kind)
        return load(self, pointers, mask, other, *how)

    def store_and_say(self: Any, pointers: Any, value: Any, mask: Any, *how: Any) -> Any:
        turns.idle = 0
        turns.check(pointers, mask)
        return store(self, pointers, value, mask, *how)

    def multiply(self: Any, a: Any, b: Any, *others: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (
                interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32) for t in (a, b)
            )
        return dot(self, a, b, *others)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_and_index)
    monkeypatch.setattr(builder, "create_masked_load", load_in_turn)
    monkeypatch.setattr(builder, "create_masked_store", store_and_say)
    monkeypatch.setattr(builder, "create_dot", multiply)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", _launch)
    return turns
