"""What is restored is what could have been written: anything else in a checkpoint is refused, whatever its digest says."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from throughtime.lm import LanguageModel, ModelConfig
from throughtime.training import Budget, CheckpointError, Loop, Streams

ADAMW = lambda parameters: torch.optim.AdamW(parameters, fused=True)  # noqa: E731
MOMENTUM = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # noqa: E731

STAGE = {"budget": {"minutes": None, "epochs": None, "steps": 5}, "learning_rate": 0.1, "step": 3, "seconds": 0.0}


def make_loop(cell="lstm", optimizer=ADAMW, **options):
    torch.manual_seed(3)
    model = LanguageModel(ModelConfig(9, cell, 8, 2))
    return Loop(
        model=model,
        windows=Streams(np.random.default_rng(0).integers(0, 9, 400), batch=3, window=8),
        optimizer=optimizer(model.parameters()),
        loss=lambda logits, targets: nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()),
        budget=Budget(steps=30),
        learning_rate=1e-2,
        **options,
    )


def stopped(steps=3, **options):
    """Return the checkpoint of a loop that was stopped."""
    loop = make_loop(**options)
    loop.model.train()
    for _ in range(steps):
        loop._step()
    tensors, state = loop.checkpoint()
    return {name: tensor.clone() for name, tensor in tensors.items()}, state


def refused(tensors, state, match, **options):
    with pytest.raises(CheckpointError, match=f"belongs to another model or optimiser: .*{match}") as caught:
        make_loop(**options).restore(tensors, state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["model.", "average.module.", "optimizer.", "state.", "rng."])
@pytest.mark.parametrize("change", ["shape", "fewer dimensions", "dtype", "NaN", "missing", "renamed"])
def test_every_tensor_is_compared(prefix, change):
    tensors, state = stopped(average=0.9)
    names = [name for name in tensors if name.startswith(prefix)]
    assert names
    for name in names:
        forged = dict(tensors)
        tensor = forged.pop(name)
        if change == "shape":
            forged[name] = torch.cat([tensor.flatten(), tensor.flatten()[:1]]).contiguous()
        elif change == "fewer dimensions":
            forged[name] = tensor.flatten()[0] if tensor.dim() else tensor.reshape(1, 1)
        elif change == "dtype":
            forged[name] = tensor.double() if tensor.is_floating_point() else tensor.to(torch.int32)
        elif change == "NaN":
            if not tensor.is_floating_point():
                continue
            forged[name] = torch.full_like(tensor, math.nan)
        elif change == "renamed":
            forged[name + "x"] = tensor
        refused(forged, state, "", average=0.9)


def test_an_optimiser_that_would_write_beyond_its_state_is_refused():
    """The fused step trusts the shapes of its moments; it ended the process."""
    tensors, state = stopped()
    tensors["optimizer.0.exp_avg"] = torch.zeros(1)
    refused(tensors, state, r"optimizer\.0\.exp_avg has shape \(1,\), expected \(32, 9\)")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", -1),
        ("step", 1.5),
        ("step", True),
        ("step", None),
        ("step", "3"),
        ("step", 10**400),
        ("seconds", math.nan),
        ("seconds", -1.0),
        ("seconds", math.inf),
        ("seconds", []),
        ("best", math.nan),
        ("best_step", {}),
        ("rate_factor", 2.0),
        ("rate_factor", -0.5),
        ("clipped_steps", 4),
        ("validated_at", 4),
        ("without_improvement", -1),
        ("rolled_back", 0.0),
        ("validations", {}),
        ("validations", ["x"]),
        ("watch", []),
        ("watch", {"slow": 1.0}),
        ("watch", {"slow": math.nan, "fast": 0.0, "lowest": 0.0, "steps": 0}),
        ("watch", {"slow": 0.0, "fast": 0.0, "lowest": 0.0, "steps": -1}),
        ("watch", {"slow": 0.0, "fast": 0.0, "lowest": 0.0, "steps": 0, "more": 0}),
        ("longer", []),
        ("longer", {}),
        ("longer", STAGE | {"step": 4}),
        ("longer", STAGE | {"step": -1}),
        ("longer", STAGE | {"seconds": 1e9}),
        ("longer", STAGE | {"learning_rate": math.nan}),
        ("longer", STAGE | {"budget": {}}),
        ("longer", STAGE | {"budget": {"minutes": None, "epochs": None, "steps": None}}),
        ("longer", STAGE | {"budget": {"minutes": 1, "epochs": None, "steps": 5}}),
        ("longer", STAGE | {"budget": {"minutes": -1, "epochs": None, "steps": None}}),
        ("longer", STAGE | {"budget": {"minutes": "5", "epochs": None, "steps": None}}),
        ("optimizer", []),
        ("optimizer", {}),
        ("optimizer", {"0": 3}),
        ("optimizer", {"x": {}}),
        ("optimizer", {"99999999999": {}}),
        ("more", 1),
    ],
)
def test_every_number_is_compared(name, value):
    tensors, state = stopped()
    refused(tensors, state | {name: value}, "")


@pytest.mark.parametrize("state", [[], None, 3, "x", {}])
def test_a_state_of_another_kind_is_refused(state):
    refused(stopped()[0], state, "")


@pytest.mark.parametrize("missing", ["step", "watch", "optimizer", "validations"])
def test_a_state_that_lacks_something_is_refused(missing):
    tensors, state = stopped()
    del state[missing]
    refused(tensors, state, f"{missing} is missing")


def test_counts_beyond_the_steps_are_refused():
    tensors, state = stopped(average=0.9)
    refused(tensors | {"average.n_averaged": torch.tensor(-10)}, state, "n_averaged is -10", average=0.9)
    refused(tensors | {"optimizer.1.step": torch.tensor(-1.0)}, state, r"optimizer\.1\.step is -1", average=0.9)
    refused(tensors | {"optimizer.1.step": torch.tensor(4.0)}, state, "expected from 0 to 3", average=0.9)


def test_a_generators_state_that_none_can_have_is_refused():
    tensors, state = stopped()
    refused(tensors | {"rng.cpu": torch.zeros_like(tensors["rng.cpu"])}, state, "no state of a random generator")


def test_a_carried_state_of_more_rows_is_refused():
    tensors, state = stopped()
    refused(tensors | {f"state.{i}": torch.zeros(2, 4, 8) for i in range(2)}, state, "")
    tensors, state = stopped(cell="mlp")
    refused(tensors | {"state.0": torch.full((7, 3), 1000)}, state, "", cell="mlp")


def test_another_optimiser_is_refused():
    tensors, state = stopped(optimizer=MOMENTUM)
    refused(tensors, state, r"optimizer\.0\.step is missing")
    tensors, state = stopped()
    refused(tensors, state, "momentum_buffer is missing", optimizer=MOMENTUM)
    tensors, state = stopped(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    refused(tensors, state, "", optimizer=MOMENTUM)


@pytest.mark.parametrize("kind", ["Adagrad", "Adamax", "ASGD", "NAdam", "RMSprop", "Rprop", "Adadelta", "RAdam"])
def test_whatever_an_optimiser_keeps_is_restored(kind):
    def optimizer(parameters):
        return getattr(torch.optim, kind)(parameters)

    whole = make_loop(optimizer=optimizer)
    whole.model.train()
    for _ in range(6):
        whole._step()
    again = make_loop(optimizer=optimizer)
    again.restore(*stopped(optimizer=optimizer))
    again.model.train()
    for _ in range(3):
        again._step()
    for name, tensor in whole.checkpoint()[0].items():
        assert torch.equal(again.checkpoint()[0][name], tensor), name


def test_a_parameter_that_never_had_a_gradient_has_nothing_kept():
    loop = make_loop()
    loop.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    loop.model.train()
    loop._step()
    tensors, state = loop.checkpoint()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    again = make_loop()
    again.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    again.restore(tensors, state)
    assert again.step == 1
