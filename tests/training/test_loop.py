"""The loop trains, carries state, stops where it should, and resumes to the bit. Its model here knows nothing of language."""

import os
import signal
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import throughtime
from throughtime.training import (
    Budget,
    CheckpointError,
    Clipping,
    DivergedError,
    Loop,
    LossWatch,
    NonFiniteError,
    NonMonotone,
    Schedule,
    Streams,
)


class Forecaster(nn.Module):
    """Predicts the next number of a series of digits."""

    def __init__(self, cell: str = "gru") -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.layer = {"rnn": throughtime.RNN, "gru": throughtime.GRU, "lstm": throughtime.LSTM}[cell](
            6, 8, 2, dropout=0.3
        )
        self.output = nn.Linear(8, 10)

    def forward(self, ids: Tensor, state=None):
        hx = state if state is None or len(state) == 2 else state[0]
        h, final = self.layer(self.embedding(ids), hx)
        return self.output(h), final if isinstance(final, tuple) else (final,)


def make_loop(cell: str = "gru", steps: int = 12, optimizer=torch.optim.AdamW, **options) -> Loop:
    torch.manual_seed(3)
    model = Forecaster(cell)
    return Loop(
        model=model,
        windows=Streams(np.arange(200) % 7, batch=3, window=8),
        optimizer=optimizer(model.parameters(), lr=1e-2),
        loss=lambda output, targets: nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten()),
        budget=Budget(steps=steps),
        learning_rate=1e-2,
        **options,
    )


def everything(loop: Loop) -> tuple[dict[str, Tensor], dict]:
    tensors, state = loop.checkpoint()
    return tensors, {k: v for k, v in state.items() if k != "seconds"}


def test_it_learns():
    reports = []
    loop = make_loop(steps=150)
    assert loop.run(reports.append)
    assert reports[-1].loss < 0.5 * reports[0].loss
    assert [r.step for r in reports] == list(range(1, 151))
    assert reports[-1].progress == 1
    assert reports[-1].epoch == pytest.approx(150 / 8)
    assert 0 < reports[-1].learning_rate < reports[50].learning_rate


def test_state_is_carried_detached_and_renewed_each_epoch():
    loop = make_loop(steps=9)
    seen = []
    model = loop.model
    forward = model.forward
    model.forward = lambda ids, state=None: (seen.append(state), forward(ids, state))[1]
    loop.run()
    *seen, _ = seen  # at the end somebody looks at the loss once more
    assert [state is None for state in seen] == [step % 8 == 0 for step in range(9)]
    assert not any(tensor.requires_grad for state in seen if state for tensor in state)


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, sgd])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_at_any_step_equals_uninterrupted(cell, optimizer, dtype):
    """Weights, optimiser, random numbers, carried state: all of it, bit for bit, wherever training was cut."""
    whole = make_loop(cell, optimizer=optimizer, dtype=dtype)
    whole.run()
    expected, expected_state = everything(whole)
    for stop in range(1, 12):
        first = make_loop(cell, optimizer=optimizer, dtype=dtype)
        for _ in range(stop):
            first.model.train()
            first._step()
        tensors, state = first.checkpoint()
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        second = make_loop(cell, optimizer=optimizer, dtype=dtype)
        torch.manual_seed(99)
        second.restore(tensors, state)
        second.run()
        actual, actual_state = everything(second)
        assert actual_state == expected_state
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), f"{name} differs after a stop at step {stop}"


def test_bfloat16_is_what_is_computed_in_and_float32_what_is_kept():
    loop = make_loop("lstm", dtype=torch.bfloat16)
    seen = []
    loop.loss = lambda output, targets: (
        seen.append(output.dtype),
        nn.functional.cross_entropy(output.flatten(0, 1).float(), targets.flatten()),
    )[1]
    loop.run()
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in loop.model.parameters()} == {torch.float32}
    same = make_loop("lstm")
    same.run()
    assert not torch.equal(loop.model.output.weight, same.model.output.weight)
    torch.testing.assert_close(loop.model.output.weight, same.model.output.weight, rtol=0, atol=0.02)


def test_forward_is_called_instead_of_the_model():
    loop = make_loop(steps=3)
    forward = loop.model.forward
    loop.forward = lambda ids, state: forward(ids, state)
    loop.model.forward = None
    assert loop.run()


def test_groups_may_learn_faster():
    loop = make_loop(steps=2)
    loop.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "rate_factor": 3.0})
    loop.run()
    first, second = loop.optimizer.param_groups
    assert second["lr"] == 3 * first["lr"] > 0


