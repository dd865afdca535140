"""RNN, LSTM and GRU: drop-in for torch.nn's, with `lengths=`, `reset=` and a choice of backend."""

import functools
import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer
from torch.nn.utils.rnn import PackedSequence

from throughtime import direct, episodes, quantization, spec, stack, watching
from throughtime.arguments import (
    as_tensor,
    check_dropout,
    check_dtype,
    check_embedding,
    check_flags,
    check_lengths,
    check_marks,
    check_no_projection,
    check_order,
    check_probabilities,
    check_projection,
    check_recompute_every,
    check_sizes,
    check_zoneout,
    describe_value,
    is_served,
)
from throughtime.backend import check_backend
from throughtime.errors import InputError, unknown_name
from throughtime.kernels.native import new
from throughtime.request import Sequences, Stack
from throughtime.rnn_base import TORCH_LSTM, RNNBase
from throughtime.skipping import Skipping
from throughtime.spec import Parameters

_ID_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)

_ARGUMENTS = """
    Args:
        input_size: I, the width of x_t.
        hidden_size: H.
        num_layers: L; each layer but the first reads the outputs of the one below.
        bias: Whether there are `bias_ih` and `bias_hh`.
        batch_first: Whether input and output are (B, T, ·); states stay (L · directions, B, ·), as in torch.nn.
        dropout: Probability of dropping an output of each layer but the last, while training.
        bidirectional: Run each layer both ways and join the outputs.
        device: Where the parameters are made.
        dtype: What the parameters are.
        backend: "auto" takes the fastest that is right; a name of `throughtime.backends()` insists on it, and calls that
            it can't serve raise NotImplementedError.
        layer_norm: Layer normalisation of W_ih x, of W_hh h and of an LSTM's c (Ba et al., 2016). Its shifts are `bias_ih` and
            `bias_hh`, and it brings `gain_ih_l0`, `gain_hh_l0` (G·H,), for an LSTM `gain_c_l0` and `shift_c_l0` (H,).
        zoneout: Probability, below 1, with which each unit keeps its old value in a step while training; otherwise the state is
            the expectation of that (Krueger et al., 2017).
        recurrent_dropout: Probability, below 1, with which each unit of h is hidden from W_hh, in all of a sequence's steps alike
            and while training (variational dropout: Gal & Ghahramani, 2016). Others are multiplied by 1/(1 − p).
        weight_drop: The same for each element of `weight_hh`, drawn anew in each call (Merity et al., 2018).
        recompute_every: Keep for the backward pass only the state, in every so many steps, and compute the rest again in it, a
            segment at a time: memory O(T/k + k) instead of O(T) beside input and output, for about a third more time. 0 keeps it
            all. Gradients are the same to the bit; segments are whole stretches of steps (4 MB), so a k below one counts as one.

    `forward(input, hx=None, *, lengths=None, mask=None, reset=None, reset_to=None, embedding=None)`:

    - `input`: (T, B, I), (B, T, I) if `batch_first`, (T, I) unbatched, or a PackedSequence; the output has the same form.
      Or token ids, integers, the same without the axis I: each stands for a one-hot vector, so that W_ih x is a column of
      W_ih, and I the size of the vocabulary.
    - `hx`: the initial state, zeros if not given.
    - `lengths`: steps in each row, integers (B,) in any order, 0 ≤ length ≤ T: a tensor on any device, a list or a numpy array.
      Outputs past a row's end are zero, and its final state is the state at its end.
    - `mask`: instead, bool, (T, B), or (B, T) if `batch_first`, or (T,) unbatched: true at the steps that are read. The others
      are passed over wherever they are: the state goes on as it is, and the output there is zero.
    - `reset`: bool, (T, B), or (B, T) if `batch_first`, or (T,) unbatched. Where true, a new sequence begins at that step:
      the state before it is `reset_to`. A reverse direction starts anew on the other side of the same boundary.
    - `reset_to`: the state that sequences begin with after a reset, in the form of `hx`; its batch may be 1, for a state that is
      learned. Zeros if not given, whatever `hx` is: so a state that is carried over from the window before ends with its own
      sequence. `reset_to=hx` goes back to the initial state.
    - `embedding`: (V, I), such as `nn.Embedding.weight`: x is the row of each token's id. Where V is at most the number of
      tokens, W_ih Eᵀ is made once instead of a product for each token.

    Under torch.autocast every cell computes in the autocast dtype: output and final state have it, and a given state may
    have it or the parameters' dtype. Gradients have the dtype of what they belong to.

    Parameters have torch's names, shapes and initialisation U(−1/√H, 1/√H), so state_dicts exchange both ways and the same
    seed gives the same weights. Gains begin at 1 and `shift_c` at 0. What is dropped is drawn from torch's generator, so
    `torch.manual_seed` repeats it, whatever the number of threads. Kernels and equations get the same masks; torch's own call draws
    its own, and `dropout` between layers draws others for packed rows than for `lengths`, since there are fewer.

    Raises:
        ValueError: A size, a probability, a length or a number of dimensions is wrong.
        TypeError: An argument or a tensor is of the wrong type.
        IndexError: A token id is negative or too large.
        RuntimeError: A tensor's shape doesn't fit, as in torch.nn.
"""


