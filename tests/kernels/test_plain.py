"""The native kernels against the equations: outputs and every gradient, with fresh memory full of NaN."""

import copy
import subprocess
import sys
from itertools import product

import passes
import pytest
import torch
from comparison import (
    GRADIENT_FACTOR,
    HAS_NATIVE,
    OUTPUT_FACTOR,
    InOrder,
    assert_as_accurate,
    least_accurate,
    moved,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from throughtime import InputError
from throughtime.backend import native as backend
from throughtime.cells import CELLS, Parameters, sequence
from throughtime.kernels import layout, native
from throughtime.request import Request as Asked

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")


@pytest.fixture(autouse=True)
def _fresh_memory_holds_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=native.instruction_sets() if HAS_NATIVE else [])
def instruction_set(request):
    before = native.instruction_set()
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set(before)


class Request:
    """One layer's arguments in float64, and gradients to send back."""

    def __init__(
        self,
        cell,
        steps,
        batch,
        hidden,
        *,
        inputs=3,
        projection=0,
        bias=True,
        ragged=False,
        resets=False,
        reverse=False,
        tokens=False,
    ):
        width, rows = projection or hidden, CELLS[cell].spec.gates * hidden
        shapes = [(rows, inputs), (rows, width)] + [(rows,), (rows,)] * bias + [(projection, hidden)] * (projection > 0)
        draw = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
        self.cell, self.reverse = cell, reverse
        self.parameters = [draw(*shape) / shape[-1] ** 0.5 for shape in shapes]
        self.ids = torch.randint(0, inputs, (steps, batch)) if tokens else None
        self.input = draw(steps, batch, inputs) if self.ids is None else one_hot(self.ids, inputs).double()
        self.initial = [draw(batch, width), draw(batch, hidden)][: len(CELLS[cell].spec.states)]
        self.lengths = torch.randint(0, steps + 1, (batch,)) if ragged else None
        self.reset = torch.rand(steps, batch) < 0.3 if resets else None
        self.grad_output = draw(steps, batch, width)
        self.grad_final = [torch.randn_like(s) for s in self.initial]

    def by_kernels(self, dtype=torch.float64) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs with final state, and gradients of input (token ids have none), initial state and parameters."""
        cast = lambda tensors: [t.to(dtype) for t in tensors]  # noqa: E731
        given = (self.input.to(dtype) if self.ids is None else self.ids, cast(self.initial), cast(self.parameters))
        given = (self.cell, *given, self.lengths, self.reset, self.reverse)
        output, final, saved = passes.forward(*given)
        gradient = passes.backward(given, self.grad_output.to(dtype), cast(self.grad_final), output, saved)
        assert (gradient.input is None) == (self.ids is not None)
        inputs = [] if gradient.input is None else [gradient.input]
        return [output, *final], [*inputs, *gradient.initial, *gradient.parameters]

    def by_equations(self, dtype=torch.float64) -> tuple[list[Tensor], list[Tensor]]:
        cell, rest = CELLS[self.cell], (self.lengths, self.reset, self.reverse)
        state = tuple(s.to(dtype) for s in self.initial)
        parameters = Parameters.from_list([p.to(dtype) for p in self.parameters])
        result = sequence.forward(cell, self.input.to(dtype), state, parameters, *rest)
        gradient = sequence.backward(
            *(cell, self.grad_output.to(dtype), tuple(g.to(dtype) for g in self.grad_final), result.saved, parameters),
            *rest,
        )
        return (
            [result.outputs, *result.final_state],
            [gradient.inputs] * (self.ids is None) + [*gradient.initial_state, *gradient.parameters.to_list()],
        )

    def by_honest_computations(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """The equations in `dtype`: of each result the least accurate that one can honestly come to."""
        with InOrder():
            computed = [self.by_equations(dtype)]
        if self.cell != "rnn_relu":  # where a number that is moved over the kink makes another gradient
            other = copy.copy(self)
            for name in ("parameters", "initial", "grad_final"):
                setattr(other, name, moved(getattr(self, name), dtype))
            (other.grad_output,) = moved([self.grad_output], dtype)
            if self.ids is None:
                (other.input,) = moved([self.input], dtype)
            computed.append(other.by_equations(dtype))
        computed = zip(self.by_equations(), self.by_equations(dtype), *computed, strict=True)
        outputs, gradients = (least_accurate(*results) for results in computed)
        return outputs, gradients

    def names(self) -> list[str]:
        parameters = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"][: len(self.parameters) // 2 * 2]
        parameters += ["weight_hr"] * (len(self.parameters) % 2)
        return ["input"] * (self.ids is None) + [*["h_0", "c_0"][: len(self.initial)], *parameters]


def assert_exact(request: Request) -> None:
    for actual, expected in zip(request.by_kernels(), request.by_equations(), strict=True):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-12 * max(1.0, e.abs().max().item() if e.numel() else 0))


def assert_accurate(request: Request, dtype: torch.dtype = torch.float32) -> None:
    exact, honest, actual = request.by_equations(), request.by_honest_computations(dtype), request.by_kernels(dtype)
    assert_as_accurate(actual[0], honest[0], exact[0], OUTPUT_FACTOR, ["output", "h_n", "c_n"][: len(exact[0])])
    assert_as_accurate(actual[1], honest[1], exact[1], GRADIENT_FACTOR, request.names())


@given(
    cell=st.sampled_from(list(CELLS)),
    steps=st.integers(1, 8),
    batch=st.integers(1, 9),
    hidden=st.sampled_from([1, 7, 16, 33, 63, 130]),
    project=st.booleans(),
    bias=st.booleans(),
    ragged=st.booleans(),
    resets=st.booleans(),
    reverse=st.booleans(),
    tokens=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=200)
def test_float64_is_exact(*, cell, steps, batch, hidden, project, bias, ragged, resets, reverse, tokens, threads, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    projection = (hidden + 1) // 2 if project and cell == "lstm" else 0
    try:
        assert_exact(
            Request(
                *(cell, steps, batch, hidden),
                projection=projection,
                bias=bias,
                ragged=ragged,
                resets=resets,
                reverse=reverse,
                tokens=tokens,
            )
        )
    finally:
        torch.set_num_threads(1)


ROUNDED = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize(("batch", "steps", "hidden"), [(1, 1, 1), (3, 5, 7), (1, 6, 63), (3, 4, 500), (70, 3, 33)])
def test_errs_no_more_than_an_honest_computation(cell, dtype, batch, steps, hidden):
    for tokens, reverse in product([False, True][: 1 + (dtype == torch.float32)], (False, True)):
        options = {"inputs": 5, "reverse": reverse, "tokens": tokens}
        assert_accurate(Request(cell, steps, batch, hidden, **options), dtype)
        assert_accurate(Request(cell, steps, batch, hidden, ragged=True, resets=True, **options), dtype)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_an_input_of_no_columns_leaves_the_biases(cell, threads):
    torch.set_num_threads(threads)
    try:
        for steps, batch, hidden in [(5, 3, 7), (1, 1, 64), (40, 30, 130)]:
            assert_exact(Request(cell, steps, batch, hidden, inputs=0, ragged=batch == 3, resets=batch == 30))
            assert_accurate(Request(cell, steps, batch, hidden, inputs=0), torch.bfloat16)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("cell", CELLS)
def test_every_instruction_set(cell, instruction_set):
    assert native.instruction_set() == instruction_set
    for tokens, hidden, ragged in product((False, True), (3, 37, 70), (False, True)):
        projection = (hidden + 1) // 2 * (cell == "lstm")
        request = Request(cell, 5, 7, hidden, ragged=ragged, resets=True, projection=projection, tokens=tokens)
        assert_exact(request)
        for dtype in ROUNDED[: 1 if tokens else 2]:
            assert_accurate(request, dtype)


@pytest.mark.parametrize("steps", [1, 700])
def test_long_sequences_cross_the_stretches(monkeypatch, steps):
    monkeypatch.setattr(layout, "_STRETCH", 1000)
    for cell, ragged, reverse, tokens in product(("lstm", "gru"), (False, True), (False, True), (False, True)):
        assert_exact(Request(cell, min(steps, 40), 3, 5, ragged=ragged, resets=ragged, reverse=reverse, tokens=tokens))


@pytest.mark.parametrize("dtype", ROUNDED)
def test_a_permuted_gate_is_caught(dtype):
    request = Request("lstm", 4, 3, 7)
    exact, honest = request.by_equations(), request.by_honest_computations(dtype)
    for parameter in (0, 1):
        request.parameters[parameter] = request.parameters[parameter].roll(7, 0)
    with pytest.raises(AssertionError):
        assert_as_accurate(request.by_kernels(dtype)[0], honest[0], exact[0], OUTPUT_FACTOR)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize(("cell", "batch"), [(cell, batch) for cell in CELLS for batch in (1, 6)])
def test_mutants_of_results_are_caught(cell, batch, dtype):
    """A state of the step before, a gradient halved, and in float32, whose honest error hides no row, one without its gradient."""
    if cell == "rnn_relu" and dtype == torch.bfloat16:
        pytest.skip("an honest gradient may be another, where rounding carries a unit over the kink")
    request = Request(cell, 5, batch, 17)
    exact, honest = request.by_equations(), request.by_honest_computations(dtype)
    mutants = [
        (0, OUTPUT_FACTOR, lambda x: x.roll(1, 0)),
        (1, GRADIENT_FACTOR, lambda x: x / 2),
        (1, GRADIENT_FACTOR, lambda x: torch.cat([torch.zeros_like(x[:1]), x[1:]])),
    ]
    for part, factor, spoil in mutants[: 3 if dtype == torch.float32 else 2]:
        right = request.by_kernels(dtype)[part]
        for index in range(1 if part == 0 else len(right)):
            wrong = [spoil(result) if place == index else result for place, result in enumerate(right)]
            with pytest.raises(AssertionError, match="errs by"):
                assert_as_accurate(wrong, honest[part], exact[part], factor)


# Without relu: where rounding carries a unit over the kink, a whole gradient comes or goes.
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "rnn_relu"])
@given(
    steps=st.integers(1, 8),
    batch=st.integers(1, 9),
    hidden=st.sampled_from([7, 16, 33, 63, 130]),  # of a single number's error the honest one can be small by luck
    inputs=st.integers(1, 9),
    options=st.fixed_dictionaries(
        {"bias": st.booleans(), "ragged": st.booleans(), "resets": st.booleans(), "reverse": st.booleans()}
    ),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
def test_bfloat16_errs_no_more_than_an_honest_computation(cell, steps, batch, hidden, inputs, options, threads, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    projection = (hidden + 1) // 2 if seed % 2 and cell == "lstm" else 0
    try:
        assert_accurate(
            Request(cell, steps, batch, hidden, inputs=inputs, projection=projection, **options), torch.bfloat16
        )
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_takes_float32_parameters(cell):
    """They are rounded for the products only; their gradients aren't rounded at all."""
    request = Request(cell, 5, 3, 20, inputs=7, ragged=True)
    low, low_gradients = request.by_kernels(torch.bfloat16)
    request.parameters = [p.bfloat16().float() for p in request.parameters]
    cast = lambda tensors: [t.bfloat16() for t in tensors]  # noqa: E731
    given = (cell, request.input.bfloat16(), cast(request.initial), request.parameters, request.lengths)
    output, final, saved = passes.forward(*given)
    gradient = passes.backward(given, request.grad_output.bfloat16(), cast(request.grad_final), output, saved)
    high = [gradient.input, *gradient.initial, *gradient.parameters]
    assert all(map(torch.equal, low, [output, *final]))
    assert [t.dtype for t in gradient.parameters] == [torch.float32] * len(gradient.parameters)
    assert all(map(torch.equal, low_gradients, cast(high)))


