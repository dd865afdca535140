"""Packed rows in, packed rows out: bit for bit what the same rows give padded, with `lengths`."""

import passes
import pytest
import torch
from comparison import HAS_NATIVE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from variants import COMBINATIONS, mask_names, random_masks, random_parameters

from throughtime.cells import CELLS, find
from throughtime.kernels import layout

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")

VARIANTS = [f"{cell}+{'+'.join(mask_names(cell))}" for cell in COMBINATIONS]
BATCH, STEPS, INPUTS = 6, 9, 5
LENGTHS = [[3, 9, 1, 9, 4, 6], [9] * 6, [9, 8, 7, 6, 5, 4], [1] * 6]


class Request:
    """A layer's arguments, padded, and the same packed."""

    def __init__(self, cell: str, hidden: int, lengths: list[int], dtype: torch.dtype, ids: bool, projection: int = 0):
        self.cell, self.lengths = cell, torch.tensor(lengths)
        steps, width, states = max(lengths), projection or hidden, len(find(cell).spec.states)
        cast = lambda tensors: [t.to(dtype) if t.is_floating_point() else t for t in tensors]  # noqa: E731
        self.input = torch.randint(INPUTS, (steps, BATCH)) if ids else torch.randn(steps, BATCH, INPUTS).to(dtype)
        self.parameters = cast(random_parameters(cell, INPUTS, hidden, projection=projection))
        self.masks = cast(random_masks(cell, steps, BATCH, hidden, projection))
        self.initial = cast([torch.randn(BATCH, width), torch.randn(BATCH, hidden)][:states])
        self.grad_output = torch.randn(steps, BATCH, width).to(dtype)
        self.grad_final = [torch.randn_like(s) for s in self.initial]
        packed = pack_padded_sequence(self.input, self.lengths, enforce_sorted=False)
        self.batch_sizes, self.order = packed.batch_sizes, packed.sorted_indices

    def pack(self, padded: Tensor) -> Tensor:
        return pack_padded_sequence(padded, self.lengths, enforce_sorted=False).data

    def sort(self, rows: list[Tensor]) -> list[Tensor]:
        return [t[:, self.order] if t.dim() == 3 else t[self.order] for t in rows]

    def run(self, packed: bool, reverse: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Results by row and step, by row, and of the parameters; the first two as they are packed."""
        pack, sort = (self.pack, self.sort) if packed else ((lambda t: t), list)
        given = (self.cell, pack(self.input), sort(self.initial), self.parameters)
        given = (*given, None if packed else self.lengths, None, reverse)
        more = {"masks": sort(self.masks), "batch_sizes": self.batch_sizes if packed else None}
        output, final, saved = passes.forward(*given, **more)
        gradient = passes.backward(given, pack(self.grad_output), sort(self.grad_final), output, saved, **more)
        by_step, by_row = [output], [*final, *gradient.initial]
        by_step += [] if gradient.input is None else [gradient.input]
        if not packed:
            by_step, by_row = [self.pack(t) for t in by_step], self.sort(by_row)
        return by_step, by_row, gradient.parameters


def assert_same(request: Request, reverse: bool) -> None:
    for packed, padded in zip(request.run(True, reverse), request.run(False, reverse), strict=True):
        for index, (a, e) in enumerate(zip(packed, padded, strict=True)):
            assert torch.equal(a, e), index


@given(
    cell=st.sampled_from(list(CELLS)),
    hidden=st.sampled_from([1, 7, 33]),
    lengths=st.sampled_from(LENGTHS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    ids=st.booleans(),
    project=st.booleans(),
    reverse=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
@settings(max_examples=200)
def test_packed_equals_padded(cell, hidden, lengths, dtype, ids, project, reverse, threads):
    torch.set_num_threads(threads)
    try:
        projection = (hidden + 1) // 2 if project and cell == "lstm" and hidden > 1 else 0
        assert_same(Request(cell, hidden, lengths, dtype, ids, projection), reverse)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("cell", VARIANTS)
def test_packed_equals_padded_with_variants(cell):
    for lengths, reverse in zip(LENGTHS, (False, True, True, False), strict=True):
        assert_same(Request(cell, 7, lengths, torch.float32, ids=reverse), reverse)


@pytest.mark.parametrize("cell", ["lstm", "lstm+layer_norm"])
def test_stretches_are_cut_alike(monkeypatch, cell):
    monkeypatch.setattr(layout, "_STRETCH", 1000)
    for reverse in (False, True):
        assert_same(Request(cell, 7, LENGTHS[0], torch.float32, ids=False), reverse)


BAD = {
    "increasing": (torch.tensor([2, 3, 1]), r"batch_sizes are \[2, 3, 1\]; expected a number for each step"),
    "another sum": (torch.tensor([3, 2, 2]), "in sum 6, the rows of input"),
    "zero": (torch.tensor([4, 2, 0]), "at least 1"),
    "none": (torch.tensor([], dtype=torch.int64), "a number for each step"),
    "int32": (torch.tensor([3, 2, 1]).int(), "batch_sizes is .* torch.int32"),
    "two-dimensional": (torch.tensor([[3, 2, 1]]), "batch_sizes is"),
    "other batch": (torch.tensor([2, 2, 2]), "h_0 is"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_batch_sizes_are_refused(case):
    sizes, message = BAD[case]
    parameters = random_parameters("gru", 4, 5)
    given = ("gru", torch.randn(6, 4).double(), [torch.zeros(3, 5).double()], parameters)
    passes.forward(*given, batch_sizes=torch.tensor([3, 2, 1]))
    with pytest.raises(ValueError, match=message):
        passes.forward(*given, batch_sizes=sizes)


def test_packed_input_takes_neither_lengths_nor_resets():
    given = ("gru", torch.randn(6, 4).double(), [torch.zeros(3, 5).double()], random_parameters("gru", 4, 5))
    for rest in ((torch.tensor([3, 2, 1]), None), (None, torch.zeros(3, 3, dtype=torch.bool))):
        with pytest.raises(ValueError, match="packed input takes neither"):
            passes.forward(*given, *rest, batch_sizes=torch.tensor([3, 2, 1]))


def test_an_id_out_of_range_is_named_by_its_place():
    given = ("gru", torch.tensor([0, 1, 2, 3, 4, 0]), [torch.zeros(3, 5).double()], random_parameters("gru", 4, 5))
    with pytest.raises(IndexError, match="token id 4 in row 4 of the packed input"):
        passes.forward(*given, batch_sizes=torch.tensor([3, 2, 1]))