class _Given(NamedTuple):
    """What a call may be given besides input and states."""

    lengths: Tensor | None
    mask: Tensor | None
    reset: Tensor | None
    embedding: Tensor | None


class Recurrent(RNNBase):
    """What RNN, LSTM and GRU share: parameters, checks, and the forms in which input and state come and go."""

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int = 0,
        device: Any,
        dtype: Any,
        backend: str,
        layer_norm: bool,
        zoneout: float | tuple[float, float],
        recurrent_dropout: float,
        weight_drop: float,
        recompute_every: int,
    ) -> None:
        nn.Module.__init__(self)  # torch's RNNBase would make parameters and caches of its own
        self.input_size, self.hidden_size, self.num_layers = check_sizes(
            input_size=input_size, hidden_size=hidden_size, num_layers=num_layers
        )
        self.bias, self.batch_first, self.bidirectional, self.layer_norm = check_flags(
            bias=bias, batch_first=batch_first, bidirectional=bidirectional, layer_norm=layer_norm
        )
        check_dropout(dropout, num_layers)
        check_probabilities(recurrent_dropout=recurrent_dropout, weight_drop=weight_drop)
        self.proj_size = check_projection(proj_size, self.hidden_size)
        check_backend(backend)
        self._spec = spec.read(spec.name_of(cell, layer_norm=self.layer_norm))
        self.dropout = float(dropout)
        self.backend = backend
        self.zoneout = check_zoneout(zoneout, has_pair="c" in self._spec.states)
        self.recurrent_dropout = float(recurrent_dropout)
        self.weight_drop = float(weight_drop)
        self.recompute_every = check_recompute_every(recompute_every)
        self._names = self._make_parameters(device, dtype)
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, quantization.accepted(self, value) if name == "qconfig" else value)

    @property
    def cell(self) -> str:
        """The cell's name, with those variants that change its equations or bring parameters."""
        return self._spec.name

    def _make_parameters(self, device: Any, dtype: Any) -> list[dict[str, str]]:
        """Register the parameters in torch's order; return for each layer and direction their names, by those in `Parameters`."""
        directions = 2 if self.bidirectional else 1
        names = []
        for layer in range(self.num_layers):
            width = self.input_size if layer == 0 else self.output_size * directions
            shapes = self._spec.parameter_shapes(width, self.hidden_size, self.proj_size, has_bias=self.bias)
            for suffix in ("", "_reverse")[:directions]:
                own = {name: f"{name}_l{layer}{suffix}" for name in shapes}
                for name, shape in shapes.items():
                    self.register_parameter(own[name], nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                names.append(own)
        return names

    @property
    def output_size(self) -> int:
        """P, the width of h in one direction: `proj_size` where there is a projection, else `hidden_size`."""
        return self.proj_size or self.hidden_size

    @property
    def _first_weight(self) -> Tensor:
        return getattr(self, self._names[0]["weight_ih"])

    def reset_parameters(self) -> None:
        """Draw every parameter from U(−1/√H, 1/√H), in torch.nn's order; set gains to 1 and `shift_c` to 0."""
        draw_parameters(self, self.hidden_size)

    def extra_repr(self) -> str:
        """Name the sizes, and the options that differ from their defaults."""
        defaults = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
            "proj_size": 0,
            "backend": "auto",
            "layer_norm": False,
            "peepholes": False,
            "coupled": False,
            "zoneout": 0.0,
            "recurrent_dropout": 0.0,
            "weight_drop": 0.0,
            "recompute_every": 0,
        }
        options = [
            f"{name}={given}" for name, value in defaults.items() if (given := getattr(self, name, value)) != value
        ]
        return ", ".join([str(self.input_size), str(self.hidden_size), *options])

    def _run(
        self,
        input: Tensor | PackedSequence,
        state: tuple[Tensor, ...] | None,
        reset_to: tuple[Tensor, ...] | None,
        given: "_Given",
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...]]:
        """Bring every form of input to (T, B, I), ids (T, B) or packed, run the stack, and give the form back."""
        if isinstance(input, Proxy):
            return self._run_symbolic(input, state, reset_to, given)
        if reset_to is None and all(option is None for option in given):
            made = self._run_directly(input, state)
            if made is not None:
                return made
        elif reset_to is None and given.lengths is not None and all(option is None for option in given[1:]):
            made = self._run_directly(input, state, given.lengths)
            if made is not None:
                return made
        check_dtype(self._first_weight.dtype)
        if isinstance(input, PackedSequence):
            if any(option is not None for option in (given.lengths, given.mask, given.reset, reset_to)):
                raise ValueError(
                    "a PackedSequence carries its own lengths; give lengths=, mask= and reset= with padded input"
                )
            return self._run_packed(input, state, given.embedding)
        if not isinstance(input, Tensor):
            raise TypeError(f"input is {describe_value(input)}; expected a tensor or a PackedSequence")
        lengths, mask, reset, embedding = given
        given = _Given(
            as_tensor("lengths", lengths, torch.int64, input.device),
            as_tensor("mask", mask, torch.bool, input.device),
            as_tensor("reset", reset, torch.bool, input.device),
            embedding,
        )
        axes = input.dim() - 1 if not _are_ids(input) else input.dim()
        if axes not in (1, 2):
            raise ValueError(f"{self._kind}: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
        if axes == 1:
            return self._run_unbatched(input, state, reset_to, given)
        if not self.batch_first:
            return self._run_padded(input, state, reset_to, given)
        mask, reset = (m.T if m is not None and m.dim() == 2 else m for m in (given.mask, given.reset))
        input = input.transpose(0, 1)
        output, final = self._run_padded(input, state, reset_to, given._replace(mask=mask, reset=reset))
        return output.transpose(0, 1), final

    def _run_padded(
        self,
        input: Tensor,
        state: tuple[Tensor, ...] | None,
        reset_to: tuple[Tensor, ...] | None,
        given: "_Given",
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Check all that is given, and serve (T, B, I) or ids (T, B)."""
        dtype, device = self._computed_dtype(input.device), input.device
        input = self._check_input(input, 2, given.embedding, dtype)
        steps, rows = input.shape[:2]
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        goes_back = _are_same(state, reset_to)
        fresh = () if goes_back else self._check_state(reset_to, input, rows, dtype, "reset_to")
        state = self._check_state(state, input, rows, dtype)
        lengths = check_lengths(given.lengths, steps, rows, device, self.batch_first)
        check_marks("mask", given.mask, steps, rows, device, self.batch_first)
        check_marks("reset", given.reset, steps, rows, device, self.batch_first)
        if given.mask is not None and lengths is not None:
            raise ValueError("lengths= and mask= are both given; expected one of them")
        sequences = Sequences(input, lengths, given.reset, embedding=given.embedding)
        skipping = None if given.mask is None else Skipping.by(given.mask)
        if skipping is not None:
            sequences = skipping.take(sequences)
        if given.reset is None or goes_back:
            output, final = stack.run(self._stack(), self._weights(), sequences, state)
        else:
            output, final = episodes.run(self._stack(), self._weights(), sequences, state, fresh)
        return (output if skipping is None else skipping.join(output)), final

    def _run_symbolic(
        self,
        input: Proxy,
        state: tuple[Tensor, ...] | None,
        reset_to: tuple[Tensor, ...] | None,
        given: "_Given",
    ) -> Any:
        """Stand as one node in a graph of torch.fx, as torch.nn's layers do."""
        is_pair = len(self._spec.states) == 2
        hx, fresh = (s if s is None or is_pair else s[0] for s in (state, reset_to))
        named = {name: option for name, option in {**given._asdict(), "reset_to": fresh}.items() if option is not None}
        node = as_node(self, (input,) if hx is None else (input, hx), named)
        return node[0], (node[1][0], node[1][1]) if is_pair else (node[1],)

    def __prepare_scriptable__(self) -> Any:
        """Say what to do instead of torch.jit.script."""
        refuse_script(self)

    def _run_directly(
        self, input: Tensor | PackedSequence, state: tuple[Tensor, ...] | None, lengths: object = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...]] | None:
        """Serve what one native call can, or return `None`. Rows that end early it can't; lengths that are all T say nothing."""
        drops = self.training and (self.dropout or self.recurrent_dropout or self.weight_drop)
        if drops or self.zoneout != 0.0 or self.backend not in ("auto", "native"):
            return None
        if isinstance(input, PackedSequence):
            return self._run_packed_directly(input, state) if lengths is None else None
        if not direct.is_served(self._parameters, input, state) or input.dim() != 3:
            return None
        if self.batch_first:
            input = input.transpose(0, 1)
        if lengths is not None and not _are_all(lengths, input.shape[1], input.shape[0]):
            return None
        made = self._compute_directly(input, state)
        if made is None or not self.batch_first:
            return made
        return made[0].transpose(0, 1), made[1]

    def _run_packed_directly(
        self, packed: PackedSequence, state: tuple[Tensor, ...] | None
    ) -> tuple[PackedSequence, tuple[Tensor, ...]] | None:
        """Serve a PackedSequence whose rows are all equally long: it is (T, B, I) with its first two axes in one."""
        data, batch_sizes, order, back = packed
        if not direct.is_served(self._parameters, data, state):
            return None
        if (order is None) is not (back is None):
            return None
        if order is not None and state is not None:  # whose rows would have to be moved before they are checked
            return None
        steps = len(batch_sizes)
        rows = len(data) // max(1, steps)
        if any(places is not None and places.shape != (rows,) for places in (order, back)):
            return None
        if data.dim() != 2 or steps * rows != len(data) or not _are_all(batch_sizes, steps, rows):
            return None
        made = self._compute_directly(data.unflatten(0, (steps, rows)), state)
        if made is None:
            return None
        output, final = made
        if back is not None:
            final = tuple([s.index_select(1, back) for s in final])
        return PackedSequence(output.flatten(0, 1), batch_sizes, order, back), final

    def _compute_directly(
        self, input: Tensor, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Compute (T, B, I), of which `direct.is_served` is true, in one native call, or return `None`."""
        steps, rows, features = input.shape
        if features != self.input_size:
            return None
        given = self.input_size, self.hidden_size, self.proj_size, self.num_layers, self.bidirectional, self.bias
        sizes = direct.sizes_of_layers(self._spec, *given)
        count, width = self.num_layers * sizes.directions, self.output_size
        if count != len(self._names) or self.bias is not ("bias_ih" in self._names[0]):
            return None
        shapes = ((count, rows, width), (count, rows, self.hidden_size))[: len(self._spec.states)]
        if state is None:
            final = tuple([input.new_zeros(shape) for shape in shapes])
        elif all(s.shape == shape for s, shape in zip(state, shapes, strict=True)):
            final = tuple([s.clone(memory_format=torch.contiguous_format) for s in state])
        else:
            return None
        output = new(input, steps, rows, sizes.directions * width)
        return (output, final) if direct.forward(sizes, self._parameters, input.contiguous(), output, final) else None

    def _run_packed(
        self, packed: PackedSequence, state: tuple[Tensor, ...] | None, embedding: Tensor | None
    ) -> tuple[PackedSequence, tuple[Tensor, ...]]:
        """Serve a PackedSequence. Its state is in the caller's order of rows; inside, in the order of the packed ones."""
        data, batch_sizes, order, back = packed
        dtype = self._computed_dtype(data.device)
        data = self._check_input(data, 1, embedding, dtype)
        check_order(order, back)
        rows = int(batch_sizes[0]) if order is None else len(order)  # a graph that is traced has no values to look at
        state = self._check_state(state, data, rows, dtype)
        if order is not None:
            state = tuple(s.index_select(1, order) for s in state)
        sequences = Sequences(data, batch_sizes=batch_sizes, order=order, embedding=embedding)
        output, final = stack.run(self._stack(), self._weights(), sequences, state)
        if back is not None:
            final = tuple(s.index_select(1, back) for s in final)
        return PackedSequence(output, batch_sizes, order, back), final

    def _stack(self) -> Stack:
        """Say what to run, apart from its tensors."""
        of_c, of_h = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout)
        of_c = of_c if "c" in self._spec.states else 0.0
        recurrent_dropout = self.recurrent_dropout if self.training else 0.0
        return Stack(
            spec=self._spec.with_masks(zoneout_h=of_h, zoneout_c=of_c, recurrent_dropout=recurrent_dropout),
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
            zoneout=(of_c, of_h),
            zoneout_is_expected=not self.training,
            recurrent_dropout=recurrent_dropout,
            recompute_every=self.recompute_every,
        )

    def _weights(self) -> list[Parameters]:
        """Return the parameters of each layer and direction, those in each `weight_hh` dropped while training."""
        self._check_fields()
        weights = [Parameters(**{name: getattr(self, own) for name, own in row.items()}) for row in self._names]
        if "parametrizations" in self._modules:
            weights = in_one_dtype(weights)
        if not self.weight_drop or not self.training:
            return weights
        if watching.is_exported_to_onnx():
            raise InputError("a layer in training, with weight_drop, can't be exported; call model.eval() first")
        return [p._replace(weight_hh=self._dropped(p.weight_hh)) for p in weights]

    def _check_fields(self) -> None:
        """Check that nobody has set a number of layers, or of directions, or biases, that there are no parameters for."""
        directions, has_bias = 2 if self.bidirectional else 1, "bias_ih" in self._names[0]
        if self.num_layers * directions == len(self._names) and self.bias == has_bias:
            return
        raise InputError(
            f"num_layers = {self.num_layers}, bidirectional = {self.bidirectional}, bias = {self.bias}, but the layer was made "
            f"with parameters {self._names[0]['weight_ih']} … {list(self._names[-1].values())[-1]}; make a new layer instead"
        )

    def _dropped(self, weight: Tensor) -> Tensor:
        p = self.weight_drop
        return (weight / (1 - p)).masked_fill(stack.draw_mask(p, weight.shape, weight.device), 0)

    def _run_unbatched(
        self,
        input: Tensor,
        state: tuple[Tensor, ...] | None,
        reset_to: tuple[Tensor, ...] | None,
        given: "_Given",
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...]]:
        """Serve a single sequence, (T, I) or ids (T,), as a batch of one."""
        axis = 0 if self.batch_first else 1
        lengths = given.lengths
        mask, reset = (m.unsqueeze(axis) if m is not None and m.dim() == 1 else m for m in (given.mask, given.reset))
        hx = _as_batch("hx", state)
        output, final = self._run(
            input.unsqueeze(axis),
            hx,
            hx if _are_same(state, reset_to) else _as_batch("reset_to", reset_to),
            _Given(
                lengths.reshape(1) if lengths is not None and lengths.numel() == 1 else lengths,
                mask,
                reset,
                given.embedding,
            ),
        )
        assert isinstance(output, Tensor)
        return output.squeeze(axis), tuple(tensor.squeeze(1) for tensor in final)

    @property
    def _kind(self) -> str:
        return type(self).__name__

    def _computed_dtype(self, device: torch.device) -> torch.dtype:
        """Dtype of output and state: the parameters', or under torch.autocast, which leaves float64 alone, that one's."""
        dtype = self._first_weight.dtype
        if is_autocast(device) and dtype != torch.float64:
            return torch.get_autocast_dtype(device.type)
        return dtype

    def _check_input(self, input: Tensor, axes: int, embedding: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return floats, (·, I) of so many axes before I, in the computation's dtype, and ids as int64."""
        if not _are_ids(input):
            if embedding is not None:
                raise ValueError(f"embedding= is for token ids, but the input is {input.dtype}, {input.dim()}-D")
            self._check_features(input, axes + 1)
            return input.to(dtype)
        weight = self._first_weight
        if input.dim() != axes:
            raise RuntimeError(f"token ids must have {axes} dimensions here, got {input.dim()}")
        if embedding is not None:
            check_embedding(embedding, self.input_size, weight.dtype)
        tensors = {"token ids are": input} if embedding is None else {"token ids are": input, "embedding is": embedding}
        for name, tensor in tensors.items():
            if tensor.device != weight.device:
                raise RuntimeError(
                    f"{name} on {tensor.device}, but the parameters are on {weight.device}; move one of them with .to()"
                )
        return input.to(torch.int64)

    def _check_features(self, input: Tensor, dims: int) -> None:
        weight = self._first_weight
        dtypes = input.dtype, weight.dtype
        is_castable = input.is_floating_point() and torch.float64 not in dtypes
        if dtypes[0] != dtypes[1] and not (is_castable and is_autocast(input.device)):
            of_model = f", or convert model: model.to({input.dtype})" if is_served(input.dtype) else ""
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}){of_model}"
            )
        if input.dim() != dims:
            raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )
        if input.device != weight.device:
            raise RuntimeError(
                f"input is on {input.device}, but the parameters are on {weight.device}; move one of them with .to()"
            )

    def _check_state(
        self, state: tuple[Tensor, ...] | None, input: Tensor, rows: int, dtype: torch.dtype, whose: str = "hx"
    ) -> tuple[Tensor, ...]:
        """Return a state in the computation's dtype, zeros where none was given; of `reset_to` one row may stand for all."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        shapes = [(count, rows, self.output_size), (count, rows, self.hidden_size)][: len(self._spec.states)]
        weight = self._first_weight
        if state is None:
            return tuple(torch.zeros(shape, dtype=dtype, device=input.device) for shape in shapes)
        for index, (tensor, shape) in enumerate(zip(state, shapes, strict=True)):
            name = whose if len(shapes) == 1 else f"{whose}[{index}]"
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is {describe_value(tensor)}; expected a tensor")
            if tensor.dim() != 3:
                raise RuntimeError(f"For batched 3-D input, {name} should also be 3-D but got {tensor.dim()}-D tensor")
            if tensor.shape != shape and (whose == "hx" or tensor.shape != (shape[0], 1, shape[2])):
                raise RuntimeError(f"Expected {name} size {shape}, got {list(tensor.shape)}")
            if tensor.dtype not in (weight.dtype, dtype) or tensor.device != input.device:
                raise RuntimeError(
                    f"{name} is {tensor.dtype} on {tensor.device}; expected {weight.dtype} on {input.device}, like the rest"
                )
        return tuple(tensor.to(dtype).expand(shape) for tensor, shape in zip(state, shapes, strict=True))


class RNN(Recurrent):
    """Simple recurrent network: h_t = tanh(W_ih x_t + b_ih + W_hh h_{t−1} + b_hh).

    Use it as `torch.nn.RNN`. `nonlinearity` is "tanh" or "relu"; the equation stands in `throughtime.cells.rnn`.

    Example:
        >>> import torch, throughtime
        >>> layer = throughtime.RNN(input_size=5, hidden_size=8)
        >>> output, h = layer(torch.randn(20, 3, 5), lengths=torch.tensor([20, 0, 7]))
        >>> output.shape, h.shape
        (torch.Size([20, 3, 8]), torch.Size([1, 3, 8]))
    """

    def __init__(  # noqa: PLR0917 as torch.nn has it
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_drop: float = 0.0,
        recompute_every: int = 0,
        proj_size: None = None,
    ) -> None:
        check_no_projection(proj_size)
        super().__init__(
            rnn_cell(nonlinearity),
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
            backend=backend,
            layer_norm=layer_norm,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            weight_drop=weight_drop,
            recompute_every=recompute_every,
        )

    @property
    def nonlinearity(self) -> str:
        """The name of the function: "tanh" or "relu". What is set is what is computed."""
        return "relu" if self._spec.base == "rnn_relu" else "tanh"

    @nonlinearity.setter
    def nonlinearity(self, nonlinearity: str) -> None:
        self.mode = rnn_cell(nonlinearity).upper()

    def extra_repr(self) -> str:
        """Name the sizes, and the options that differ from their defaults."""
        return super().extra_repr() + (", nonlinearity=relu" if self.nonlinearity == "relu" else "")

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        reset_to: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the layer: return the output and h at each row's end, (L · directions, B, H)."""
        state, fresh = (None if s is None else (s,) for s in (hx, reset_to))
        output, (h,) = self._run(input, state, fresh, _Given(lengths, mask, reset, embedding))
        return output, h


