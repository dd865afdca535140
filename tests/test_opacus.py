"""The layers under Opacus: gradients by sample are those of each sample alone, through outputs and final states."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import throughtime

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    opacus = pytest.importorskip("opacus", reason="Opacus isn't installed")
    from opacus.grad_sample import GradSampleModule
    from opacus.validators import ModuleValidator
    from opacus.validators.errors import UnsupportedModuleError

    from throughtime.opacus import PrivateLayer

pytestmark = pytest.mark.filterwarnings("ignore")  # of Opacus, torch's hooks and secure random numbers

LAYERS = {
    "rnn": throughtime.RNN,
    "lstm": throughtime.LSTM,
    "lstm_projected": lambda *a, **k: throughtime.LSTM(*a, proj_size=2, **k),
    "gru": throughtime.GRU,
    "gru_reset_before": lambda *a, **k: throughtime.GRU(*a, reset_after=False, **k),
    "mgu": throughtime.MGU,
    "layer_norm": lambda *a, **k: throughtime.LSTM(*a, layer_norm=True, **k),
}


class Classifier(nn.Module):
    """A layer between two of torch's, whose final state counts as well."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(3, 3), layer, nn.Linear(size, 2)

    def forward(self, x: Tensor, lengths: Tensor, h: Tensor | None = None) -> Tensor:
        batch_first = self.layer.batch_first
        x = self.before(x)
        hx = None if h is None else h if not isinstance(h, Tensor) else h.transpose(0, 1)
        output, final = self.layer(x if batch_first else x.transpose(0, 1), hx, lengths=lengths)
        output = output if batch_first else output.transpose(0, 1)
        final = final[0] if isinstance(final, tuple) else final
        return self.after(output.tanh().sum(1)) + self.after(final[-1].repeat(1, output.shape[2] // final.shape[2]))


def make(name: str, **options) -> Classifier:
    layer = LAYERS[name](3, 4, **options).double()
    return Classifier(layer, layer.output_size * (1 + layer.bidirectional)).double()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}]
)
def test_gradients_by_sample_are_each_samples_own(name, options):
    model, x, lengths = make(name, **options), torch.randn(4, 5, 3).double(), torch.tensor([5, 2, 1, 4])
    private = GradSampleModule(ModuleValidator.fix(model), loss_reduction="sum")
    private(x, lengths).square().sum().backward()
    found = {n.replace("_module.", "").replace(".copies", ""): p.grad_sample for n, p in private.named_parameters()}
    for row in range(4):
        loss = model(x[row : row + 1], lengths[row : row + 1]).square().sum()
        for (key, p), e in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            torch.testing.assert_close(found[key][row], e.to(p.dtype), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("given", ["zeros", "state", "learned", "hx"])
def test_resets_go_where_the_layers_do(name, given):
    layer, x, reset = LAYERS[name](3, 4).double(), torch.randn(6, 4, 3).double(), torch.rand(6, 4) < 0.3
    many = [torch.randn(1, rows, 4).double() for rows in (4, 4, 1 if given == "learned" else 4)]
    hx, fresh = ((h, h.flip(2)) if name == "lstm" else h for h in (many[0], many[2]))
    options = {"zeros": {}, "hx": {"reset_to": hx}}.get(given, {"reset_to": fresh})
    private = GradSampleModule(ModuleValidator.fix(layer), batch_first=False, loss_reduction="sum")
    options["mask"] = torch.rand(6, 4) < 0.7
    output = private(x, hx, reset=reset, **options)[0]
    torch.testing.assert_close(output, layer(x, hx, reset=reset, **options)[0])
    output.square().sum().backward()
    expected = torch.autograd.grad(layer(x, hx, reset=reset, **options)[0].square().sum(), list(layer.parameters()))
    for p, e in zip(private.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad_sample.sum(0), e, rtol=1e-9, atol=1e-11)


def test_a_layer_is_refused_until_it_is_fixed():
    model = make("lstm")
    with pytest.raises(UnsupportedModuleError, match=r"ModuleValidator\.fix makes it a PrivateLayer"):
        ModuleValidator.validate(model, strict=True)
    assert ModuleValidator.is_valid(ModuleValidator.fix(model))


@pytest.mark.parametrize("batch_first", [False, True])
def test_either_axis_may_be_the_batch(batch_first):
    layer = throughtime.GRU(3, 4, batch_first=batch_first).double()
    x = torch.randn(*((2, 5) if batch_first else (5, 2)), 3).double()
    private = GradSampleModule(ModuleValidator.fix(layer), batch_first=batch_first, loss_reduction="sum")
    private(x)[0].square().sum().backward()
    for row, own in enumerate(x.split(1, 0 if batch_first else 1)):
        expected = torch.autograd.grad(layer(own)[0].square().sum(), list(layer.parameters()))
        for p, e in zip(private.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad_sample[row], e, rtol=1e-9, atol=1e-11)


def test_a_private_step_without_noise_is_a_plain_step():
    model, x, y = make("gru", batch_first=True), torch.randn(8, 5, 3).double(), torch.randn(8, 2).double()
    fixed = ModuleValidator.fix(model)
    optimizer = torch.optim.SGD(fixed.parameters(), lr=0.1)
    lengths = torch.full((8,), 5)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    engine = opacus.PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=fixed,
        optimizer=optimizer,
        data_loader=data,
        noise_multiplier=0.0,
        max_grad_norm=1e6,
        poisson_sampling=False,
    )
    for own_x, own_y in loader:
        nn.functional.mse_loss(private(own_x, lengths), own_y).backward()
        optimizer.step()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.mse_loss(model(x, lengths), y).backward()
    plain.step()
    for a, e in zip(fixed.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, e)
    assert isinstance(fixed.layer, PrivateLayer)
    torch.testing.assert_close(fixed.layer.plain()(x)[0], model.layer(x)[0])


def test_nobody_may_be_drawn_and_masks_are_each_samples_own():
    model = make("lstm", zoneout=0.3, recurrent_dropout=0.2, batch_first=True)
    private = GradSampleModule(ModuleValidator.fix(model), loss_reduction="sum")
    for rows in (0, 3):
        private.zero_grad()
        private(torch.randn(rows, 5, 3).double(), torch.full((rows,), 5)).sum().backward()
        assert all(p.grad_sample.shape == (rows, *p.shape) for p in private.parameters())
        for p in private.parameters():
            p.grad_sample = None


def test_what_has_no_samples_is_refused():
    layer = PrivateLayer(throughtime.GRU(3, 4))
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 3)])
    for given in (torch.randn(5, 3), packed):
        with pytest.raises(NotImplementedError, match="private layers take a batch"):
            layer(given)
    with pytest.raises(NotImplementedError, match="no embedding="):
        layer(torch.zeros(5, 2, dtype=torch.int64), embedding=torch.randn(4, 3))