def test_bfloat16_rounds_to_nearest_even(instruction_set):
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3F80FFFF, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF, 0x7F800001]
    )
    weight = torch.cat([bits.to(torch.int32), torch.arange(0x00800000, 0x7F800000, 9_999_991, dtype=torch.int32)])
    weight = weight.view(torch.float32)[:, None]
    x, h = torch.ones(1, 1, 1).bfloat16(), torch.zeros(1, len(weight)).bfloat16()
    expected = weight.bfloat16().mT[None]
    no_recurrence = torch.zeros(len(weight), len(weight))
    output, _, _ = passes.forward("rnn_relu", x, [h], [weight, no_recurrence])
    assert torch.equal(output.nan_to_num(-1), expected.nan_to_num(-1))
    bias = weight[:, 0]  # never rounded before the output is
    output, _, _ = passes.forward(
        "rnn_relu", x, [h], [0 * weight.nan_to_num(0, 0), no_recurrence, bias, 0 * bias.nan_to_num(0, 0)]
    )
    assert torch.equal(output.nan_to_num(-1), expected.nan_to_num(-1))


def test_bfloat16_carries_its_state_in_float32():
    """c grows by 0.001 a step with i = f = 1; in bfloat16 it would stop at 0.25."""
    steps, bias = 1000, torch.tensor([50, 50, 0.001, 50])
    x, state = torch.zeros(steps, 1, 1).bfloat16(), [torch.zeros(1, 1).bfloat16()] * 2
    _, (_, c), _ = passes.forward("lstm", x, state, [torch.zeros(4, 1), torch.zeros(4, 1), bias, torch.zeros(4)])
    torch.testing.assert_close(c, torch.tensor([[1.0]]).bfloat16())


