"""Cells with their variants, once more and on their own: plain torch, one function a cell, no derivative written by hand."""

from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from throughtime.cells import CELLS, Parameters, find

ADDED = {"lstm": ("coupled", "peepholes", "layer_norm"), **dict.fromkeys(set(CELLS) - {"lstm"}, ("layer_norm",))}
MASKS = {"lstm": ("zoneout_h", "zoneout_c", "recurrent_dropout")}
COMBINATIONS = [  # every set of variants that change the equations or bring parameters
    "+".join([cell, *(name for name, there in zip(ADDED[cell], chosen, strict=True) if there)])
    for cell in CELLS
    for chosen in product([False, True], repeat=len(ADDED[cell]))
]


def mask_names(cell: str) -> tuple[str, ...]:
    """Masks that a cell can take."""
    return MASKS.get(cell.split("+")[0], ("zoneout_h", "recurrent_dropout"))


def random_parameters(
    name: str, inputs: int, hidden: int, bias: bool = True, projection: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """The flat list of a cell with its variants, gains about 1."""
    cell, width = find(name), projection or hidden
    rows = cell.spec.gates * hidden
    shapes = [(rows, inputs), (rows, width)] + [(rows,), (rows,)] * bias + [(projection, hidden)] * (projection > 0)
    tensors = [torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5 for shape in shapes]
    sizes = {"weight_ch": rows - hidden, "gain_ih": rows, "gain_hh": rows, "gain_c": hidden, "shift_c": hidden}
    return tensors + [
        torch.randn(sizes[extra], dtype=dtype) * 0.5 + (extra[:4] == "gain") for extra in cell.spec.variant_parameters
    ]


def random_masks(name: str, steps: int, batch: int, hidden: int, projection: int = 0, expected: bool = False):
    """The flat list of a cell's masks."""
    width, masks = projection or hidden, []
    for mask in find(name).spec.masks:
        if mask == "recurrent_dropout":
            masks.append((torch.rand(batch, width) < 0.6).double() / 0.6)
        elif expected:
            masks.append(torch.tensor(0.3, dtype=torch.float64))
        else:
            masks.append(torch.rand(steps, batch, width if mask == "zoneout_h" else hidden) < 0.4)
    return masks


def run(name: str, x: Tensor, state: list[Tensor], parameters: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Outputs (T, B, P) and the final state."""
    base, *variants = name.split("+")
    cell = find(name)
    p = Parameters.from_list(parameters, cell.spec.variant_parameters)
    mask = dict(zip(cell.spec.masks, masks, strict=True))
    h, *c = state
    outputs = []
    for t, x_t in enumerate(x):
        h_in = h * mask.get("recurrent_dropout", 1)
        w = _map(x_t, p.weight_ih, p.bias_ih, p.gain_ih)
        if base == "lstm":
            new_h, new_c = _lstm(w, h_in, c[0], p, "coupled" in variants)
            c = [_mix(mask.get("zoneout_c"), t, c[0], new_c)]
        else:
            new_h = STEPS[base](w, h_in, h, p)
        h = _mix(mask.get("zoneout_h"), t, h, new_h)
        outputs.append(h)
    return [torch.stack(outputs), h, *c]


def _mix(zoneout: Tensor | None, t: int, old: Tensor, new: Tensor) -> Tensor:
    if zoneout is None:
        return new
    return old.lerp(new, 1 - zoneout) if zoneout.dim() == 0 else torch.where(zoneout[t], old, new)


def _map(x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> Tensor:
    u = x @ weight.T
    if gain is not None:
        return layer_norm(u, gain.shape, gain, bias)
    return u if bias is None else u + bias


def _rnn_tanh(w: Tensor, h_in: Tensor, h: Tensor, p: Parameters) -> Tensor:
    return torch.tanh(w + _map(h_in, p.weight_hh, p.bias_hh, p.gain_hh))


def _rnn_relu(w: Tensor, h_in: Tensor, h: Tensor, p: Parameters) -> Tensor:
    return (w + _map(h_in, p.weight_hh, p.bias_hh, p.gain_hh)).relu()


def _lstm(w: Tensor, h_in: Tensor, c: Tensor, p: Parameters, coupled: bool) -> tuple[Tensor, Tensor]:
    a = w + _map(h_in, p.weight_hh, p.bias_hh, p.gain_hh)
    size = c.shape[1]
    if coupled:
        a = torch.cat([torch.zeros_like(a[:, :size]), a], 1)
    peephole = torch.zeros(3, size, dtype=a.dtype)
    if p.weight_ch is not None:
        peephole = torch.cat([peephole.flatten(), p.weight_ch])[-3 * size :].view(3, size)
    f = torch.sigmoid(a[:, size : 2 * size] + peephole[1] * c)
    i = 1 - f if coupled else torch.sigmoid(a[:, :size] + peephole[0] * c)
    new_c = f * c + i * torch.tanh(a[:, 2 * size : 3 * size])
    o = torch.sigmoid(a[:, 3 * size :] + peephole[2] * new_c)
    m = o * torch.tanh(new_c if p.gain_c is None else layer_norm(new_c, (size,), p.gain_c, p.shift_c))
    return (m if p.weight_hr is None else m @ p.weight_hr.T), new_c


def _gru(w: Tensor, h_in: Tensor, h: Tensor, p: Parameters) -> Tensor:
    size, u = h.shape[1], _map(h_in, p.weight_hh, p.bias_hh, p.gain_hh)
    r, z = torch.sigmoid(w[:, : 2 * size] + u[:, : 2 * size]).chunk(2, 1)
    return z * h + (1 - z) * torch.tanh(w[:, 2 * size :] + r * u[:, 2 * size :])


def _part(x: Tensor, p: Parameters, rows: slice) -> Tensor:
    bias, gain = (None if v is None else v[rows] for v in (p.bias_hh, p.gain_hh))
    return _map(x, p.weight_hh[rows], bias, gain)


def _gru_reset_before(w: Tensor, h_in: Tensor, h: Tensor, p: Parameters) -> Tensor:
    size = h.shape[1]
    r, z = torch.sigmoid(w[:, : 2 * size] + _part(h_in, p, slice(0, 2 * size))).chunk(2, 1)
    return z * h + (1 - z) * torch.tanh(w[:, 2 * size :] + _part(r * h_in, p, slice(2 * size, None)))


def _mgu(w: Tensor, h_in: Tensor, h: Tensor, p: Parameters) -> Tensor:
    size = h.shape[1]
    f = torch.sigmoid(w[:, :size] + _part(h_in, p, slice(size)))
    return h + f * (torch.tanh(w[:, size:] + _part(f * h_in, p, slice(size, None))) - h)


STEPS = {
    "rnn_tanh": _rnn_tanh,
    "rnn_relu": _rnn_relu,
    "lstm": _lstm,
    "gru": _gru,
    "gru_reset_before": _gru_reset_before,
    "mgu": _mgu,
}
