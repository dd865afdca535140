"""The layers under Opacus: differentially private training, whose gradients come by sample.

Importing this module tells Opacus of the layers: `ModuleValidator.fix` replaces each by a `PrivateLayer`, as it replaces
torch.nn.LSTM by its own, and what it returns can be made private.

    import throughtime.opacus
    from opacus import PrivacyEngine
    from opacus.validators import ModuleValidator

    model = ModuleValidator.fix(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )

Opacus hears of a module's positional arguments and of its first result alone: of a layer that were hooked itself, gradients
through a final state would be lost, and lengths, resets and initial states. So what it hooks is a module that hands out a copy
of the parameters for each sample; the layer computes with these, and the gradient of a copy is its sample's own.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from opacus.grad_sample import register_grad_sampler  # pyright: ignore[reportMissingImports]
from opacus.validators import register_module_fixer, register_module_validator  # pyright: ignore[reportMissingImports]
from opacus.validators.errors import ShouldReplaceModuleError, UnsupportedModuleError  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from torch.func import functional_call

from throughtime.layers import GRU, LSTM, MGU, RNN, Recurrent

_LAYERS = [RNN, LSTM, GRU, MGU]


class Copies(nn.Module):
    """Parameters, of which each sample is handed a copy."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

    def forward(self, samples: Tensor) -> Tensor:
        """Return all parameters in a row for each of B samples (B, 1, ·); `samples` is (B, B, 0), whichever axis is the batch."""
        row = torch.cat([parameter.flatten() for parameter in self.parameters()])
        return row.expand(len(samples), 1, -1)

    def by_name(self, rows: Tensor) -> dict[str, Tensor]:
        """Cut rows (·, N) of N elements in the parameters, or in their gradients."""
        sizes = [parameter.numel() for parameter in self.parameters()]
        each = zip(self.named_parameters(), rows.split(sizes, dim=-1), strict=True)
        return {name: part.unflatten(-1, parameter.shape) for (name, parameter), part in each}


class PrivateLayer(nn.Module):
    """A layer of throughtime whose gradients come by sample.

    It is called as the layer is, with a batch; packed sequences and `embedding=` are refused, since a sample's share of them isn't
    known. Its parameters are those of `copies`. What is dropped is drawn for each sample.

    Args:
        layer: Whose parameters become this one's.

    Raises:
        NotImplementedError: When called with something that has no batch, with packed rows or an embedding.
    """

    def __init__(self, layer: Recurrent) -> None:
        super().__init__()
        self.copies = Copies(dict(layer.named_parameters()))
        self.batch_first = layer.batch_first
        self._shell = (copy.deepcopy(layer).to("meta"),)  # in a tuple, so that its parameters aren't this module's

    def forward(
        self,
        input: Tensor,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        reset_to: Any = None,
        embedding: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Run the layer: return the output and the final state."""
        dims = 3 if isinstance(input, Tensor) and input.is_floating_point() else 2
        if not isinstance(input, Tensor) or input.dim() != dims:
            raise NotImplementedError(
                "private layers take a batch of padded sequences; give lengths= with it, if they differ"
            )
        if embedding is not None:
            raise NotImplementedError("private layers take no embedding=; look the tokens up with nn.Embedding")
        axis = 0 if self.batch_first else 1
        rows = input.shape[axis]
        parameters = self.copies(input.new_empty((rows, rows, 0), dtype=torch.float32)).squeeze(1)
        states, fresh = _parts(hx), tuple(s.expand(-1, rows, -1) for s in _parts(reset_to))
        options = {"lengths": lengths, "mask": mask, "reset": reset}
        if rows == 0:  # Poisson sampling may draw nobody, whose gradients must be there as well
            return self._run(self.copies.by_name(parameters.sum(0)), input, states, fresh, options)
        axes = {name: None if options[name] is None else way for name, way in self._axes.items()}
        mapped = torch.vmap(
            self._run_sample,
            in_dims=(0, axis, (1,) * len(states), (1,) * len(fresh), axes),
            out_dims=(axis, 1),
            randomness="different",
        )
        return mapped(parameters, input, states, fresh, options)

    @property
    def _axes(self) -> dict[str, int]:
        """Which axis of an option is the batch."""
        axis = 0 if self.batch_first else 1
        return {"lengths": 0, "mask": axis, "reset": axis}

    def plain(self) -> Recurrent:
        """Return a layer as it was made from, with the weights of now."""
        layer = copy.deepcopy(self._shell[0]).to_empty(device=next(self.parameters()).device)
        layer.load_state_dict(self.copies.state_dict())
        return layer.train(self.training)

    def _run(
        self,
        parameters: dict[str, Tensor],
        input: Tensor,
        states: Sequence[Tensor],
        fresh: Sequence[Tensor],
        options: dict[str, Any],
    ) -> tuple[Tensor, Any]:
        hx, reset_to = (None if not s else tuple(s) if len(s) == 2 else s[0] for s in (states, fresh))
        layer = self._shell[0].train(self.training)
        return functional_call(layer, parameters, (input, hx), {**options, "reset_to": reset_to})

    def _run_sample(
        self,
        parameters: Tensor,
        input: Tensor,
        states: Sequence[Tensor],
        fresh: Sequence[Tensor],
        options: dict[str, Any],
    ) -> tuple[Tensor, Any]:
        """Run a batch of one, whose tensors have no axis for it."""
        axis = 0 if self.batch_first else 1
        own = {name: None if t is None else t.unsqueeze(self._axes[name]) for name, t in options.items()}
        of_one, fresh_of_one = ([state.unsqueeze(1) for state in part] for part in (states, fresh))
        copies = self.copies.by_name(parameters)
        output, final = self._run(copies, input.unsqueeze(axis), of_one, fresh_of_one, own)
        return output.squeeze(axis), tuple(s.squeeze(1) for s in final) if isinstance(final, tuple) else final.squeeze(
            1
        )


def _parts(state: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a state, none of `None`."""
    return () if state is None else tuple(state) if isinstance(state, tuple | list) else (state,)


@register_module_validator(_LAYERS)
def _validate(module: Recurrent) -> list[UnsupportedModuleError]:
    name = type(module).__name__
    return [
        ShouldReplaceModuleError(
            f"throughtime.{name} has no gradients by sample; ModuleValidator.fix makes it a PrivateLayer"
        )
    ]


@register_module_fixer(_LAYERS)
def _fix(module: Recurrent, **_: Any) -> PrivateLayer:
    return PrivateLayer(module)


@register_grad_sampler(Copies)
def _by_sample(copies: Copies, _: list[Tensor], grads: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return each parameter's gradient by sample: that of the sample's copy, (B, 1, ·) or (1, B, ·)."""
    parts = copies.by_name(grads.flatten(0, 1))
    return {parameter: parts[name] for name, parameter in copies.named_parameters() if parameter.requires_grad}