def test_a_token_read_as_its_neighbour_is_caught():
    request = Request("gru", 4, 3, 7, tokens=True)
    exact = request.by_equations()
    request.ids = (request.ids + 1) % 3
    for actual, expected in zip(request.by_kernels(), exact, strict=True):
        assert not any(torch.allclose(a, e) for a, e in zip(actual[:1], expected[:1], strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_the_gradient_of_tokens_does_not_depend_on_threads(cell):
    """Bit for bit, in an array large enough to be shared; and every token that never came has a gradient of zero."""
    request = Request(cell, 40, 33, 70, inputs=9, tokens=True)
    request.ids = request.ids.clamp(max=7)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(request.by_kernels(torch.float32)[1])
    torch.set_num_threads(1)
    weight_ih = results[0][-4]
    assert (weight_ih[:, 8] == 0).all()
    assert (weight_ih[:, :8] != 0).any(0).all()
    for other in results[1:]:
        assert torch.equal(other[-4], weight_ih)
        assert torch.equal(other[-2], results[0][-2])  # bias_ih, summed from it


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float64, *ROUNDED])
def test_tokens_are_one_hot_vectors_bit_for_bit(cell, dtype):
    request = Request(cell, 6, 3, 63, inputs=5, tokens=True, ragged=True, resets=True)
    outputs, _ = request.by_kernels(dtype)
    request.ids = None
    assert all(map(torch.equal, outputs, request.by_kernels(dtype)[0]))


