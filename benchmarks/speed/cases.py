"""The programme: every case, who takes part, and what should come of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.speed import character_model as model
from benchmarks.speed import layer_norm
from benchmarks.speed.case import HONEST, OURS, Case, Contest, Contestant, Figure, Results, times_faster, times_slower
from benchmarks.speed.neighbour import busy_neighbour
from benchmarks.speed.problem import Problem, missing_bfloat16, missing_layer_norm

GRID = [(1, 100, 128), (1, 100, 512), (32, 100, 128), (64, 128, 256), (32, 128, 512), (64, 50, 1024), (16, 1000, 128)]
RAGGED = [(32, 100, 128), (64, 60, 256)]
MANY_TO_ONE = [100, 200, 400, 1000]  # T
LARGE = [(64, 128, 256), (32, 128, 512), (64, 50, 1024)]
CELLS = ["lstm", "gru", "rnn"]
PEERS = {"onnx": "onnxruntime", "jax": "jax", "compiled": "torch"}  # that can be left out, and the package they need
KERNELS = "kernels alone"
PRODUCT = 2048  # side of the product that the ceiling is measured with


@dataclass(frozen=True)
class Choice:
    """What the command line asked for, as far as cases have to know it.

    Attributes:
        peers: Which of `PEERS` take part.
        kernels: Whether the kernels' functions are timed without layer and autograd, too.
    """

    peers: frozenset[str] = frozenset(PEERS)
    kernels: bool = False

    def missing(self, peer: str) -> str | None:
        """Say why a peer can't take part, or nothing."""
        if peer not in self.peers:
            return f"{peer} was not asked for"
        if find_spec(PEERS[peer]) is None:
            return f"{PEERS[peer]} isn't installed: pip install 'throughtime[bench]'"
        return None


def programme(choice: Choice) -> Iterator[Case]:
    """Every case, in the order in which they run."""
    yield from _padded(choice)
    yield from _ragged(choice)
    yield from _many_to_one()
    yield _resets()
    yield from _layer_norm(choice)
    yield from _bfloat16()
    yield from _bidirectional()
    yield from _character_model()
    yield from _ceiling()
    yield from _neighbour()
    yield from _jax(choice)


def _padded(choice: Choice) -> Iterator[Case]:
    for training in (True, False):
        for cell in CELLS:
            for batch, steps, hidden in GRID:
                target = _padded_target(cell, batch, steps, hidden) if training else None
                figures = [times_faster("torch.nn", target), times_faster("torch.nn", ours=KERNELS)]
                yield Case(
                    *("training" if training else "inference", cell, f"B{batch} T{steps} H{hidden}"),
                    partial(_padded_contest, Problem(cell, steps, batch, hidden, training), choice),
                    figures if training else [*figures, times_faster("onnx")],
                    is_quick=training and (batch, steps, hidden) in ((1, 100, 128), (32, 100, 128)),
                )


def _padded_target(cell: str, batch: int, steps: int, hidden: int) -> float:
    if cell == "lstm":
        return 1.5 if batch == 1 or steps == 1000 else 1.0
    if batch == 1:
        return 4.0
    return 2.0 if hidden == 128 else 1.3


def _padded_contest(problem: Problem, choice: Choice) -> Contest:
    contestants = [*_own(problem, choice), Contestant("torch.nn", problem.by_torch())]
    exact, absent = problem.by_torch(torch.float64), {}
    if not problem.training:
        if reason := choice.missing("onnx"):
            absent["onnx"] = reason
        else:
            from benchmarks.speed import onnx_peer

            contestants.append(Contestant("onnx", onnx_peer.runner(problem), onnx_peer.read))
    return Contest(contestants, exact, absent)


def _own(problem: Problem, choice: Choice, judged_by: str = "torch.nn") -> list[Contestant]:
    ours = [Contestant(OURS, problem.by_us(), judged_by=judged_by)]
    return [*ours, Contestant(KERNELS, problem.by_kernels(), judged_by=judged_by)] if choice.kernels else ours


