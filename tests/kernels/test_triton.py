"""The Triton kernels against the equations, in Triton's interpreter: outputs and every gradient."""

import importlib
import os
import random

import numpy
import pytest
import torch

import throughtime
from throughtime.backend import reference, triton

_before = os.environ.get("TRITON_INTERPRET")
os.environ["TRITON_INTERPRET"] = "1"  # what is imported now, Triton's own functions too, is interpreted for good
try:
    pytest.importorskip("triton", reason="Triton isn't installed")
    import triton_interpreter
    from triton_cases import CELLS, VARIANTS, Case

    exchange = importlib.import_module("throughtime.kernels.triton.exchange")
    plan = importlib.import_module("throughtime.kernels.triton.plan")
finally:
    if _before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = _before

ERROR = {torch.float32: 4e-6, torch.float16: 2e-2, torch.bfloat16: 0.15}  # of what is normalised, in small layers


@pytest.fixture(autouse=True)
def turns(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    turns = triton_interpreter.install(monkeypatch)
    turns.random = random.Random(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    yield turns
    torch.use_deterministic_algorithms(False)


def check(case, dtype=torch.float32):
    expected, found = case.run(reference, torch.float64), case.run(triton, dtype)
    for index, (own, right) in enumerate(zip(found, expected, strict=True)):
        assert own.shape == right.shape
        assert own.dtype == dtype
        error = float((own.double() - right).norm() / right.norm().clamp(min=1e-9))
        assert error <= ERROR[dtype], f"result {index} errs by {error:.1e}"


@pytest.mark.parametrize("cell", CELLS + VARIANTS)
def test_every_cell(cell):
    check(Case(cell))


@pytest.mark.parametrize("cell", CELLS + VARIANTS)
def test_lengths_and_resets_backwards_over_several_programs(cell):
    check(Case(cell, batch=19, hidden=17, ragged=True, resets=True, reverse=True))


@pytest.mark.parametrize("cell", CELLS + VARIANTS)
def test_one_unit(cell):
    """Of few numbers a load without its mask reads beyond the last."""
    if "layer_norm" in cell:  # which leaves nothing of one unit's c, and no digits of its gradient
        assert all(torch.isfinite(each).all() for each in Case(cell, hidden=1).run(triton))
    else:
        check(Case(cell, hidden=1))


@pytest.mark.parametrize("cell", CELLS + VARIANTS)
def test_token_ids_without_biases(cell):
    check(Case(cell, tokens=True, ragged=True, bias=False))


@pytest.mark.parametrize("vocabulary", [3, 1500])
def test_token_ids_of_any_vocabulary(vocabulary):
    check(Case("gru", inputs=vocabulary, tokens=True))


@pytest.mark.parametrize("cell", [*CELLS, *VARIANTS[:4]])
@pytest.mark.parametrize("how", [{"ragged": True, "resets": True}, {"packed": True}, {}], ids=str)
def test_both_directions_at_once(cell, how):
    check(Case(cell, both=True, **how))


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_packed_rows_in_reverse(cell):
    check(Case(cell, packed=True, reverse=True, batch=4))


def test_an_expectation_stands_for_masks():
    check(Case(VARIANTS[4], expected=True, resets=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [5, 6])
@pytest.mark.parametrize("cell", ["rnn_relu", "lstm", "gru", "gru_reset_before"])
def test_two_bytes_a_number(cell, hidden, dtype):
    check(Case(cell, hidden=hidden, ragged=True, resets=True), dtype)


@pytest.mark.parametrize("hidden", [1, 2, 3])
@pytest.mark.parametrize("cell", ["lstm+layer_norm", "lstm+layer_norm+zoneout_c", "lstm+coupled+layer_norm"])
def test_few_normalised_units_in_two_bytes(cell, hidden):
    """What is standardised on the way back is what was standardised: of few units little is left over, times a large scale."""
    found, honest, exact = [], [], []
    for seed in range(8):  # luck decides over few numbers, so those of all seeds are judged together
        torch.manual_seed(seed)
        case = Case(cell, hidden=hidden, steps=3)
        for to, backend, dtype in (
            (found, triton, torch.bfloat16),
            (honest, reference, torch.bfloat16),
            (exact, reference, torch.float64),
        ):
            to.append(case.run(backend, dtype))
    for place in range(len(exact[0])):
        own, other, right = (torch.stack([run[place].double() for run in runs]) for runs in (found, honest, exact))
        errors = [float((each - right).norm() / right.norm().clamp(min=1e-4)) for each in (own, other)]
        if errors[1] < 0.3:  # else bfloat16 has hardly a digit of it, whoever computes
            assert errors[0] <= max(3 * errors[1], ERROR[torch.bfloat16]), f"{errors[0]:.2g}, equations {errors[1]:.2g}"


def test_more_rows_than_run_at_once(monkeypatch):
    monkeypatch.setattr(plan, "programs_at_once", lambda _: 2)
    check(Case("lstm+layer_norm+peepholes", batch=70, hidden=9, ragged=True))


def test_a_layer_as_deep_as_many_chunks(monkeypatch):
    monkeypatch.setattr(plan, "_chunk", lambda *_: 16)
    check(Case("gru_reset_before", hidden=57, resets=True, batch=2, steps=3))


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_numbers_that_are_exchanged_two_to_a_word_in_many_chunks(cell, monkeypatch):
    monkeypatch.setattr(plan, "_chunk", lambda *_: 16)
    check(Case(cell, hidden=70, batch=2, steps=2), torch.float16)


@pytest.mark.parametrize("cell", ["gru", "lstm+layer_norm"])
def test_bits_depend_on_no_schedule(cell, turns):
    case = Case(cell, hidden=17, ragged=True)
    first = case.run(triton)
    turns.random = random.Random(2)
    assert all(torch.equal(a, b) for a, b in zip(first, case.run(triton), strict=True))


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before+layer_norm"])
def test_nothing_is_kept_where_no_backward_pass_follows(cell):
    case = Case(cell)
    (request,) = case.requests(torch.float32, apart=False)
    kept, lean = triton.forward(request, True), triton.forward(request, False)
    assert lean.saved == []
    assert torch.equal(kept.output, lean.output)
    assert [(s.shape, s.dtype) for s in triton.fake_saved(request)] == [(s.shape, s.dtype) for s in kept.saved]


def test_gradients_that_are_not_there_are_zero():
    case = Case("lstm")
    (request,) = case.requests(torch.float32, apart=False)
    output, final, saved = triton.forward(request, True)
    nothing = triton.backward(request, None, [None, None], output, saved)
    zeros = triton.backward(request, torch.zeros_like(output), [torch.zeros_like(f) for f in final], output, saved)
    for a, b in zip([*nothing.initial, *nothing.parameters], [*zeros.initial, *zeros.parameters], strict=True):
        assert torch.equal(a, b)
        assert a.count_nonzero() == 0


def test_a_batch_of_no_rows():
    case = Case("gru", batch=0)
    assert [t.shape for t in case.run(triton)] == [t.shape for t in case.run(reference)]


def test_programs_that_nobody_gives_anything_end_with_an_error(monkeypatch):
    (request,) = Case("lstm", hidden=17).requests(torch.float32, apart=False)
    monkeypatch.setattr(triton_interpreter.interpreter.InterpreterBuilder, "create_masked_store", lambda *_: None)
    monkeypatch.setattr(triton_interpreter, "_PATIENCE", 5)
    with pytest.raises(triton_interpreter.interpreter.InterpreterError, match="all programs wait"):
        triton.forward(request, False)


def test_programs_that_did_not_wait_would_compute_with_what_is_not_there(monkeypatch):
    """So these tests would see a wait that is left out."""
    (request,) = Case("lstm", hidden=17).requests(torch.float32, apart=False)
    assert torch.isfinite(triton.forward(request, False).output).all()
    monkeypatch.setattr(exchange, "is_missing", lambda *_: False)
    assert triton.forward(request, False).output.isnan().any()


@pytest.mark.parametrize("access", ["create_masked_load", "create_masked_store"])
def test_what_is_not_masked_is_an_error(access, monkeypatch):
    """So these tests would see a mask that is left out."""
    (request,) = Case("lstm").requests(torch.float32, apart=False)
    triton.forward(request, True)
    builder = triton_interpreter.interpreter.InterpreterBuilder
    own, place = getattr(builder, access), {"create_masked_load": 1, "create_masked_store": 2}[access]

    def unmasked(self, *given):
        given[place].data = numpy.ones_like(given[place].data)
        return own(self, *given)

    monkeypatch.setattr(builder, access, unmasked)
    errors = triton_interpreter.OutsideError, triton_interpreter.interpreter.InterpreterError
    with pytest.raises(errors, match="beyond what the launch was given"):
        triton.forward(request, True)


def test_what_stands_for_nothing_is_not_taken_for_zeros(monkeypatch):
    (request,) = Case("lstm").requests(torch.float32, apart=False)
    builder = triton_interpreter.interpreter.InterpreterBuilder
    load = builder.create_masked_load

    def bare(self, pointers, mask, other, *how):
        is_volatile = how[-1]
        return load(self, pointers, mask, other if is_volatile else None, *how)

    monkeypatch.setattr(builder, "create_masked_load", bare)
    assert triton.forward(request, True).output.isnan().any()


def test_a_state_that_looks_unset_is_not_waited_for():
    (request,) = Case("lstm").requests(torch.float32, apart=False)
    h_0, c_0 = request.initial
    strange = torch.full_like(h_0, -1, dtype=torch.int32).view(torch.float32)
    direction = request.directions[0]._replace(initial=(strange, c_0))
    assert triton.forward(request._replace(directions=(direction,)), False).output.isnan().all()


def test_padding_may_hold_anything():
    case = Case("lstm", ragged=True)
    first = case.run(triton)
    is_padding = torch.arange(5)[:, None] >= case.given["lengths"]
    case.input[is_padding] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(first, case.run(triton), strict=True))


def test_layers_compute_with_them():
    ours = throughtime.GRU(4, 6, num_layers=2, bidirectional=True, backend="triton")
    theirs = throughtime.GRU(4, 6, num_layers=2, bidirectional=True, backend="reference")
    theirs.load_state_dict(ours.state_dict())
    x, lengths = torch.randn(5, 3, 4), torch.tensor([5, 0, 2])
    results = []
    for layer in (ours, theirs):
        output, h_n = layer(x, lengths=lengths)
        (output.sin().sum() + h_n.cos().sum()).backward()
        results.append([output, h_n, *[p.grad for p in layer.parameters()]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert "triton" in throughtime.backends()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"recompute_every": 2}, "they keep all that their backward pass needs"),
        (
            {"input": torch.zeros(5, 3, 4, dtype=torch.float64)},
            "they compute float32, bfloat16 and float16, not torch.float64",
        ),
    ],
)
def test_what_they_refuse(change, reason):
    (request,) = Case("lstm").requests(torch.float32, apart=False)
    assert triton.refusal(request._replace(**change)) == reason
    assert triton.refusal(request) is None


