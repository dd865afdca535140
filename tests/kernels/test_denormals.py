"""The kernels take denormals for zero, in every thread that computes, and leave each thread as they found it."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from comparison import HAS_NATIVE
from torch import Tensor

import throughtime
from throughtime import insight
from throughtime.kernels import native

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")

CELLS = {
    "rnn_tanh": throughtime.RNN,
    "rnn_relu": lambda *sizes, **more: throughtime.RNN(*sizes, nonlinearity="relu", **more),
    "lstm": throughtime.LSTM,
    "gru": throughtime.GRU,
    "gru_reset_before": lambda *sizes, **more: throughtime.GRU(*sizes, reset_after=False, **more),
    "mgu": throughtime.MGU,
}
KINDS: dict[str, Callable[..., torch.nn.Module]] = CELLS | {
    "lstm+proj": lambda *sizes, **more: throughtime.LSTM(*sizes, proj_size=10, **more),
    "lstm+layer_norm": lambda *sizes, **more: throughtime.LSTM(*sizes, layer_norm=True, **more),
    "lstm+peepholes+zoneout": lambda *sizes, **more: throughtime.LSTM(*sizes, peepholes=True, zoneout=0.1, **more),
    "gru+layer_norm": lambda *sizes, **more: throughtime.GRU(*sizes, layer_norm=True, **more),
    "gru+zoneout": lambda *sizes, **more: throughtime.GRU(*sizes, zoneout=0.1, **more),
    "gru_reset_before+zoneout": lambda *sizes, **more: throughtime.GRU(*sizes, reset_after=False, zoneout=0.1, **more),
    "rnn+zoneout": lambda *sizes, **more: throughtime.RNN(*sizes, zoneout=0.1, **more),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
GATED = ["lstm", "gru", "gru_reset_before", "lstm+layer_norm", "gru+layer_norm"]
SERVED = [
    (kind, dtype) for kind in KINDS for dtype in DTYPES if dtype != torch.bfloat16 or kind in (*CELLS, "lstm+proj")
]


@pytest.fixture(params=["1", "2", "2 of our own"])
def threads(request):
    """Every way in which threads come to a call."""
    torch.set_num_threads(int(request.param[0]))
    native.use_own_threads("own" in request.param)
    are_kept()  # torch's threads are there before anybody flushes
    yield
    native.use_own_threads(False)
    torch.set_num_threads(1)


@pytest.fixture(params=[False, True], ids=["kept by the caller", "flushed by the caller"])
def flushed(request):
    torch.set_flush_denormal(request.param)
    yield request.param
    torch.set_flush_denormal(False)


def settings() -> int:
    """The calling thread's floating-point settings, without the flags of what has happened."""
    (now,) = before = native.module.flush_denormals(1)
    native.module.restore_denormals(1, before)
    return now & ~0x3F


def are_kept() -> list[bool]:
    """Whether torch keeps denormals, in the first elements, which the calling thread computes, and in the last."""
    product = torch.full((1 << 18,), 2e-38) * 0.1
    bits = product[[0, -1]].view(torch.int32)  # numbers that are compared are flushed themselves
    return (bits != 0).tolist()


def denormals(tensor: Tensor) -> int:
    return int(((tensor != 0) & (tensor.abs() < torch.finfo(tensor.dtype).smallest_normal)).sum())


def fading(kind: str, dtype: torch.dtype = torch.float32, rows: int = 12, **more) -> tuple[torch.nn.Module, Tensor]:
    """A layer whose gradients fade within 150 steps, and its input."""
    torch.manual_seed(1)
    layer = KINDS[kind](7, 40, dtype=dtype, **more)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "weight_hh" in name or "gain_hh" in name:
                parameter.mul_(0.3)
            if "bias" in name and not kind.startswith("rnn"):
                parameter.view(-1, 40)[1] = -0.5  # the forget or the update gate's: little of the old state is kept
    return layer, torch.randn(150, rows, 7, dtype=dtype)


def many_to_one(layer: torch.nn.Module, x: Tensor, **options) -> list[Tensor]:
    """The output, and the gradients of a loss on the last step, so small that they are soon nothing."""
    x = x.detach().requires_grad_()
    output, _ = layer(x, **options)
    loss = output[-1].sum() * (1e-280 if x.dtype == torch.float64 else 1e-20)
    return [output.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])]


CALLS: dict[str, Callable[[], object]] = {
    "a step": lambda: throughtime.LSTM(7, 40)(torch.randn(1, 2, 7)),
    "without gradients": torch.no_grad()(lambda: throughtime.LSTM(7, 40)(torch.randn(30, 12, 7))),
    **{kind: lambda kind=kind: many_to_one(*fading(kind)) for kind in KINDS},
    **{str(dtype): lambda dtype=dtype: many_to_one(*fading("gru", dtype)) for dtype in DTYPES},
    "ragged": lambda: many_to_one(*fading("lstm"), lengths=torch.arange(139, 151)),
    "resets": lambda: many_to_one(*fading("lstm"), reset=torch.rand(150, 12) < 0.1),
    "both ways": lambda: many_to_one(*fading("gru", bidirectional=True)),
    "recomputed": lambda: many_to_one(*fading("gru", recompute_every=20)),
    "token ids": lambda: throughtime.LSTM(7, 40)(torch.randint(7, (90, 12)))[0].sum().backward(),
    "lag matrix": lambda: lag_norms(),
}


def lag_norms() -> Tensor:
    layer, x = fading("lstm", rows=3)
    recording, gradients = insight.record(layer, x.double(), dtype=torch.float32), torch.zeros(150, 3, 40)
    gradients[-1] = 1e-20
    (lag,) = insight.lag_matrix(recording, gradients.double())
    return lag.norms.float()


