"""What a model is made of, as a stream computes it: embedding, recurrent layers, linear layers. A snapshot in float32."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from throughtime.arguments import check_flags, describe_value
from throughtime.errors import InputError
from throughtime.layers import GRU, LSTM, MGU, RNN, Recurrent
from throughtime.rnn_base import TORCH_GRU, TORCH_LSTM, TORCH_RNN
from throughtime.spec import Parameters, Spec, read

Kind = TypeVar("Kind", bound=nn.Module)
_OF_TORCH = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}
_NOTHING_IN_EVAL = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class RecurrentStage(NamedTuple):
    """A recurrent layer of one direction; `share_h` and `share_c` of its old state are kept at every step (zoneout)."""

    spec: Spec
    parameters: Parameters
    share_h: float
    share_c: float

    @property
    def input_size(self) -> int:
        """I, the width of what it reads."""
        return self.parameters.weight_ih.shape[1]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.parameters.weight_ih.shape[0] // self.spec.gates

    @property
    def output_size(self) -> int:
        """P, the width of h."""
        return self.parameters.weight_hh.shape[1]

    def describe(self) -> str:
        """Say what it is, for the fingerprint."""
        sizes = f"{self.input_size} {self.hidden_size} {self.output_size}"
        return f"{self.spec.name} {sizes} {self.share_h!r} {self.share_c!r} {','.join(self.parameters.there())}"

    def tensors(self) -> list[Tensor]:
        """Return what it computes with."""
        return self.parameters.to_list()


class LinearStage(NamedTuple):
    """A linear layer (O, I)."""

    weight: Tensor
    bias: Tensor | None

    @property
    def input_size(self) -> int:
        """I, the width of what it reads."""
        return self.weight.shape[1]

    @property
    def output_size(self) -> int:
        """O, the width of what it gives."""
        return self.weight.shape[0]

    def describe(self) -> str:
        """Say what it is, for the fingerprint."""
        return f"linear {self.input_size} {self.output_size} {self.bias is not None}"

    def tensors(self) -> list[Tensor]:
        """Return what it computes with."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


class Snapshot(NamedTuple):
    """A model's weights as they were.

    Attributes:
        stages: Its layers, in order; at least one is recurrent.
        embedding: (V, E), what token ids are read as; or `None`.
        reads_ids: Whether it reads token ids: without an embedding they stand for one-hot vectors.
    """

    stages: list[RecurrentStage | LinearStage]
    embedding: Tensor | None
    reads_ids: bool

    @property
    def vocabulary_size(self) -> int:
        """V, the number of token ids; I of one-hot vectors."""
        return self.stages[0].input_size if self.embedding is None else self.embedding.shape[0]

    def fingerprint(self) -> bytes:
        """Return 16 bytes that tell this model from any other, whatever the precision it is computed in."""
        digest = hashlib.sha256(f"ids {self.reads_ids}".encode())
        parts: list[tuple[str, list[Tensor]]] = [(stage.describe(), stage.tensors()) for stage in self.stages]
        if self.embedding is not None:
            parts.append((f"embedding {list(self.embedding.shape)}", [self.embedding]))
        for description, tensors in parts:
            digest.update(description.encode() + b"\0")
            for tensor in tensors:
                digest.update(tensor.numpy().astype("<f4", copy=False).data)
        return digest.digest()[:16]


def snapshot(model: Any, ids: bool | None) -> Snapshot:
    """Read a model.

    Args:
        model: A layer, an `nn.Sequential` of layers, or what lists them itself, in order, with `stages()`.
        ids: Whether it reads token ids; `None` leaves that to the model.

    Raises:
        InputError: A part of it can't be streamed.
    """
    if ids is not None:
        (ids,) = check_flags(ids=ids)
    embedding: Tensor | None = None
    stages: list[RecurrentStage | LinearStage] = []
    for name, module in _parts(model):
        if _is(module, nn.Embedding) and not stages and embedding is None:
            _check_is_plain(module)
            if module.max_norm is not None:
                raise InputError(f"{name} has max_norm, which changes its weights as it reads; expected it without")
            with _as_in_eval(module):
                embedding = _numbers(module.weight, name)
            if embedding.dim() != 2:
                raise InputError(f"{name} has a weight {list(embedding.shape)}; expected 2 dimensions")
            if not embedding.shape[0]:
                raise InputError(f"{name} has no rows; expected one for each of one or more tokens")
        else:
            stages += _stages(module, name)
    if not any(isinstance(stage, RecurrentStage) for stage in stages):
        raise InputError(f"{type(model).__name__} has no recurrent layer; expected an RNN, LSTM or GRU to be streamed")
    given = stages[0].input_size if embedding is None else embedding.shape[1]
    for stage in stages:
        if stage.input_size != given:
            raise InputError(f"a layer reads {stage.input_size} numbers, but what comes before it gives {given}")
        given = stage.output_size
    says_ids = embedding is not None or getattr(model, "reads_ids", False)
    if embedding is not None and ids is False:
        raise InputError("ids=False, but the model begins with an embedding, which reads token ids; leave ids= out")
    if ids and not isinstance(stages[0], RecurrentStage) and embedding is None:
        raise InputError(
            "ids=True, but the model begins with a linear layer; expected an embedding or a recurrent layer"
        )
    return Snapshot(stages, embedding, says_ids if ids is None else ids)