@pytest.mark.parametrize("batch", [1, 3])
def test_strides_of_tokens_do_not_matter(batch):
    request = Request("gru", 6, batch, 9, tokens=True)
    expected = request.by_kernels()
    request.ids = torch.stack([request.ids, request.ids + 1000], 2)[:, :, 0]
    assert not request.ids.is_contiguous()
    for a, e in zip(request.by_kernels(), expected, strict=True):
        assert all(map(torch.equal, a, e))


def test_tokens_in_the_padding_do_not_matter():
    request = Request("lstm", 6, 3, 9, tokens=True)
    request.lengths = torch.tensor([3, 0, 6])
    expected = request.by_kernels()
    request.ids[torch.arange(6)[:, None] >= request.lengths] = 1 << 40
    for a, e in zip(request.by_kernels(), expected, strict=True):
        assert all(map(torch.equal, a, e))


@pytest.mark.parametrize("cell", CELLS)
def test_padding_is_neither_read_nor_left_unwritten(cell):
    request = Request(cell, 6, 5, 9, resets=True)
    request.lengths = torch.tensor([3, 0, 6, 1, 6])
    past = torch.arange(6)[:, None] >= request.lengths
    expected = request.by_equations()
    request.input[past] = torch.nan
    request.grad_output[past] = torch.nan
    outputs, gradients = request.by_kernels()
    assert (outputs[0][past] == 0).all()
    assert (gradients[0][past] == 0).all()
    for a, e in zip([*outputs, *gradients], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-11)


