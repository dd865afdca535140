"""Training takes denormals for zero while a step is taken, in all of torch's threads, and changes nothing else of the process."""

import sys

import numpy as np
import pytest
import torch
from comparison import HAS_NATIVE
from torch import Tensor, nn

import throughtime
from throughtime import insight
from throughtime.insight.tasks import Task
from throughtime.kernels import native
from throughtime.training import Budget, Loop, NonFiniteError, Streams, flush_denormals

with_kernels = pytest.mark.skipif(not HAS_NATIVE, reason="torch's other threads are reached by the native kernels")


@pytest.fixture(params=[1, pytest.param(2, marks=with_kernels)])
def threads(request):
    torch.set_num_threads(request.param)
    assert are_kept() == [True, True]
    yield request.param
    torch.set_num_threads(1)


def are_kept() -> list[bool]:
    """Whether torch keeps denormals, in the first elements, which the calling thread computes, and in the last."""
    product = torch.full((1 << 18,), 2e-38) * 0.1
    return (product[[0, -1]].view(torch.int32) != 0).tolist()  # numbers that are compared are flushed themselves


def test_they_are_zero_within_the_context_alone(threads):
    with flush_denormals():
        assert are_kept() == [False, False]
        assert sys.float_info.min / 2 == 0
        with flush_denormals():
            assert are_kept() == [False, False]
        assert are_kept() == [False, False]
    assert are_kept() == [True, True]
    assert sys.float_info.min / 2 > 0


def test_what_each_thread_did_before_is_restored_after_an_exception(threads):
    torch.set_flush_denormal(True)
    kept = are_kept()
    try:
        with pytest.raises(ZeroDivisionError), flush_denormals():
            raise ZeroDivisionError
        assert are_kept() == kept == [False, threads > 1]  # the other thread was not told to
    finally:
        torch.set_flush_denormal(False)


@with_kernels
@pytest.mark.parametrize("inside", [1, 4])
def test_the_number_of_threads_may_change_meanwhile(inside):
    torch.set_num_threads(2)
    try:
        with flush_denormals():
            torch.set_num_threads(inside)
            are_kept()
        for count in (inside, 2, 4):
            torch.set_num_threads(count)
            assert are_kept() == [True, True]
    finally:
        torch.set_num_threads(1)


def test_without_the_kernels_it_holds_in_the_calling_thread(monkeypatch):
    monkeypatch.setattr(native, "module", None)
    with flush_denormals():
        assert are_kept() == [False, False]
        with flush_denormals():
            pass
        assert are_kept() == [False, False]
    assert are_kept() == [True, True]


class Model(nn.Module):
    """Reads few of the many tokens that it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(1 << 15, 8), throughtime.GRU(8, 8)

    def forward(self, ids: Tensor, state=None):
        output, h = self.layer(self.embedding(ids), None if state is None else state[0])
        return output, (h,)


def make_loop(loss=lambda output, targets: output[-1].square().sum(), **options) -> Loop:
    torch.manual_seed(3)
    model = Model()
    return Loop(
        model=model,
        windows=Streams(np.arange(400) % 7, batch=2, window=8),
        optimizer=torch.optim.AdamW(model.parameters(), fused=True),
        loss=loss,
        budget=Budget(steps=24),
        learning_rate=1e-2,
        **options,
    )


def test_a_step_of_the_loop_flushes_and_what_is_called_between_does_not(threads):
    inside, between = [], []

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        inside.append(are_kept())
        return output[-1].square().sum()

    loop = make_loop(loss, validate=lambda *_: between.append(are_kept()) or 1.0, validate_every=5)
    assert loop.run(lambda _: between.append(are_kept()), save=lambda: between.append(are_kept()))
    assert inside == [[False, False]] * 25  # one for each step, and one at the end
    assert between == [[True, True]] * len(between)
    assert len(between) > 24


def test_it_ends_where_a_step_raises(threads):
    with pytest.raises(NonFiniteError):
        make_loop(lambda output, _: output.sum() * torch.nan).run()
    assert are_kept() == [True, True]


def test_moments_of_what_is_never_read_do_not_stay_denormal(threads):
    """Else they would: nine tenths of one of the smallest denormals are rounded to itself.

    They become zero where the CPU multiplies and adds at once; elsewhere m − 0.1 m stays m, as 0.1 m is a denormal and so zero.
    """
    loop = make_loop()
    loop._step()
    moment = loop.optimizer.state[loop.model.embedding.weight]["exp_avg"]
    moment[7:] = 2e-38
    loop.run()
    assert moment[:7].count_nonzero() > 0
    assert ((moment[7:] == 0) | (moment[7:] >= torch.finfo(torch.float32).tiny)).all()


def test_a_resumed_loop_goes_the_same_way_through_them(threads):
    whole, part, again = make_loop(), make_loop(), make_loop()
    for loop in (whole, part):
        loop._step()
        loop.optimizer.state[loop.model.embedding.weight]["exp_avg"][7:] = 2e-38
    whole.run()
    for _ in range(4):
        part._step()
    tensors, state = part.checkpoint()
    again.restore({name: tensor.clone() for name, tensor in tensors.items()}, state)
    again.run()
    resumed = again.checkpoint()[0]
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.checkpoint()[0].items())


def test_a_task_is_trained_so_too(threads, monkeypatch):
    inside, between, loss = [], [], Task.loss
    monkeypatch.setattr(Task, "loss", lambda *arguments: (inside.append(are_kept()), loss(*arguments))[1])
    task = insight.make_task("adding", 20)
    insight.solve(task, "gru", hidden_size=4, steps=3, on_step=lambda *_: between.append(are_kept()))
    assert inside[:3] == [[False, False]] * 3
    assert between == [[True, True]] * 3
    assert are_kept() == [True, True]
