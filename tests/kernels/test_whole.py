"""A layer whose rows all take part in each step: one native call for a pass, with the bits of the calls for its parts."""

import itertools

import pytest
import torch
from comparison import HAS_NATIVE
from torch import Tensor

from throughtime.backend import native
from throughtime.kernels.plan import Plan
from throughtime.kernels.whole import WholePlan, is_whole
from throughtime.request import Request, Result

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")

CELLS = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3, "gru_reset_before": 3, "mgu": 2}


def asked(
    cell: str, dtype: torch.dtype = torch.float32, *, sizes=(9, 3, 5, 7), ways=1, bias=True, projected=0
) -> Request:
    """A request of random numbers: T, B, I, H."""
    torch.manual_seed(1)
    steps, batch, inputs, hidden = sizes
    rows, width = CELLS[cell] * hidden, projected or hidden

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype) * (0.5 / hidden**0.5)

    states = [draw(batch, width), draw(batch, hidden)][: 2 if cell == "lstm" else 1]
    shapes = [
        (rows, inputs),
        (rows, width),
        *([(rows,)] * 2 if bias else []),
        *([(width, hidden)] if projected else []),
    ]
    initial = [draw(*s.shape) for _ in range(ways) for s in states]
    parameters = [draw(*shape) for _ in range(ways) for shape in shapes]
    return Request.read(cell, draw(steps, batch, inputs), initial, parameters, bidirectional=ways == 2)


def both_passes(plan: Plan | WholePlan, request: Request, given=("output", "final"), needs_input=True) -> list[Tensor]:
    """Everything that a plan answers, from the same gradients of output and final state."""
    torch.manual_seed(2)
    result: Result = plan.forward(request, True)
    grad_output = torch.randn_like(result.output) if "output" in given else None
    grad_final = [torch.randn_like(s) if "final" in given else None for s in result.final]
    gradient = plan.backward(request, grad_output, grad_final, result.output, result.saved, needs_input)
    assert (gradient.input is not None) is needs_input
    inputs = [gradient.input] if gradient.input is not None else []
    return [result.output, *result.final, *result.saved, *inputs, *gradient.initial, *gradient.parameters]


def assert_same(request: Request, **options) -> None:
    assert is_whole(request)
    whole, parts = both_passes(WholePlan(request), request, **options), both_passes(Plan(request), request, **options)
    assert len(whole) == len(parts)
    for index, (one, other) in enumerate(zip(whole, parts, strict=True)):
        assert torch.equal(one, other), index


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_the_bits_are_those_of_the_calls_for_parts(cell, dtype, ways, bias):
    assert_same(asked(cell, dtype, ways=ways, bias=bias))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 4, 3, 2), (4, 0, 3, 2), (300, 40, 3, 33), (5, 2, 70, 64)])
@pytest.mark.parametrize("cell", CELLS)
def test_sizes(cell, sizes):
    assert_same(asked(cell, sizes=sizes, ways=2))


@pytest.mark.parametrize("projected", [1, 4, 20])
@pytest.mark.parametrize("ways", [1, 2])
def test_projections(projected, ways):
    assert_same(asked("lstm", projected=projected, ways=ways))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("given", [(), ("output",), ("final",)])
@pytest.mark.parametrize("needs_input", [False, True])
def test_gradients_that_nobody_gives_or_wants(cell, given, needs_input):
    assert_same(asked(cell, ways=2), given=given, needs_input=needs_input)


def test_tensors_with_gaps_and_turned_signs():
    request = asked("lstm")
    wide = torch.stack([request.input, request.input], dim=-1)[..., 0]
    first = request.directions[0]
    weight = torch._neg_view(-first.parameters.weight_hh)  # pyright: ignore[reportPrivateImportUsage]
    turned = first.parameters._replace(weight_hh=weight, weight_ih=first.parameters.weight_ih.t().contiguous().t())
    changed = request._replace(input=wide, directions=(first._replace(parameters=turned),))
    assert all(map(torch.equal, both_passes(WholePlan(changed), changed), both_passes(WholePlan(request), request)))


@pytest.mark.parametrize("threads", [1, 2])
def test_every_cell_is_served_whole_and_nothing_else(threads):
    for cell, dtype in itertools.product(CELLS, (torch.float32, torch.float64)):
        assert is_whole(asked(cell, dtype))
    request = asked("lstm")
    for other in (
        request._replace(lengths=torch.tensor([1, 2, 3])),
        request._replace(reset=torch.zeros(9, 3, dtype=torch.bool)),
        request._replace(recompute_every=2),
        request._replace(input=torch.zeros(9, 3, dtype=torch.int64)),
        asked("lstm", torch.bfloat16),
    ):
        assert not is_whole(other)
    plan = WholePlan(request)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert (plan.take_up(request) is plan) is (threads == before)
    finally:
        torch.set_num_threads(before)
    assert plan.take_up(asked("lstm", sizes=(9, 3, 5, 8))) is None
    assert plan.take_up(asked("lstm", torch.float64)) is None


def test_a_tensor_without_memory_is_refused():
    request = asked("lstm")
    hollow = torch._efficientzerotensor((9, 3, 5))  # pyright: ignore[reportPrivateImportUsage]
    with pytest.raises(TypeError, match="input: a Tensor without memory of its own"):
        WholePlan(request).forward(request._replace(input=hollow), True)


def test_the_operator_is_served_whole_too(monkeypatch):
    """So that a compiled call costs no more than another one."""
    monkeypatch.setattr(native, "Plan", None)
    request = asked("gru")
    result = native.forward(request, True)
    gradient = native.backward(request, torch.ones_like(result.output), [None], result.output, result.saved)
    assert gradient.input is not None