def _parts(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers in order, and how to call each in a message."""
    listed: Iterable[Any] = [model]
    lists_them = getattr(model, "stages", None)
    if callable(lists_them) and not isinstance(lists_them, nn.Module):  # which somebody may have called so
        given = lists_them()
        if not isinstance(given, Iterable):
            raise InputError(f"stages() returned {describe_value(given)}; expected the model's layers in order")
        listed = given
        if isinstance(model, nn.Module):
            _check_is_plain(model)
    for module in listed:
        if not isinstance(module, nn.Module):
            raise InputError(
                f"can't stream a {type(module).__name__}; expected a layer, an nn.Sequential or a loaded run"
            )
        if _is(module, nn.Sequential):
            _check_is_plain(module)
            for child in module:
                yield from _parts(child)
        elif any(_is(module, kind) for kind in _NOTHING_IN_EVAL):
            _check_is_plain(module)
        else:
            yield type(module).__name__, module


def _stages(module: nn.Module, name: str) -> list[RecurrentStage] | list[LinearStage]:
    _check_is_plain(module)
    if _is(module, nn.Linear):
        with _as_in_eval(module):
            weight, bias = _numbers(module.weight, name), None if module.bias is None else _numbers(module.bias, name)
        if weight.dim() != 2 or not weight.numel():
            raise InputError(f"{name} has a weight {list(weight.shape)}; expected one or more inputs and outputs")
        if bias is not None:
            _check_shape(name, "bias", bias, weight.shape[:1])
        return [LinearStage(weight, bias)]
    if isinstance(module, nn.RNNBase) and any(_is(module, kind) for kind in (TORCH_RNN, TORCH_LSTM, TORCH_GRU)):
        return _recurrent(module, name, read(_OF_TORCH[module.mode]), 0.0)
    if isinstance(module, Recurrent) and any(_is(module, kind) for kind in (RNN, LSTM, GRU, MGU)):
        return _recurrent(module, name, read(module.cell), module.zoneout)
    raise InputError(
        f"can't stream {name}; expected RNN, LSTM, GRU and MGU layers (throughtime's or torch.nn's), nn.Linear, an nn.Embedding "
        f"at the beginning, and all of them in an nn.Sequential{_in_sequence(module)}"
    )


def _in_sequence(module: nn.Module) -> str:
    """Say how the layers of somebody's own module are given, if it has some: what its forward does besides isn't known."""
    own = [f"model.{name}" for name, _ in module.named_children()]
    if type(module).__module__.startswith("torch.") or len(own) < 2:
        return ""
    what = f"nn.Sequential({', '.join(own)})"
    return f". If {type(module).__name__} only calls its layers in turn, give {what}: it has the same weights"


def _recurrent(layer: Any, name: str, spec: Spec, zoneout: float | tuple[float, float]) -> list[RecurrentStage]:
    if layer.bidirectional:
        raise InputError(
            f"{name} is bidirectional: it needs the end of a sequence before it can begin; expected one direction"
        )
    share_c, share_h = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)
    share_c = share_c if "c" in spec.states else 0.0
    spec = spec.with_masks(zoneout_h=share_h, zoneout_c=share_c, recurrent_dropout=0.0)
    with _as_in_eval(layer):
        rows = [[_numbers(tensor, name) for tensor in row] for row in layer.all_weights]
    stages, reads, proj_size = [], layer.input_size, layer.proj_size
    for number, row in enumerate(rows):
        parameters = Parameters.from_list(row, spec.variant_parameters)
        shapes = spec.parameter_shapes(reads, layer.hidden_size, proj_size, has_bias=bool(layer.bias))
        for which, tensor in parameters.there().items():
            _check_shape(name, f"{which} in layer {number}", tensor, shapes[which])
        stages.append(RecurrentStage(spec, parameters, share_h, share_c))
        reads = proj_size or layer.hidden_size
    return stages


@contextlib.contextmanager
def _as_in_eval(module: nn.Module) -> Iterator[None]:
    """Let torch's parametrisations make the weights as in `eval()`; while training some draw them, or change as they are read."""
    own = getattr(module, "parametrizations", None)
    training = [part for part in own.modules() if part.training] if isinstance(own, nn.Module) else []
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def _check_shape(name: str, parameter: str, tensor: Tensor, expected: Sequence[int]) -> None:
    if tensor.shape != torch.Size(expected):
        raise InputError(f"{name} has a {parameter} of shape {list(tensor.shape)}; expected {list(expected)}")


def _is(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether it is of a kind, and computes as that does."""
    own = type(module)
    return isinstance(module, kind) and own.forward is kind.forward and own.__call__ is nn.Module.__call__


def _check_is_plain(module: nn.Module) -> None:
    """Check that a call of a module runs its class's `forward` and nothing else."""
    name = type(module).__name__
    if any(parameter is not None and is_lazy(parameter) for parameter in module._parameters.values()):
        raise InputError(f"{name} has no weights yet, as it wasn't called; expected a model that was")
    if module._forward_hooks or module._forward_pre_hooks:
        raise InputError(f"{name} has forward hooks, which a stream doesn't run; remove them first")
    if "forward" in vars(module):
        raise InputError(
            f"{name} has a forward of its own in place of its class's, which a stream doesn't run; remove it"
        )


def _numbers(tensor: Tensor | None, name: str) -> Tensor:
    """Return a copy, in float32 on the CPU."""
    if tensor is None:
        raise InputError(f"{name} has a weight that is None; expected a model with its weights")
    if tensor.layout != torch.strided:
        raise InputError(f"{name} has a weight that is {tensor.layout}; expected a dense one, as weight.to_dense() is")
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"{name} is {tensor.dtype}, but a stream computes in float32 at most; expected model.float()")
    if tensor.device.type == "meta":
        raise InputError(f"{name} is on the meta device and has no weights; expected a model with its weights")
    copy = tensor.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
    return copy.resolve_neg().contiguous()
