"""RNNCell, LSTMCell, GRUCell and MGUCell: one step of a layer at a call, drop-in for torch.nn's cells."""

from typing import Any

import torch
from torch import Tensor, nn

from throughtime import direct, spec, stack
from throughtime.arguments import check_dtype, check_flags, check_sizes, check_zoneout, describe_value
from throughtime.backend import check_backend
from throughtime.errors import unknown_name
from throughtime.layers import computed_dtype, draw_parameters, in_one_dtype
from throughtime.request import Sequences, Stack
from throughtime.spec import Parameters

_ARGUMENTS = """
    Args:
        input_size: I.
        hidden_size: H.
        bias: Whether there are `bias_ih` and `bias_hh`.
        device: Where the parameters are made.
        dtype: What the parameters are.
        backend: As a layer's: "auto", or a name of `throughtime.backends()`.
        layer_norm: As a layer's; it brings `gain_ih` and `gain_hh`, for an LSTM `gain_c` and `shift_c`.
        zoneout: As a layer's; units are drawn anew in each call while training.

    `forward(input, hx=None)` takes `input` (B, I), or (I,) unbatched, and the state before, (B, H) or (H,), zeros if not given. What
    differs between the steps of a sequence is the caller's: a layer's `recurrent_dropout` and `weight_drop`, which are drawn once for
    all steps, are not here.

    Parameters have torch's names, shapes and initialisation U(−1/√H, 1/√H), so state_dicts exchange both ways and the same seed gives
    the same weights. A step has the bits of the layer's own.

    Raises:
        ValueError: A size, a probability or a number of dimensions is wrong.
        TypeError: An argument is of the wrong type.
        RuntimeError: A tensor's shape, dtype or device doesn't fit.
"""


