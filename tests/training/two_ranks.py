"""What two processes do together, against what one does: each part is run by both, and each asserts."""

import os
import signal

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from throughtime.errors import InputError
from throughtime.lm.model import LanguageModel, ModelConfig
from throughtime.training import Budget, Clipping, Loop, LostRankError, Ranks, Rollback, Sequences, Streams, joined
from throughtime.training.ranks import SaidElsewhereError

ALONE = Ranks()
TOKENS = np.random.default_rng(0).integers(1, 5, 1000).astype(np.uint16)
# 7 sequences of 1 to 23 tokens in batches of 3: rows that end long before others, a last batch with a row for one process alone
SEQUENCES = np.concatenate([[*np.arange(n) % 4 + 1, 0] for n in (1, 2, 3, 5, 8, 14, 23)]).astype(np.uint16)
STEPS = 24


def language_loop(ranks, windows, steps=STEPS, shape=None, **more):
    """Return a loop that trains a small language model."""
    torch.manual_seed(3)
    model = LanguageModel(ModelConfig(5, hidden_size=8, **(shape or {})))
    options = {"learning_rate": 0.02, "clipping": Clipping(0.5), "budget": Budget(steps=steps), "ranks": ranks} | more
    optimizer = torch.optim.AdamW(model.parameters())
    return Loop(model, windows, optimizer, model.loss, forward=model.hidden, **options)


def losses(loop, **more):
    """Run a loop; return loss and gradient norm of each step."""
    seen = []
    loop.run(lambda report: seen.append((report.raw_loss, report.gradient_norm)), **more)
    return np.array(seen)


def assert_same(loop, other):
    """Weights, optimiser, averages and carried states, the latter of all rows, agree to float noise."""
    tensors, state = loop.checkpoint()
    expected, expected_state = other.checkpoint()
    assert tensors.keys() == expected.keys()
    for name in expected.keys() - {"rng.cpu"}:
        torch.testing.assert_close(tensors[name], expected[name], rtol=1e-3, atol=1e-5)
    assert state["step"] == expected_state["step"]
    assert state["best_step"] == expected_state["best_step"]


def check_equality(ranks):
    """Two processes come to what one comes to, whatever the cell, the windows and the number of rows."""
    cases = [
        (
            Streams(TOKENS, batch=5, window=9),
            {"cell": "lstm", "num_layers": 2, "ar": 0.5, "tar": 0.5},
            {"average": 0.9},
        ),
        (Streams(TOKENS, batch=4, window=9), {"cell": "gru", "embedding_size": 8, "tied": True}, {"nonmonotone": 1}),
        (Streams(TOKENS, batch=1, window=9), {"cell": "mlp"}, {}),
        (Sequences(SEQUENCES, 0, batch=3, window=4), {"cell": "lstm", "ar": 0.5}, {}),
        (Sequences(SEQUENCES, 0, batch=7, window=30), {"cell": "gru"}, {"dtype": torch.bfloat16}),
    ]
    for windows, shape, more in cases:
        measured = iter((3.0, 2.0, 2.5, 2.6, 1.0, 4.0, 5.0, 0.5))
        if "nonmonotone" in more:
            more = more | {"validate": lambda model, stop, it=measured: next(it), "validate_every": 6}
        loop = language_loop(ranks, windows, shape=shape, **more)
        found = losses(loop)
        measured = iter((3.0, 2.0, 2.5, 2.6, 1.0, 4.0, 5.0, 0.5))
        if "nonmonotone" in more:
            more = more | {"validate": lambda model, stop, it=measured: next(it)}
        alone = language_loop(ALONE, windows, shape=shape, **more)
        narrow = more.get("dtype") == torch.bfloat16
        np.testing.assert_allclose(found, losses(alone), atol=0.02 if narrow else 1e-5)
        if not narrow:
            assert_same(loop, alone)


def stopped_at(loop, step):
    """Run a loop until the last of its processes is asked to stop at a step; return its checkpoint."""
    ranks = loop.ranks

    def interrupt(report):
        if report.step == step - (not ranks.is_alone) and ranks.rank == ranks.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)  # the other one hears of it in the next step

    assert not loop.run(interrupt)
    assert (loop.step, loop.signal) == (step, signal.SIGTERM)
    return loop.checkpoint()