class LSTM(Recurrent):
    """Long short-term memory: c_t = f ⊙ c_{t−1} + i ⊙ g, h_t = o ⊙ tanh(c_t); gates in the order i f g o.

    Use it as `torch.nn.LSTM`; `proj_size` P > 0 projects h to that width. `hx` and the final state are pairs (h, c). The
    equations stand in `throughtime.cells.lstm`; `throughtime.init` has forget-gate and chrono initialisation.

    `peepholes` lets i and f see c_{t−1} and o see c_t, each unit its own (Gers & Schmidhuber, 2000): `weight_ch_l0` (3·H,), cut
    i f o. `coupled` makes i = 1 − f (CIFG: Greff et al., 2017): the gates are then f g o, so `weight_ih_l0` is (3·H, I) and so on,
    and the peepholes (2·H,), f o. `zoneout` may be a pair, for c and for h.

    Example:
        >>> import torch, throughtime
        >>> layer = throughtime.LSTM(input_size=5, hidden_size=8, batch_first=True)
        >>> reset = torch.zeros(3, 20, dtype=torch.bool)
        >>> reset[1, 10] = True  # in row 1 an episode begins at step 10
        >>> output, (h, c) = layer(torch.randn(3, 20, 5), reset=reset)
        >>> output.shape, c.shape
        (torch.Size([3, 20, 8]), torch.Size([1, 3, 8]))
    """

    def __init__(  # noqa: PLR0917 as torch.nn has it
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
        layer_norm: bool = False,
        peepholes: bool = False,
        coupled: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        weight_drop: float = 0.0,
        recompute_every: int = 0,
    ) -> None:
        peepholes, coupled = check_flags(peepholes=peepholes, coupled=coupled)
        super().__init__(
            spec.name_of("lstm", coupled=coupled, peepholes=peepholes),
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=proj_size,
            device=device,
            dtype=dtype,
            backend=backend,
            layer_norm=layer_norm,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            weight_drop=weight_drop,
            recompute_every=recompute_every,
        )

    @property
    def peepholes(self) -> bool:
        """Whether the gates see c."""
        return "peepholes" in self._spec.variants

    @property
    def coupled(self) -> bool:
        """Whether the input gate is what the forget gate leaves."""
        return self._spec.is_coupled

    # torch.nn's LSTM takes pairs here, where its other layers take h.
    check_forward_args = TORCH_LSTM.check_forward_args  # pyright: ignore[reportAssignmentType]
    permute_hidden = TORCH_LSTM.permute_hidden  # pyright: ignore[reportAssignmentType]
    get_expected_cell_size = TORCH_LSTM.get_expected_cell_size

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        reset_to: tuple[Tensor, Tensor] | None = None,
        embedding: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run the layer: return the output and (h, c) at each row's end, (L · directions, B, P) and (…, H)."""
        for name, state in (("hx", hx), ("reset_to", reset_to)):
            if not (state is None or isinstance(state, Proxy) or (isinstance(state, tuple | list) and len(state) == 2)):
                raise TypeError(f"{name} is {describe_value(state)}; expected a pair (h_0, c_0) of tensors")
        output, (h, c) = self._run(input, hx, reset_to, _Given(lengths, mask, reset, embedding))
        return output, (h, c)


