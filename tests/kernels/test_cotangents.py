"""The native lag matrix against the plain sweep, which is tested against autograd."""

import itertools

import pytest
import torch
from comparison import GRADIENT_FACTOR, HAS_NATIVE, assert_as_accurate

import throughtime
from throughtime import insight
from throughtime.insight import adjoint, gradient_flow
from throughtime.kernels import cotangents, native

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")

LAYERS = {
    "rnn_tanh": throughtime.RNN,
    "rnn_relu": lambda *sizes, **more: throughtime.RNN(*sizes, nonlinearity="relu", **more),
    "lstm": throughtime.LSTM,
    "gru": throughtime.GRU,
}


def record(cell, steps, batch, hidden, dtype=torch.float64, **more):
    layer = LAYERS[cell](3, hidden, **more).double()
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -1.5 / hidden**0.5, 1.5 / hidden**0.5)
    x = torch.randn(steps, batch, 3, dtype=torch.float64)
    width = hidden * (2 if more.get("bidirectional") else 1)
    return insight.record(layer, x, dtype=dtype), torch.randn(steps, batch, width, dtype=torch.float64)


def both(monkeypatch, recording, gradients, **options):
    """Return the norms by the kernel and by the plain sweep."""
    calls, kernel = [], cotangents.norms

    def counted(*arguments):
        calls.append(arguments)
        return kernel(*arguments)

    monkeypatch.setattr(adjoint.cotangents, "norms", counted)
    native = insight.lag_matrix(recording, gradients, **options)
    assert len(calls) == len(recording.lanes)
    monkeypatch.undo()
    monkeypatch.setattr(gradient_flow, "native_norms", lambda *_: None)
    plain = insight.lag_matrix(recording, gradients, **options)
    monkeypatch.undo()
    return native, plain


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("steps", "batch", "hidden"), [(1, 1, 1), (9, 3, 7), (60, 2, 16), (101, 1, 63)])
def test_it_is_the_plain_sweep(monkeypatch, cell, bidirectional, steps, batch, hidden):
    recording, gradients = record(cell, steps, batch, hidden, bidirectional=bidirectional)
    for options in ({}, {"lags": 5}, {"lags": 20, "probes": 3}):
        native, plain = both(monkeypatch, recording, gradients, **options)
        for one, other in zip(native, plain, strict=True):
            torch.testing.assert_close(one.norms, other.norms, rtol=1e-10, atol=1e-14)
            assert torch.equal(one.valid, other.valid)


@pytest.mark.parametrize("cell", LAYERS)
def test_every_instruction_set_is_as_accurate_as_the_plain_sweep(monkeypatch, cell):
    before = native.instruction_set()
    exact_recording, gradients = record(cell, 40, 3, 50)
    lane = exact_recording.lanes[0]
    exact = insight.lag_matrix(exact_recording, gradients)[0].norms
    recording = exact_recording.__class__((lane_of(lane, torch.float32),), exact_recording.outputs.float())
    try:
        for name in native.instruction_sets():
            native.use_instruction_set(name)
            (fast,), (plain,) = both(monkeypatch, recording, gradients.float())
            assert_as_accurate([fast.norms], [plain.norms], [exact], GRADIENT_FACTOR)
    finally:
        native.use_instruction_set(before)


def lane_of(lane, dtype):
    """Return a lane with its numbers rounded."""
    from dataclasses import replace

    return replace(
        lane,
        parameters=type(lane.parameters)(*(None if w is None else w.to(dtype) for w in lane.parameters)),
        saved=[type(step)(*(field.to(dtype) for field in step)) for step in lane.saved],
        states=tuple(s.to(dtype) for s in lane.states),
    )


def test_lengths_are_kept_to(monkeypatch):
    layer, x = throughtime.LSTM(3, 5).double(), torch.randn(12, 4, 3, dtype=torch.float64)
    recording = insight.record(layer, x, lengths=torch.tensor([12, 0, 5, 1]))
    gradients = torch.full((12, 4, 5), torch.nan, dtype=torch.float64)
    gradients[:5, 2], gradients[:1, 3], gradients[:, 0] = 1, 2, 3
    (native,), (plain,) = both(monkeypatch, recording, gradients)
    torch.testing.assert_close(native.norms, plain.norms, rtol=1e-10, atol=1e-14)


def test_a_norm_is_no_smaller_than_its_number_allows(monkeypatch):
    """The square of 1e-30 is none in float32, but 1e-30 is."""
    recording, gradients = record("gru", 7, 2, 9, dtype=torch.float32)
    (native,), _ = both(monkeypatch, recording, 1e-30 * gradients)
    assert (native.norms[native.valid] > 0).all()


def test_threads_and_neighbours_change_no_bit():
    recording, gradients = record("lstm", 80, 5, 20, dtype=torch.float32)
    found = []
    for threads, rows in itertools.product((1, 2, 3), (None, 2)):
        torch.set_num_threads(threads)
        part = recording if rows is None else recording.part(slice(rows, rows + 1))
        of_rows = gradients if rows is None else gradients[:, rows : rows + 1]
        norms = insight.lag_matrix(part, of_rows)[0].norms
        found.append(norms if rows is not None else norms[:, :, 2:3])
    torch.set_num_threads(1)
    assert all(torch.equal(norms, found[0]) for norms in found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight_hh": torch.zeros(16, 5)}, "expected torch.float32 \\[16, 4\\]"),
        ({"to_gates": [torch.zeros(6, 2, 4, 4), torch.zeros(6, 2, 3, 4)]}, "expected torch.float32 \\[6, 2, 4, 4\\]"),
        ({"to_gates": [torch.zeros(6, 2, 4, 4)] * 2, "direct": [[None, None], [None, None]]}, "h or c sends nothing"),
        ({"grad_output": torch.zeros(6, 2, 4).double()}, "expected torch.float64"),
        ({"losses": [3, 1]}, "losses at \\[3, 1\\]"),
        ({"losses": [6]}, "expected ascending steps below 6"),
        ({"losses": [-1]}, "expected ascending steps below 6"),
        ({"lags": 0}, "lags 0"),
        ({"weight_hh": torch.zeros(16, 4).half()}, "expected torch.float32"),
    ],
)
def test_bad_requests_never_reach_native_code(change, said):
    request = {
        "weight_hh": torch.zeros(16, 4),
        "to_gates": [torch.zeros(6, 2, 4, 4)] * 2,
        "direct": [[None, torch.zeros(6, 2, 4)], [None, torch.zeros(6, 2, 4)]],
        "grad_output": torch.zeros(6, 2, 4),
        "losses": [0, 3],
        "lags": 4,
        "reverse": False,
    }
    cotangents.norms(**request)
    with pytest.raises(ValueError, match=said):
        cotangents.norms(**request | change)