def _ragged(choice: Choice) -> Iterator[Case]:
    targets = {"lstm": 5.0, "gru": 2.5, "rnn": 2.5}
    for cell in CELLS:
        for batch, steps, hidden in RAGGED:
            generator = torch.Generator().manual_seed(1)
            lengths = torch.randint(5, steps + 1, (batch,), generator=generator)
            share = int(lengths.sum()) / (batch * steps)
            yield Case(
                *("ragged", cell, f"B{batch} T5–{steps} H{hidden}"),
                partial(_ragged_contest, cell, steps, batch, hidden, lengths, choice),
                [
                    times_faster("PackedSequence", targets[cell]),
                    times_slower(OURS, "ours padded", 1.2, share),
                    times_faster("PackedSequence", ours=KERNELS),
                ],
                is_quick=(batch, steps) == (32, 100),
            )


def _ragged_contest(cell: str, steps: int, batch: int, hidden: int, lengths: Tensor, choice: Choice) -> Contest:
    problem, padded = Problem(cell, steps, batch, hidden, lengths=lengths), Problem(cell, steps, batch, hidden)
    return Contest(
        [
            *_own(problem, choice, "PackedSequence"),
            Contestant("PackedSequence", problem.by_torch()),
            Contestant("ours padded", padded.by_us(), exact=padded.by_torch(torch.float64)),
        ],
        problem.by_torch(torch.float64),
    )


def _many_to_one() -> Iterator[Case]:
    """A loss on the last step only: gradients die out into denormals, which many CPUs compute with a hundred times more slowly."""
    for cell in CELLS:
        for steps in MANY_TO_ONE:
            yield Case(
                *("many-to-one", cell, f"B32 T{steps} H128"),
                partial(_many_to_one_contest, cell, steps),
                [
                    times_faster("torch.nn", 5.0 if steps >= 400 else None),
                    times_slower(OURS, "ours, a loss on each step", 1.1),
                ],
                is_quick=steps == 400,
            )


def _many_to_one_contest(cell: str, steps: int) -> Contest:
    problem, whole = Problem(cell, steps, 32, 128, many_to_one=True), Problem(cell, steps, 32, 128)
    return Contest(
        [
            Contestant(OURS, problem.by_us(), judged_by="torch.nn"),
            Contestant("torch.nn", problem.by_torch()),
            Contestant("ours, a loss on each step", whole.by_us(), exact=whole.by_torch(torch.float64)),
        ],
        problem.by_torch(torch.float64),
    )


def _resets() -> Case:
    def contest() -> Contest:
        reset = torch.rand(128, 8, generator=torch.Generator().manual_seed(1)) < 1 / 32
        problem = Problem("lstm", 128, 8, 256, reset=reset)
        return Contest(
            [
                Contestant(OURS, problem.by_us(), judged_by="a call a step"),
                Contestant("a call a step", problem.by_steps()),
                Contestant("LSTMCell", problem.by_cell()),
            ],
            problem.by_steps(torch.float64),
        )

    figures = [times_faster("a call a step", 8.0), times_faster("LSTMCell")]
    return Case("resets", "lstm", "B8 T128 H256, an episode of 32 steps on average", contest, figures, is_quick=True)


def _layer_norm(choice: Choice) -> Iterator[Case]:
    for batch, steps, hidden in ((32, 100, 128), (64, 50, 256)):
        yield Case(
            *("layer-norm", "lstm", f"B{batch} T{steps} H{hidden}"),
            partial(_layer_norm_contest, steps, batch, hidden, choice),
            [times_faster("eager", 5.0), times_faster("compiled", 2.0), times_slower(OURS, "ours plain", 1.4)],
            is_quick=hidden == 128,
            is_threaded=True,
            missing=missing_layer_norm(),
        )


