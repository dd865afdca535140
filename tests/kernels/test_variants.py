"""The native kernels of cells with variants against the equations: outputs and every gradient, with fresh memory full of NaN."""

import copy
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
    assert_as_accurate_on_average,
    least_accurate,
    moved,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from variants import COMBINATIONS, mask_names, random_masks, random_parameters

from throughtime.backend import native as backend
from throughtime.cells import Masks, Parameters, find, sequence
from throughtime.kernels import layout, native
from throughtime.request import Request as Asked

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")

CELLS = [*COMBINATIONS, *(f"{cell}+{'+'.join(mask_names(cell))}" for cell in COMBINATIONS)]
CELLS = [cell for cell in CELLS if "+" in cell]
EVERYTHING = [cell for cell in CELLS if "layer_norm+zoneout" in cell and ("lstm" not in cell or "coupled+peep" in cell)]
EVERYTHING.append("lstm+peepholes+layer_norm+zoneout_h+zoneout_c+recurrent_dropout")
NORMALISED = [cell for cell in CELLS if "layer_norm" in cell and not cell.startswith("rnn_relu")]


@pytest.fixture(autouse=True)
def _fresh_memory_holds_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
        expected=False,
        ragged=False,
        resets=False,
        reverse=False,
    ):
        self.cell = find(cell)
        self.parameters = random_parameters(cell, inputs, hidden, bias, projection)
        self.masks = random_masks(cell, steps, batch, hidden, projection, expected)
        self.input = torch.randn(steps, batch, inputs, dtype=torch.float64)
        widths = [projection or hidden, hidden][: len(self.cell.spec.states)]
        self.initial = [torch.randn(batch, width, dtype=torch.float64) for width in widths]
        lengths = torch.randint(0, steps + 1, (batch,)) if ragged else None
        reset = torch.rand(steps, batch) < 0.3 if resets else None
        self.rest = lengths, reset, reverse
        self.grad_output = torch.randn(steps, batch, widths[0], dtype=torch.float64)
        self.grad_final = [torch.randn_like(s) for s in self.initial]

    def cast(self, dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
        return [t.to(dtype) if t.is_floating_point() else t for t in tensors]

    def forward(self, dtype=torch.float64, keep=True):
        return passes.forward(*self.given(dtype), keep, masks=self.cast(dtype, self.masks))

    def given(self, dtype: torch.dtype) -> tuple:
        tensors = self.input.to(dtype), self.cast(dtype, self.initial), self.cast(dtype, self.parameters)
        return (self.cell.spec.name, *tensors, *self.rest)

    def by_kernels(self, dtype=torch.float64) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs with final state, and gradients of input, initial state and parameters."""
        output, final, saved = self.forward(dtype)
        made = self.grad_output.to(dtype), self.cast(dtype, self.grad_final), output, saved
        gradient = passes.backward(self.given(dtype), *made, masks=self.cast(dtype, self.masks))
        return [output, *final], [gradient.input, *gradient.initial, *gradient.parameters]

    def by_equations(self, dtype=torch.float64) -> tuple[list[Tensor], list[Tensor]]:
        parameters = Parameters.from_list(self.cast(dtype, self.parameters), self.cell.spec.variant_parameters)
        masks = Masks.from_list(self.cast(dtype, self.masks), self.cell.spec.masks)
        state = tuple(self.cast(dtype, self.initial))
        result = sequence.forward(self.cell, self.input.to(dtype), state, parameters, *self.rest, masks=masks)
        grads = self.grad_output.to(dtype), tuple(self.cast(dtype, self.grad_final))
        gradient = sequence.backward(self.cell, *grads, result.saved, parameters, *self.rest, masks=masks)
        return (
            [result.outputs, *result.final_state],
            [gradient.inputs, *gradient.initial_state, *gradient.parameters.to_list()],
        )

    def by_honest_computations(self, dtype=torch.float32) -> tuple[list[Tensor], list[Tensor]]:
        """The equations in a dtype: of each result the least accurate that one can honestly come to."""
        computed = [self.by_equations(), self.by_equations(dtype)]
        with InOrder():
            computed.append(self.by_equations(dtype))
        if not self.cell.spec.name.startswith("rnn_relu"):  # where a number moved over the kink makes another gradient
            other = copy.copy(self)
            for name in ("parameters", "initial", "grad_final"):
                setattr(other, name, moved(getattr(self, name), dtype))
            other.input, other.grad_output = moved([self.input, self.grad_output], dtype)
            computed.append(other.by_equations(dtype))
        outputs, gradients = (least_accurate(*results) for results in zip(*computed, strict=True))
        return outputs, gradients

    def names(self) -> list[str]:
        state = ["h_0", "c_0"][: len(self.initial)]
        return ["input", *state, *Parameters.from_list(self.parameters, self.cell.spec.variant_parameters).there()]


def assert_exact(request: Request) -> None:
    results = zip(request.by_kernels(), request.by_equations(), (["output", "h", "c"], request.names()), strict=True)
    for actual, expected, names in results:
        for a, e, name in zip(actual, expected, names, strict=False):
            tolerance = 1e-11 * max(1.0, e.abs().max().item() if e.numel() else 0)
            torch.testing.assert_close(a, e, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def assert_accurate(*options, dtype=torch.float32, **more) -> None:
    """Ask it of the average over several draws: a normalisation divides by a spread that is now and then near zero."""
    outputs, gradients = [], []
    for _ in range(5):
        request = Request(*options, **more)
        results = request.by_kernels(dtype), request.by_honest_computations(dtype), request.by_equations()
        outputs.append([result[0] for result in results])
        gradients.append([result[1] for result in results])
    assert_as_accurate_on_average(outputs, OUTPUT_FACTOR, ["output", "h_n", "c_n"][: 1 + len(request.initial)])
    assert_as_accurate_on_average(gradients, GRADIENT_FACTOR, request.names())


@given(
    cell=st.sampled_from(CELLS),
    expected=st.booleans(),
    steps=st.integers(1, 8),
    batch=st.integers(1, 9),
    hidden=st.sampled_from([1, 7, 16, 33, 63, 130]),
    project=st.booleans(),
    bias=st.booleans(),
    ragged=st.booleans(),
    resets=st.booleans(),
    reverse=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=200)
def test_float64_is_exact(
    *, cell, expected, steps, batch, hidden, project, bias, ragged, resets, reverse, threads, seed
):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    options = {"bias": bias, "expected": expected, "ragged": ragged, "resets": resets, "reverse": reverse}
    if project and cell.startswith("lstm") and hidden > 1:
        options["projection"] = (hidden + 1) // 2
    try:
        assert_exact(Request(cell, steps, batch, hidden, **options))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_is_exact(cell):
    for hidden, ragged in product((1, 5, 37), (False, True)):
        projection = 3 if cell.startswith("lstm") and ragged and hidden > 3 else 0
        assert_exact(Request(cell, 5, 6, hidden, ragged=ragged, resets=ragged, projection=projection))


@pytest.mark.parametrize("cell", EVERYTHING)
def test_float32_errs_no_more_with_a_single_row(cell):
    for reverse in (False, True):
        assert_accurate(cell, 6, 1, 63, inputs=5, reverse=reverse)


@pytest.mark.parametrize("cell", EVERYTHING)
@pytest.mark.parametrize(("batch", "steps", "hidden"), [(1, 1, 1), (3, 5, 7), (2, 6, 63), (3, 4, 500), (70, 3, 33)])
def test_float32_errs_no_more_than_an_honest_computation(cell, batch, steps, hidden):
    for reverse in (False, True):
        assert_accurate(cell, steps, batch, hidden, inputs=5, reverse=reverse)
        assert_accurate(cell, steps, batch, hidden, inputs=5, ragged=True, resets=True, reverse=reverse)


# Without relu: where rounding carries a unit over the kink, a whole gradient comes or goes.
@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.startswith("rnn_relu")])
@pytest.mark.parametrize(("batch", "steps", "hidden"), [(1, 6, 63), (3, 5, 7), (3, 4, 130), (20, 3, 33)])
def test_bfloat16_errs_no_more_than_an_honest_computation(cell, batch, steps, hidden):
    projection = (hidden + 1) // 2 if cell.startswith("lstm") and batch == 20 else 0
    reverse = hidden == 63
    options = {"inputs": 5, "projection": projection, "reverse": reverse, "dtype": torch.bfloat16}
    assert_accurate(cell, steps, batch, hidden, **options)
    assert_accurate(cell, steps, batch, hidden, ragged=True, resets=True, expected=True, **options)


# Of so few units the spread is often small, and what is left of a row's mean grows by up to 1 / √ε, some 316 times.
@pytest.mark.parametrize("cell", NORMALISED)
@pytest.mark.parametrize("hidden", [1, 2, 3, 7])
def test_bfloat16_of_few_normalised_units(cell, hidden):
    for ragged in (False, True):
        assert_accurate(cell, 4, 3, hidden, ragged=ragged, resets=ragged, reverse=ragged, dtype=torch.bfloat16)


@pytest.mark.parametrize("cell", [c for c in NORMALISED if c.startswith("lstm") and "peepholes" not in c])
@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_goes_back_over_a_single_normalised_unit(cell, threads, instruction_set):
    """Whatever c is, less its mean it is zero: so c_0 gets no gradient, exactly, however what a step keeps is rounded."""
    torch.set_num_threads(threads)
    try:
        for dtype, batch in product((torch.float32, torch.float64, torch.bfloat16), (1, 9)):
            request = Request(cell, 6, batch, 1, ragged=True, resets=True)
            request.grad_final[1].zero_()
            gradients = dict(zip(request.names(), request.by_kernels(dtype)[1], strict=True))
            assert not gradients["c_0"].any()
            assert gradients["h_0"].any() or batch == 1
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("cell", [cell for cell in EVERYTHING if not cell.startswith("rnn_relu")])
def test_bfloat16_with_every_instruction_set(cell, instruction_set):
    for hidden, ragged in product((2, 37), (False, True)):
        assert_accurate(cell, 5, 7, hidden, ragged=ragged, resets=True, dtype=torch.bfloat16)


@pytest.mark.parametrize("cell", EVERYTHING)
def test_bfloat16_takes_float32_parameters(cell):
    """They are rounded for the products only; their gradients aren't rounded at all."""
    request = Request(cell, 5, 3, 20, inputs=7, ragged=True)
    bf16 = torch.bfloat16
    request.parameters = request.cast(bf16, request.parameters)
    low, low_gradients = request.by_kernels(bf16)
    name, x, initial, parameters, *rest = request.given(bf16)
    given = (name, x, initial, [p.float() for p in parameters], *rest)
    masks = request.cast(bf16, request.masks)
    output, final, saved = passes.forward(*given, masks=masks)
    made = request.grad_output.to(bf16), request.cast(bf16, request.grad_final), output, saved
    gradient = passes.backward(given, *made, masks=masks)
    assert all(map(torch.equal, low, [output, *final]))
    assert {t.dtype for t in gradient.parameters} == {torch.float32}
    high = [gradient.input, *gradient.initial, *gradient.parameters]
    assert all(map(torch.equal, low_gradients, request.cast(bf16, high)))


@pytest.mark.parametrize("cell", EVERYTHING)
def test_every_instruction_set(cell, instruction_set):
    for hidden, ragged in product((3, 37, 70), (False, True)):
        assert_exact(Request(cell, 5, 7, hidden, ragged=ragged, resets=True))
    assert_accurate(cell, 5, 7, 37, ragged=True, resets=True)


@pytest.mark.parametrize("cell", EVERYTHING)
def test_long_sequences_cross_the_stretches(monkeypatch, cell):
    monkeypatch.setattr(layout, "_STRETCH", 1000)
    for ragged, reverse in product((False, True), (False, True)):
        request = Request(cell, 40, 3, 5, ragged=ragged, resets=ragged, reverse=reverse)
        assert_exact(request)
        output, final, saved = request.forward(keep=False)
        assert not saved
        kept, kept_final, _ = request.forward()
        assert all(map(torch.equal, (output, *final), (kept, *kept_final)))


@pytest.mark.parametrize("cell", EVERYTHING)
def test_padding_is_neither_read_nor_left_unwritten(cell):
    request = Request(cell, 6, 5, 9, resets=True)
    lengths = torch.tensor([3, 0, 6, 1, 6])
    request.rest = lengths, request.rest[1], False
    past = torch.arange(6)[:, None] >= lengths
    expected = request.by_equations()
    request.input[past] = torch.nan
    request.grad_output[past] = torch.nan
    outputs, gradients = request.by_kernels()
    assert (outputs[0][past] == 0).all()
    assert (gradients[0][past] == 0).all()
    for a, e in zip([*outputs, *gradients], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cell", EVERYTHING)
def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads(cell):
    """Bit for bit, whatever the batch, its order and the number of threads."""
    request = Request(cell, 5, 23, 40, inputs=8)
    _, together, _ = request.forward(torch.float32)
    x, initial, masks = request.input, request.initial, request.masks
    try:
        for rows, threads in product(([4], [7, 4], [20, 4, 1, 0, 2, 3, 5]), (1, 2)):
            torch.set_num_threads(threads)
            lengths = torch.full((len(rows),), 5)
            lengths[rows.index(4) - 1] = 5 if len(rows) == 1 else 3
            request.rest = lengths, None, False
            request.input, request.initial = x[:, rows], [s[rows] for s in initial]
            request.masks = [m[:, rows] if m.dim() == 3 else m[rows] for m in masks]
            _, final, _ = request.forward(torch.float32)
            for a, e in zip(final, together, strict=True):
                assert torch.equal(a[rows.index(4)], e[4])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("cell", EVERYTHING)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_call_gives_the_same_bits(cell, threads):
    torch.set_num_threads(threads)
    try:
        for batch in (1, 20):
            request = Request(cell, 7, batch, 40, inputs=8)
            first, again = request.by_kernels(torch.float32), request.by_kernels(torch.float32)
            assert all(map(torch.equal, [*first[0], *first[1]], [*again[0], *again[1]]))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("mutated", ["gain_hh", "gain_c", "shift_c", "weight_ch", "zoneout_c", "recurrent_dropout"])
def test_a_mutant_is_caught(mutated):
    """A parameter or mask whose units are permuted makes another answer, and the comparison must see it."""
    request = Request("lstm+peepholes+layer_norm+zoneout_h+zoneout_c+recurrent_dropout", 4, 3, 7)
    exact, honest = request.by_equations(), request.by_honest_computations()
    if mutated in request.cell.spec.masks:
        index = request.cell.spec.masks.index(mutated)
        request.masks[index] = request.masks[index].roll(1, -1)
    else:
        index = (
            len(request.parameters)
            - len(request.cell.spec.variant_parameters)
            + request.cell.spec.variant_parameters.index(mutated)
        )
        request.parameters[index] = request.parameters[index].roll(1, 0)
    with pytest.raises(AssertionError, match="errs by"):
        assert_as_accurate(request.by_kernels(torch.float32)[0], honest[0], exact[0], OUTPUT_FACTOR)


BAD = {
    "mask of another shape": (lambda r: r.masks.__setitem__(0, r.masks[0][:, :-1]), "zoneout_h is"),
    "mask of another dtype": (lambda r: r.masks.__setitem__(1, r.masks[1].double()), "zoneout_c is"),
    "dropout of another shape": (lambda r: r.masks.__setitem__(2, r.masks[2][:1]), "recurrent_dropout is"),
    "masks missing": (lambda r: r.masks.pop(), "there are 2 masks; expected zoneout_h, zoneout_c, recurrent_dropout"),
    "gain of another size": (lambda r: r.parameters.__setitem__(-3, r.parameters[-3][1:]), r"gain_hh is \(27,\)"),
}


@pytest.mark.parametrize("change", BAD)
def test_bad_input_is_refused_before_native_code_runs(change):
    request = Request("lstm+layer_norm+zoneout_h+zoneout_c+recurrent_dropout", 4, 3, 7)
    spoil, message = BAD[change]
    spoil(request)
    with pytest.raises(ValueError, match=message):
        request.by_kernels()


@pytest.mark.parametrize(("steps", "batch"), [(3, 0), (0, 3)])
def test_nothing_to_do(steps, batch):
    request = Request("lstm+layer_norm+zoneout_h", steps, batch, 4)
    (output, *final), gradients = request.by_kernels()
    assert output.shape == (steps, batch, 4)
    torch.testing.assert_close(final, request.initial)
    assert all((g == 0).all() for g in gradients[3:])


def test_refusals():
    tensors = [torch.zeros(1)] * 2
    assert backend.refusal(Asked.read("gru+layer_norm", tensors[0], tensors[:1], [*tensors, *tensors])) is None
    tensors = [torch.zeros(1).half()] * 2
    reason = backend.refusal(Asked.read("gru+layer_norm", tensors[0], tensors[:1], [*tensors, *tensors]))
    assert "they compute float32, float64 and bfloat16 on the CPU, not torch.float16" in str(reason)