def test_busy_processes_change_no_bit(two_threads):
    """Beside them a call may go on with one thread, and does so from one of its products to the next."""
    request = Request("lstm", 20, 32, 64)
    expected = request.by_kernels(torch.float32)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for _ in range(20):
            for given, right in zip(request.by_kernels(torch.float32), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(given, right, strict=True))
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", ROUNDED)
def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads(cell, dtype, two_threads):
    """Bit for bit, whatever the batch, its order and the number of threads."""
    request = Request(cell, 5, 23, 40, inputs=8)
    x, state = request.input.to(dtype), [s.to(dtype) for s in request.initial]
    parameters = [p.to(dtype) for p in request.parameters]
    _, together, _ = passes.forward(cell, x, state, parameters)
    for rows in ([4], [7, 4], [20, 4, 1, 0, 2, 3, 5]):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            lengths = torch.full((len(rows),), 5)
            lengths[rows.index(4) - 1] = 5 if len(rows) == 1 else 3
            _, final, _ = passes.forward(cell, x[:, rows], [s[rows] for s in state], parameters, lengths)
            for a, e in zip(final, together, strict=True):
                assert torch.equal(a[rows.index(4)], e[4])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_strides_do_not_matter(cell, dtype):
    request = Request(cell, 4, 3, 6)
    expected = request.by_kernels(dtype)
    request.input = request.input.transpose(0, 2).contiguous().transpose(0, 2)
    request.grad_output = request.grad_output.transpose(0, 1).contiguous().transpose(0, 1)
    request.parameters = [p.t().contiguous().t() if p.dim() == 2 else p for p in request.parameters]
    request.initial = [torch.stack([s, s], 2)[:, :, 0] for s in request.initial]
    for a, e in zip(request.by_kernels(dtype), expected, strict=True):
        for b, f in zip(a, e, strict=True):
            torch.testing.assert_close(b, f, rtol=0, atol=1e-12)


def test_saved_tensors_survive_a_backward_pass():
    request = Request("lstm", 4, 3, 6)
    given = ("lstm", request.input, request.initial, request.parameters)
    output, final, saved = passes.forward(*given)
    before = [t.clone() for t in (output, *final, *saved)]
    made = (request.grad_output, request.grad_final, output, saved)
    first, again = passes.backward(given, *made), passes.backward(given, *made, needs_input=False)
    assert all(map(torch.equal, before, (output, *final, *saved)))
    assert again.input is None
    assert all(map(torch.equal, first.parameters, again.parameters))


@pytest.mark.parametrize("cell", CELLS)
def test_pooled_memory_changes_no_bit(cell, small_arrays_are_pooled):
    request = Request(cell, 5, 3, 20, ragged=True, projection=7 * (cell == "lstm"))
    small_arrays_are_pooled(False)
    expected = request.by_kernels()
    small_arrays_are_pooled(True)
    for _ in range(2):  # the second time in memory that the first has left behind
        for a, e in zip(request.by_kernels(), expected, strict=True):
            assert all(map(torch.equal, a, e))


def test_pooled_memory_is_reused_and_bounded(small_arrays_are_pooled):
    native.release_memory()
    before = native.memory_use()
    assert before.idle == 0
    first = native.new(torch.empty(0), 5 << 20)
    address, held = first.data_ptr(), native.memory_use().used - before.used
    assert held >= 20 << 20
    del first
    assert native.memory_use() == (before.used, held)
    assert native.new(torch.empty(0), 4 << 20).data_ptr() == address
    for count in range(100_000, 5 << 20, 300_000):  # arrays of ever new sizes
        del_me = native.new(torch.empty(0), count)
        assert sum(native.memory_use()) <= before.used + held
        del del_me
    native.release_memory()
    assert native.memory_use() == before


def test_idle_memory_is_handed_back_in_the_end(small_arrays_are_pooled):
    native.release_memory()
    large, small = native.new(torch.empty(0), 64 << 20), torch.empty(0)
    del large
    for _ in range(1100):
        small = native.new(torch.empty(0), 10)
    assert native.memory_use().idle < 64 << 20
    del small


@pytest.mark.parametrize("cell", CELLS)
def test_without_keep_the_answer_is_the_same(cell):
    request = Request(cell, 6, 4, 20, ragged=True)
    arguments = (cell, request.input, request.initial, request.parameters, request.lengths)
    output, final, _ = passes.forward(*arguments)
    lean, lean_final, saved = passes.forward(*arguments, keep=False)
    assert not saved
    assert all(map(torch.equal, (output, *final), (lean, *lean_final)))