def check_resumes(ranks):
    """A checkpoint of any number of processes is gone on from by any; by as many, with dropout too, to the bit."""
    for windows in (Streams(TOKENS, batch=5, window=9), Sequences(SEQUENCES, 0, batch=3, window=4)):
        whole = language_loop(ALONE, windows)
        losses(whole)
        for before, after in ((ranks, ALONE), (ALONE, ranks)):
            checkpoint = stopped_at(language_loop(before, windows), 13)
            then = language_loop(after, windows)
            then.restore(*checkpoint)
            losses(then)
            assert_same(then, whole)
    windows, shape = (
        Streams(TOKENS, batch=5, window=9),
        {"num_layers": 2, "dropout": 0.3, "zoneout": 0.1, "weight_drop": 0.2},
    )
    whole = language_loop(ranks, windows, shape=shape)
    expected, end = losses(whole), whole.checkpoint()[0]
    checkpoint = stopped_at(language_loop(ranks, windows, shape=shape), 13)
    then = language_loop(ranks, windows, shape=shape)
    then.restore(*checkpoint)
    assert (losses(then) == expected[13:]).all()
    for name, tensor in then.checkpoint()[0].items():
        assert torch.equal(tensor, end[name]), name


def check_decisions(ranks):
    """What is decided by a clock, a loss or a measurement is decided alike: no process goes another way, or waits in vain."""
    windows = Streams(TOKENS, batch=4, window=9)
    timed = language_loop(ranks, windows, budget=Budget(minutes=0.3 / 60))
    saved = []
    losses(timed, save=lambda: saved.append(timed.checkpoint()[1]["seconds"]), save_every=0.05)
    assert len(set(ranks._everybodys((timed.step, timed.seconds, tuple(saved))))) == 1
    assert len(saved) > 2

    def loss(h, targets, calls=[]):  # noqa: B006 it counts
        calls.append(1)
        value = model_loss(h, targets)
        return value * float("nan") if len(calls) == 9 and ranks.rank == 1 else value

    diverging = language_loop(ranks, windows, rollbacks=1)
    model_loss, diverging.loss, events = diverging.loss, loss, []
    losses(diverging, on_event=events.append)
    assert [(type(event), event.step, event.to_step) for event in events] == [(Rollback, 9, 0)]
    assert diverging.step == STEPS

    values = iter([3.0, 2.0, 2.5, 2.4])
    patient = language_loop(
        ranks, windows, validate=lambda model, stop: next(values), validate_every=2, patience=2
    )  # the first one measures
    losses(patient)
    assert patient.stopped_early
    assert (patient.step, patient.best_step) == (8, 4)
    assert len(list(values)) == (0 if ranks.is_first else 4)
    told = ranks._everybodys(patient.model.output.weight.sum().item())
    assert told[0] == told[1]


class Tagger(torch.nn.Module):
    """torch's own layers; a parameter that nothing reads stays as it is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embedding, self.gru, self.output = torch.nn.Embedding(5, 8), torch.nn.GRU(8, 8), torch.nn.Linear(8, 5)
        self.unread = torch.nn.Parameter(torch.ones(3))

    def forward(self, ids, state=None):
        output, h = self.gru(self.embedding(ids), None if state is None else state[0])
        return self.output(output), (h,)


def check_wrapped(ranks):
    """A model that its user wrapped in DistributedDataParallel trains as one process does, and is refused without ranks."""

    def loop_of(model, ranks):
        return Loop(
            model=model,
            windows=Streams(TOKENS, batch=5, window=9),
            optimizer=torch.optim.AdamW(model.parameters(), weight_decay=0.1),
            loss=lambda output, targets: cross_entropy(output.flatten(0, 1), targets.flatten()),
            budget=Budget(steps=STEPS),
            learning_rate=0.02,
            average=0.9,
            rollbacks=1,
            ranks=ranks,
        )

    alone, wrapped = loop_of(Tagger(), ALONE), loop_of(DistributedDataParallel(Tagger()), ranks)
    np.testing.assert_allclose(losses(wrapped), losses(alone), atol=1e-5)
    assert_same(wrapped, alone)
    assert (wrapped.trained.unread == 1).all()
    go_on = loop_of(DistributedDataParallel(Tagger()), ranks)
    go_on.restore(*alone.checkpoint())
    with pytest.raises(InputError, match="expected ranks="):  # each process would have decided for itself
        loop_of(DistributedDataParallel(Tagger()), ALONE)


def check_errors(ranks):
    """An error of one process ends both, and is raised as it is in one of them; last, since the processes part by it."""
    if ranks.rank == 1:
        raise InputError("only here")
    ranks.total(1.0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    expected = InputError if os.environ["RANK"] == "1" else SaidElsewhereError
    with pytest.raises(expected) as caught, joined() as ranks:  # noqa: PT012
        assert ranks.size == 2
        for check in (check_equality, check_resumes, check_decisions, check_wrapped):
            check(ranks)
            print(f"{check.__name__}, {ranks.rank}", flush=True)
        check_errors(ranks)
    assert str(caught.value) == "only here" or isinstance(caught.value.__cause__, LostRankError)
    print(f"check_errors, {os.environ['RANK']}", flush=True)
