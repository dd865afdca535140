"""Whether a change leaves every bit as it was: digests of outputs and gradients of every cell, variant, option and dtype.

Each case is a layer called as a user calls it, at odd sizes and from fixed seeds: outputs, final state, and the gradients of input,
initial state, embedding and parameters; of some, second derivatives, forward mode, and calls of the operator itself. Record before
a change and compare after it, on the same machine with the same number of threads.

    OMP_NUM_THREADS=1 python benchmarks/bits.py record before.json
    OMP_NUM_THREADS=1 python benchmarks/bits.py compare before.json
"""

import argparse
import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import throughtime

STEPS, BATCH, INPUTS, HIDDEN = 9, 5, 6, 7
LENGTHS = torch.tensor([4, 9, 0, 1, 7])
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}
Make = Callable[..., Any]

CELLS: dict[str, Make] = {
    "rnn_tanh": throughtime.RNN,
    "rnn_relu": lambda *sizes, **options: throughtime.RNN(*sizes, nonlinearity="relu", **options),
    "lstm": throughtime.LSTM,
    "lstm_projected": lambda *sizes, **options: throughtime.LSTM(*sizes, proj_size=3, **options),
    "gru": throughtime.GRU,
    "gru_reset_before": lambda *sizes, **options: throughtime.GRU(*sizes, reset_after=False, **options),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer_norm": {"layer_norm": True},
    "zoneout": {"zoneout": 0.3},
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "weight_drop": {"weight_drop": 0.3},
    "all": {"layer_norm": True, "zoneout": 0.3, "recurrent_dropout": 0.4, "weight_drop": 0.2},
}
LSTM_VARIANTS: dict[str, dict[str, Any]] = {
    "coupled": {"coupled": True},
    "peepholes": {"peepholes": True},
    "zoneout_of_c": {"zoneout": (0.4, 0.0)},
    "all_of_lstm": {"layer_norm": True, "coupled": True, "peepholes": True, "zoneout": (0.2, 0.1)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "one": {},
    "deep": {"num_layers": 3, "dropout": 0.3},
    "both_ways": {"num_layers": 2, "bidirectional": True},
    "recomputing": {"recompute_every": 4},
    "no_bias": {"bias": False, "batch_first": True},
    "reference": {"backend": "reference", "bidirectional": True},
}
FORMS = ("padded", "lengths", "reset", "lengths_and_reset", "packed", "ids", "embedded", "autocast", "no_grad", "eval")


def main() -> None:
    parser = argparse.ArgumentParser(description="Record or compare digests of what the layers compute.")
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name this is found in")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    digests = {name: digest_of(compute) for name, compute in cases() if re.search(options.only, name)}
    if options.action == "record":
        options.file.write_text(json.dumps(digests, indent=0))
        print(f"{len(digests)} cases recorded")
        return
    before = {n: d for n, d in json.loads(options.file.read_text()).items() if re.search(options.only, n)}
    different = [name for name in {**before, **digests} if before.get(name) != digests.get(name)]
    for name in different:
        print(f"differs: {name}: {before.get(name)} before, {digests.get(name)} now")
    if different or not before:
        raise SystemExit(f"{len(different)} of {len(before)} cases differ")
    print(f"{len(digests)} cases, the same bits")


def cases() -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Yield the name of each case, and what computes it."""
    for name in CELLS:
        variants = VARIANTS | (LSTM_VARIANTS if name.startswith("lstm") else {})
        for (variant, more), (option, options) in itertools.product(variants.items(), OPTIONS.items()):
            for form, dtype in itertools.product(FORMS, DTYPES):
                make = CELLS[name], {**options, **more}
                yield f"{name} {variant} {option} {form} {dtype}", partial(run, make, form, dtype)
    for name, dtype in itertools.product(CELLS, DTYPES):
        yield f"{name} long {dtype}", partial(run_long, CELLS[name], dtype)
        yield f"{name} long recomputing {dtype}", partial(run_long, CELLS[name], dtype, recompute_every=70)
        yield f"{name} torch {dtype}", partial(run, (CELLS[name], {"backend": "torch"}), "lengths", dtype)
    for name, variant, backend in itertools.product(CELLS, VARIANTS, ("auto", "reference")):
        make = CELLS[name], {"backend": backend, **VARIANTS[variant]}
        yield f"{name} {variant} {backend} transformed", partial(transformed, make)
    for name, reverse, recompute_every in itertools.product(("rnn_tanh", "lstm", "gru"), (False, True), (0, 3)):
        for form in ("padded", "lengths_and_reset", "packed"):
            case = f"operator {name} {reverse} {recompute_every} {form}"
            yield case, partial(run_operator, name, reverse, recompute_every, form)


def digest_of(compute: Callable[[], list[Tensor]]) -> str:
    """Return the digest of what is computed, or the error's name where the case is refused."""
    torch.manual_seed(1)
    try:
        tensors = compute()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error)[:40]}"
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:20]


