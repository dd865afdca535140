"""One step of one stream, and of many: `throughtime.stream` against the product alone, torch.nn, torch's cells and ONNX Runtime.

    python -m benchmarks.step            # about five minutes on a calm machine; --quick takes one
    python -m benchmarks.step --layers   # the layers' own calls without gradient, of one step to a thousand, on one thread and two
    python -m benchmarks.step --cells    # the cells' calls, without gradient, and with: twenty steps there and back
    python -m benchmarks.step --soak 10  # streams stepped, saved, cloned and reset for ten minutes: memory has to stay as it is

Each contestant's answer to a sequence is compared with torch.nn's in float64 before it is timed; then all of a case are timed in
turns, and medians and their ratios are printed. The floor is the product of a step alone, (G·H, I + H) by a vector, on weights
packed in the same precision: no engine can be below it. All of it on one thread, but for the streams that are stepped by two.
ONNX Runtime takes part where it is installed (`pip install onnxruntime onnx`): by `run`, and with its arrays bound (`io_binding`).

Not measured here, since it is compiled for one size: RTNeural publishes 0.33, 1.04 and 3.3 µs for an LSTM of 16, 32 and 64 units
(i7-8700B).
"""

import argparse
import importlib.util
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import throughtime
from benchmarks.speed.case import Contestant
from benchmarks.speed.report import machine
from benchmarks.speed.timing import take_turns
from throughtime.kernels import native
from throughtime.streaming.engine import PRECISIONS
from throughtime.streaming.writing import Writer

LAYERS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
OURS: dict[str, Any] = {"lstm": throughtime.LSTM, "gru": throughtime.GRU, "rnn": throughtime.RNN}
CELLS: dict[str, Any] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
OUR_CELLS: dict[str, Any] = {"lstm": throughtime.LSTMCell, "gru": throughtime.GRUCell, "rnn": throughtime.RNNCell}
CASES = {"lstm": (16, 64, 128, 256, 512, 1024), "gru": (64, 512, 1024), "rnn": (64, 512)}
SHAPES = [(steps, rows) for steps in (1, 2, 4, 16, 100, 1000) for rows in (1, 4, 16, 64, 256)]  # T, B
SIZES = (16, 64, 128, 256, 512, 1024)
ALLOWED = {"bfloat16": 0.05, "int8": 0.1}  # of the largest output; in float32 1e-4
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
FLOORS_A_CALL = 20  # products, so that the call from Python is the smallest part
Floats = NDArray[np.float32]


class Stepped(NamedTuple):
    """A contestant: `begin` returns what steps from a fresh state, x (I,) to h (H,)."""

    name: str
    begin: Callable[[], Callable[[Floats], Floats]]
    allowed: float = 1e-4


def ours(layer: nn.Module, precision: str) -> Stepped:
    """Return a stream."""
    stream = throughtime.stream(layer, precision=precision)

    def begin() -> Callable[[Floats], Floats]:
        stream.reset()
        return stream.step

    return Stepped(f"stream, {precision}", begin, ALLOWED.get(precision, 1e-4))


def layers(name: str, layer: Any) -> Stepped:
    """Return a layer of torch.nn's kind, called with T = 1."""

    def begin() -> Callable[[Floats], Floats]:
        state = [None]

        def step(x: Floats) -> Floats:
            with torch.inference_mode():
                output, state[0] = layer(torch.from_numpy(x)[None], state[0])
            return output[0].numpy()

        return step

    return Stepped(name, begin)


def cells(name: str, kind: str, layer: nn.RNNBase, kinds: dict[str, Any]) -> Stepped:
    """Return a cell."""
    cell = kinds[kind](layer.input_size, layer.hidden_size)
    cell.load_state_dict({name.removesuffix("_l0"): tensor for name, tensor in layer.state_dict().items()})

    def begin() -> Callable[[Floats], Floats]:
        state = [None]

        def step(x: Floats) -> Floats:
            with torch.inference_mode():
                state[0] = cell(torch.from_numpy(x), state[0])
            h = state[0][0] if kind == "lstm" else state[0]
            return h.numpy()

        return step

    return Stepped(name, begin)