def test_the_callers_settings_are_what_they_were(threads, flushed):
    expected, kept = settings(), are_kept()
    for call, function in CALLS.items():
        function()
        assert (settings(), are_kept()) == (expected, kept), call
    assert kept == [not flushed, not flushed or torch.get_num_threads() > 1]  # torch sets one thread only


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent")
@pytest.mark.parametrize("what", ["forward", "backward"])
def test_so_they_are_where_a_call_raises_and_in_what_raises(flushed, what):
    """A signal's handler runs in the middle of a pass, with the caller's settings."""
    found = []

    def handler(*_):
        found.append(sys.float_info.min / 2 == 0)
        raise InterruptedError

    layer, x = throughtime.LSTM(8, 256), torch.randn(20_000, 1, 8)
    began = time.perf_counter()
    loss = layer(x)[0].sum()
    took = time.perf_counter() - began  # there; the way back takes longer
    call = loss.backward if what == "backward" else lambda: layer(x)
    expected, before = settings(), signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, took / 4)
        with pytest.raises(InterruptedError):
            call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert found == [flushed]
    assert settings() == expected
    assert are_kept()[0] is not flushed


@pytest.mark.parametrize(("kind", "dtype"), SERVED, ids=str)
def test_gradients_fade_out_into_zeros(threads, kind, dtype):
    layer, x = fading(kind, dtype)
    layer.backend = "native"
    grads = many_to_one(layer, x)[1:]
    assert (grads[0][0] == 0).all()
    assert (grads[0][-1] != 0).any()
    assert [denormals(grad) for grad in grads] == [0] * len(grads)


def test_the_lag_matrix_fades_out_into_zeros(threads):
    norms = lag_norms()
    assert (norms == 0).any()
    assert (norms > 0).any()
    assert denormals(norms) == 0


@pytest.mark.parametrize(("kind", "dtype"), [it for it in SERVED if it[1] != torch.bfloat16], ids=str)
def test_nothing_else_is_lost(kind, dtype):
    """The equations keep denormals, as torch does: of what they find, all is found that is far enough above."""
    layer, x = fading(kind, dtype, rows=3)
    layer.eval()
    found = {}
    for backend in ("native", "reference"):
        layer.backend = backend
        found[backend] = many_to_one(layer, x)
    largest = [found[backend][1].abs().amax((1, 2), keepdim=True) for backend in found]  # of each step
    smallest = torch.finfo(dtype).smallest_normal
    assert ((largest[1] > 0) & (largest[1] < smallest)).any()
    assert ((found["native"][1] - found["reference"][1]).abs() <= 1e-3 * largest[1] + 1e3 * smallest).all()
    for ours, theirs in zip(found["native"][2:], found["reference"][2:], strict=True):
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


def test_a_rows_bits_depend_on_neither_threads_nor_neighbours():
    for kind in KINDS:
        if "zoneout" in kind:  # whose masks are drawn for all rows at once
            continue
        layer, x = fading(kind, rows=24)
        expected = many_to_one(layer, x)
        alone = many_to_one(layer, x[:, :1].contiguous())
        assert torch.equal(alone[1], expected[1][:, :1]), kind
        for count in (2, 3):
            torch.set_num_threads(count)
            together = many_to_one(layer, x)
            torch.set_num_threads(1)
            whole = 2 if "+" in kind and kind != "lstm+proj" else None  # a variant's sums are taken in pieces
            assert all(map(torch.equal, together[:whole], expected[:whole])), kind


@pytest.mark.parametrize("kind", ["rnn_relu", "rnn+zoneout"])
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize(("weight", "x"), [(1e-20, 1e-20), (1e10, 1e-39), (1e-39, 1e10)])
def test_denormal_sums_and_what_denormals_would_come_to_are_zeros(threads, kind, rows, weight, x):
    layer = KINDS[kind](64, 128, bias=False)
    torch.nn.init.constant_(layer.weight_ih_l0, weight)
    output = layer(torch.full((50, rows, 64), x))[0]
    assert torch.tensor(x) * torch.tensor(weight) > 0
    assert output.count_nonzero() == 0


@pytest.mark.parametrize(("kind", "dtype"), [it for it in SERVED if it[0] in GATED], ids=str)
def test_a_gate_that_is_shut_lets_nothing_through(threads, kind, dtype):
    """σ of a strongly negative number would be a denormal, 6e-39 of a float, and what it is multiplied with may be large."""
    layer = KINDS[kind](5, 40, dtype=dtype)
    layer.backend = "native"
    for name, parameter in layer.named_parameters():
        torch.nn.init.constant_(parameter, 0.0)
        if name.startswith("bias"):  # of an LSTM the forget gate's, of a GRU the update gate's
            torch.nn.init.constant_(parameter.view(-1, 40)[1], -1e4)
    large = torch.full((1, 8, 40), 1e300 if dtype == torch.float64 else 1e30, dtype=dtype)
    state = (torch.zeros_like(large), large) if kind.startswith("lstm") else large
    _, last = layer(torch.zeros(1, 8, 5, dtype=dtype), state)
    assert (last[1] if kind.startswith("lstm") else last).count_nonzero() == 0


FIRST = """
import torch, throughtime
torch.set_num_threads(2)
with torch.no_grad():
    throughtime.GRU(64, 256)(torch.ones(10, 32, 64))  # little enough for torch to make no threads before
bits = (torch.full((1 << 18,), 2e-38) * 0.1)[[0, -1]].view(torch.int32)
print((bits != 0).tolist())
"""


def test_threads_that_begin_in_a_call_keep_them_after_it():
    """A new thread has the settings of the one that makes it."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=False)
    assert done.stdout == "[True, True]\n", done.stderr
