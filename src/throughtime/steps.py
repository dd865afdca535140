"""RNNCell, LSTMCell, GRUCell and MGUCell: one step of a layer at a call, drop-in for torch.nn's cells."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from throughtime import direct, quantization, spec, stack, watching
from throughtime.arguments import check_dtype, check_flags, check_sizes, check_zoneout, describe_value
from throughtime.backend import check_backend
from throughtime.errors import InputError
from throughtime.layers import as_node, draw_parameters, in_one_dtype, is_autocast, refuse_script, rnn_cell
from throughtime.request import Sequences, Stack
from throughtime.spec import Parameters

# torch's classes as they are now: somebody may put throughtime's in their places, as `torch.nn.LSTMCell = throughtime.LSTMCell`.
TORCH_RNN_CELL, TORCH_LSTM_CELL, TORCH_GRU_CELL = nn.RNNCell, nn.LSTMCell, nn.GRUCell

_TORCHS: dict[str, Callable[..., Any]] = {
    "rnn_tanh": torch.rnn_tanh_cell,
    "rnn_relu": torch.rnn_relu_cell,
    "lstm": torch.lstm_cell,
    "gru": torch.gru_cell,
}
_OWN = ("_spec", "_names", "backend", "layer_norm", "zoneout")

_ARGUMENTS = """
    Args:
        input_size: I.
        hidden_size: H.
        bias: Whether there are `bias_ih` and `bias_hh`.
        device: Where the parameters are made.
        dtype: What the parameters are.
        backend: "auto", or a name of `throughtime.backends()` that is insisted on.
        layer_norm: As a layer's; it brings `gain_ih` and `gain_hh`, for an LSTM `gain_c` and `shift_c`.
        zoneout: As a layer's; units are drawn anew in each call while training.

    `forward(input, hx=None)` takes `input` (B, I), or (I,) unbatched, and the state before, (B, H) or (H,), zeros if not given.
    What a layer draws once for all steps of a sequence, `recurrent_dropout` and `weight_drop`, is the caller's.

    Parameters have torch's names, shapes and initialisation U(−1/√H, 1/√H), so state_dicts exchange both ways and the same seed
    gives the same weights. They are those of a layer of one direction, without "_l0".

    Without gradient, in float32 or float64 on the CPU, "auto" takes the kernels: a step has the bits of the layer's own. Elsewhere
    it takes torch's own call, where torch has such a cell (no variants, no `reset_after=False`), since around a single step ours
    would take longer. Under torch.autocast that call does what it does for torch's cells; all else computes in the parameters'
    dtype.

    Raises:
        ValueError: A size, a probability or a number of dimensions is wrong.
        TypeError: An argument is of the wrong type.
        RuntimeError: A tensor's shape, dtype or device doesn't fit.
        NotImplementedError: The backend that is insisted on can't serve a call.
