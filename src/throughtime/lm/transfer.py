"""Weights of a trained model for another one: the same layers, more tokens, parts that hold still."""

import re
from collections.abc import Collection

import torch
from torch import Tensor

from throughtime.errors import InputError, unknown_name
from throughtime.lm.model import LanguageModel


def take_over(source: LanguageModel, target: LanguageModel, ordinary: int) -> None:
    """Give a model the weights of another one whose vocabulary is the beginning of its own.

    What belongs to a new token (a row of the embedding, of a one-hot input or of the output layer) starts as the mean over the
    tokens that were there, so that it is about as likely as any (Hewitt, 2021).

    Args:
        source: Where the weights come from.
        target: Where they go; of the same shape but for the vocabulary and for what drops activations.
        ordinary: From which token on the source's stand for text, not for the unknown token or the end of a sequence.

    Example:
        >>> from throughtime.lm import ModelConfig
        >>> small, large = (LanguageModel(ModelConfig(vocabulary_size=v, hidden_size=8)) for v in (5, 7))
        >>> take_over(small, large, ordinary=1)
        >>> bool((large.output.bias[:5] == small.output.bias).all())
        True
    """
    found = {_plain(name): tensor for name, tensor in source.state_dict().items()}
    for name, tensor in target.state_dict().items():
        tensor.copy_(_widened(found[_plain(name)], tensor.shape, ordinary))


def _plain(name: str) -> str:
    """Return a parameter's name as it is where layers aren't apart for locked dropout between them."""
    return re.sub(r"^recurrent\.layers\.(\d+)\.(.*)_l0$", r"recurrent.\2_l\1", name)


def _widened(tensor: Tensor, shape: torch.Size, ordinary: int) -> Tensor:
    """Return a tensor that has as many tokens as a shape, along the one dimension that differs."""
    for dim, (there, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
        if there != wanted:
            known = tensor.narrow(dim, min(ordinary, there - 1), there - min(ordinary, there - 1))
            sizes = [wanted - there if at == dim else -1 for at in range(tensor.dim())]
            return torch.cat([tensor, known.mean(dim, keepdim=True).expand(sizes)], dim)
    return tensor


def part_names(layers: int) -> list[str]:
    """Return the parts of a model that can hold still while the others learn: "embedding", "1" … "L", "output"."""
    return ["embedding", *map(str, range(1, layers + 1)), "output"]


def read_parts(given: str, layers: int) -> list[str]:
    """Return the parts that are named in a list with commas.

    Raises:
        InputError: There is no such part.

    Example:
        >>> read_parts("embedding,1", layers=2)
        ['embedding', '1']
    """
    parts = [part.strip() for part in given.split(",")]
    for part in parts:
        if part not in part_names(layers):
            raise unknown_name("part to --freeze", part, part_names(layers))
    return parts


def freeze(model: LanguageModel, parts: Collection[str]) -> None:
    """Let parts of a model hold still: what is tied holds still with either of its names.

    Raises:
        InputError: Nothing is left to train, or a part isn't there.
    """
    if "embedding" in parts and model.embedding is None:
        raise InputError(
            "--freeze embedding: this model's input is one-hot and has none; its input weights are layer 1's"
        )
    for name, parameter in model.named_parameters():
        if _part_of(_plain(name)) in parts:
            parameter.requires_grad_(False)
    if "output" in parts:
        model.output.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            f"--freeze {','.join(parts)}: nothing is left to train; expected some of the model's parts alone"
        )


def knows_tokens(model: LanguageModel, parts: Collection[str]) -> bool:
    """Return whether one of these parts has weights of its own for each token."""
    return "output" in parts or ("1" in parts if model.embedding is None else "embedding" in parts)


def _part_of(name: str) -> str:
    """Return the part that a parameter belongs to."""
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith(("output.", "projection.")):
        return "output"
    if above := re.match(r"recurrent\.above\.(\d+)\.", name):
        return str(int(above[1]) + 2)
    layer = re.search(r"_l(\d+)$", name)
    return str(int(layer[1]) + 1 if layer else 1)
