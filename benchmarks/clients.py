"""Real packages with a recurrent layer inside: theirs as it is, and the same with ours put in its place by `throughtime.convert`.

    pip install torch==2.13.0 -c constraints.txt && pip install . -c constraints.txt    # in an environment of its own
    pip install --no-deps -r benchmarks/clients-requirements.txt    # last: several pin versions of years ago
    python -m benchmarks.clients [--only kraken …] [--budget 20]

Each model is built by its package's own code at the size that the package chooses, then copied and converted. Results, and in
training each parameter's gradient, must be equal to float noise before anything is timed; both sides take turns, on one thread by
the processor's clock. silero-vad's model is TorchScript, which nothing is exchanged in: its shipped weights are stepped by
`throughtime.stream`. Each package has a process of its own: after the others in one process, torch.nn's training steps took up to
six times as long. A package that isn't there, or can't be imported, is named with the reason, and the others go on.
Prints a table; all of it goes to bench-results/ as JSON. The exit code says whether an answer was wrong.
"""

import argparse
import copy
import json
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import throughtime
from benchmarks.speed.case import Contestant
from benchmarks.speed.report import machine
from benchmarks.speed.timing import take_turns

ALLOWED = 1e-4  # difference, of a result's largest number: float noise, with what layers and steps make of it
Run = Callable[[], list[Tensor]]


class Case(NamedTuple):
    """What is computed twice.

    Attributes:
        what: In words.
        theirs: Computes with the package's own layers.
        ours: The same with ours.
    """

    what: str
    theirs: Run
    ours: Run


@dataclass(frozen=True)
class Timed:
    """A case's outcome: milliseconds, and the largest difference; or why there is none."""

    client: str
    version: str | None
    what: str = ""
    difference: float | None = None
    theirs: float | None = None
    ours: float | None = None
    left_out: str = ""
    wrong: str = ""

    @property
    def ratio(self) -> float:
        """The package's time over that with ours; 0 where nothing was timed."""
        return self.theirs / self.ours if self.theirs and self.ours else 0.0