"""


class Cell(nn.RNNCellBase):
    """What the cells share: parameters, checks, and who takes the step."""

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
        nn.Module.__init__(self)  # torch's class would make parameters of its own
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

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":
            quantization.refuse(self)
            value = None
        super().__setattr__(name, value)

    @property
    def cell(self) -> str:
        """The cell's name, with those variants that change its equations or bring parameters."""
        return self._spec.name

    @property
    def mode(self) -> str:
        """The same as a layer's `mode`: one of torch's names where torch has such a cell, otherwise another."""
        return (self._spec.name + "+zoneout" * self._has_zoneout).upper()

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters as a layer has them: of one layer and direction, in torch's order, then those that a variant brings."""
        return [[getattr(self, name) for name in self._names]]

    @property
    def _has_zoneout(self) -> bool:
        return self.zoneout not in (0.0, (0.0, 0.0))

    def reset_parameters(self) -> None:
        """Draw every parameter from U(−1/√H, 1/√H), in torch.nn's order; set gains to 1 and `shift_c` to 0."""
        draw_parameters(self, self.hidden_size)

    def extra_repr(self) -> str:
        """Name the sizes, and the options that differ from their defaults."""
        defaults = {
            "bias": True,
            "nonlinearity": "tanh",
            "reset_after": True,
            "backend": "auto",
            "layer_norm": False,
            "peepholes": False,
            "coupled": False,
            "zoneout": 0.0,
        }
        options = [
            f"{name}={given}" for name, value in defaults.items() if (given := getattr(self, name, value)) != value
        ]
        return ", ".join([str(self.input_size), str(self.hidden_size), *options])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state if "_spec" in state else fields_from_torch(type(self), state))

    def __prepare_scriptable__(self) -> Any:
        """Say what to do instead of torch.jit.script."""
        refuse_script(self)

    def _step(self, input: Tensor, state: tuple[Tensor, ...] | None) -> Any:
        """Return the state after a step: h, or (h, c)."""
        if direct.is_served(self._parameters, input, state):
            final = self._step_directly(input, state)
            if final is not None:
                return final if len(final) == 2 else final[0]
        if not all(map(_has_rows, (input, *(state or ())))):
            if isinstance(input, Proxy) or any(isinstance(tensor, Proxy) for tensor in state or ()):
                return self._as_node(input, state)
            self._check_axes(input, state)
        if input.dim() == 1:
            state = None if state is None else tuple([tensor.unsqueeze(0) for tensor in state])
            final = self._step_batch(input.unsqueeze(0), state)
            return (final[0].squeeze(0), final[1].squeeze(0)) if isinstance(final, tuple) else final.squeeze(0)
        return self._step_batch(input, state)

    def _step_directly(self, input: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        """Serve what one native call can, or return `None`."""
        if input.dim() != 2 or input.shape[1] != self.input_size:
            return None
        if self.zoneout != 0.0 or self.backend not in ("auto", "native"):
            return None
        shape = input.shape[0], self.hidden_size
        if state is None:
            final = tuple([input.new_zeros(shape) for _ in self._spec.states])
        elif {s.shape for s in state} == {shape}:
            final = tuple([s.clone(memory_format=torch.contiguous_format) for s in state])
        else:
            return None
        sizes = direct.sizes_of_cell(self._spec, self.input_size, self.hidden_size, "bias_ih" in self._names)
        return final if direct.forward(sizes, self._parameters, input.contiguous(), None, final) else None

    def _as_node(self, input: Any, state: tuple[Any, ...] | None) -> Any:
        """Stand as one node in a graph of torch.fx, as torch.nn's cells do."""
        is_pair = len(self._spec.states) == 2
        node = as_node(self, (input,) if state is None else (input, state if is_pair else state[0]), {})
        return (node[0], node[1]) if is_pair else node

    def _check_axes(self, input: Tensor, state: tuple[Tensor, ...] | None) -> None:
        """Check that there are tensors with one axis each, or two."""
        kind, is_batched = type(self).__name__, isinstance(input, Tensor) and input.dim() == 2
        named = {"input": input}
        if state is not None:
            names = ("hidden",) if len(state) == 1 else ("hx[0]", "hx[1]")
            named |= dict(zip(names, state, strict=True))
        for name, tensor in named.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{kind}: {name} is {describe_value(tensor)}; expected a tensor")
            if tensor.dim() not in (1, 2):
                raise ValueError(f"{kind}: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead")
            if (tensor.dim() == 2) != is_batched:
                raise RuntimeError(
                    f"{kind}: {name} has shape {list(tensor.shape)}, but the input is {list(input.shape)}; expected both "
                    "with an axis of the batch, or both without"
                )

    def _step_batch(self, input: Tensor, state: tuple[Tensor, ...] | None) -> Any:
        """Take a step by torch's own call, or as a layer's call of one step."""
        if self.mode not in _TORCHS_MODES or self.backend not in ("auto", "torch") or watching.is_transformed():
            return self._step_by_stack(input, state)
        if state is None:
            zeros = torch.zeros(input.shape[0], self.hidden_size, dtype=input.dtype, device=input.device)
            state = tuple([zeros for _ in self._spec.states])
        hx = state if len(state) == 2 else state[0]
        return _TORCHS[self._spec.base](input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)

    def _step_by_stack(self, input: Tensor, state: tuple[Tensor, ...] | None) -> Any:
        """Take a step as a layer's call of one."""
        weights = Parameters(**{name: getattr(self, name) for name in self._names})
        if "parametrizations" in self._modules:
            (weights,) = in_one_dtype([weights])
        dtype = weights.weight_ih.dtype
        check_dtype(dtype)
        self._check(input, state, dtype)
        if state is None:
            zeros = torch.zeros(input.shape[0], self.hidden_size, dtype=dtype, device=input.device)
            state = tuple([zeros for _ in self._spec.states])
        of_c, of_h = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout)
        of_c = of_c if "c" in self._spec.states else 0.0
        asked = Stack(
            spec=self._spec.with_masks(zoneout_h=of_h, zoneout_c=of_c, recurrent_dropout=0.0),
            backend=self.backend,
            zoneout=(of_c, of_h),
            zoneout_is_expected=not self.training,
        )
        initial = tuple([tensor.to(dtype)[None] for tensor in state])
        if is_autocast(input.device):
            with torch.autocast(input.device.type, enabled=False):
                _, final = stack.run(asked, [weights], Sequences(input.to(dtype)[None]), initial)
        else:
            _, final = stack.run(asked, [weights], Sequences(input[None]), initial)
        return (final[0][0], final[1][0]) if len(final) == 2 else final[0][0]

    def _check(self, input: Tensor, state: tuple[Tensor, ...] | None, dtype: torch.dtype) -> None:
        """Check what (B, I) and (B, H) must be, in torch's words where it has some; under autocast dtypes may differ."""
        if input.shape[1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {self.input_size}")
        for index, tensor in enumerate(state or ()):
            if tensor.shape[0] != input.shape[0]:
                raise RuntimeError(
                    f"Input batch size {input.shape[0]} doesn't match hidden{index} batch size {tensor.shape[0]}"
                )
            if tensor.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {tensor.shape[1]}, expected {self.hidden_size}"
                )
        device, is_cast = self.weight_ih.device, is_autocast(input.device)
        for name, tensor in {"input": input, **{f"hidden{i}": s for i, s in enumerate(state or ())}}.items():
            fits = tensor.is_floating_point() and tensor.dtype != torch.float64 if is_cast else tensor.dtype == dtype
            if not (fits or tensor.dtype == dtype) or tensor.device != device:
                raise RuntimeError(
                    f"{name} is {tensor.dtype} on {tensor.device}; expected {dtype} on {device}, like the parameters"
                )


