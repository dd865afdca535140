"""A layer's output may be written to: what the backward pass needs of it is computed again."""

import pytest
import torch
from comparison import BACKENDS
from test_transforms import LAYERS
from torch import nn

import throughtime

IN_PLACE = {
    "relu_": lambda output, x: output.relu_(),
    "a residual": lambda output, x: output.add_(x[..., :1]),
    "dropout": lambda output, x: nn.functional.dropout(output, 0.5, inplace=True),
    "a part": lambda output, x: output[1:].mul_(2),
    "a view of it": lambda output, x: output.transpose(0, 1).masked_fill_(x.transpose(0, 1)[..., :1] > 0, 1.0),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_the_output_may_be_written_to(name, change, options, backend):
    layer, x = LAYERS[name](3, 4, backend=backend, **options), torch.randn(5, 3, 3, requires_grad=True)
    leaves, gradients = [x, *layer.parameters()], []
    for copies in (False, True):
        torch.manual_seed(1)
        output, _ = layer(x, lengths=torch.tensor([2, 0, 3, 1, 3] if options else [5, 0, 3]))
        output = output.clone() if copies else output
        IN_PLACE[change](output, x.detach())
        gradients.append(torch.autograd.grad(output.square().sum(), leaves))
    for a, e in zip(*gradients, strict=True):
        assert torch.equal(a, e)


def test_an_output_in_pooled_memory_may_be_written_to():
    layer, x = throughtime.GRU(3, 64), torch.randn(100, 64, 3)
    output, _ = layer(x)
    assert output.nbytes > 1 << 20
    output.mul_(2).sum().backward()
    found = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    (layer(x)[0] * 2).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, layer.parameters(), strict=True))


def test_the_output_may_be_written_to_before_a_second_derivative():
    layer, x = LAYERS["gru"](3, 4).double(), torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0].tanh_(), x)


@pytest.mark.parametrize("written", ["input", "state", "parameter"])
def test_what_was_read_may_not_be_written_to(written):
    layer, x, h = LAYERS["gru"](3, 4), torch.randn(4, 2, 3), torch.randn(1, 2, 4)
    output, _ = layer(x, h)
    output.mul_(2)
    with torch.no_grad():
        {"input": x, "state": h, "parameter": layer.weight_hh_l0}[written].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_graph_that_is_gone_is_told_of():
    output, _ = LAYERS["gru"](3, 4)(torch.randn(4, 2, 3))
    loss = output.mul_(2).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