def converted(
    what: str, model: nn.Module, forward: Callable[[Any], Tensor], *, inference: bool = True, training: bool = True
) -> Iterator[Case]:
    """Make a model's cases: a call without gradient in `eval()`, and a training step whose loss is a weighted mean."""

    def infer(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        with torch.no_grad():
            return [forward(model.eval())]

    def train(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        model.train().zero_grad()
        found = forward(model)
        (found * torch.linspace(-1, 2, found.numel()).view_as(found)).mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return [found.detach(), *gradients]

    pair = model, throughtime.convert(copy.deepcopy(model))
    for kind, run, wanted in (("inference", infer, inference), ("training", train, training)):
        if wanted:
            yield Case(f"{what}, {kind}", *(partial(run, one) for one in pair))


def without_its_init(package: str) -> None:
    """Let a package's modules be imported without its `__init__`, which brings in what they don't need."""
    if package in sys.modules:
        return
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    sys.modules[package] = made = types.ModuleType(package)
    made.__path__, made.__spec__ = list(spec.submodule_search_locations), spec


def deepfilternet() -> Iterator[Case]:
    """The recurrent blocks of DeepFilterNet 3 and 1: three seconds of sound in frames of 10 ms."""
    without_its_init("df")
    modules: Any = import_module("df.modules")
    squeezed = modules.SqueezedGRU_S(512, 256, output_size=512, num_layers=2, linear_groups=16)
    grouped = modules.GroupedGRU(512, 256, num_layers=3, groups=8, add_outputs=True)
    for name, block in (("SqueezedGRU_S", squeezed), ("GroupedGRU, 8 groups", grouped)):
        for rows, is_training in ((1, False), (8, True)):
            x = torch.randn(rows, 300, 512)
            call = partial(_first, x)
            what = f"{name}, B {rows} T 300"
            yield from converted(what, block, call, inference=not is_training, training=is_training)


def _first(x: Tensor, model: Any) -> Tensor:
    return model(x)[0]


def recbole() -> Iterator[Case]:
    """GRU4Rec with its own settings, on as many items as MovieLens-1M has."""
    kind: Any = import_module("recbole.model.sequential_recommender.gru4rec").GRU4Rec
    config = {"embedding_size": 64, "hidden_size": 128, "num_layers": 1, "dropout_prob": 0.3, "loss_type": "CE"}
    config |= {"USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_"}
    config |= {"ITEM_LIST_LENGTH_FIELD": "length", "MAX_ITEM_LIST_LENGTH": 50, "device": "cpu"}
    model = kind(config, types.SimpleNamespace(num=lambda _: 3706))
    lengths = torch.randint(5, 51, (256,))
    items = torch.randint(1, 3706, (256, 50)) * (torch.arange(50) < lengths[:, None])
    given = {"item_list": items, "length": lengths, "item": torch.randint(1, 3706, (256,))}

    def forward(model: Any) -> Tensor:
        return model.calculate_loss(given) if model.training else model.full_sort_predict(given)

    return converted("GRU4Rec, B 256 T 50", model, forward)


def kraken() -> Iterator[Case]:
    """The recogniser of kraken's default specification: four convolutions, three bidirectional LSTMs, lines of any length."""
    without_its_init("kraken.lib.vgsl")
    layers: Any = import_module("kraken.lib.vgsl.layers")
    stages: list[nn.Module] = []
    for inputs, outputs, width, pools in ((1, 32, 13, True), (32, 32, 13, True), (32, 64, 9, True), (64, 64, 9, False)):
        stages += [layers.ActConv2D(inputs, outputs, (3, width), (1, 1), "r"), layers.Dropout(0.1, 2)]
        stages += [layers.MaxPool((2, 2), (2, 2))] if pools else []
    stages.append(layers.Reshape(2, 1, 15, 2, 1))
    for inputs in (960, 400, 400):
        stages += [layers.TransposedSummarizingRNN(inputs, 200, "b", False, False), layers.Dropout(0.1, 2)]
    model = layers.MultiParamSequential(*stages, layers.LinSoftmax(400, 100))
    for rows, is_training in ((1, False), (4, True)):
        widths = torch.linspace(400, 1000, rows).int() if rows > 1 else torch.tensor([1000])
        x = torch.rand(rows, 1, 120, 1000)
        call = partial(_recognise, x, widths)
        yield from converted(
            f"recogniser, B {rows}, lengths", model, call, inference=not is_training, training=is_training
        )
    own = nn.Sequential(*(stage for stage in stages if isinstance(stage, layers.TransposedSummarizingRNN)))
    x, lengths = torch.randn(4, 960, 1, 125), torch.tensor([50, 75, 100, 125])
    yield from converted("its LSTMs alone, B 4, lengths", own, partial(_read_lines, x, lengths))


def _recognise(x: Tensor, widths: Tensor, model: Any) -> Tensor:
    return model(x, widths)[0]


def _read_lines(x: Tensor, lengths: Tensor, model: Any) -> Tensor:
    for layer in model:
        x, lengths = layer(x, lengths)
    return x


def resemblyzer() -> Iterator[Case]:
    """The speaker encoder with the weights that the package ships: eight partial utterances of 1.6 s."""
    encoder: Any = import_module("resemblyzer.voice_encoder").VoiceEncoder("cpu", verbose=False)
    return converted("VoiceEncoder, shipped weights, B 8 T 160", encoder, partial(_call, torch.rand(8, 160, 40)))


def _call(x: Any, model: Any) -> Tensor:
    return model(x)


def recurrent_ppo() -> Iterator[Case]:
    """RecurrentPPO's policy: eight environments stepped, and its loss's forward pass with and without an episode's beginning."""
    policies: Any = import_module("sb3_contrib.common.recurrent.policies")
    states: Any = import_module("sb3_contrib.common.recurrent.type_aliases").RNNStates
    spaces: Any = import_module("gymnasium.spaces")
    box, actions = spaces.Box(-1, 1, (4,)), spaces.Discrete(2)

    def policy() -> nn.Module:  # a new one each time: once it was called, it holds tensors that can't be copied
        return policies.RecurrentActorCriticPolicy(box, actions, lambda _: 3e-4)

    def state(rows: int) -> Any:
        return states(*((torch.zeros(1, rows, 256), torch.zeros(1, rows, 256)) for _ in range(2)))

    def act(model: Any) -> Tensor:
        given = torch.linspace(-1, 1, 32).view(8, 4)
        _, values, probabilities, _ = model(given, state(8), torch.zeros(8), deterministic=True)
        return torch.cat([values.flatten(), probabilities])

    def evaluate(starts: Tensor, model: Any) -> Tensor:
        given, taken = torch.linspace(-1, 1, 512).view(128, 4), torch.arange(128) % 2
        return torch.cat([found.flatten() for found in model.evaluate_actions(given, taken, state(4), starts)])

    yield from converted("a step of 8 environments", policy(), act, training=False)
    starts = torch.zeros(128)
    yield from converted("4 windows of 32 steps", policy(), partial(evaluate, starts), inference=False)
    starts = starts.index_fill(0, torch.tensor([5, 40, 77]), 1)
    what = "4 windows of 32 steps, 3 episodes begin"
    yield from converted(what, policy(), partial(evaluate, starts), inference=False)


def torch_geometric() -> Iterator[Case]:
    """LSTM aggregation of 200 nodes' neighbours, 1 to 20 of them."""
    kind: Any = import_module("torch_geometric.nn.aggr.lstm").LSTMAggregation
    counts = torch.randint(1, 21, (200,))
    index = torch.arange(200).repeat_interleave(counts)
    x = torch.randn(len(index), 64)
    return converted("LSTMAggregation, 200 nodes", kind(64, 64), lambda model: model(x, index))


def neuralhydrology() -> Iterator[Case]:
    """CudaLSTM of 128 units over a year of five forcings and 27 attributes of a basin."""
    modelzoo: Any = import_module("neuralhydrology.modelzoo.cudalstm")
    forcings = ["prcp", "srad", "tmax", "tmin", "vp"]
    config = {"model": "cudalstm", "head": "regression", "hidden_size": 128, "output_dropout": 0.4, "seq_length": 365}
    config |= {"dynamic_inputs": forcings, "static_attributes": [f"a{n}" for n in range(27)]}
    config |= {"target_variables": ["QObs"], "initial_forget_bias": 3, "predict_last_n": 1}
    model = modelzoo.CudaLSTM(import_module("neuralhydrology.utils.config").Config(config, dev_mode=True))
    for rows in (1, 64):
        data = {"x_d": {name: torch.randn(rows, 365, 1) for name in forcings}, "x_s": torch.randn(rows, 27)}
        call = partial(_predict, data)
        yield from converted(f"CudaLSTM, B {rows} T 365", model, call, training=rows > 1)


def _predict(data: dict[str, Any], model: Any) -> Tensor:
    return model(data)["y_hat"]


def gluonts() -> Iterator[Case]:
    """DeepAR with its own settings: a hundred sampled paths of a day, hour by hour, and a training step."""
    kind: Any = import_module("gluonts.torch.model.deepar.module").DeepARModel
    normal: Any = import_module("gluonts.torch.distributions").NormalOutput()
    model = kind(
        "h", context_length=48, prediction_length=24, distr_output=normal
    )  # StudentT's samples are rejected ones

    def given(rows: int) -> dict[str, Tensor]:
        past = model._past_length
        return {
            "feat_static_cat": torch.zeros(rows, 1, dtype=torch.long),
            "feat_static_real": torch.zeros(rows, 1),
            "past_time_feat": torch.rand(rows, past, 1),
            "past_target": torch.rand(rows, past) + 1,
            "past_observed_values": torch.ones(rows, past),
            "future_time_feat": torch.rand(rows, 24, 1),
        }

    one, many = given(1), given(32)
    following = {"future_target": torch.rand(32, 24) + 1, "future_observed_values": torch.ones(32, 24)}
    yield from converted("DeepAR, 100 sampled paths of 24", model, lambda model: model(**one), training=False)
    yield from converted("DeepAR's loss, B 32", model, lambda model: model.loss(**many, **following), inference=False)


def silero_vad() -> Iterator[Case]:
    """silero-vad's shipped weights: its decoder on a frame of 32 ms, and all of it with that decoder exchanged, 31 frames each."""
    shipped: Any = import_module("silero_vad")
    threads = torch.get_num_threads()
    vad = shipped.load_silero_vad()
    torch.set_num_threads(threads)
    inner = vad._model
    layer = throughtime.LSTM(128, 128)
    layer.load_state_dict({f"{name}_l0": weight for name, weight in inner.decoder.rnn.state_dict().items()})
    stream = throughtime.stream(layer)
    readout = inner.decoder.decoder.state_dict()
    weight, bias = readout["2.weight"].numpy().ravel(), float(readout["2.bias"])
    sound = torch.randn(31, 1, 512) * 0.1
    chunks = torch.cat([torch.cat([torch.zeros(1, 64), *sound[:, :, -64:]])[:31, None], sound], 2)
    with torch.no_grad():
        features = [inner.encoder(inner.run_extractors(chunk)) for chunk in chunks]

    def decide(feature: Tensor) -> float:
        h = stream.step(feature.numpy().ravel())
        return 1 / (1 + np.exp(-float(weight @ np.maximum(h, 0)) - bias))

    @torch.no_grad()
    def decoder_theirs() -> list[Tensor]:
        state, found = torch.zeros(0), []
        for feature in features:
            out, state = inner.decoder(feature, state)
            found.append(out.flatten())
        return [torch.cat(found)]

    def decoder_ours() -> list[Tensor]:
        stream.reset()
        return [torch.tensor([decide(feature) for feature in features])]

    @torch.no_grad()
    def all_theirs() -> list[Tensor]:
        vad.reset_states()
        return [torch.cat([vad(frame, 16000).flatten() for frame in sound])]

    @torch.no_grad()
    def all_ours() -> list[Tensor]:
        stream.reset()
        return [torch.tensor([decide(inner.encoder(inner.run_extractors(chunk))) for chunk in chunks])]

    yield Case("decoder, shipped weights, a stream", decoder_theirs, decoder_ours)
    yield Case("encoder and decoder", all_theirs, all_ours)


CLIENTS: dict[str, Callable[[], Iterator[Case]]] = {
    "DeepFilterNet": deepfilternet,
    "recbole": recbole,
    "kraken": kraken,
    "Resemblyzer": resemblyzer,
    "sb3-contrib": recurrent_ppo,
    "torch-geometric": torch_geometric,
    "neuralhydrology": neuralhydrology,
    "gluonts": gluonts,
    "silero-vad": silero_vad,
}


def difference(case: Case) -> float:
    """Return the largest difference between results, of each one's largest number."""
    theirs, ours = case.theirs(), case.ours()
    if [found.shape for found in theirs] != [found.shape for found in ours]:
        return float("inf")
    apart = [
        float((a.double() - b.double()).abs().max() / b.abs().max().clamp_min(1e-30))
        for a, b in zip(ours, theirs, strict=True)
    ]
    return max(apart) if all(one == one for one in apart) else float("nan")


def measure(client: str, budget: float) -> Iterator[Timed]:
    """Check and time all that a package has."""
    try:
        found: str | None = version(client)
    except PackageNotFoundError:
        yield Timed(client, None, left_out="it isn't installed")
        return
    try:
        torch.manual_seed(1)
        for case in CLIENTS[client]():
            apart = difference(case)
            if not apart <= ALLOWED:
                yield Timed(client, found, case.what, wrong=f"differs by {apart:.1e}; allowed are {ALLOWED:.0e}")
                continue
            pair = [Contestant("theirs", case.theirs), Contestant("ours", case.ours)]
            seconds = take_turns(pair, budget)
            theirs, ours = (1e3 * statistics.median(seconds[one.name]) for one in pair)
            yield Timed(client, found, case.what, apart, theirs, ours)
    except (ImportError, OSError) as error:
        yield Timed(client, found, left_out=f"{type(error).__name__}: {error}".partition("\n")[0])


def measure_apart(client: str, budget: float, threads: int) -> list[Timed]:
    """Check and time a package in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as process:
        return process.submit(_measured, client, budget).result()


def _measured(client: str, budget: float) -> list[Timed]:
    warnings.filterwarnings("ignore")  # of the packages, on their own ways
    return list(measure(client, budget))


def line_of(timed: Timed) -> str:
    """Return a row of the table."""
    head = f"| {timed.client}{f' {timed.version}' * bool(timed.version)} | {timed.what} | "
    if timed.left_out or timed.wrong:
        return f"{head}{f'left out: {timed.left_out}' if timed.left_out else f'WRONG: {timed.wrong}'} | | | |"
    return f"{head}{timed.difference:.0e} | {timed.theirs:.2f} | {timed.ours:.2f} | {timed.ratio:.2f} |"


def main(arguments: list[str] | None = None) -> int:
    """Measure all packages; the exit code says whether an answer was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.clients", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(CLIENTS), default=list(CLIENTS), metavar="PACKAGE")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a case, after three turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the JSON file")
    given = parser.parse_args(arguments)
    everything: list[Timed] = []
    print("| package | what | difference | theirs, ms | with ours, ms | theirs / ours |\n|---|---|---|---|---|---|")
    for client in given.only:
        for timed in measure_apart(client, given.budget, given.threads):
            print(line_of(timed), flush=True)
            everything.append(timed)
    slower = [timed for timed in everything if 0 < timed.ratio < 1]
    print(f"\n{sum(timed.ratio > 0 for timed in everything)} cases, slower with ours: {len(slower)}")
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"clients-{time.strftime('%Y%m%d-%H%M%S')}.json"
    written = {"machine": machine() | {"threads": given.threads}, "cases": [asdict(timed) for timed in everything]}
    path.write_text(json.dumps(written, indent=1), encoding="utf-8")
    print(path)
    return int(any(timed.wrong for timed in everything))


if __name__ == "__main__":
    sys.exit(main())
