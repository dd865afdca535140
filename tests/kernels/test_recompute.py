"""`recompute_every`: the same bits as when everything is kept, from a fraction of what is kept."""

from itertools import product

import passes
import pytest
import torch
from comparison import HAS_NATIVE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from variants import COMBINATIONS, mask_names, random_masks, random_parameters

from throughtime.cells import CELLS, find
from throughtime.kernels import layout

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")

VARIANTS = [f"{cell}+{'+'.join(mask_names(cell))}" for cell in COMBINATIONS]


@pytest.fixture(autouse=True)
def _short_stretches_and_fresh_memory_of_nan():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_STRETCH", 3000)
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


class Request:
    """One layer's arguments, and gradients to send back."""

    def __init__(self, cell, steps, batch, hidden, dtype, *, ids=False, projection=0, form="padded", resets=False):
        width, states = projection or hidden, len(find(cell).spec.states)
        cast = lambda tensors: [t.to(dtype) if t.is_floating_point() else t for t in tensors]  # noqa: E731
        self.cell = cell
        self.parameters = cast(random_parameters(cell, 5, hidden, projection=projection))
        self.masks = cast(random_masks(cell, steps, batch, hidden, projection))
        self.initial = cast([torch.randn(batch, width), torch.randn(batch, hidden)][:states])
        self.grad_final = [torch.randn_like(s) for s in self.initial]
        lengths = torch.randint(0, steps + 1, (batch,)) if form == "lengths" else None
        self.rest = (lengths, torch.rand(steps, batch) < 0.2 if resets and form != "packed" else None)
        shape: tuple[int, ...] = (steps, batch)
        self.more: dict[str, Tensor] = {}
        if form == "packed":
            self.more["batch_sizes"] = torch.randint(1, batch + 1, (steps,)).sort(descending=True)[0]
            self.more["batch_sizes"][0] = batch
            shape = (int(self.more["batch_sizes"].sum()),)
        self.input = torch.randint(5, shape) if ids else torch.randn(*shape, 5).to(dtype)
        self.grad_output = torch.randn(*shape, width).to(dtype)

    def run(self, reverse: bool, every: int) -> tuple[list[Tensor], list[Tensor]]:
        """Results and gradients; what was kept."""
        given = (self.cell, self.input, self.initial, self.parameters, *self.rest, reverse)
        more = {"masks": self.masks, **self.more, "recompute_every": every}
        output, final, saved = passes.forward(*given, **more)
        before = output.clone()
        gradient = passes.backward(given, self.grad_output, self.grad_final, output, saved, **more)
        assert torch.equal(output, before)
        inputs = [] if gradient.input is None else [gradient.input]
        return [output, *final, *inputs, *gradient.initial, *gradient.parameters], saved


def assert_same(request: Request, reverse: bool, every: int) -> None:
    again, states = request.run(reverse, every)
    expected, kept = request.run(reverse, 0)
    for index, (a, e) in enumerate(zip(again, expected, strict=True)):
        assert torch.equal(a, e), index
    if kept:
        assert [s.shape[1:] for s in states] == [s.shape for s in request.initial]


@given(
    cell=st.sampled_from(list(CELLS)),
    steps=st.sampled_from([1, 2, 13, 37]),
    batch=st.sampled_from([1, 3, 6]),
    hidden=st.sampled_from([1, 7, 33]),
    every=st.sampled_from([1, 4, 7, 13, 50]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    form=st.sampled_from(["padded", "lengths", "packed"]),
    ids=st.booleans(),
    project=st.booleans(),
    resets=st.booleans(),
    reverse=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
@settings(max_examples=300)
def test_gradients_are_the_same_bits(
    *, cell, steps, batch, hidden, every, dtype, form, ids, project, resets, reverse, threads
):
    torch.set_num_threads(threads)
    try:
        projection = (hidden + 1) // 2 if project and cell == "lstm" and hidden > 1 else 0
        request = Request(cell, steps, batch, hidden, dtype, ids=ids, projection=projection, form=form, resets=resets)
        assert_same(request, reverse, every)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("cell", VARIANTS)
@pytest.mark.parametrize("form", ["padded", "lengths", "packed"])
def test_gradients_of_variants_are_the_same_bits(cell, form):
    for reverse, every in product((False, True), (1, 7)):
        assert_same(Request(cell, 23, 5, 9, torch.float32, form=form, resets=True), reverse, every)


@pytest.mark.parametrize("cell", ["lstm", "gru", "lstm+layer_norm"])
def test_what_is_kept_is_the_state_in_every_so_many_steps(cell):
    """Stretches of this request are 3 steps or fewer, so a segment of 8 has 9 at most."""
    request = Request(cell, 80, 7, 9, torch.float32)
    _, states = request.run(False, 8)
    assert {s.shape[1:] for s in states} == {(7, 9)}
    assert 9 <= len(states[0]) <= 10
    _, kept = request.run(False, 0)
    assert sum(t.numel() for t in states) < sum(t.numel() for t in kept) / 16


@pytest.mark.parametrize("cell", ["lstm", "lstm+layer_norm"])
def test_states_of_another_segmentation_are_refused(cell):
    request = Request(cell, 40, 3, 9, torch.float32)
    given = (cell, request.input, request.initial, request.parameters)
    output, _, saved = passes.forward(*given, recompute_every=8)
    with pytest.raises(ValueError, match=r"saved\[0\] is"):
        passes.backward(given, request.grad_output, request.grad_final, output, saved, recompute_every=40)


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "mgu", "lstm+layer_norm"])
@pytest.mark.parametrize("lengths", [[3, 1, 2], [0, 0, 0]])
def test_segments_that_no_row_reaches(monkeypatch, cell, lengths):
    """Their arrays have no elements, which isn't what it means that there are none."""
    monkeypatch.setattr(layout, "_STRETCH", 600)  # of a step or two each
    x, hidden = torch.randn(11, 3, 4), 6
    parameters = [p.float() for p in random_parameters(cell, 4, hidden)]
    initial = [torch.randn(3, hidden) for _ in find(cell).spec.states]
    results = []
    for recompute_every in (0, 1):
        given = (cell, x, initial, parameters, torch.tensor(lengths), None, False)
        output, final, saved = passes.forward(*given, recompute_every=recompute_every)
        grads = torch.ones_like(output), [torch.ones_like(s) for s in final]
        gradient = passes.backward(given, *grads, output, saved, recompute_every=recompute_every)
        results.append([output, *final, gradient.input, *gradient.initial, *gradient.parameters])
    assert all(map(torch.equal, *results))
    assert (results[0][0][3:] == 0).all()