class GRU(Recurrent):
    """Gated recurrent unit: h_t = (1 − z) ⊙ n + z ⊙ h_{t−1}; gates in the order r z n.

    Use it as `torch.nn.GRU`. `reset_after=True` is torch's and cuDNN's form, n = tanh(W x + b + r ⊙ (U h + c));
    `reset_after=False` is Cho et al.'s (2014) and the textbooks', n = tanh(W x + b + U (r ⊙ h) + c). The equations stand in
    `throughtime.cells.gru`.

    Example:
        >>> import torch, throughtime
        >>> layer = throughtime.GRU(input_size=5, hidden_size=8, reset_after=False)
        >>> output, h = layer(torch.randn(20, 5))  # one sequence, unbatched
        >>> output.shape, h.shape
        (torch.Size([20, 8]), torch.Size([1, 8]))
    """

    def __init__(  # noqa: PLR0917 as torch.nn has it
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        reset_after: bool = True,
        backend: str = "auto",
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_drop: float = 0.0,
        recompute_every: int = 0,
        proj_size: None = None,
    ) -> None:
        check_no_projection(proj_size)
        (reset_after,) = check_flags(reset_after=reset_after)
        super().__init__(
            "gru" if reset_after else "gru_reset_before",
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
            backend=backend,
            layer_norm=layer_norm,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            weight_drop=weight_drop,
            recompute_every=recompute_every,
        )

    @property
    def reset_after(self) -> bool:
        """Whether the reset gate acts after the recurrent product."""
        return self._spec.base == "gru"

    def extra_repr(self) -> str:
        """Name the sizes, and the options that differ from their defaults."""
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        reset_to: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the layer: return the output and h at each row's end, (L · directions, B, H)."""
        state, fresh = (None if s is None else (s,) for s in (hx, reset_to))
        output, (h,) = self._run(input, state, fresh, _Given(lengths, mask, reset, embedding))
        return output, h


