"""The variants' equations against autograd, numeric gradients and a second formulation in plain torch, all in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from variants import COMBINATIONS, mask_names, random_masks, random_parameters, run

from throughtime import InputError
from throughtime.cells import CELLS, Masks, Parameters, find, sequence

TOLERANCE = {"rtol": 1e-10, "atol": 1e-11}


class Request:
    """One layer's arguments, all of which want a gradient."""

    def __init__(self, name, steps, batch, hidden, *, bias=True, projection=0, expected=False):
        self.cell = find(name)
        self.parameters = random_parameters(name, 3, hidden, bias, projection)
        widths = [projection or hidden, hidden][: len(self.cell.spec.states)]
        self.state = [torch.randn(batch, width, dtype=torch.float64) for width in widths]
        self.x = torch.randn(steps, batch, 3, dtype=torch.float64)
        self.masks = random_masks(name, steps, batch, hidden, projection, expected)
        self.leaves = [t.requires_grad_() for t in (self.x, *self.state, *self.parameters)]

    def equations(self, lengths=None, reset=None, reverse=False, *, leaves=None):
        x, *rest = self.leaves if leaves is None else leaves
        state, parameters = tuple(rest[: len(self.state)]), rest[len(self.state) :]
        masks = Masks.from_list(self.masks, self.cell.spec.masks)
        parameters = Parameters.from_list(list(parameters), self.cell.spec.variant_parameters)
        return sequence.forward(self.cell, x, state, parameters, lengths, reset, reverse, masks=masks)


def with_masks(name: str, masks: list[str]) -> str:
    return "+".join([name, *(m for m in masks if m in mask_names(name))])


ALL_MASKS = ["zoneout_h", "zoneout_c", "recurrent_dropout"]
masks_and_cells = {
    "name": st.sampled_from(COMBINATIONS),
    "masks": st.lists(st.sampled_from(ALL_MASKS), unique=True),
    "expected": st.booleans(),
    "steps": st.integers(1, 5),
    "batch": st.integers(1, 4),
    "hidden": st.sampled_from([1, 2, 7]),
    "project": st.booleans(),
    "bias": st.booleans(),
    "seed": st.integers(0, 99),
}


def make(*, name, masks, expected, steps, batch, hidden, project, bias, seed) -> Request:
    torch.manual_seed(seed)
    projection = hidden - 1 if project and name.startswith("lstm") else 0
    name = with_masks(name, masks)
    return Request(name, steps, batch, hidden, bias=bias, projection=projection, expected=expected)


@given(**masks_and_cells)
def test_the_equations_are_those_written_a_second_time(**options):
    request = make(**options)
    result = request.equations()
    again = run(request.cell.spec.name, request.x, request.state, request.parameters, request.masks)
    for a, e in zip((result.outputs, *result.final_state), again, strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE)


@given(**masks_and_cells, ragged=st.booleans(), resets=st.booleans(), reverse=st.booleans())
def test_backpropagation_through_time_is_autograd(ragged, resets, reverse, **options):
    request = make(**options)
    steps, batch = options["steps"], options["batch"]
    lengths = torch.randint(0, steps + 1, (batch,)) if ragged else None
    reset = torch.rand(steps, batch) < 0.4 if resets else None
    result = request.equations(lengths, reset, reverse)
    grad_outputs = torch.randn_like(result.outputs)
    grad_final = tuple(torch.randn_like(s) for s in result.final_state)
    expected = torch.autograd.grad(
        (result.outputs, *result.final_state), request.leaves, (grad_outputs, *grad_final), allow_unused=True
    )
    gradient = sequence.backward(
        *(request.cell, grad_outputs, grad_final, result.saved),
        *(Parameters.from_list(request.parameters, request.cell.spec.variant_parameters), lengths, reset, reverse),
        masks=Masks.from_list(request.masks, request.cell.spec.masks),
    )
    for a, e in zip((gradient.inputs, *gradient.initial_state, *gradient.parameters.to_list()), expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if e is None else e, **TOLERANCE)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_numeric_gradients_agree(name):
    request = Request(with_masks(name, ALL_MASKS), 3, 2, 3)
    lengths, reset = torch.tensor([3, 2]), torch.tensor([[0, 0], [0, 1], [1, 0]], dtype=torch.bool)

    def numbers(*leaves):
        result = request.equations(lengths, reset, leaves=leaves)
        return result.outputs, *result.final_state

    assert torch.autograd.gradcheck(numbers, request.leaves)


@pytest.mark.parametrize("name", CELLS)
def test_zoneout_keeps_the_old_state_or_takes_the_new(name):
    for keeps in (True, False):
        request = Request(name, 4, 3, 5)
        plain = request.equations()
        request.cell = find(with_masks(name, ["zoneout_h", "zoneout_c"]))
        request.masks = [torch.full((4, 3, 5), keeps)] * len(request.cell.spec.states)
        result = request.equations()
        assert torch.equal(result.outputs, request.state[0].expand(4, 3, 5) if keeps else plain.outputs)


def test_unknown_variants_are_refused():
    with pytest.raises(InputError, match=r"gru has no variant 'peepholes'; it has layer_norm, zoneout_h"):
        find("gru+peepholes")
    with pytest.raises(ValueError, match=r"3 parameter tensors; expected .*, weight_ch, gain_ih"):
        Parameters.from_list([torch.zeros(1)] * 3, ("weight_ch", "gain_ih"))
    with pytest.raises(ValueError, match="0 masks; expected zoneout_h"):
        Masks.from_list([], ("zoneout_h",))
