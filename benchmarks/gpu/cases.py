"""The cases: what is computed, who takes part, and what should come of it. On a GPU torch.nn is cuDNN."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import peers
from benchmarks.gpu.contest import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    OURS,
    TF32,
    Contest,
    Contestant,
    Figure,
    Numerics,
    Passes,
)
from benchmarks.gpu.problem import DOUBLE, Problem

PLAIN_ROWS, PLAIN_WIDTHS = (1, 16, 64, 256), (128, 256, 512, 1024)  # B, H


@dataclass(frozen=True)
class Setting:
    """Where all cases run.

    Attributes:
        device: Whose times are taken.
        backend: throughtime's, in all cases.
        is_quick: Tiny sizes, which try the program instead of the device.
    """

    device: torch.device
    backend: str
    is_quick: bool = False

    @property
    def has_targets(self) -> bool:
        """Whether ratios are to be judged."""
        return self.device.type == "cuda" and not self.is_quick

    def size(self, of_case: int, tiny: int) -> int:
        """Choose one."""
        return tiny if self.is_quick else of_case


def cases(setting: Setting) -> dict[str, Callable[[], Iterator[Contest]]]:
    """Every case by its name, in the order in which they run."""
    return {
        "resets": partial(_resets, setting),
        "ragged": partial(_ragged, setting),
        "layer_norm": partial(_layer_norm, setting),
        "long": partial(_long, setting),
        "plain": partial(plain, setting),
    }


def _ours(problem: Problem, setting: Setting, numerics: Numerics, judge: str, compiles: str) -> Contestant:
    name = f"{OURS}, {numerics.name}"
    return Contestant(name, numerics, partial(problem.by_us, numerics, setting.backend), judge, compiles=compiles)


def _resets(setting: Setting) -> Iterator[Contest]:
    """Episodes that begin anywhere."""
    steps, batch, hidden = setting.size(128, 9), setting.size(128, 4), setting.size(256, 16)
    on_cuda, has_torchrl = peers.missing(setting.device), peers.missing(setting.device, "torchrl")
    generator = torch.Generator().manual_seed(3)
    reset = (torch.rand(steps, batch, generator=generator) < 0.03).to(setting.device)
    for cell in ("lstm", "gru"):
        problem = Problem(cell, steps, batch, hidden, setting.device, reset=reset)
        contestants = []
        for numerics in (FLOAT32, TF32):
            tag = f", {numerics.name}"
            contestants += [
                _ours(problem, setting, numerics, "cell loop" + tag, f"{cell}{tag}"),
                Contestant("cell loop" + tag, numerics, partial(peers.cell_loop, problem, numerics)),
                Contestant(
                    "cell loop in a CUDA graph" + tag,
                    numerics,
                    partial(peers.cell_loop, problem, numerics, graphed=True),
                    missing=on_cuda,
                ),
                Contestant("torch.nn, segments packed" + tag, numerics, partial(peers.segments, problem, numerics)),
            ]
        torchrl = {"TorchRL ieee (its default)": ("ieee", FLOAT32), "TorchRL tf32x3": ("tf32x3", FLOAT32)}
        torchrl["TorchRL tf32"] = ("tf32", TF32)
        contestants += [
            Contestant(
                *(name, numerics, partial(peers.torchrl, problem, numerics, precision)),
                missing=has_torchrl,
                compiles=f"torchrl {cell} {precision}",
            )
            for name, (precision, numerics) in torchrl.items()
        ]
        figures = []
        for numerics, theirs in ((FLOAT32, list(torchrl)[:2]), (TF32, list(torchrl)[2:])):
            ours, tag = f"{OURS}, {numerics.name}", f", {numerics.name}"
            figures += [
                Figure(ours, theirs, 2.0),
                Figure(ours, ["cell loop" + tag], 10.0),
                Figure(ours, ["cell loop in a CUDA graph" + tag, "torch.nn, segments packed" + tag]),
            ]
        title = f"{cell.upper()} B{batch} T{steps} H{hidden} I{hidden}, 3 % resets"
        exact = partial(peers.cell_loop, problem, DOUBLE)
        yield Contest(title, contestants, exact, problem.names, figures)


def _ragged(setting: Setting) -> Iterator[Contest]:
    """Rows of very different lengths, both ways."""
    steps, batch, hidden = setting.size(1000, 20), setting.size(64, 5), setting.size(512, 16)
    lengths = _long_tailed(batch, steps, steps * 3 // 10)
    ragged = Problem("gru", steps, batch, hidden, setting.device, lengths, bidirectional=True, is_rounded=True)
    padded = Problem("gru", steps, batch, hidden, setting.device, bidirectional=True, is_rounded=True)
    packed, other = "torch.nn, PackedSequence", "torch.nn, padded (another result)"
    ours = _ours(ragged, setting, BFLOAT16, packed, "gru ragged")
    contestants = [
        ours,
        Contestant(packed, BFLOAT16, partial(ragged.by_torch, BFLOAT16)),
        Contestant(other, BFLOAT16, partial(padded.by_torch, BFLOAT16), exact=partial(padded.by_torch, DOUBLE)),
    ]
    figures = [Figure(ours.name, [packed], 1.5), Figure(ours.name, [other])]
    title = f"GRU both ways, B{batch} T≤{steps}, {float(lengths.double().mean()):.0f} on average, H{hidden} I{hidden}"
    yield Contest(title, contestants, partial(ragged.by_torch, DOUBLE), ragged.names, figures)


def _long_tailed(rows: int, most: int, mean: int) -> Tensor:
    """Lengths spread as an exponential distribution's, in any order, one of them the longest."""
    quantiles = -torch.log(1 - (torch.arange(rows) + 0.5) / rows)
    lengths = (quantiles * mean / quantiles.mean()).round().long().clamp(1, most)
    lengths[-1] = most
    return lengths[torch.randperm(rows, generator=torch.Generator().manual_seed(1))]


