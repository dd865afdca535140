"""Frameworks that train or explain models take ours for torch.nn's: same weights and seeds, same numbers."""

import importlib
import pickle
import warnings
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import throughtime

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks
LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU}
BOTH = pytest.mark.parametrize("name", LAYERS)


def load(package: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(package.split(".")[0], reason=f"{package} isn't installed")
        return importlib.import_module(package)


class Classifier(nn.Module):
    """Sequences (B, T, 3), or ids (B, T) of tokens, to scores of two classes."""

    def __init__(self, name: str, ours: bool, tokens: int = 0, hidden_size: int = 8) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(tokens, 3) if tokens else nn.Identity()
        self.layer = LAYERS[name](3, hidden_size, num_layers=2, batch_first=True)
        self.readout = nn.Linear(hidden_size, 2)
        if ours:
            throughtime.convert(self)
            assert type(self.layer) is getattr(throughtime, name.upper())

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.layer(self.embedding(x))[0][:, -1])


def data() -> tuple[Tensor, Tensor]:
    """Return steps (48, 12, 3), and whether each row's sum is above zero."""
    steps = torch.randn(48, 12, 3, generator=torch.Generator().manual_seed(1))
    return steps, (steps.sum((1, 2)) > 0).long()


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    start = Classifier("lstm" if isinstance(theirs.layer, nn.LSTM) else "gru", ours=False)
    for a, e, s in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        assert not torch.equal(a, s)  # it was trained
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


@BOTH
def test_skorch_trains_searches_and_pickles(name):
    skorch, search = load("skorch"), load("sklearn.model_selection")
    x, y = (t.numpy() for t in data())
    options = {"criterion": nn.CrossEntropyLoss, "lr": 0.1, "max_epochs": 3, "batch_size": 16, "verbose": 0}
    found = []
    for ours in (True, False):
        net = skorch.NeuralNetClassifier(Classifier, module__name=name, module__ours=ours, **options)
        searched = search.GridSearchCV(net, {"module__hidden_size": [4, 8]}, scoring="neg_log_loss", cv=2).fit(x, y)
        net.fit(x, y)
        found.append((net, searched.cv_results_["mean_test_score"]))
    (ours, our_scores), (theirs, their_scores) = found
    assert_same(ours.module_, theirs.module_)
    assert our_scores == pytest.approx(their_scores, rel=1e-4)
    assert our_scores[0] != our_scores[1]
    assert (pickle.loads(pickle.dumps(ours)).predict_proba(x) == ours.predict_proba(x)).all()


@BOTH
@pytest.mark.parametrize("method", ["IntegratedGradients", "Saliency", "InputXGradient", "FeatureAblation"])
def test_captum_attributes_to_inputs(name, method):
    attribute = load("captum.attr")
    x = data()[0]
    ours, theirs = (
        getattr(attribute, method)(Classifier(name, ours)).attribute(x.clone(), target=1) for ours in (True, False)
    )
    assert ours.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@BOTH
def test_captum_attributes_to_a_text_and_completely(name):
    attribute = load("captum.attr")
    ids, found = torch.randint(10, (4, 12), generator=torch.Generator().manual_seed(2)), []
    for ours in (True, False):
        model = Classifier(name, ours, tokens=10)
        method = attribute.LayerIntegratedGradients(model, model.embedding)
        found.append(method.attribute(ids, torch.zeros_like(ids), target=1, n_steps=50))
        change = (model(ids) - model(torch.zeros_like(ids)))[:, 1]
        torch.testing.assert_close(found[-1].sum((1, 2)).float(), change, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@BOTH
def test_lightning_trains_and_restores(name, tmp_path):
    lightning = load("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, name: str, ours: bool) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = Classifier(name, ours)

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    modules = []
    for ours in (True, False):
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=2,
            gradient_clip_val=0.5,
            accumulate_grad_batches=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=ours,
            default_root_dir=tmp_path,
        )
        module = Module(name, ours)
        trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=8))
        modules.append(module)
    assert_same(*(module.model for module in modules))
    trainer.strategy.connect(modules[0])
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    restored = Module.load_from_checkpoint(tmp_path / "ours.ckpt")
    x = data()[0]
    assert type(restored.model.layer) is getattr(throughtime, name.upper())
    assert torch.equal(restored.model(x), modules[0].model(x))


@BOTH
def test_accelerate_trains_and_restores(name, tmp_path):
    accelerate = load("accelerate")
    models = []
    for ours in (True, False):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = Classifier(name, ours)
        model, optimizer, batches = accelerator.prepare(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            DataLoader(TensorDataset(*data()), batch_size=8),
        )
        for _ in range(2):
            for x, y in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.cross_entropy(model(x), y))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
        if ours:
            accelerator.save_state(tmp_path)
            before = [p.clone() for p in model.parameters()]
            with torch.no_grad():
                for p in model.parameters():
                    p.zero_()
            accelerator.load_state(tmp_path)
            assert all(map(torch.equal, model.parameters(), before))
        models.append(accelerator.unwrap_model(model))
    assert_same(*models)


@BOTH
def test_accelerate_keeps_the_weights_elsewhere_between_calls(name):
    accelerate = load("accelerate")
    model, x = Classifier(name, ours=True), data()[0]
    with torch.no_grad():
        expected = model(x)
        accelerate.cpu_offload(model, execution_device="cpu")
        assert all(p.is_meta for p in model.parameters())
        for _ in range(2):
            assert torch.equal(model(x), expected)