def floor(layer: nn.RNNBase, precision: str) -> Contestant:
    """Return the product of a step alone."""
    weight = torch.cat(tuple(layer.all_weights[0][:2]), 1).detach().contiguous()
    packed = native.module.StreamWeights(precision)
    packed.add_linear(weight.data_ptr(), 0, *weight.shape)
    x, out = np.random.default_rng(0).random(weight.shape[1], np.float32), np.empty(weight.shape[0], np.float32)
    arguments = 1, x.ctypes.data, out.ctypes.data, FLOORS_A_CALL
    return Contestant(f"floor, {precision}", lambda: (packed.multiply(*arguments), x, out))


def check(contestant: Stepped, x: Floats, exact: Floats) -> None:
    """Refuse a wrong answer."""
    step = contestant.begin()
    found = np.stack([np.array(step(row)) for row in x])
    error = np.abs(found - exact).max() / np.abs(exact).max()
    if not error <= contestant.allowed:
        raise SystemExit(f"{contestant.name} errs by {error:.1e}; allowed are {contestant.allowed:.0e}")


def contestants(kind: str, layer: nn.RNNBase) -> list[Stepped]:
    """Return who steps a layer."""
    own = OURS[kind](layer.input_size, layer.hidden_size, layer.num_layers)
    own.load_state_dict(layer.state_dict())
    found = [ours(own, precision) for precision in PRECISIONS]
    found += [layers("throughtime layer, T = 1", own), layers("torch.nn, T = 1", layer)]
    if layer.num_layers == 1:
        found += [cells("throughtime cell", kind, layer, OUR_CELLS), cells("torch cell", kind, layer, CELLS)]
    if HAS_ONNX:
        from benchmarks import step_onnx

        found += [Stepped(name, begin) for name, begin in step_onnx.contestants(kind, layer)]
    return found


def checked(kind: str, hidden: int, layers_: int = 1) -> tuple[nn.RNNBase, list[Stepped], Floats]:
    """Make a case: the layer, who steps it, each of them right, and an input."""
    torch.manual_seed(0)
    layer = LAYERS[kind](hidden, hidden, layers_).eval()
    x = np.random.default_rng(0).standard_normal((60, hidden), np.float32)
    with torch.inference_mode():
        exact = LAYERS[kind](hidden, hidden, layers_, dtype=torch.float64)
        exact.load_state_dict(layer.state_dict())
        answer = exact(torch.from_numpy(x).double())[0].numpy()
    found = contestants(kind, layer)
    for one in found:
        check(one, x, answer)
    return layer, found, x


def one_step(kind: str, hidden: int, budget: float) -> None:
    """Print a case of one stream."""
    layer, found, x = checked(kind, hidden)
    floors = [floor(layer, precision) for precision in PRECISIONS]
    timed = [*floors, *(Contestant(one.name, partial(one.begin(), x[0])) for one in found)]
    seconds = take_turns(timed, budget, block=0.01)
    medians = {name: 1e6 * statistics.median(times) for name, times in seconds.items()}
    medians |= {one.name: medians[one.name] / FLOORS_A_CALL for one in floors}
    stream = medians["stream, float32"]
    print(f"\n{kind.upper()}, I = H = {hidden}: µs a step, and how many times the float32 stream's")
    for name, value in medians.items():
        print(f"  {name:26} {value:9.2f}  {value / stream:7.2f}")


def percentiles(budget: float) -> None:
    """Print how three GRU layers of 256, an audio model's, are spread."""
    _, found, x = checked("gru", 256, 3)
    wanted = (50, 90, 99, 99.9)
    print("\nthree GRU of 256: µs a step at percentiles " + ", ".join(map(str, wanted)))
    steps = {one.name: one.begin() for one in found}
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + budget
    while time.perf_counter() < end:
        for name, step in steps.items():
            for row in x:
                began = time.perf_counter()
                step(row)
                times[name].append(time.perf_counter() - began)
    for name, all_of_it in times.items():
        print(f"  {name:26}" + "".join(f"{1e6 * value:9.1f}" for value in np.percentile(all_of_it, wanted)))


