"""The operator as ONNX has it: an LSTM, GRU or RNN node for each layer, in both of torch's exporters.

`torch.onnx.export(dynamo=True)` decomposes operators by torch's table, in which ours stands; `dynamo=False` traces, and what a call
of the operator is there is decided in `operator.run`. Either way one text, in torch's own operators, arranges the weights, and
the node stands between them.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch.jit._trace import TracerWarning

from throughtime import schema, watching
from throughtime.onnx import layout
from throughtime.request import Request


def check(request: Request) -> None:
    """Refuse what no node of ONNX's computes.

    Raises:
        InputError: There is such a thing, which is named.
    """
    further = {
        "resets within a sequence (reset=)": request.reset is not None,
        "packed input; give lengths= with padded input": request.batch_sizes is not None,
    }
    layout.check(request.spec, request.directions[0].parameters.weight_hr is not None, **further)


def translate(request: Request) -> tuple[Tensor, list[Tensor]]:
    """Return output and final state, computed by a node of ONNX's: in float64 or, whatever else the dtype is, in float32.

    Raises:
        InputError: There is no such node.
    """
    check(request)
    dtype = torch.float64 if request.dtype == torch.float64 else torch.float32
    node, directions = layout.node_of(request.spec), request.directions
    steps, batch, ways = request.steps, request.batch, len(directions)
    hidden = int(directions[0].initial[-1].shape[1])  # a trace has sizes as tensors
    initial = [torch.stack(part).to(dtype) for part in zip(*(d.initial for d in directions), strict=True)]
    lengths = None if request.lengths is None else request.lengths.to(torch.int32)
    w, r, b, p = [
        None if array is None else array.to(dtype) for array in layout.arrays([d.parameters for d in directions], node)
    ]
    inputs = [_read(request, dtype), w, r, b, lengths, *initial, *([] if p is None else [p])]
    attributes = layout.attributes(node, hidden, ["reverse" if d.reverse else "forward" for d in directions])
    shapes = [(steps, ways, batch, hidden), *[(ways, batch, hidden)] * len(initial)]
    called = _Called(node.op, attributes, tuple(t is not None for t in inputs), tuple(shapes), dtype, request)
    y, *final = called.node([t for t in inputs if t is not None])
    output = y.squeeze(1) if ways == 1 else y.transpose(1, 2).flatten(2)
    if lengths is not None:  # of a row that has no steps ONNX doesn't say what its final state is
        is_empty = (lengths == 0)[:, None]
        final = [torch.where(is_empty, before, after) for before, after in zip(initial, final, strict=True)]
    states = [part[way].to(request.dtype) for way in range(ways) for part in final]
    return output.to(request.dtype), states


def translate_traced(request: Request) -> tuple[Tensor, list[Tensor]]:
    """Do the same in a trace, which has sizes as tensors; that those of weights are read as numbers is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)
        return translate(request)


def _read(request: Request, dtype: torch.dtype) -> Tensor:
    """Return X; of token ids the one-hot vectors."""
    if not request.reads_ids:
        return request.input.to(dtype)
    vocabulary = request.directions[0].parameters.weight_ih.shape[1]
    return (request.input[:, :, None] == torch.arange(vocabulary, device=request.input.device)).to(dtype)


class _Called(NamedTuple):
    """A call of a node.

    Attributes:
        op: The node's name.
        attributes: Its attributes.
        are_given: Of each of its inputs whether it is there.
        shapes: Those of its outputs.
        dtype: That of its outputs.
        request: What it computes.
    """

    op: str
    attributes: dict[str, Any]
    are_given: tuple[bool, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    request: Request

    def node(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        """Put the node into the graph that is made, and return its outputs."""
        if watching.is_jit_traced():
            return _Traced.apply(self, *inputs, *(t for t in self.request.tensors() if t is not None))
        dtypes = [self.dtype] * len(self.shapes)
        given = self.in_places(inputs, None)
        return torch.onnx.ops.symbolic_multi_out(self.op, given, self.attributes, dtypes=dtypes, shapes=self.shapes)

    def in_places(self, inputs: Sequence[Any], absent: Any) -> list[Any]:
        """Return the inputs with something in the places of those that are absent."""
        rest = iter(inputs)
        return [next(rest) if is_given else absent for is_given in self.are_given]

    def compute(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs, as the node would compute them, of the request's tensors that are there."""
        rest = iter(tensors)
        own = [None if t is None else next(rest) for t in self.request.tensors()]
        request = self.request.form().request(own)
        results = [
            torch.ops.throughtime.recurrence.default(
                *schema.flat(request._replace(directions=(d,)), False, "reference")
            )
            for d in request.directions
        ]
        parts = zip(*(final for _, final, _ in results), strict=True)
        outputs = [torch.stack([output for output, _, _ in results], 1), *(torch.stack(part) for part in parts)]
        return [tensor.to(self.dtype) for tensor in outputs]


class _Traced(torch.autograd.Function):
    """A node in a graph that `torch.onnx.export(dynamo=False)` traces."""

    @staticmethod
    def forward(ctx: Any, called: _Called, *inputs: Tensor) -> Any:
        return tuple(called.compute(inputs[sum(called.are_given) :]))

    @staticmethod
    def symbolic(g: Any, called: _Called, *inputs: Any) -> Any:
        absent = g.op("prim::Constant")
        absent.setType(torch._C.OptionalType.ofTensor())
        kinds = {int: "i", str: "s", list: "s"}
        attributes = {f"{name}_{kinds[type(value)]}": value for name, value in called.attributes.items()}
        made = g.op(called.op, *called.in_places(inputs, absent), outputs=len(called.shapes), **attributes)
        return tuple(made)


@register_decomposition(torch.ops.throughtime.recurrence.default)
def _decomposed(*arguments: Any, **named: Any) -> Any:
    """Stand for the operator where an exporter to ONNX asks torch's table; to anybody else it is not there."""
    if not watching.is_exported_to_onnx():
        return NotImplemented
    request, keep, backend = schema.read(*arguments, **named)
    output, final = translate(request)
    return output, final, schema.BACKENDS[backend].fake_saved(request) if keep else []


# Tensors without values would ask the same table, unless there is a rule for them in this one.
register_decomposition(torch.ops.throughtime.recurrence.default, type="meta")(schema.fake)