_TORCHS_MODES = frozenset(name.upper() for name in _TORCHS)


def _has_rows(tensor: object) -> bool:
    return type(tensor) is Tensor and tensor.dim() == 2


def fields_from_torch(kind: type[nn.Module], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a cell of ours from those of torch.nn's: an object's or a pickle's.

    Args:
        kind: What it will be.
        state: Its `__dict__`; parameters, buffers, hooks and whatever somebody has put there go along.

    Raises:
        InputError: One that somebody has put there has a name that ours need.
    """
    names = [name for name in state if name != "nonlinearity"]
    taken = [name for name in names if name in _OWN or isinstance(getattr(kind, name, None), property)]
    if taken:
        raise InputError(f"has an attribute {taken[0]!r} of somebody's, a name that throughtime's cells use themselves")
    cell = "lstm" if issubclass(kind, LSTMCell) else "gru"
    has_bias = bool(state["bias"])
    own = {
        "bias": has_bias,
        "_spec": spec.read(rnn_cell(state["nonlinearity"]) if "nonlinearity" in state else cell),
        "_names": ("weight_ih", "weight_hh", *("bias_ih", "bias_hh") * has_bias),
        "backend": "auto",
        "layer_norm": False,
        "zoneout": 0.0,
    }
    return {**{name: state[name] for name in names}, **own}


def fields_for_torch(kind: type[nn.Module], cell: Cell) -> dict[str, Any]:
    """Return the attributes of a cell of torch.nn's that computes what one of ours does, whose mode is one of torch's."""
    kept = {name: value for name, value in vars(cell).items() if name not in _OWN}
    return kept | ({"nonlinearity": cell.nonlinearity} if isinstance(cell, RNNCell) else {})


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
        own = {"backend": backend, "layer_norm": layer_norm, "zoneout": zoneout}
        super().__init__(rnn_cell(nonlinearity), input_size, hidden_size, bias=bias, device=device, dtype=dtype, **own)

    @property
    def nonlinearity(self) -> str:
        """The name of the function: "tanh" or "relu"."""
        return "relu" if self._spec.base == "rnn_relu" else "tanh"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return h_t, (B, H), or (H,) unbatched."""
        return self._step(input, None if hx is None else (hx,))


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
        if hx is not None:
            if not isinstance(hx, Proxy | tuple | list) or (not isinstance(hx, Proxy) and len(hx) != 2):
                raise TypeError(f"hx is {describe_value(hx)}; expected a pair (h, c) of tensors")
            hx = hx[0], hx[1]
        return self._step(input, hx)


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
        return self._step(input, None if hx is None else (hx,))


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
        return self._step(input, None if hx is None else (hx,))


for _cell in (RNNCell, LSTMCell, GRUCell, MGUCell):
    _cell.__doc__ = f"{_cell.__doc__}{_ARGUMENTS}"