def many_streams(budget: float) -> None:
    """Print what a stream of LSTM-256 costs among others."""
    torch.manual_seed(0)
    layer = throughtime.LSTM(256, 256)
    print("\nLSTM of 256: µs a stream where so many are stepped together, and how many times the throughput of one")
    for precision in PRECISIONS:
        timed, counts = [], {}
        for streams, threads in ((1, 1), (64, 1), (64, 2), (1000, 1), (1000, 2)):
            name = f"{precision}, {streams} streams, {threads} thread{'s' * (threads > 1)}"
            many = throughtime.stream(layer, streams=streams, threads=threads, precision=precision)
            x = np.random.default_rng(0).standard_normal((streams, 256), np.float32)
            x = x[0] if streams == 1 else x
            timed.append(Contestant(name, partial(many.step, x)))
            counts[name] = streams
        seconds = take_turns(timed, budget, block=0.01)
        each = {name: 1e6 * statistics.median(times) / counts[name] for name, times in seconds.items()}
        first = next(iter(each.values()))
        for name, value in each.items():
            print(f"  {name:34} {value:8.2f}  {first / value:6.1f}")
    print(f"  {throughtime.stream(layer, streams=10_000).memory}, in bytes; h and c are {4 * 2 * 256} of a stream's")


def calls(kind: str, hidden: int, shape: tuple[int, int], num_layers: int) -> list[Contestant]:
    """Return who computes a layer's call without gradient, of (T, B): each of them right."""
    torch.manual_seed(0)
    layer = LAYERS[kind](hidden, hidden, num_layers)
    own, exact = OURS[kind](hidden, hidden, num_layers), LAYERS[kind](hidden, hidden, num_layers, dtype=torch.float64)
    for other in (own, exact):
        other.load_state_dict(layer.state_dict())
    x = torch.randn(*shape, hidden)
    with torch.inference_mode():
        (_, state), (answer, _) = layer(x), exact(x.double())
        for name, one in (("throughtime", own), ("torch.nn", layer)):
            error = float((one(x)[0] - answer).abs().max() / answer.abs().max())
            if not error <= 1e-4:
                raise SystemExit(f"{name} errs by {error:.1e}; allowed are 1e-04")
    return [Contestant("throughtime", partial(own, x, state)), Contestant("torch.nn", partial(layer, x, state))]


@torch.inference_mode()
def layers_at_few_steps(budget: float, threads_each: Sequence[int] = (1, 2), *, quick: bool) -> None:
    """Print torch.nn's time over ours, for each cell, number of layers and threads, size and shape."""
    found: dict[str, float] = {}
    for threads in threads_each:
        torch.set_num_threads(threads)
        for kind, num_layers, hidden in itertools.product(LAYERS, (1, 2), SIZES):
            what = f"{kind.upper()}, I = H = {hidden}, layers {num_layers}, threads {threads}"
            print(f"\n{what}: T x B, µs, torch.nn's time / ours")
            for shape in SHAPES:
                work = shape[0] * shape[1] * hidden * hidden * num_layers
                if work > (1e7 if quick else 3e9):
                    continue
                seconds = take_turns(calls(kind, hidden, shape, num_layers), budget, block=0.005)
                ours, theirs = (1e6 * statistics.median(seconds[name]) for name in ("throughtime", "torch.nn"))
                case = f"{shape[0]} x {shape[1]}"
                print(f"  {case:12} {ours:12.1f} {theirs / ours:8.2f}", flush=True)
                found[f"{kind} H {hidden}, layers {num_layers}, threads {threads}, {case}"] = theirs / ours
    slower = {case: ratio for case, ratio in found.items() if ratio < 1}
    print(f"\n{len(found)} cases, slower than torch.nn in {len(slower)}")
    for case, ratio in sorted(slower.items(), key=lambda item: item[1]):
        print(f"  {ratio:.2f}  {case}")


def trained(cell: nn.Module, x: Any) -> Any:
    """Step a cell through x, (T, B, I), from a fresh state, and go back; return the last state."""
    state: Any = None
    for x_t in x:
        state = cell(x_t, state)
    (state[0] if isinstance(state, tuple) else state).sum().backward()
    return state