def test_a_layer_that_is_too_wide_is_refused():
    (request,) = Case("lstm", hidden=700, batch=1, steps=1).requests(torch.float32, apart=False)
    assert triton.refusal(request) == "W_hh of 700 units doesn't fit into the multiprocessors of this GPU"


@pytest.mark.parametrize("programs", [8, 108, 132])
@pytest.mark.parametrize("shared", [101376, 166912, 232448])
def test_a_loop_is_cut_such_that_its_programs_run_at_once_and_hold_their_part(programs, shared):
    """With more programs than run at once a GPU would wait for ever; a tile without an element for each thread would give NaNs."""
    chance, found = random.Random(0), 0
    for _ in range(400):
        hidden, batch, ways = chance.randint(1, 1200), chance.randint(1, 400), chance.choice([1, 2])
        columns, word, depth = chance.choice([1, 2, 4, 5]), chance.choice([2, 4]), chance.choice([1, 2, 4])
        width = depth * hidden
        cut = plan.tiling(width, hidden, columns, batch, ways, word, programs, shared)
        if cut is None:
            assert hidden > 32  # which fits everywhere
            continue
        found += 1
        assert all(size & (size - 1) == 0 for size in (cut.rows, cut.units, cut.chunk, cut.warps))
        padded = cut.chunk * cut.chunks(width)
        assert 0 <= padded - width < cut.chunk
        assert padded <= 8 * cut.chunk
        assert 1 <= cut.groups <= -(-batch // cut.rows)
        assert cut.groups * -(-hidden // cut.units) * ways <= programs
        assert cut.rows * cut.chunk >= 32 * cut.warps
        assert cut.rows * padded <= 160 * 32 * cut.warps  # numbers that threads hold until all have arrived
        assert word * (cut.rows * cut.chunk + padded * cut.units * columns) <= shared - 19456
        for is_exact in (False, True):
            pieces = cut.pieces(columns * cut.units, is_exact)
            assert pieces == 1 or cut.chunk // pieces >= 16
            assert pieces > 1 or not is_exact or cut.warps == 1 or cut.chunk == 16
    assert found > 50


def test_a_layer_that_programs_can_only_hold_all_together_is_served():
    assert plan.tiling(64, 64, 4, 16, 1, 4, 1, 232448) == plan.Tiling(16, 64, 64, 4, 1)
    assert plan.tiling(65, 65, 4, 16, 1, 4, 1, 232448) is None
    assert plan.tiling(2560, 320, 1, 16, 1, 4, 132, 232448) == plan.Tiling(16, 8, 512, 8, 1)
    assert plan.tiling(2561, 320, 1, 16, 1, 4, 132, 232448) is None  # of more numbers than threads have registers for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("hidden", [8, 9])
@pytest.mark.parametrize(
    ("cell", "columns", "gates_back", "columns_back"),
    [
        ("rnn_tanh", 1, 1, 1),
        ("lstm", 4, 4, 1),
        ("lstm+coupled", 4, 3, 1),
        ("gru", 4, 3, 1),
        ("gru_reset_before", 5, 2, 2),
    ],
)
def test_loops_are_cut_for_what_they_multiply(
    cell, columns, gates_back, columns_back, hidden, both, dtype, monkeypatch
):
    """Too little is no shared memory on a GPU: of each unit, the columns forward, and how deep and how many go back."""
    (request,) = Case(cell, hidden=hidden, batch=3, both=both).requests(dtype, apart=False)
    asked = []
    monkeypatch.setattr(plan, "tiling", lambda *given: asked.append(given))
    width, word = (hidden // 2, 4) if dtype == torch.bfloat16 and hidden == 8 else (hidden, dtype.itemsize)
    for batch in (None, 1, 0):
        plan.tilings(request, batch)
        rest = 3 if batch is None else 1, 1 + both, word, 8, 232448
        assert asked[-2:] == [(width, hidden, columns, *rest), (gates_back * width, hidden, columns_back, *rest)]


@pytest.mark.parametrize("cuts", [(None, None), (None, 1), (1, None), (1, 1)])
def test_both_loops_must_fit(cuts, monkeypatch):
    (request,) = Case("lstm").requests(torch.float32, apart=False)
    left = list(cuts)
    monkeypatch.setattr(plan, "tiling", lambda *_: left.pop(0))
    assert plan.fits(request) == (None not in cuts)


@pytest.mark.parametrize(
    ("dtype", "is_allowed", "is_exact", "precision"),
    [
        (torch.float32, False, True, "ieee"),
        (torch.float32, True, False, "tf32"),
        (torch.bfloat16, True, True, "tf32"),
        (torch.float16, False, True, "tf32"),
    ],
    ids=str,
)
def test_products_are_rounded_where_torch_says_so(dtype, is_allowed, is_exact, precision, monkeypatch):
    """Which the interpreter doesn't: it has no TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", is_allowed)
    (request,) = Case("lstm").requests(dtype, apart=False)
    assert plan.is_exact(dtype) == is_exact
    assert plan.Plan(request)._shared()["PRECISION"] == precision


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_compiled_layer_is_served_without_a_warning(kind):
    layer, x = getattr(throughtime, kind)(4, 6, backend="triton"), torch.randn(5, 3, 4)
    output, _ = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert torch.equal(output, layer(x)[0])


def test_without_a_gpu_they_are_not_there(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "triton" not in throughtime.backends()
    with pytest.raises(throughtime.InputError, match="'triton' can't be had: there is no NVIDIA GPU here"):
        throughtime.LSTM(2, 3, backend="triton")(torch.zeros(1, 1, 2))
