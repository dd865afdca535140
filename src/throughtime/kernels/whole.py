"""A plan for a layer whose rows all take part in each step: each pass in one native call.

What `Plan` cuts in parts, because rows end, episodes begin or segments are computed again, needs none here, and saying it in parts
takes Python longer than a small layer takes to compute. The bits are the same on both ways.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from throughtime.kernels import native
from throughtime.kernels.layout import check_memory, steps_of_a_forward_stretch, steps_of_a_stretch
from throughtime.kernels.native import contiguous, kind, memory_of, new
from throughtime.request import Gradient, Request, Result, check_backward, split


def is_whole(request: Request) -> bool:
    """Whether a request, which has been checked, can be served: in the dtype of arithmetic, a plain cell, forwards or both ways."""
    return (
        request.lengths is None
        and request.batch_sizes is None
        and request.reset is None
        and not request.recompute_every
        and not request.spec.variants
        and not request.directions[0].reverse
        and request.input.dtype in (torch.float32, torch.float64)
    )


class WholePlan:
    """A request that has been checked; it holds no tensor, so both passes and any number of either may share it."""

    def __init__(self, request: Request) -> None:
        spec, first = request.spec, request.directions[0].parameters
        steps, batch, inputs = request.input.shape
        hidden = first.weight_hh.shape[0] // spec.gates
        projected = 0 if first.weight_hr is None else first.weight_hr.shape[0]
        self._cell, self._marks = native.cell(spec), _marks(request)
        self._at_once = tuple(
            cut(batch, gates * hidden, request.dtype.itemsize)
            for cut, gates in (
                (steps_of_a_forward_stretch, spec.gates),
                (steps_of_a_stretch, self._cell.gradient_gates),
            )
        )
        self._sizes = {
            "cell": self._cell.number,
            "gates": spec.gates,
            "threads": torch.get_num_threads(),
            "steps": steps,
            "batch": batch,
            "input": inputs,
            "hidden": hidden,
            "projected": projected,
        }

    def let_go(self, request: Request) -> None:
        """Hold nothing: it never does."""

    def take_up(self, request: Request) -> "WholePlan | None":
        """Return the plan for tensors of the same shapes, or `None` if they have others, or threads are more or fewer."""
        is_same = self._sizes["threads"] == torch.get_num_threads() and self._marks == _marks(request)
        return self if is_same else None

    def forward(self, request: Request, keep: bool) -> Result:
        """Compute the layer; `keep` says that a backward pass will follow."""
        sizes, ways, like = self._sizes, request.directions, request.input
        steps, batch, hidden = sizes["steps"], sizes["batch"], sizes["hidden"]
        x, weights = contiguous(like), [contiguous(p) for way in ways for p in way.parameters if p is not None]
        final = [contiguous(s).clone() for way in ways for s in way.initial]
        output = new(like, steps, batch, len(ways) * (sizes["projected"] or hidden))
        saved = [new(like, steps * batch, it.width(hidden)) for _ in ways for it in self._cell.saved] if keep else []
        check_memory(input=[x], initial=final, parameters=weights)
        held = memory_of(x, *weights)
        kind(like.dtype).forward_whole(
            **sizes,
            weights=_in_places(request, weights),
            saved=self._saved_places(saved, len(ways)),
            at_once=self._at_once[0],
            x=x.data_ptr(),
            output=output.data_ptr(),
            state=_pairs(final, len(ways)),
        )
        del held
        return Result(output, final, saved)

    def backward(
        self,
        request: Request,
        grad_output: Tensor | None,
        grad_final: Sequence[Tensor | None],
        output: Tensor,
        saved: Sequence[Tensor],
        needs_input: bool,
    ) -> Gradient:
        """Backpropagate; a gradient that is `None` is zero."""
        sizes, ways, like = self._sizes, request.directions, request.input
        count, rows, hidden = len(ways), sizes["steps"] * sizes["batch"], sizes["hidden"]
        expected = [((rows, it.width(hidden)), like.dtype) for _ in ways for it in self._cell.saved]
        check_backward(request, grad_output, grad_final, output, saved, expected)
        x, output, saved = contiguous(like), contiguous(output), [contiguous(tensor) for tensor in saved]
        initial = [contiguous(s) for way in ways for s in way.initial]
        weights = [contiguous(p) for way in ways for p in way.parameters if p is not None]
        grad_output = None if grad_output is None else contiguous(grad_output)
        check_memory(
            input=[x], initial=initial, parameters=weights, output=[output], grad_output=[grad_output], saved=saved
        )
        check_memory(grad_final=grad_final)
        held = memory_of(x, output, *initial, *weights, *saved)
        grad_initial = [
            torch.zeros_like(s) if g is None else g.resolve_neg().clone(memory_format=torch.contiguous_format)
            for g, s in zip(grad_final, initial, strict=True)
        ]
        sums = [new(p, *p.shape) for p in weights]
        grad_input = [new(x, *x.shape) for _ in ways] if needs_input else []
        kind(like.dtype).backward_whole(
            **sizes,
            weights=_in_places(request, weights),
            saved=self._saved_places(saved, count),
            at_once=self._at_once[1],
            x=x.data_ptr(),
            output=output.data_ptr(),
            initial=_pairs(initial, count),
            grad_output=0 if grad_output is None else grad_output.data_ptr(),
            grad_input=[g.data_ptr() for g in grad_input] or [0] * count,
            grad_state=_pairs(grad_initial, count),
            sums=_in_places(request, sums),
        )
        del held
        for other in grad_input[1:]:
            grad_input[0] += other
        return Gradient(grad_input[0] if needs_input else None, grad_initial, sums)

    def _saved_places(self, saved: Sequence[Tensor], count: int) -> list[int]:
        """Return addresses of gates and kept, each or 0, of each direction."""
        places = []
        for own in split(saved, count) if saved else [[]] * count:
            where = {it.name: tensor.data_ptr() for it, tensor in zip(self._cell.saved, own, strict=False)}
            places += [where.get("gates", 0), where.get("kept", 0)]
        return places


def _marks(request: Request) -> list[Any]:
    """What tells whether tensors are alike."""
    return [(t.shape, t.dtype, t.device) for t in (request.input, *request.initial, *request.parameters)]


def _in_places(request: Request, tensors: Sequence[Tensor]) -> list[int]:
    """Return the addresses of what stands for the parameters, in the order of `Parameters`, 0 for one that isn't there."""
    each = iter(tensors)
    return [0 if p is None else next(each).data_ptr() for way in request.directions for p in way.parameters]


def _pairs(states: Sequence[Tensor], count: int) -> list[int]:
    """Return addresses of h and c, or 0, of each direction."""
    if len(states) == 2 * count:
        return [s.data_ptr() for s in states]
    return list(chain.from_iterable((s.data_ptr(), 0) for s in states))