def run(make: tuple[Make, dict[str, Any]], form: str, dtype: str) -> list[Tensor]:
    """Call a layer, and backpropagate through it."""
    of, options = make
    layer = of(INPUTS, HIDDEN, **options).to(DTYPES[dtype])
    layer.train(form != "eval")
    x: Any = torch.randn(STEPS, BATCH, INPUTS).to(DTYPES[dtype]).requires_grad_(form != "no_grad")
    embedding = torch.randn(8, INPUTS).to(DTYPES[dtype]).requires_grad_() if form == "embedded" else None
    leaves = [x, *layer.parameters()]
    if form in ("ids", "embedded"):
        x = torch.randint(INPUTS, (STEPS, BATCH))
        leaves = [*layer.parameters(), *([] if embedding is None else [embedding])]
    reset = torch.rand(STEPS, BATCH) < 0.3 if "reset" in form else None
    lengths = LENGTHS if "lengths" in form or form == "embedded" else None
    state = initial_state(layer, x, form)
    leaves += [] if state is None else list(state)
    if form == "packed":
        x = pack_padded_sequence(x, LENGTHS.clamp(min=1), enforce_sorted=False)
    elif layer.batch_first:
        x, reset = x.transpose(0, 1), None if reset is None else reset.T
    hx = state[0] if state is not None and len(state) == 1 else state
    with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"), torch.set_grad_enabled(form != "no_grad"):
        output, final = layer(x, hx, lengths=lengths, reset=reset, reset_to=hx, embedding=embedding)
    output = output.data if isinstance(output, PackedSequence) else output
    results = [output, *([final] if isinstance(final, Tensor) else final)]
    if form == "no_grad":
        return results
    return [*results, *torch.autograd.grad(results, leaves, [torch.randn_like(t) for t in results])]


def initial_state(layer: Any, x: Tensor, form: str) -> tuple[Tensor, ...] | None:
    """Draw a state for some of the forms; the others begin with zeros."""
    if form in ("padded", "ids", "autocast"):
        return None
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = (layer.output_size, layer.hidden_size)[: 2 if isinstance(layer, throughtime.LSTM) else 1]
    dtype = next(layer.parameters()).dtype
    return tuple(torch.randn(rows, BATCH, width).to(dtype).requires_grad_() for width in widths)


def run_long(of: Make, dtype: str, **options: Any) -> list[Tensor]:
    """As `run`, over several stretches, with rows that end."""
    layer = of(INPUTS, 61, bidirectional=True, **options).to(DTYPES[dtype])
    x = torch.randn(500, 37, INPUTS).to(DTYPES[dtype]).requires_grad_()
    lengths = torch.randint(0, 501, (37,))
    output, _ = layer(x, lengths=lengths)
    return [output, *torch.autograd.grad(output, [x, *layer.parameters()], torch.randn_like(output))]


def transformed(make: tuple[Make, dict[str, Any]]) -> list[Tensor]:
    """Second derivatives, forward mode, a Jacobian-vector product by torch.func, and batched gradients, in float64."""
    of, given = make
    layer = of(INPUTS, HIDDEN, **given).double().eval()
    x = torch.randn(4, 2, INPUTS, dtype=torch.float64, requires_grad=True)
    reset = torch.rand(4, 2) < 0.3

    def output_of(x: Tensor) -> Tensor:
        return layer(x, reset=reset)[0]

    output = output_of(x)
    (first,) = torch.autograd.grad(output, x, torch.randn_like(output), create_graph=True)
    second = torch.autograd.grad(first.square().sum(), [x, *layer.parameters()], allow_unused=True)
    product = torch.func.jvp(output_of, (x.detach(),), (torch.randn_like(x),))[1]
    by_func = torch.func.grad(lambda x: output_of(x).sum())(x.detach())
    batched = torch.autograd.grad(output_of(x), x, torch.randn(3, *output.shape).double(), is_grads_batched=True)
    return [output, first, *(t for t in second if t is not None), product, by_func, *batched]


def run_operator(cell: str, reverse: bool, recompute_every: int, form: str) -> list[Tensor]:
    """Call the operator by hand, one direction, and its backward pass by autograd."""
    gates, states = {"rnn_tanh": (1, 1), "lstm": (4, 2), "gru": (3, 1)}[cell]
    sizes = torch.tensor([5, 4, 4, 2, 1, 1, 1, 1, 1])
    places = (int(sizes.sum()),) if form == "packed" else (STEPS, BATCH)
    x = torch.randn(*places, INPUTS, requires_grad=True)
    initial = [torch.randn(BATCH, HIDDEN, requires_grad=True) for _ in range(states)]
    shapes = [(gates * HIDDEN, INPUTS), (gates * HIDDEN, HIDDEN), (gates * HIDDEN,), (gates * HIDDEN,)]
    parameters = [torch.randn(shape, requires_grad=True) for shape in shapes]
    lengths, reset = (LENGTHS, torch.rand(STEPS, BATCH) < 0.3) if form == "lengths_and_reset" else (None, None)
    batch_sizes = sizes if form == "packed" else None
    rest = (lengths, reset, [], cell, reverse, True, "native", batch_sizes, recompute_every)
    output, final, saved = torch.ops.throughtime.recurrence(x, initial, parameters, *rest)
    results = [output, *final]
    gradients = torch.autograd.grad(results, [x, *initial, *parameters], [torch.randn_like(t) for t in results])
    return [*results, *saved, *gradients]


if __name__ == "__main__":
    main()