class MGU(Recurrent):
    """Minimal gated unit (Zhou et al., 2016): h_t = (1 − f) ⊙ h_{t−1} + f ⊙ tanh(W_n x + b_n + U_n (f ⊙ h_{t−1}) + c_n).

    A GRU with one gate f in place of two: two thirds of its parameters. Gates are in the order f n; the equations stand in
    `throughtime.cells.mgu`. torch.nn has no such layer, so there is no torch call for it: the kernels and the equations serve.

    Example:
        >>> import torch, throughtime
        >>> layer = throughtime.MGU(input_size=5, hidden_size=8)
        >>> output, h = layer(torch.randn(20, 3, 5))
        >>> output.shape, h.shape, layer.weight_hh_l0.shape
        (torch.Size([20, 3, 8]), torch.Size([1, 3, 8]), torch.Size([16, 8]))
    """

    def __init__(  # noqa: PLR0917 as torch.nn's GRU has it
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_drop: float = 0.0,
        recompute_every: int = 0,
    ) -> None:
        super().__init__(
            "mgu",
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
            backend=backend,
            layer_norm=layer_norm,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            weight_drop=weight_drop,
            recompute_every=recompute_every,
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        reset_to: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the layer: return the output and h at each row's end, (L · directions, B, H)."""
        state, fresh = (None if s is None else (s,) for s in (hx, reset_to))
        output, (h,) = self._run(input, state, fresh, _Given(lengths, mask, reset, embedding))
        return output, h


for _layer in (RNN, LSTM, GRU, MGU):
    _layer.__doc__ = f"{_layer.__doc__}{_ARGUMENTS}"
quantization.register(LSTM, GRU)


def as_node(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Make a call of a module one node in a graph of torch.fx. One of the arguments, or a part of one, is a `Proxy`."""
    parts = [part for one in (*arguments, *named.values()) for part in (one if isinstance(one, tuple) else (one,))]
    tracer = next(part.tracer for part in parts if isinstance(part, Proxy))
    path = tracer.path_of_module(module) if isinstance(tracer, Tracer) else ""
    if not path:
        kind = type(module).__name__
        raise TypeError(
            f"torch.fx can't trace a {kind} by itself; expected a module that has it, of which it is a node"
        )
    quantization.check_tracer(module, tracer)
    return tracer.create_proxy("call_module", path, arguments, named)


def refuse_script(module: nn.Module) -> NoReturn:
    """Say what to do instead: torch.jit.script can't read what a module does, and would exchange it in the model given."""
    raise InputError(
        f"torch.jit.script can't compile throughtime.{type(module).__name__}; script throughtime.to_torch(copy.deepcopy(model)), "
        "which has torch.nn's layers, or use torch.jit.trace or torch.export"
    )


def draw_parameters(module: nn.Module, hidden_size: int) -> None:
    """Draw every parameter from U(−1/√H, 1/√H), in torch.nn's order; set gains to 1 and `shift_c` to 0."""
    bound = 1 / math.sqrt(hidden_size)
    for name, parameter in module.named_parameters():
        if name.startswith(("gain", "shift")):
            nn.init.constant_(parameter, float(name.startswith("gain")))
        else:
            nn.init.uniform_(parameter, -bound, bound)


def in_one_dtype(weights: list[Parameters]) -> list[Parameters]:
    """Return parameters in the widest of their dtypes: under autocast a parametrization may have made some in its dtype."""
    tensors = [p for own in weights for p in own.to_list()]
    if len({t.dtype for t in tensors}) == 1:
        return weights
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors])
    return [own._replace(**{name: p.to(dtype) for name, p in own.there().items()}) for own in weights]


