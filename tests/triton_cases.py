"""What the Triton kernels are tested with, in their interpreter and on a GPU."""

import torch
from torch import Tensor

from throughtime import spec
from throughtime.backend import reference
from throughtime.request import Request

CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"]
VARIANTS = [
    "lstm+layer_norm",
    "lstm+peepholes",
    "lstm+coupled",
    "lstm+coupled+layer_norm+peepholes",
    "lstm+layer_norm+peepholes+zoneout_h+zoneout_c+recurrent_dropout",
    "gru+layer_norm+zoneout_h+recurrent_dropout",
    "gru_reset_before+layer_norm+zoneout_h+recurrent_dropout",
    "rnn_tanh+layer_norm+zoneout_h+recurrent_dropout",
]


class Case:
    """One layer's arguments in float64, and gradients to send back."""

    def __init__(self, cell, steps=5, batch=3, hidden=5, inputs=4, *, bias=True, ragged=False, resets=False, **options):
        self.both, self.reverse = options.get("both", False), options.get("reverse", False)
        said, self.cell = spec.read(cell), cell
        draw = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
        rows, ways = said.gates * hidden, 2 if self.both else 1
        shapes = {"weight_ch": (rows - hidden,), "gain_c": (hidden,), "shift_c": (hidden,)}
        self.parameters = [
            tensor
            for _ in range(ways)
            for tensor in [
                *(draw(rows, inputs) / 2, draw(rows, hidden) / hidden**0.5),
                *([draw(rows), draw(rows)] if bias else []),
                *(1 + 0.3 * draw(*shapes.get(name, (rows,))) for name in said.variant_parameters),
            ]
        ]
        self.initial = [draw(batch, hidden) for _ in range(ways * len(said.states))]
        self.given = {}
        places = (steps, batch)
        if ragged:
            self.given["lengths"] = torch.randint(0, steps + 1, (batch,))
        if resets:
            self.given["reset"] = torch.rand(steps, batch) < 0.3
        if options.get("packed"):
            sizes = torch.randint(1, batch + 1, (steps,)).sort(descending=True).values
            sizes[0] = batch
            self.given["batch_sizes"], places = sizes, (int(sizes.sum()),)
        self.input = torch.randint(0, inputs, places) if options.get("tokens") else draw(*places, inputs)
        share = torch.tensor(0.3, dtype=torch.float64)
        masks = {"recurrent_dropout": (torch.rand(batch, hidden, dtype=torch.float64) < 0.7) / 0.7}
        self.masks = [
            masks.get(name, share if options.get("expected") else torch.rand(steps, batch, hidden) < 0.4)
            for name in said.masks
        ]
        self.grads = draw(*places, ways * hidden), [draw(batch, hidden) for _ in self.initial]

    def requests(self, dtype, apart, device="cpu"):
        cast = lambda tensors: [t.to(device, dtype if t.is_floating_point() else None) for t in tensors]  # noqa: E731
        (input,) = cast([self.input])
        given = {
            "masks": cast(self.masks),
            **{name: t if name == "batch_sizes" else t.to(device) for name, t in self.given.items()},
        }
        if not (self.both and apart):
            more = {"reverse": self.reverse, "bidirectional": self.both}
            return [Request.read(self.cell, input, cast(self.initial), cast(self.parameters), **more, **given)]
        halves = zip(
            *(t.chunk(2) if isinstance(t, Tensor) else _halves(t) for t in (self.initial, self.parameters)), strict=True
        )
        return [
            Request.read(self.cell, input, cast(initial), cast(parameters), reverse=way == 1, **given)
            for way, (initial, parameters) in enumerate(halves)
        ]

    def run(self, backend, dtype=torch.float32, device="cpu") -> list[Tensor]:
        """Output, final state, and gradients of the input (token ids have none), the initial state and the parameters."""
        requests = self.requests(dtype, backend is reference, device)
        results = [backend.forward(request, True) for request in requests]
        grad_output, *grad_final = (g.to(device, dtype) for g in [self.grads[0], *self.grads[1]])
        outputs = grad_output.chunk(len(requests), -1)
        finals = [grad_final] if len(requests) == 1 else _halves(grad_final)
        has_input = self.input.is_floating_point()
        gradients = [
            backend.backward(request, own.contiguous(), final, result.output, result.saved, has_input)
            for request, result, own, final in zip(requests, results, outputs, finals, strict=True)
        ]
        inputs = [sum(g.input for g in gradients)] if has_input else []
        found = [torch.cat([r.output for r in results], -1), *[f for r in results for f in r.final], *inputs]
        return found + [s for g in gradients for s in g.initial] + [p for g in gradients for p in g.parameters]


def _halves(tensors):
    return [tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]]