def _layer_norm_contest(steps: int, batch: int, hidden: int, choice: Choice) -> Contest:
    problem = Problem("lstm", steps, batch, hidden)
    exact, honest = layer_norm.by_torch(problem, torch.float64), layer_norm.by_honest_computations(problem)
    contestants = [
        Contestant(OURS, layer_norm.by_us(problem), judged_by=HONEST),
        Contestant("eager", layer_norm.by_torch(problem), judged_by=HONEST),
        Contestant("ours plain", problem.by_us(), exact=problem.by_torch(torch.float64)),
    ]
    reason = choice.missing("compiled") or ("only the smaller one is compiled, for minutes" if hidden > 128 else None)
    if reason:
        return Contest(contestants, exact, {"compiled": reason}, honest)
    compiled = Contestant("compiled", layer_norm.by_torch(problem, compiled=True), judged_by=HONEST)
    return Contest([*contestants, compiled], exact, honest=honest)


def _bfloat16() -> Iterator[Case]:
    for cell in CELLS:
        for batch, steps, hidden in LARGE:
            yield Case(
                *("bf16", cell, f"B{batch} T{steps} H{hidden}"),
                partial(_bfloat16_contest, Problem(cell, steps, batch, hidden)),
                [times_faster("ours fp32", 1.6, "ours bf16"), times_faster("torch bf16", 1.3, "ours bf16")],
                is_quick=cell == "lstm" and hidden == 256,
                missing=missing_bfloat16(),
            )


def _bfloat16_contest(problem: Problem) -> Contest:
    return Contest(
        [
            Contestant("ours bf16", problem.by_us(torch.bfloat16), judged_by="torch bf16"),
            Contestant("torch bf16", problem.by_torch_autocast()),
            Contestant("ours fp32", problem.by_us()),
        ],
        problem.by_torch(torch.float64),
    )


def _bidirectional() -> Iterator[Case]:
    def contest(problem: Problem, peer: str) -> Contest:
        return Contest(
            [Contestant(OURS, problem.by_us(), judged_by=peer), Contestant(peer, problem.by_torch())],
            problem.by_torch(torch.float64),
        )

    name = "2 layers both ways, B32 H256, lengths 128 on average, 512 at most"
    problem = Problem("lstm", 512, 32, 256, lengths=_long_tailed(32, 512, 128), layers=2, bidirectional=True)
    packed = "PackedSequence"
    yield Case("bidirectional", "lstm", name, partial(contest, problem, packed), [times_faster(packed, 5.0)])
    for cell in CELLS:
        problem = Problem(cell, 100, 1, 128, bidirectional=True)
        figures = [times_faster("torch.nn")]
        yield Case("bidirectional", cell, "B1 T100 H128 both ways", partial(contest, problem, "torch.nn"), figures)


def _long_tailed(rows: int, most: int, mean: int) -> Tensor:
    """Lengths spread as an exponential distribution's, in any order, one of them the longest."""
    quantiles = -torch.log(1 - (torch.arange(rows) + 0.5) / rows)
    lengths = (quantiles * mean / quantiles.mean()).round().long().clamp(1, most)
    lengths[-1] = most
    return lengths[torch.randperm(rows, generator=torch.Generator().manual_seed(1))]


def _character_model() -> Iterator[Case]:
    name = f"B{model.BATCH} T{model.STEPS} H{model.HIDDEN} V{model.VOCABULARY}, a whole training step"

    def exact() -> Results:
        return model.by_torch(dtype=torch.float64)()  # a fresh model: a training step changes its weights

    def contest() -> Contest:
        return Contest(
            [
                Contestant(OURS, model.by_us(), judged_by="torch.nn"),
                Contestant("torch.nn", model.by_torch()),
                _large_product(torch.float32),
            ],
            exact,
        )

    def contest_bfloat16() -> Contest:
        return Contest(
            [
                Contestant("ours bf16", model.by_us(autocast=True), judged_by="torch bf16"),
                Contestant("torch bf16", model.by_torch(autocast=True)),
                Contestant("torch.nn", model.by_torch()),
                _large_product(torch.bfloat16),
            ],
            exact,
        )

    def limit(theirs: float, product: float) -> float:
        return theirs / (model.OPERATIONS * product / (2 * PRODUCT**3))

    def of_products(product: str) -> Figure:
        return Figure(f"torch.nn / the products alone at the speed of {product}", ("torch.nn", product), limit)

    figures = [times_faster("torch.nn", 1.6), of_products("torch.mm")]
    yield Case("character-model", "lstm", name, contest, figures, is_quick=True)
    figures = [times_faster("torch.nn", 3.0, "ours bf16"), times_faster("torch bf16", ours="ours bf16")]
    figures.append(of_products("torch.mm bf16"))
    yield Case("character-model", "lstm", f"{name}, bf16", contest_bfloat16, figures, missing=missing_bfloat16())


