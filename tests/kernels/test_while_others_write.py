"""A call under way while other threads exchange its tensors, write to them, fork, or ask for another instruction set.

What another thread may do at any moment is done here at the worst one. What could end the process has one of its own.
"""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from comparison import HAS_NATIVE
from torch.multiprocessing.reductions import StorageWeakRef

import throughtime
from throughtime import direct
from throughtime.kernels import native, plan, whole

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")

LAYERS = {
    "lstm": lambda: throughtime.LSTM(5, 7, num_layers=2, proj_size=3),
    "gru_reset_before": lambda: throughtime.GRU(5, 7, reset_after=False, bidirectional=True),
    "varied": lambda: throughtime.LSTM(5, 7, layer_norm=True, peepholes=True),
}


def exchange(layer: torch.nn.Module, input: torch.Tensor, how: str) -> bool:
    """Exchange what a call was given; return whether what it computes with is still there."""
    before = [StorageWeakRef(t.untyped_storage()) for t in (*layer.parameters(), input)]
    input.data = torch.full_like(input, torch.nan)
    for name, parameter in [*layer._parameters.items()]:
        if how == "data":
            parameter.data = torch.full_like(parameter, torch.nan)
        else:
            layer._parameters[name] = torch.nn.Parameter(torch.full_like(parameter, torch.nan))
    del parameter
    return not any(memory.expired() for memory in before)