def nt_asgd(losses: list[float], steps: int = 12) -> Loop:
    """A loop that averages as NT-ASGD does, and is told what it would have measured after each two steps."""
    told = iter(losses)
    return make_loop(
        steps=steps,
        optimizer=lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
        schedule=Schedule("constant", warmup=0.0),
        nonmonotone=2,
        validate=lambda model, should_stop: next(told),
        validate_every=2,
    )


def test_weights_are_averaged_from_where_validation_stops_improving():
    loop = nt_asgd([5.0, 4.0, 4.5, 4.1, 3.9, 3.8])  # none of them is worse than the best of all but the last two
    loop.run()
    assert loop.trained is loop.model
    loop = nt_asgd([5.0, 4.0, 4.5, 4.3, 4.1, 3.9])  # 4.1, after ten steps, is worse than 4.0
    kept = []
    loop.run(lambda report: kept.append(loop.model.output.weight.detach().clone()))
    assert len(kept) == 12
    torch.testing.assert_close(loop.trained.output.weight, torch.stack(kept[10:]).mean(0))
    assert not torch.equal(loop.trained.output.weight, loop.model.output.weight)


def test_averaging_that_began_or_not_is_resumed():
    losses = [5.0, 4.0, 4.5, 4.3, 4.1, 3.9]
    whole = nt_asgd(losses)
    whole.run()
    expected, expected_state = everything(whole)
    for stop in (3, 7, 9, 11):
        first = nt_asgd(losses)
        first.run(lambda report, stop=stop: os.kill(os.getpid(), signal.SIGINT) if report.step == stop else None)
        tensors, state = first.checkpoint()
        second = nt_asgd(losses[first.step // 2 :])
        second.restore({name: tensor.clone() for name, tensor in tensors.items()}, state)
        second.run()
        actual, actual_state = everything(second)
        assert actual_state == expected_state
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_trigger_looks_at_all_but_the_last_measurements():
    trigger = NonMonotone(interval=3)
    assert not any(map(trigger.is_met_by, (4.0, 9.0, 9.0, 9.0)))  # the first of them is too few to tell
    assert not trigger.is_met_by(4.0)
    assert trigger.is_met_by(4.1)


def test_a_foreign_checkpoint_is_refused():
    tensors, state = make_loop("gru").checkpoint()
    with pytest.raises(CheckpointError, match="belongs to another model or optimiser"):
        make_loop("lstm").restore(tensors, state)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_finishes_the_step_and_saves(number):
    before = signal.getsignal(number)
    saved = []
    loop = make_loop(steps=1000)
    spent = loop.run(
        lambda report: os.kill(os.getpid(), number) if report.step == 5 else None, lambda: saved.append(loop.step)
    )
    assert not spent
    assert saved == [0, loop.step]
    assert loop.step in (5, 6)
    assert signal.getsignal(number) == before


def test_interrupts_in_a_row_are_one_and_a_later_one_interrupts_at_once(monkeypatch):
    def interrupted_at_each_step(report):
        os.kill(os.getpid(), signal.SIGINT)

    saved = []
    loop = make_loop(steps=1000)
    assert not loop.run(
        lambda report: [interrupted_at_each_step(report) for _ in range(10)], lambda: saved.append(loop.step)
    )
    assert saved == [0, 1]
    monkeypatch.setattr(throughtime.training.loop, "_PATIENCE", 0.0)
    with pytest.raises(KeyboardInterrupt):
        make_loop(steps=1000).run(lambda report: [interrupted_at_each_step(report) for _ in range(2)])


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        loop = make_loop(steps=8)
        assert loop.run(lambda report: os.kill(os.getpid(), signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_it_runs_outside_the_main_thread():
    loop = make_loop()
    thread = threading.Thread(target=loop.run)
    thread.start()
    thread.join()
    assert loop.step == 12


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched():
    loop = make_loop(steps=20)
    saved = []
    honest = loop.loss
    loop.loss = lambda output, targets: honest(output, targets) * (float("nan") if loop.step == 6 else 1)
    with pytest.raises(NonFiniteError, match=r"the loss became nan at step 7; the last good checkpoint is kept"):
        loop.run(save=lambda: saved.append(loop.step), save_every=0)
    assert saved == [0, 1, 2, 3, 4, 5, 6]
    assert all(torch.isfinite(p).all() for p in loop.model.parameters())


def test_clipping_is_reported():
    reports = []
    loop = make_loop(steps=4, clipping=Clipping(norm=1e-3))
    loop.run(reports.append)
    assert loop.clip_share == 1
    assert all(r.clipped and r.gradient_norm > 1e-3 for r in reports)


def test_a_time_budget_counts_training_only(monkeypatch):
    """A clock that jumps while saving must not eat the budget."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    loop = make_loop()
    loop.budget = Budget(minutes=1)
    honest = loop.loss

    def slow_loss(output, targets):
        now[0] += 7.0
        return honest(output, targets)

    loop.loss = slow_loss

    def save():
        now[0] += 1000.0

    assert loop.run(save=save, save_every=0)
    assert loop.step == 9  # nine steps of seven seconds are the first to pass a minute
    assert loop.seconds == 63.0


def test_the_average_follows_the_weights_and_is_what_is_validated():
    seen = []

    def validate(model, should_stop):
        seen.append((model, not should_stop()))
        return 1.0

    loop = make_loop(steps=12, average=0.9, validate=validate, validate_every=5)
    weights = []
    loop.run(lambda report: weights.append(loop.model.output.bias.detach().clone()))
    expected = weights[0]
    for n, weight in enumerate(weights[1:], start=1):
        expected = torch.lerp(expected, weight, 1 - min(0.9, (1 + n) / (10 + n)))
    torch.testing.assert_close(loop.trained.output.bias, expected)
    assert not torch.equal(loop.trained.output.bias, weights[-1])
    assert seen == [(loop.trained, True)] * 3  # after steps 5, 10 and the last, 12
    assert loop.model.training


def test_the_best_is_kept_and_patience_ends_training():
    values = iter([3.0, 2.0, 2.5, 1.0, 1.0, 4.0, 5.0, 0.0])
    best = []
    loop = make_loop(steps=40, validate=lambda model, should_stop: next(values), validate_every=4, patience=3)
    assert loop.run(on_event=lambda event: best.append(event.step) if event.is_best else None)
    assert best == [4, 8, 16]
    assert (loop.step, loop.best_step, loop.best) == (28, 16, 1.0)
    assert loop.stopped_early
    assert loop.is_finished


def test_an_interrupted_validation_is_made_up_for_after_a_resume():
    def interrupted(model, should_stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return None if should_stop() else 1.0

    loop = make_loop(validate=interrupted, validate_every=5)
    assert not loop.run()
    assert (loop.step, loop.signal, loop.best_step) == (5, signal.SIGTERM, 0)
    saved = loop.checkpoint()
    again = make_loop(validate=lambda model, should_stop: 1.0, validate_every=5)
    again.restore(*saved)
    best = []
    assert again.run(on_event=lambda event: best.append(event.step) if event.is_best else None)
    assert best == [5]


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_averages_and_validations_resume_too(cell):
    def options():
        seen = iter([5.0, 4.0, 4.5, 4.6])
        return {"average": 0.9, "validate": lambda model, stop: next(seen), "validate_every": 3, "rollbacks": 3}

    whole = make_loop(cell, **options())
    whole.run()
    expected, expected_state = everything(whole)
    for stop in (1, 4, 7, 11):
        first = make_loop(cell, **options())
        first.run(lambda report, at=stop: os.kill(os.getpid(), signal.SIGINT) if report.step == at else None)
        saved = first.checkpoint()
        second = make_loop(cell, **options())
        for _ in range(first.step // 3):
            second.validate(None, None)
        second.restore(*saved)
        second.run()
        actual, actual_state = everything(second)
        assert actual_state == expected_state
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), f"{name} differs after a stop at step {stop}"


def spoilt(loop: Loop, steps: set[int], factor: float) -> list[int]:
    """Spoil the loss at some calls; return where the steps that are counted will stand."""
    honest, calls = loop.loss, []

    def loss(output, targets):
        calls.append(loop.step + 1)
        return honest(output, targets) * (factor if len(calls) in steps else 1)

    loop.loss = loss
    return calls


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 100.0])
def test_a_divergence_is_rolled_back_and_slowed_down(factor):
    loop = make_loop(steps=260, rollbacks=3)
    calls = spoilt(loop, {230, 240}, factor)
    happened, restored = [], []
    weights = {}

    def observe(report):
        weights.setdefault(report.step, []).append(loop.model.output.bias.detach().clone())

    def note(rollback):
        happened.append(rollback)
        restored.append({name: tensor.clone() for name, tensor in loop.checkpoint()[0].items()})

    assert loop.run(observe, on_event=note)
    assert all(torch.equal(restored[0][name], tensor) for name, tensor in restored[1].items())  # moments too
    assert [(r.step, r.to_step, r.learning_rate) for r in happened] == [(230, 100, 5e-3), (110, 100, 2.5e-3)]
    assert "at step 230" in happened[0].reason
    assert calls[230] == 101
    assert (loop.step, loop.rolled_back) == (260, 2)
    first, second, third = weights[101]  # the same window and state, with ever smaller steps
    start = weights[100][0]
    assert (first - start).norm() > 1.9 * (second - start).norm() > 3.5 * (third - start).norm() > 0


def test_the_fourth_divergence_ends_it():
    loop = make_loop(steps=200, rollbacks=3)
    spoilt(loop, {60, 61, 62, 63}, float("nan"))
    happened = []
    with pytest.raises(
        NonFiniteError, match=r"after 3 rollbacks and with the learning rate down to 0\.00125: the loss became nan"
    ):
        loop.run(on_event=happened.append)
    assert [r.to_step for r in happened] == [0, 0, 0]
    assert all(torch.isfinite(p).all() for p in loop.model.parameters())


def test_what_is_a_divergence_and_what_is_not():
    watch = LossWatch()
    for step in range(1, 60):
        watch.check(4.0 - step * 0.04, step)  # learning
        watch.see(4.0 - step * 0.04)
    for step in range(60, 160):
        watch.check(1.6 + 0.3 * (step % 3), step)  # noise
        watch.see(1.6 + 0.3 * (step % 3))
    watch.check(4.0, 160)  # one hard window
    with pytest.raises(DivergedError, match=r"the loss went up to 30 at step 160, from 2\.04"):
        watch.check(30.0, 160)
    for _ in range(250):  # a loss that stays high, though it never jumps
        watch.see(min(watch.fast + 0.05, 4.0))
    with pytest.raises(DivergedError, match="at step 410"):
        watch.check(4.0, 410)


def test_an_average_needs_a_share():
    with pytest.raises(throughtime.InputError, match=r"decay = 1\.0: expected a share"):
        make_loop(average=1.0)


def test_an_interrupted_last_validation_leaves_training_unfinished():
    loop = make_loop(validate=lambda model, should_stop: os.kill(os.getpid(), signal.SIGINT), validate_every=50)
    assert not loop.run()
    assert loop.step == 12
    saved = loop.checkpoint()
    again = make_loop(validate=lambda model, should_stop: 1.0, validate_every=50)
    again.restore(*saved)
    assert again.run()
    assert again.best_step == 12


def test_a_probe_sees_the_windows_that_are_trained_on_and_changes_nothing() -> None:
    seen = []

    def probe(model, inputs, targets, state, *lengths):
        assert model.training
        assert targets.shape == inputs.shape == (8, 3)
        seen.append((inputs[0, 0].item(), None if state is None else state[0].clone()))
        return {"answer": float(len(seen))}

    reports = []
    probed = make_loop("lstm", probe=probe, probe_every=5)
    probed.run(reports.append)
    plain = make_loop("lstm")  # only now: it sets the seed that dropout draws by
    carried = {}
    plain.run(lambda report: carried.update({report.step: plain.state[0]}))
    assert all(
        torch.equal(a, b) for a, b in zip(everything(probed)[0].values(), everything(plain)[0].values(), strict=True)
    )
    assert {r.step: r.scalars for r in reports if r.scalars} == {5: {"answer": 1.0}, 10: {"answer": 2.0}}
    assert [first for first, _ in seen] == [probed.windows.window_at(step)[0][0, 0].item() for step in (4, 9)]
    assert seen[0][1] is not None
    assert torch.equal(seen[0][1], carried[4])  # what the window starts from


def test_weights_that_the_last_step_made_none_are_taken_back():
    """A step looks at the loss before it; nobody looked after the last one, and its weights were saved."""
    loop = make_loop(steps=4, optimizer=sgd, rollbacks=3)
    honest, steps = loop.optimizer.step, []

    def step(closure=None):
        honest(closure)
        steps.append(loop.step + 1)
        if len(steps) == 4:
            loop.model.output.bias.data.fill_(float("inf"))

    loop.optimizer.step = step
    happened = []
    assert loop.run(on_event=happened.append)
    assert steps == [1, 2, 3, 4, 1, 2, 3, 4]
    assert [(event.step, event.to_step) for event in happened] == [(5, 0)]
    assert all(torch.isfinite(parameter).all() for parameter in loop.model.parameters())


@pytest.mark.parametrize(("value", "save_every"), [(float("nan"), 0), (3e38, 1e9)])
def test_weights_that_are_none_reach_no_checkpoint_and_no_end(value, save_every):
    """Neither those that aren't finite nor, at the end, those of which the loss isn't."""
    loop = make_loop(steps=3, optimizer=sgd, rollbacks=0)
    honest, saved = loop.optimizer.step, []

    def step(closure=None):
        honest(closure)
        if loop.step == 2:
            loop.model.output.weight.data.fill_(value)
            loop.model.output.weight.data[0].neg_()

    loop.optimizer.step = step
    with pytest.raises(NonFiniteError):
        loop.run(save=lambda: saved.append(loop.step), save_every=save_every)
    assert max(saved) == (0 if save_every else 2)
