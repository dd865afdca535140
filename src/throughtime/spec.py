"""What a cell's name says, and the names of its tensors. The one place where such a name is read; the equations stand in `cells`.

"lstm+peepholes+zoneout_h" is a base and its variants.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from throughtime.errors import InputError, unknown_name
from throughtime.shapes import StepHidden


class _Base(NamedTuple):
    gates: int
    states: tuple[str, ...]
    variants: tuple[str, ...]


_MASKS = ("zoneout_h", "zoneout_c", "recurrent_dropout")
_VARIANTS = ("layer_norm", "zoneout_h", "recurrent_dropout")
_BASES = {
    "rnn_tanh": _Base(1, ("h",), _VARIANTS),
    "rnn_relu": _Base(1, ("h",), _VARIANTS),
    "lstm": _Base(4, ("h", "c"), ("coupled", "peepholes", "layer_norm", *_MASKS)),
    "gru": _Base(3, ("h",), _VARIANTS),
    "gru_reset_before": _Base(3, ("h",), _VARIANTS),
    "mgu": _Base(2, ("h",), _VARIANTS),
}


class Spec(NamedTuple):
    """What a cell's name says.

    Attributes:
        name: The whole of it.
        base: The cell without variants, one of `names()`.
        variants: Their names, as given.
        gates: G, the number of H-row blocks in `weight_ih` and `weight_hh`.
        states: The parts of its state: ("h",), or ("h", "c").
        variant_parameters: Names of the parameters that the variants bring, in their order in `Parameters`.
        masks: Names of the masks that it takes, in their order in `Masks`.
    """

    name: str
    base: str
    variants: tuple[str, ...]
    gates: int
    states: tuple[str, ...]
    variant_parameters: tuple[str, ...]
    masks: tuple[str, ...]

    @property
    def is_coupled(self) -> bool:
        """Whether the input gate is what the forget gate leaves."""
        return "coupled" in self.variants

    @property
    def is_normalised(self) -> bool:
        """Whether it has layer normalisation."""
        return "layer_norm" in self.variants

    def parameter_shapes(
        self, input_size: int, hidden_size: int, proj_size: int = 0, *, has_bias: bool
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a direction's parameters, by their names in `Parameters`: in torch's order, then the variants'."""
        rows, width = self.gates * hidden_size, proj_size or hidden_size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, input_size), "weight_hh": (rows, width)}
        if has_bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        if proj_size:
            shapes |= {"weight_hr": (proj_size, hidden_size)}
        variant = {
            "weight_ch": (rows - hidden_size,),
            **dict.fromkeys(("gain_ih", "gain_hh"), (rows,)),
            **dict.fromkeys(("gain_c", "shift_c"), (hidden_size,)),
        }
        return shapes | {name: variant[name] for name in self.variant_parameters}

    def with_masks(self, **probabilities: float) -> "Spec":
        """Return the cell with those variants as well that take masks, by name, of which there is a probability."""
        masks = tuple([name for name in _MASKS if probabilities[name]])
        if not masks:
            return self
        return self._replace(name="+".join([self.name, *masks]), variants=(*self.variants, *masks), masks=masks)


@lru_cache
def read(name: str) -> Spec:
    """Read a cell's name: a base, followed by any of its variants.

    Variants are `layer_norm`, `zoneout_h` and `recurrent_dropout`, for an LSTM also `coupled`, `peepholes` and `zoneout_c`.

    Raises:
        InputError: There is no such cell or variant.

    Example:
        >>> spec = read("lstm+peepholes+zoneout_h")
        >>> spec.base, spec.gates, spec.states, spec.variant_parameters, spec.masks
        ('lstm', 4, ('h', 'c'), ('weight_ch',), ('zoneout_h',))
    """
    base, *variants = name.split("+")
    if base not in _BASES:
        raise unknown_name("cell", base, _BASES)
    gates, states, known = _BASES[base]
    if unknown := [variant for variant in variants if variant not in known]:
        raise InputError(f"a cell {base} has no variant {unknown[0]!r}; it has {', '.join(known)}")
    parameters = ["weight_ch"] * ("peepholes" in variants)
    if "layer_norm" in variants:
        parameters += ["gain_ih", "gain_hh", *(["gain_c", "shift_c"] if "c" in states else [])]
    masks = tuple(mask for mask in _MASKS if mask in variants)
    return Spec(name, base, tuple(variants), gates - ("coupled" in variants), states, tuple(parameters), masks)


def names() -> list[str]:
    """Return the names of all cells, without variants.

    Example:
        >>> names()
        ['rnn_tanh', 'rnn_relu', 'lstm', 'gru', 'gru_reset_before', 'mgu']
    """
    return list(_BASES)