@pytest.mark.parametrize(("steps", "batch"), [(3, 0), (0, 3)])
def test_nothing_to_do(steps, batch):
    request = Request("gru", steps, batch, 4)
    (output, final), gradients = request.by_kernels()
    assert output.shape == (steps, batch, 4)
    torch.testing.assert_close(final, request.initial[0])
    assert all((g == 0).all() for g in gradients[2:])


def test_special_values_pass_through():
    x = torch.tensor([0.0, -0.0, 1e-30, 50, -50, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])[None, :, None]
    ones, zero, h = torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(10, 1)
    output, _, _ = passes.forward("rnn_tanh", x, [h], [ones, zero])
    torch.testing.assert_close(output, torch.tanh(x), rtol=3e-7, atol=0, equal_nan=True)
    output, _, _ = passes.forward("rnn_relu", x, [h], [ones, zero])
    torch.testing.assert_close(output, torch.relu(x), rtol=0, atol=0, equal_nan=True)


def test_tanh_is_accurate_everywhere():
    x = torch.cat([torch.linspace(-12, 12, 20_001), torch.logspace(-20, 0, 2_000)])
    output, _, _ = passes.forward(
        "rnn_tanh", x[None, :, None], [torch.zeros(len(x), 1)], [torch.ones(1, 1), torch.zeros(1, 1)]
    )
    exact = torch.tanh(x.double())
    units = (output[0, :, 0].double() - exact).abs() / (exact.abs() * torch.finfo(torch.float32).eps + 1e-300)
    assert units.max() < 2.0


BAD = {
    "weight_hh": (lambda r: r.parameters.__setitem__(1, r.parameters[1][:, :-1]), "weight_hh is"),
    "state": (lambda r: r.initial.__setitem__(0, r.initial[0][:1]), "h_0 is"),
    "states": (lambda r: r.initial.pop(), "state tensors"),
    "long": (lambda r: setattr(r, "lengths", torch.tensor([4, 5, 0])), "number of steps"),
    "negative": (lambda r: setattr(r, "lengths", torch.tensor([4, -1, 0])), "number of steps"),
    "lengths": (lambda r: setattr(r, "lengths", torch.tensor([4, 1])), "int64"),
    "reset": (lambda r: setattr(r, "reset", torch.zeros(4, 2, dtype=torch.bool)), "bool"),
}


@pytest.mark.parametrize("change", BAD)
def test_bad_input_is_refused_before_native_code_runs(change):
    request = Request("lstm", 4, 3, 5)
    spoil, message = BAD[change]
    spoil(request)
    with pytest.raises(ValueError, match=message):
        request.by_kernels()


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (
            torch.tensor([[0, 1], [2, 3]]),
            IndexError,
            "token id 3 at step 1 of row 1; expected 0 to 2, since there are 3 rows",
        ),
        (torch.tensor([[0, -1], [2, 0]]), IndexError, "token id -1 at step 0 of row 1"),
        (torch.zeros(2, 2, dtype=torch.int32), TypeError, "input is torch.int32; expected a floating dtype"),
        (torch.zeros(2, 2, 3, dtype=torch.int64), TypeError, "input is torch.int64; expected a floating dtype"),
    ],
)
def test_bad_token_ids_are_refused_before_native_code_runs(ids, error, message):
    request = Request("lstm", 2, 2, 5, tokens=True)
    request.ids = ids
    with pytest.raises(error, match=message):
        request.by_kernels()


def test_mixed_dtypes_are_refused():
    request = Request("lstm", 4, 3, 5)
    request.parameters[0] = request.parameters[0].float()
    with pytest.raises(
        ValueError, match=r"weight_ih is \(20, 3\) torch.float32 on cpu; expected \(20, 3\) torch.float64"
    ):
        passes.forward("lstm", request.input, request.initial, request.parameters)


def test_refusals(monkeypatch):
    def asked(cell: str, dtype: torch.dtype = torch.float32) -> Asked:
        tensors = [torch.zeros(1, dtype=dtype)] * 2
        return Asked.read(cell, tensors[0], tensors, tensors)

    assert backend.refusal(asked("lstm")) is None
    assert "float16" in str(backend.refusal(asked("lstm", torch.float16)))
    monkeypatch.setattr(native, "missing", "not built")
    assert backend.refusal(asked("lstm")) == "not built"
    with pytest.raises(InputError, match="unknown cell 'transformer'"):
        asked("transformer")