def rnn_cell(nonlinearity: str) -> str:
    """Return the name of an RNN's cell with a nonlinearity, "tanh" or "relu"."""
    if nonlinearity not in ("tanh", "relu"):
        raise unknown_name("nonlinearity", nonlinearity, ["tanh", "relu"])
    return f"rnn_{nonlinearity}"


def is_autocast(device: torch.device) -> bool:
    """Whether torch.autocast is on for a device; there are some that it doesn't know, as "meta"."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _as_batch(name: str, state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
    """Return the state of a single sequence as that of a batch of one."""
    for tensor in state or ():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {describe_value(tensor)}; expected a tensor")
        if tensor.dim() != 2:
            raise RuntimeError(f"For unbatched 2-D input, {name} should also be 2-D but got {tensor.dim()}-D tensor")
    return None if state is None else tuple(tensor[:, None] for tensor in state)


def _are_same(state: tuple[Tensor, ...] | None, other: tuple[Tensor, ...] | None) -> bool:
    """Whether two states are the same tensors, or none."""
    if state is None or other is None:
        return state is None and other is None
    return all(own is its for own, its in zip(state, other, strict=True))


def _are_all(counts: object, number: int, every: int) -> bool:
    """Whether these are so many counts, each of them `every`; what can't be told here, or wants a message, isn't."""
    return (
        type(counts) is Tensor
        and counts.dtype in (torch.int64, torch.int32)
        and counts.is_cpu
        and counts.shape == (number,)
        and bool((counts == every).all())
    )


def _are_ids(input: Tensor) -> bool:
    return input.dim() < 3 and input.dtype in _ID_TYPES