class Cell(nn.Module):
    """What the cells share: parameters, checks, and the call of the kernels or of what stands for them."""

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool,
        device: Any,
        dtype: Any,
        backend: str,
        layer_norm: bool,
        zoneout: float | tuple[float, float],
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size = check_sizes(input_size=input_size, hidden_size=hidden_size)
        self.bias, self.layer_norm = check_flags(bias=bias, layer_norm=layer_norm)
        check_backend(backend)
        self.backend = backend
        self._spec = spec.read(spec.name_of(cell, layer_norm=self.layer_norm))
        self.zoneout = check_zoneout(zoneout, has_pair="c" in self._spec.states)
        shapes = self._spec.parameter_shapes(self.input_size, self.hidden_size, has_bias=self.bias)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        if not self.bias:
            self.register_parameter("bias_ih", None)
            self.register_parameter("bias_hh", None)
        self._names = tuple(shapes)
        self.reset_parameters()

    @property
    def cell(self) -> str:
        """The cell's name, with those variants that change its equations or bring parameters."""
        return self._spec.name

    def reset_parameters(self) -> None:
        """Draw every parameter from U(−1/√H, 1/√H), in torch.nn's order; set gains to 1 and `shift_c` to 0."""
        draw_parameters(self, self.hidden_size)

    def extra_repr(self) -> str:
        """Name the sizes, and the options that differ from their defaults."""
        defaults = {
            "bias": True,
            "backend": "auto",
            "layer_norm": False,
            "peepholes": False,
            "coupled": False,
            "reset_after": True,
            "zoneout": 0.0,
            "nonlinearity": "tanh",
        }
        options = [
            f"{name}={given}" for name, value in defaults.items() if (given := getattr(self, name, value)) != value
        ]
        return ", ".join([str(self.input_size), str(self.hidden_size), *options])

    def _step(self, input: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Return the state after a step."""
        if not isinstance(input, Tensor):
            raise TypeError(f"input is {describe_value(input)}; expected a tensor (B, {self.input_size})")
        if input.dim() == 2 and direct.is_served(self._parameters, input, state):
            final = self._step_directly(input, state)
            if final is not None:
                return final
        kind = type(self).__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{kind}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for index, tensor in enumerate(state or ()):
            name = "hidden" if len(self._spec.states) == 1 else f"hx[{index}]"
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is {describe_value(tensor)}; expected a tensor (B, {self.hidden_size})")
            if tensor.dim() not in (1, 2):
                raise ValueError(f"{kind}: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead")
        if input.dim() == 1:
            final = self._step(input[None], None if state is None else tuple([tensor[None] for tensor in state]))
            return tuple([tensor[0] for tensor in final])
        return self._step_by_stack(input, state)

    def _step_directly(self, input: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        """Serve what one native call can, or return `None`."""
        rows, columns = input.shape
        shape = rows, self.hidden_size
        if columns != self.input_size or self.zoneout != 0.0 or self.backend not in ("auto", "native"):
            return None
        if state is None:
            final = tuple([input.new_zeros(shape) for _ in self._spec.states])
        elif all(s.shape == shape for s in state):
            final = tuple([s.clone(memory_format=torch.contiguous_format) for s in state])
        else:
            return None
        sizes = direct.sizes_of_cell(self._spec, self.input_size, self.hidden_size, self.bias)
        return final if direct.forward(sizes, self._parameters, input.contiguous(), None, final) else None

    def _step_by_stack(self, input: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Take a step as a layer's call of one."""
        weight = self.weight_ih
        check_dtype(weight.dtype)
        dtype = computed_dtype(input.device, weight.dtype)
        self._check(input, state, dtype)
        shape = input.shape[0], self.hidden_size
        if state is None:
            state = tuple([torch.zeros(shape, dtype=dtype, device=input.device) for _ in self._spec.states])
        of_c, of_h = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout)
        of_c = of_c if "c" in self._spec.states else 0.0
        asked = Stack(
            spec=self._spec.with_masks(zoneout_h=of_h, zoneout_c=of_c, recurrent_dropout=0.0),
            backend=self.backend,
            zoneout=(of_c, of_h),
            zoneout_is_expected=not self.training,
        )
        weights = [Parameters(**{name: getattr(self, name) for name in self._names})]
        if "parametrizations" in self._modules:
            weights = in_one_dtype(weights)
        initial = tuple([tensor.to(dtype)[None] for tensor in state])
        _, final = stack.run(asked, weights, Sequences(input.to(dtype)[None]), initial)
        return tuple([tensor[0] for tensor in final])

    def _check(self, input: Tensor, state: tuple[Tensor, ...] | None, dtype: torch.dtype) -> None:
        """Check what (B, I) and (B, H) must be, in torch's words where it has some."""
        weight = self.weight_ih
        if input.shape[1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {self.input_size}")
        is_cast = dtype != weight.dtype and input.is_floating_point() and input.dtype != torch.float64
        if (input.dtype != weight.dtype and not is_cast) or input.device != weight.device:
            raise RuntimeError(
                f"input is {input.dtype} on {input.device}; expected {weight.dtype} on {weight.device}, like the parameters"
            )
        for index, tensor in enumerate(state or ()):
            if tensor.shape[0] != input.shape[0]:
                raise RuntimeError(
                    f"Input batch size {input.shape[0]} doesn't match hidden{index} batch size {tensor.shape[0]}"
                )
            if tensor.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {tensor.shape[1]}, expected {self.hidden_size}"
                )
            if tensor.dtype not in (weight.dtype, dtype) or tensor.device != input.device:
                raise RuntimeError(
                    f"hidden{index} is {tensor.dtype} on {tensor.device}; expected {weight.dtype} on {input.device}, like the rest"
                )


class RNNCell(Cell):
    """A step of a simple recurrent network: h_t = tanh(W_ih x_t + b_ih + W_hh h_{t−1} + b_hh).

    Use it as `torch.nn.RNNCell`. `nonlinearity` is "tanh" or "relu"; the equation stands in `throughtime.cells.rnn`.

    Example:
        >>> import torch, throughtime
        >>> cell, h = throughtime.RNNCell(input_size=5, hidden_size=8), None
        >>> for x in torch.randn(20, 3, 5):
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
        layer_norm: bool = False,
        zoneout: float = 0.0,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise unknown_name("nonlinearity", nonlinearity, ["tanh", "relu"])
        own = {"backend": backend, "layer_norm": layer_norm, "zoneout": zoneout}
        super().__init__(f"rnn_{nonlinearity}", input_size, hidden_size, bias=bias, device=device, dtype=dtype, **own)

    @property
    def nonlinearity(self) -> str:
        """The name of the function: "tanh" or "relu"."""
        return "relu" if self._spec.base == "rnn_relu" else "tanh"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return h_t, (B, H), or (H,) unbatched."""
        return self._step(input, None if hx is None else (hx,))[0]