@pytest.mark.parametrize("how", ["data", "parameters"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_direct_call_keeps_its_memory(name, how, monkeypatch):
    layer, x, kept = LAYERS[name](), torch.randn(4, 2, 5), []
    with torch.no_grad():
        expected = layer(x)[0]
    call = direct._CALLS[torch.float32]

    def native_call(*arguments):
        kept.append(exchange(layer, x, how))
        call(*arguments)

    monkeypatch.setattr(direct, "_CALLS", {torch.float32: native_call})
    with torch.no_grad():
        found = layer(x)[0]
    assert kept == [True]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("how", ["data", "parameters"])
@pytest.mark.parametrize("name", ["gru_reset_before", "varied"])
def test_a_training_call_keeps_its_memory(name, how, monkeypatch):
    layer, x, kept, reset = LAYERS[name](), torch.randn(4, 2, 5), [], torch.zeros(4, 2, dtype=torch.bool)
    expected = layer(x, reset=reset)[0]
    run = plan._run_forward

    def run_forward(*arguments):
        kept.append(exchange(layer, x, how))
        run(*arguments)

    monkeypatch.setattr(plan, "_run_forward", run_forward)
    found = layer(x, reset=reset)[0]
    assert kept == [True]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("how", ["data", "parameters"])
def test_a_training_call_of_whole_rows_keeps_its_memory(how, monkeypatch):
    layer, x, kept = LAYERS["gru_reset_before"](), torch.randn(4, 2, 5), []
    expected, own = layer(x)[0], native.kind(torch.float32)

    def forward_whole(**arguments):
        kept.append(exchange(layer, x, how))
        own.forward_whole(**arguments)

    monkeypatch.setattr(whole, "kind", lambda _: SimpleNamespace(forward_whole=forward_whole))
    found = layer(x)[0]
    assert kept == [True]
    assert torch.equal(found, expected)


WRITTEN_TO = """
    import torch
    from throughtime.backend import native as backend
    from throughtime.kernels import plan
    from throughtime.request import Request

    torch.set_num_threads(1)
    T, B, V, H = 6, 3, 4, 5
    written, when = {written!r}, {when!r}
    values = {{
        "input": torch.ones(T, B, dtype=torch.int64),
        "lengths": torch.tensor([6, 2, 4]),
        "batch_sizes": torch.tensor([3, 3, 2, 2, 1, 1]),
        "reset": torch.zeros(T, B, dtype=torch.bool),
    }}
    worse = {{"input": 1 << 40, "lengths": 1 << 20, "batch_sizes": 1 << 20, "reset": True}}
    if written == "batch_sizes":
        values["input"] = torch.ones(12, dtype=torch.int64)
    options = {{written: values[written]}} if written != "input" else {{}}
    parameters = [torch.randn(4 * H, V), torch.randn(4 * H, H)]

    def call():
        initial = [torch.zeros(B, H), torch.zeros(B, H)]
        return backend.forward(Request.read("lstm", values["input"], initial, parameters, **options), keep=True)

    expected = call().output
    module, name = {{"after the check": (backend, "_check"), "in the pass": (plan, "_run_forward")}}[when]
    do = getattr(module, name)

    def then_written(*arguments):
        if when == "after the check":
            do(*arguments)
        values[written].fill_(worse[written])
        if when == "in the pass":
            do(*arguments)

    setattr(module, name, then_written)
    try:
        print("the same" if torch.equal(call().output, expected) else "another answer")
    except (ValueError, IndexError) as error:
        print("refused:", error)
"""


@pytest.mark.parametrize("when", ["after the check", "in the pass"])
@pytest.mark.parametrize("written", ["input", "lengths", "batch_sizes", "reset"])
def test_what_tells_places_is_checked_where_nobody_writes(written, when):
    """Ids, lengths, batch sizes and resets tell the kernels where to read and write, and when to meet."""
    script = textwrap.dedent(WRITTEN_TO.format(written=written, when=when))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if when == "in the pass":
        assert done.stdout == "the same\n", done.stderr
    elif written == "reset":
        assert done.stdout == "another answer\n", done.stderr
    else:
        assert done.stdout.startswith("refused: "), done.stderr
        assert {"input": "token id", "lengths": "lengths must lie", "batch_sizes": "batch_sizes are"}[
            written
        ] in done.stdout


@pytest.mark.skipif(HAS_NATIVE and len(native.instruction_sets()) < 2, reason="there is one instruction set")
@pytest.mark.parametrize("name", ["gru_reset_before", "varied"])
def test_a_pass_ends_with_the_instruction_set_that_it_began_with(name, monkeypatch):
    """Panels of one set mean something else to another."""
    layer, x, reset = LAYERS[name](), torch.randn(40, 9, 5), torch.zeros(40, 9, dtype=torch.bool)
    before, *_, other = native.instruction_sets()

    def results():
        native.use_instruction_set(before)
        output, _ = layer(x, reset=reset)
        native.use_instruction_set(before)
        return [output, *torch.autograd.grad(output.sum(), list(layer.parameters()))]

    set_in_use, expected = native.instruction_set(), results()
    for loop in (plan._ForwardLoop, plan._BackwardLoop):

        def then_switched(self, *arguments, _packed=loop.__init__):
            _packed(self, *arguments)
            native.use_instruction_set(other)

        monkeypatch.setattr(loop, "__init__", then_switched)
    try:
        found = results()
    finally:
        native.use_instruction_set(set_in_use)
    assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(HAS_NATIVE and len(native.instruction_sets()) < 2, reason="there is one instruction set")
def test_directions_that_were_laid_out_for_two_instruction_sets_run_apart(monkeypatch):
    layer, x = LAYERS["gru_reset_before"](), torch.randn(40, 9, 5)
    reset = torch.zeros(40, 9, dtype=torch.bool)
    before, *_, other = native.instruction_sets()
    set_in_use, expected = native.instruction_set(), layer(x, reset=reset)[0]
    make = plan.Layout._lay_out

    def then_switched(self):
        made = make(self)
        native.use_instruction_set(other)
        return made

    monkeypatch.setattr(plan.Layout, "_lay_out", then_switched)
    native.use_instruction_set(before)
    try:
        found = layer(x, reset=reset)[0]
    finally:
        native.use_instruction_set(set_in_use)
    assert torch.allclose(found, expected, atol=1e-5)