def cells_alone(budget: float) -> None:
    """Print torch's cells' time over ours, without gradient, and in training."""
    print("\nµs a step, and torch's cell's time / ours: without gradient; in training, twenty steps there and back")
    for kind, hidden, rows in itertools.product(CELLS, (16, 128, 512, 1024), (1, 32)):
        torch.manual_seed(0)
        both = {"throughtime": OUR_CELLS[kind](hidden, hidden), "torch": CELLS[kind](hidden, hidden)}
        both["throughtime"].load_state_dict(both["torch"].state_dict())
        x = torch.randn(20, rows, hidden)
        state = trained(both["torch"], x)
        with torch.no_grad():
            for found, expected in zip(*(one(x[0], state) for one in both.values()), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            timed = [Contestant(name, partial(one, x[0], state)) for name, one in both.items()]
            stepping = take_turns(timed, budget, block=0.005)
        training = take_turns([Contestant(n, partial(trained, one, x)) for n, one in both.items()], budget, block=0.01)
        said = f"  {kind.upper():5} I = H = {hidden:<5} B {rows:<3}"
        for seconds, steps in ((stepping, 1), (training, len(x))):
            us = {name: 1e6 * statistics.median(times) / steps for name, times in seconds.items()}
            said += f" {us['throughtime']:9.1f} {us['torch'] / us['throughtime']:6.2f}"
        print(said, flush=True)


def soak(minutes: float) -> None:
    """Use streams in every way for so long, and refuse growing memory."""
    torch.manual_seed(0)
    layer = throughtime.LSTM(32, 64, 2)
    many = [throughtime.stream(layer, streams=100, precision=precision) for precision in PRECISIONS]
    reads = throughtime.stream(nn.Sequential(throughtime.GRU(60, 64), nn.Linear(64, 60)), ids=True)
    random, sizes = np.random.default_rng(0), []
    began = time.monotonic()
    for tenth in range(11):
        while time.monotonic() < began + tenth * 6 * minutes:
            for streams in many:
                which = random.permutation(100)[: random.integers(1, 101)]
                streams.step(random.standard_normal((len(which), 32), np.float32), which=which)
                streams.feed(random.standard_normal((random.integers(1, 200), 32), np.float32), which=int(which[0]))
                saved = streams.state(which)
                streams.clone().restore(saved, which)
                streams.reset(which[: len(which) // 2])
            writer = Writer(reads.clone(), end=None, top_p=0.9)
            writer.read(random.integers(60, size=random.integers(1, 50)).tolist())
            writer.write(random.random(random.integers(1, 200)))
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6)
        print(f"after {tenth * minutes / 10:.1f} minutes: {sizes[-1]:.1f} MB", flush=True)
    if max(sizes[2:]) > sizes[1] + 2:
        raise SystemExit(f"memory grew from {sizes[1]:.1f} to {max(sizes):.1f} MB")


def main() -> None:
    """Measure, or soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns, and small cases alone")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="this alone, on Linux")
    parser.add_argument("--layers", action="store_true", help="the layers' own calls alone")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="with --layers, on how many; default 1 2"
    )
    parser.add_argument("--cells", action="store_true", help="the cells alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.soak is not None:
        soak(given.soak)
    elif given.layers:
        layers_at_few_steps(0.1 if given.quick else 0.5, given.threads, quick=given.quick)
    elif given.cells:
        cells_alone(0.1 if given.quick else 0.5)
    else:
        measure(quick=given.quick)


def measure(*, quick: bool) -> None:
    """Measure all cases, one after the other."""
    print(*(f"{name}: {value}" for name, value in machine().items()), sep="\n")
    print("" if HAS_ONNX else "onnxruntime isn't installed, and takes no part")
    budget = 1.0 if quick else 6.0
    for kind, sizes in CASES.items():
        for hidden in sizes:
            if not quick or hidden <= 256:
                one_step(kind, hidden, budget)
    percentiles(budget)
    many_streams(budget)


if __name__ == "__main__":
    main()