def _ceiling() -> Iterator[Case]:
    """The layer, and with an input of width 1 its recurrence alone: products' operations a second, against one large product's."""
    for batch, steps, hidden in LARGE:
        for inputs, name in ((hidden, "whole layer"), (1, "recurrence alone")):
            yield Case(
                *("ceiling", "lstm", f"B{batch} T{steps} H{hidden}, {name}, training"),
                partial(_ceiling_contest, Problem("lstm", steps, batch, hidden, inputs=inputs)),
                [_share(3 * 2.0 * steps * batch * 4 * hidden * (hidden + inputs))],
                is_quick=hidden == 512,
            )


def _share(operations: float) -> Figure:
    def share(own: float, product: float) -> float:
        return (operations / own) / (2 * PRODUCT**3 / product)

    return Figure("our FLOP/s / torch.mm's", (OURS, "torch.mm"), share, 0.75)


def _large_product(dtype: torch.dtype) -> Contestant:
    a, b = torch.randn(PRODUCT, PRODUCT).to(dtype), torch.randn(PRODUCT, PRODUCT).to(dtype)
    name = "torch.mm bf16" if dtype == torch.bfloat16 else "torch.mm"
    return Contestant(name, lambda: [a @ b], exact=lambda: [a.double() @ b.double()])


def _ceiling_contest(problem: Problem) -> Contest:
    return Contest(
        [
            Contestant(OURS, problem.by_us(), judged_by="torch.nn"),
            Contestant("torch.nn", problem.by_torch()),
            _large_product(torch.float32),
        ],
        problem.by_torch(torch.float64),
    )


def _neighbour() -> Iterator[Case]:
    for batch, steps, hidden in ((32, 100, 128), (64, 128, 256)):
        yield Case(
            *("neighbour", "lstm", f"B{batch} T{steps} H{hidden}, slowdown beside one busy process"),
            partial(_neighbour_contest, Problem("lstm", steps, batch, hidden)),
            [
                times_slower("ours beside", OURS, 2.2),
                Figure("torch.nn beside / torch.nn", ("torch.nn beside", "torch.nn"), lambda own, alone: own / alone),
            ],
            is_quick=hidden == 128,
            is_threaded=True,
        )


def _neighbour_contest(problem: Problem) -> Contest:
    ours, theirs = problem.by_us(), problem.by_torch()
    return Contest(
        [
            Contestant(OURS, ours, judged_by="torch.nn"),
            Contestant("torch.nn", theirs),
            Contestant("ours beside", ours, judged_by="torch.nn", around=busy_neighbour),
            Contestant("torch.nn beside", theirs, around=busy_neighbour),
        ],
        problem.by_torch(torch.float64),
        block=0.5,  # many time slices of the scheduler
    )


def _jax(choice: Choice) -> Iterator[Case]:
    for cell in CELLS:
        for batch, steps, hidden in ((32, 100, 128), (64, 128, 256)):
            yield Case(
                *("jax", cell, f"B{batch} T{steps} H{hidden}, training"),
                partial(_jax_contest, Problem(cell, steps, batch, hidden)),
                [times_faster("jax"), times_faster("torch.nn")],
                is_threaded=True,  # jax takes every core
                missing=choice.missing("jax"),
            )


def _jax_contest(problem: Problem) -> Contest:
    from benchmarks.speed import jax_peer

    return Contest(
        [
            Contestant(OURS, problem.by_us(), judged_by="torch.nn"),
            Contestant("torch.nn", problem.by_torch()),
            Contestant("jax", jax_peer.runner(problem), jax_peer.read),
        ],
        problem.by_torch(torch.float64),
    )