class LSTMCell(Cell):
    """A step of a long short-term memory: c_t = f ⊙ c_{t−1} + i ⊙ g, h_t = o ⊙ tanh(c_t); gates in the order i f g o.

    Use it as `torch.nn.LSTMCell`; `hx` and the result are pairs (h, c). `peepholes`, `coupled` and a pair of `zoneout` are those of
    `throughtime.LSTM`: the peepholes are `weight_ch`.

    Example:
        >>> import torch, throughtime
        >>> cell, state = throughtime.LSTMCell(input_size=5, hidden_size=8), None
        >>> for x in torch.randn(20, 3, 5):
        ...     state = cell(x, state)
        >>> h, c = state
        >>> h.shape, c.shape
        (torch.Size([3, 8]), torch.Size([3, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
        layer_norm: bool = False,
        peepholes: bool = False,
        coupled: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
    ) -> None:
        peepholes, coupled = check_flags(peepholes=peepholes, coupled=coupled)
        name = spec.name_of("lstm", coupled=coupled, peepholes=peepholes)
        own = {"backend": backend, "layer_norm": layer_norm, "zoneout": zoneout}
        super().__init__(name, input_size, hidden_size, bias=bias, device=device, dtype=dtype, **own)

    @property
    def peepholes(self) -> bool:
        """Whether the gates see c."""
        return "peepholes" in self._spec.variants

    @property
    def coupled(self) -> bool:
        """Whether the input gate is what the forget gate leaves."""
        return self._spec.is_coupled

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return (h_t, c_t), (B, H) each, or (H,) unbatched."""
        if hx is not None and (not isinstance(hx, tuple | list) or len(hx) != 2):
            raise TypeError(f"hx is {describe_value(hx)}; expected a pair (h, c) of tensors")
        h, c = self._step(input, None if hx is None else tuple(hx))
        return h, c


class GRUCell(Cell):
    """A step of a gated recurrent unit: h_t = (1 − z) ⊙ n + z ⊙ h_{t−1}; gates in the order r z n.

    Use it as `torch.nn.GRUCell`. With `reset_after=False` the reset gate acts on h before the product, as in the textbooks (Cho et
    al., 2014). The equations stand in `throughtime.cells.gru`.

    Example:
        >>> import torch, throughtime
        >>> cell = throughtime.GRUCell(input_size=5, hidden_size=8)
        >>> cell(torch.randn(5), torch.zeros(8)).shape
        torch.Size([8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        reset_after: bool = True,
        backend: str = "auto",
        layer_norm: bool = False,
        zoneout: float = 0.0,
    ) -> None:
        (reset_after,) = check_flags(reset_after=reset_after)
        name = "gru" if reset_after else "gru_reset_before"
        own = {"backend": backend, "layer_norm": layer_norm, "zoneout": zoneout}
        super().__init__(name, input_size, hidden_size, bias=bias, device=device, dtype=dtype, **own)

    @property
    def reset_after(self) -> bool:
        """Whether the reset gate acts on the product, as torch's does, or on h before it."""
        return self._spec.base == "gru"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return h_t, (B, H), or (H,) unbatched."""
        return self._step(input, None if hx is None else (hx,))[0]


class MGUCell(Cell):
    """A step of a minimal gated unit, `throughtime.MGU`: h_t = (1 − f) ⊙ h_{t−1} + f ⊙ n; gates in the order f n.

    Example:
        >>> import torch, throughtime
        >>> cell = throughtime.MGUCell(input_size=5, hidden_size=8)
        >>> cell(torch.randn(3, 5)).shape, cell.weight_hh.shape
        (torch.Size([3, 8]), torch.Size([16, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
        layer_norm: bool = False,
        zoneout: float = 0.0,
    ) -> None:
        own = {"backend": backend, "layer_norm": layer_norm, "zoneout": zoneout}
        super().__init__("mgu", input_size, hidden_size, bias=bias, device=device, dtype=dtype, **own)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return h_t, (B, H), or (H,) unbatched."""
        return self._step(input, None if hx is None else (hx,))[0]


for _cell in (RNNCell, LSTMCell, GRUCell, MGUCell):
    _cell.__doc__ = f"{_cell.__doc__}{_ARGUMENTS}"