def name_of(name: str, **variants: object) -> str:
    """Return the name of a cell with those further variants whose value is true.

    Example:
        >>> name_of("lstm", peepholes=True, layer_norm=False)
        'lstm+peepholes'
    """
    return "+".join([name, *(variant for variant, is_there in variants.items() if is_there)])


class Parameters(NamedTuple):
    """The weights of one layer in one direction, under torch's names and in torch's order; then those of variants.

    Absent ones are `None`. The same tuple carries gradients.

    Attributes:
        weight_ch: Peephole weights, cut like a bias: i, f, o; or f, o where the gates are coupled.
        gain_ih: Gain of the layer normalisation of W_ih x; its shift is `bias_ih`.
        gain_hh: Gain of the layer normalisation of W_hh h; its shift is `bias_hh`.
        gain_c: Gain of the layer normalisation of an LSTM's c.
        shift_c: Shift of the same.
    """

    weight_ih: Float[Tensor, "GH I"]
    weight_hh: Float[Tensor, "GH P"]
    bias_ih: Float[Tensor, "GH"] | None = None
    bias_hh: Float[Tensor, "GH"] | None = None
    weight_hr: Float[Tensor, "P H"] | None = None
    weight_ch: Float[Tensor, "_"] | None = None
    gain_ih: Float[Tensor, "GH"] | None = None
    gain_hh: Float[Tensor, "GH"] | None = None
    gain_c: Float[Tensor, "H"] | None = None
    shift_c: Float[Tensor, "H"] | None = None

    @classmethod
    def from_list(cls, tensors: list[Tensor], variant_parameters: tuple[str, ...] = ()) -> "Parameters":
        """Read the flat order: torch's own 2, 3, 4 or 5 tensors, whose number tells which there are; then the variants'.

        Args:
            tensors: The tensors that are there.
            variant_parameters: Names of the last ones, as the cell's `Spec` has them.
        """
        own = len(tensors) - len(variant_parameters)
        if not 2 <= own <= 5:
            names = ("weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr]", *variant_parameters)
            raise ValueError(f"there are {len(tensors)} parameter tensors; expected {', '.join(names)}")
        weight_hr = tensors[own - 1] if own % 2 else None
        bias_ih, bias_hh = tensors[2:4] if own > 3 else (None, None)
        of_variants = dict(zip(variant_parameters, tensors[own:], strict=True))
        return cls(tensors[0], tensors[1], bias_ih, bias_hh, weight_hr, **of_variants)

    def to_list(self) -> list[Tensor]:
        """Return the tensors that are there, in the flat order."""
        return [tensor for tensor in self if tensor is not None]

    def there(self) -> dict[str, Tensor]:
        """Return the tensors that are there, by name."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}

    def zeros(self) -> "Parameters":
        """Return an empty sum to which gradients can be added."""
        return self._replace(**{name: torch.zeros_like(tensor) for name, tensor in self.there().items()})

    def plus(self, other: "Parameters") -> "Parameters":
        """Return the sum, tensor by tensor: the Σ over t of ∂L/∂W = Σ_t ∂L_t/∂W."""
        return self._replace(**{name: tensor + other.there()[name] for name, tensor in self.there().items()})


class Masks(NamedTuple):
    """What a variant drops or keeps, drawn before the sequence; all `None` in a plain cell.

    Attributes:
        zoneout_h: Where h keeps its old value (T, B, P), bool; or, as a number (0-d), the share of it that is kept at
            every step: the expectation.
        zoneout_c: The same for an LSTM's c, (T, B, H).
        recurrent_dropout: What h_{t−1} is multiplied by as it enters W_hh, at every step: (B, P), zeros and 1/(1 − p).
    """

    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None
    recurrent_dropout: StepHidden | None = None

    @classmethod
    def from_list(cls, tensors: list[Tensor], names: tuple[str, ...]) -> "Masks":
        """Read a flat list; `names` are the cell's `masks` in its `Spec`."""
        if len(tensors) != len(names):
            raise ValueError(f"there are {len(tensors)} masks; expected {', '.join(names) or 'none'}")
        return cls(**dict(zip(names, tensors, strict=True))) if tensors else NO_MASKS

    def to_list(self) -> list[Tensor]:
        """Return those that are there, in the flat order."""
        return [mask for mask in self if mask is not None]

    def there(self) -> dict[str, Tensor]:
        """Return those that are there, by name."""
        return {name: mask for name, mask in self._asdict().items() if mask is not None}


NO_MASKS = Masks()