def _layer_norm(setting: Setting) -> Iterator[Contest]:
    """A cell that no vendor's library has."""
    steps, batch, hidden = setting.size(256, 7), setting.size(64, 4), setting.size(512, 16)
    on_cuda = peers.missing(setting.device)
    compiled = ("step", "reduce-overhead", "step graphed")
    for numerics in (FLOAT32, TF32, BFLOAT16):
        is_rounded = numerics is BFLOAT16
        problem = Problem("lstm", steps, batch, hidden, setting.device, layer_norm=True, is_rounded=is_rounded)
        ours = _ours(problem, setting, numerics, "eager loop", f"layer_norm {numerics.name}")
        contestants = [ours, Contestant("eager loop", numerics, partial(peers.layer_norm, problem, numerics))]
        hows = {"graphed": "eager loop in a CUDA graph"}
        hows |= {how: f"compiled: {how}" for how in (*compiled, *(("whole",) if is_rounded else ()))}
        for how, name in hows.items():
            build = partial(peers.layer_norm, problem, numerics, how)
            key = "" if how == "graphed" else f"{how.removesuffix(' graphed')} {numerics.name}"
            contestants.append(Contestant(name, numerics, build, missing=on_cuda, compiles=key))
        figures = [
            Figure(ours.name, ["eager loop"], 8.0),
            Figure(ours.name, [name for how, name in hows.items() if how != "graphed"], 3.0),
            Figure(ours.name, [hows["graphed"]]),
        ]
        title = f"layer-normalised LSTM B{batch} T{steps} H{hidden} I{hidden}, {numerics.name}"
        yield Contest(title, contestants, partial(peers.layer_norm, problem, DOUBLE), problem.names, figures)


def _long(setting: Setting) -> Iterator[Contest]:
    """A sequence of a thousand steps in 16 bits."""
    steps, batch, hidden = setting.size(1024, 12), setting.size(16, 4), setting.size(768, 16)
    problem = Problem("lstm", steps, batch, hidden, setting.device, is_rounded=True)
    on_cuda, has_flashrnn = peers.missing(setting.device), peers.missing(setting.device, "flashrnn")
    theirs = {numerics: f"torch.nn, {numerics.name}" for numerics in (BFLOAT16, FLOAT16)}
    ours = {n: _ours(problem, setting, n, name, f"long {n.name}") for n, name in theirs.items()}
    if setting.device.type != "cuda":
        del ours[FLOAT16]  # the CPU's kernels have no float16
    contestants = list(ours.values())
    for numerics, name in theirs.items():
        on_cuda_only = on_cuda if numerics is FLOAT16 else None
        contestants.append(Contestant(name, numerics, partial(problem.by_torch, numerics), missing=on_cuda_only))
    for name, backend in (("FlashRNN fused", "cuda_fused"), ("FlashRNN alternating", "cuda")):
        build = partial(peers.flashrnn, problem, BFLOAT16, backend)
        contestants.append(Contestant(name, BFLOAT16, build, missing=has_flashrnn, compiles=name))
    own = f"{OURS}, {BFLOAT16.name}"
    figures = [
        Figure(own, [theirs[FLOAT16]], at_most=1.3),
        Figure(own, [theirs[BFLOAT16]]),
        Figure(own, ["FlashRNN fused", "FlashRNN alternating"]),
        Figure(f"{OURS}, {FLOAT16.name}", [theirs[FLOAT16]]),
    ]
    title = f"LSTM B{batch} T{steps} H{hidden} I{hidden}, 16 bits"
    yield Contest(title, contestants, partial(problem.by_torch, DOUBLE), problem.names, figures)


def plain(setting: Setting) -> Iterator[Contest]:
    """What "auto" has to choose between: ours and torch's own fused call, at many sizes."""
    rows: Sequence[int] = (1, 4) if setting.is_quick else PLAIN_ROWS
    widths: Sequence[int] = (8,) if setting.is_quick else PLAIN_WIDTHS
    for numerics in (BFLOAT16, TF32, FLOAT32):
        for cell in ("lstm", "gru", "rnn"):
            for hidden in widths:
                for batch in rows:
                    yield _plain(setting, numerics, cell, batch, hidden)


def _plain(setting: Setting, numerics: Numerics, cell: str, batch: int, hidden: int) -> Contest:
    problem = Problem(
        *(cell, setting.size(128, 5), batch, hidden, setting.device), is_rounded=numerics.dtype != torch.float32
    )
    ours = _ours(problem, setting, numerics, "torch", f"{cell} {numerics.name}")

    def theirs() -> Passes:
        return problem.by_us(numerics, "torch")

    contestants = [ours, Contestant("torch", numerics, theirs)]
    title = f"{cell.upper()} {numerics.name} H{hidden} B{batch}"
    figures = [Figure(ours.name, ["torch"])]
    return Contest(title, contestants, partial(problem.by_torch, DOUBLE), problem.names, figures)
