"""Layers from ONNX's nodes and Keras' arrays: ONNX's own test cases, round trips, and what is refused by name."""

import warnings

import numpy as np
import pytest
import torch

import throughtime
from throughtime.onnx.reading import Reversed

pytest.importorskip("onnxruntime", reason="the extra throughtime[onnx] isn't installed")

import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx_models import Layer, computed, exported, recurrent


def _cases() -> dict:
    """ONNX's test cases of recurrent nodes: the node, what it is given and what it makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case import node
        from onnx.backend.test.case.node import gru, lstm, rnn  # noqa: F401 they add their cases
    found = {}
    for case in node._NodeTestCases:
        (made,) = case.model.graph.node
        if made.op_type in ("RNN", "LSTM", "GRU"):
            found[case.name] = (case.model, *case.data_sets[0])
    return found


CASES = _cases()


def _with_weights(model, given):
    """Let a model hold what it is given, but for the first input."""
    made = onnx.ModelProto.FromString(model.SerializeToString())
    for one, array in list(zip(made.graph.input, given, strict=True))[1:]:
        made.graph.initializer.append(numpy_helper.from_array(array, one.name))
    del made.graph.input[1:]
    return made


def same(actual, expected, tolerance: float = 1e-5) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def test_there_are_cases_of_every_node_and_direction():
    assert len(CASES) >= 17
    assert {node.op_type for model, *_ in CASES.values() for node in model.graph.node} == {"RNN", "LSTM", "GRU"}


@pytest.mark.parametrize("name", CASES)
def test_onnx_test_cases_are_read_and_written_again(name):
    model, given, expected = CASES[name]
    ((_, found),) = throughtime.from_onnx(_with_weights(model, given)).items()
    (node,) = model.graph.node
    by_row = any(each.name == "layout" and each.i for each in node.attribute)
    x = torch.from_numpy(given[0])
    results = _results(found, x)
    right = {
        output: torch.from_numpy(array) for output, array in zip([o for o in node.output if o], expected, strict=True)
    }
    for place, output in enumerate(node.output):
        if output:
            mine = results[place]
            if by_row:
                mine = mine.transpose(0, 1)
            elif not place:
                mine = mine.permute(0, 2, 1, 3) if mine.dim() == 4 else mine
            torch.testing.assert_close(mine, right[output], rtol=1e-5, atol=1e-5)
    if isinstance(found.layer, Reversed):
        return
    again = exported(Layer(found.layer).eval(), (x,), dynamo=False, batch_first=found.layer.batch_first)
    assert [each.op_type for each in recurrent(again)] == [node.op_type]
    with torch.no_grad():
        same(computed(again, (x,)), Layer(found.layer)(x))


def _results(found, x):
    """Return Y (T, B, D, H), and each part of the final state (D, B, H)."""
    with torch.no_grad():
        output, final = found.layer(x, found.hx, lengths=found.lengths)
    layer = found.layer.layer if isinstance(found.layer, Reversed) else found.layer
    output = output.transpose(0, 1) if layer.batch_first else output
    return [output.unflatten(2, (-1, layer.hidden_size)), *(final if isinstance(final, tuple) else (final,))]


def _model(op="LSTM", hidden=3, inputs=2, ways=1, *, before=(), more=(), held=None, **attributes):
    """Return a model of one node with weights, and these."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    chance = np.random.default_rng(0)
    arrays = {"W": (ways, gates * hidden, inputs), "R": (ways, gates * hidden, hidden), "B": (ways, 2 * gates * hidden)}
    held = {name: chance.standard_normal(shape).astype(np.float32) for name, shape in arrays.items()} | (held or {})
    names = ["X", "W", "R", "B", *more]
    node = helper.make_node(op, names, ["Y", "Y_h"], name="own", **{"hidden_size": hidden, **attributes})
    tensors = [numpy_helper.from_array(array, name) for name, array in held.items()]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", "B", size]) for name, size in (("X", inputs),)
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("Y", "Y_h")]
    graph = helper.make_graph([*before, node], "g", values, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("op", "ways", "options"),
    [
        ("LSTM", 2, {"direction": "bidirectional"}),
        ("LSTM", 1, {"input_forget": 1}),
        ("LSTM", 1, {"direction": "reverse"}),
        ("GRU", 1, {"linear_before_reset": 1}),
        ("GRU", 2, {"linear_before_reset": 0, "direction": "bidirectional"}),
        ("GRU", 1, {"direction": "reverse"}),
        ("RNN", 2, {"activations": ["Relu", "Relu"], "direction": "bidirectional"}),
    ],
)
def test_layers_compute_what_onnx_runtime_does(op, ways, options):
    model = _model(op, ways=ways, **options)
    found = throughtime.from_onnx(model)["own"]
    x = torch.randn(7, 4, 2)
    y, h = computed(model, (x,))
    output, final, *_ = _results(found, x)
    same((output.transpose(1, 2), final), (y, h))


def test_input_forget_with_peepholes_is_read_as_onnx_runtime_computes_it():
    peepholes = np.random.default_rng(1).standard_normal((1, 9)).astype(np.float32)
    model = _model(more=("", "", "", "P"), held={"P": peepholes}, input_forget=1)
    x = torch.randn(7, 4, 2)
    found = throughtime.from_onnx(model)["own"]
    assert found.layer.peepholes
    output, h, _ = _results(found, x)
    same((output.transpose(1, 2), h), computed(model, (x,)))


def test_lengths_and_states_that_the_file_holds_come_with_the_layer():
    state = np.ones((1, 3, 3), np.float32)
    held = {"n": np.array([7, 2, 1], np.int32), "h": state, "c": 2 * state}
    model = _model(more=("n", "h", "c"), held=held)
    found = throughtime.from_onnx(model)["own"]
    assert found.lengths.tolist() == [7, 2, 1]
    x = torch.randn(7, 3, 2)
    output, h, _ = _results(found, x)
    same((output.transpose(1, 2), h), computed(model, (x,)))


def test_a_reversed_layer_turns_each_row_by_its_own_length_and_is_exported():
    model = _model("GRU", direction="reverse", more=("n",), held={"n": np.array([5, 0, 2], np.int32)})
    found = throughtime.from_onnx(model)["own"]
    x = torch.randn(5, 3, 2)
    output, h = found.layer(x, lengths=found.lengths)
    y, y_h = computed(model, (x,))
    same((output, h), (y[:, 0], y_h))
    with torch.no_grad():
        same(computed(exported(Layer(found.layer).eval(), (x,), dynamo=False), (x,)), found.layer(x))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_the_exporters_write_is_read_again(name, bias):
    """Their weights are what nodes make of initialisers."""
    layer = getattr(throughtime, name)(300, 64, bidirectional=True, bias=bias)
    made = exported(Layer(layer).eval(), (torch.randn(6, 3, 300),), dynamo=False)
    ((_, found),) = throughtime.from_onnx(made).items()
    assert {k: v.tolist() for k, v in found.layer.state_dict().items()} == {
        k: v.tolist() for k, v in layer.state_dict().items()
    }


def test_weights_that_nodes_make_are_computed():
    w = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    before = [helper.make_node("Unsqueeze", ["w", "axis"], ["W"])]
    model = _model("RNN", before=before, held={"w": w, "axis": np.array([0])})
    del model.graph.initializer[[t.name for t in model.graph.initializer].index("W")]
    assert np.array_equal(throughtime.from_onnx(model)["own"].layer.weight_ih_l0.detach().numpy(), w)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clip": 3.0}, "'own' clips at 3; expected one that doesn't"),
        (
            {"activations": ["Sigmoid", "Relu", "Tanh"]},
            "has the activations Sigmoid, Relu, Tanh; expected Sigmoid, Tanh",
        ),
        ({"direction": "sideways"}, "has direction 'sideways'; expected forward"),
        ({"held": {"B": np.zeros((1, 7), np.float32)}}, r"has B \(1, 7\), torch.float32; expected \(1, 24\)"),
        ({"held": {"W": np.zeros((1, 12, 2), np.int64)}}, "has W of torch.int64; expected float32"),
        ({"hidden_size": 5}, "has hidden_size 5; expected R's, 3"),
        ({"more": ("", "h", "X"), "held": {"h": np.zeros((1, 1, 3), np.float32)}}, "one part of its state"),
        ({"before": [helper.make_node("Identity", ["X"], ["W"])]}, None),
    ],
)
def test_what_no_layer_is_is_refused_by_name(options, said):
    model = _model(**options)
    if said is None:  # W hangs on an input
        del model.graph.initializer[0]
        said = "has W = 'W', which hangs on an input"
    with pytest.raises(throughtime.InputError, match=said):
        throughtime.from_onnx(model)


def _spoilt(tensor):
    tensor.raw_data = tensor.raw_data[:-2]


@pytest.mark.parametrize(
    ("before", "spoil", "said"),
    [
        # A stranger's file of a hundred bytes may ask for a terabyte.
        (helper.make_node("ConstantOfShape", ["size"], ["W"]), None, "has W = 'W', which hangs on an input"),
        (helper.make_node("Identity", ["W2"], ["W"]), None, "has W = 'W', which hangs on an input"),
        (helper.make_node("Reshape", ["R", "size"], ["W"]), None, r"node 'W' \(Reshape\) can't be computed"),
        (helper.make_node("Identity", ["W"], ["W"]), None, "hangs on its own output"),
        (None, _spoilt, "tensor 'W' can't be read"),
    ],
)
def test_weights_that_can_not_be_had_are_refused_by_name(before, spoil, said):
    held = {"size": np.array([1 << 20, 1 << 20])}
    model = _model(before=[before] if before else (), held=held)
    first = next(tensor for tensor in model.graph.initializer if tensor.name == "W")
    if spoil is not None:
        spoil(first)
    else:
        model.graph.initializer.remove(first)
    with pytest.raises(throughtime.InputError, match=said):
        throughtime.from_onnx(model)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(throughtime.InputError, match="can't be read: No such file"):
        throughtime.from_onnx(tmp_path / "none.onnx")
    (tmp_path / "no.onnx").write_bytes(b"\x08\xff\xff\xffnonsense")
    with pytest.raises(throughtime.InputError, match=r"is no ONNX model|has no RNN"):
        throughtime.from_onnx(str(tmp_path / "no.onnx"))
    with pytest.raises(throughtime.InputError, match=r"expected a path or an onnx\.ModelProto"):
        throughtime.from_onnx(3)
    empty = helper.make_model(helper.make_graph([helper.make_node("Relu", ["X"], ["Y"])], "g", [], []))
    with pytest.raises(throughtime.InputError, match="no RNN, LSTM or GRU node"):
        throughtime.from_onnx(empty)


# Keras: its own equations, in numpy


def _sigmoid(a):
    return 1 / (1 + np.exp(-a))


def _keras(cell, weights, x, reset_after=True, relu=False):
    """Return every step (B, T, H), as Keras' layers compute it."""
    kernel, recurrent, *bias = weights
    hidden = recurrent.shape[0]
    h = c = np.zeros((x.shape[0], hidden))
    b = bias[0] if bias else np.zeros(kernel.shape[1])
    outputs = []
    for x_t in x.transpose(1, 0, 2):
        if cell == "rnn":
            a = x_t @ kernel + h @ recurrent + b
            h = np.maximum(a, 0) if relu else np.tanh(a)
        elif cell == "lstm":
            i, f, g, o = np.split(x_t @ kernel + h @ recurrent + b, 4, axis=1)
            c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
            h = _sigmoid(o) * np.tanh(c)
        else:
            of_x, of_h = b if b.ndim == 2 else (b, 0 * b)
            x_z, x_r, x_h = np.split(x_t @ kernel + of_x, 3, axis=1)
            u_z, u_r, u_h = np.split(h @ recurrent + of_h, 3, axis=1)
            z, r = _sigmoid(x_z + u_z), _sigmoid(x_r + u_r)
            candidate = r * u_h if reset_after else (r * h) @ recurrent[:, 2 * hidden :]
            h = z * h + (1 - z) * np.tanh(x_h + candidate)
        outputs.append(h)
    return np.stack(outputs, 1)


def _of_keras(cell, reset_after=True, bias=True, seed=0):
    chance, rows = np.random.default_rng(seed), {"rnn": 1, "lstm": 4, "gru": 3}[cell] * 4
    shape = (2, rows) if cell == "gru" and reset_after else (rows,)
    shapes = [(5, rows), (4, rows)] + [shape] * bias
    return [chance.standard_normal(each) for each in shapes]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("cell", "options"),
    [("rnn", {}), ("rnn", {"relu": True}), ("lstm", {}), ("gru", {}), ("gru", {"reset_after": False})],
)
def test_keras_layers_are_computed(cell, options, bias):
    weights = _of_keras(cell, options.get("reset_after", True), bias)
    layer = throughtime.from_keras(cell, weights, **options)
    x = np.random.default_rng(1).standard_normal((3, 7, 5))
    output, _ = layer(torch.from_numpy(x))
    same((output,), (torch.from_numpy(_keras(cell, weights, x, **options)),), 1e-10)


@pytest.mark.parametrize("is_apart", [False, True])
def test_both_directions_of_keras_stand_in_a_row_or_apart(is_apart):
    forward, backward = _of_keras("gru"), _of_keras("gru", seed=7)
    layer = throughtime.from_keras("gru", *((forward, backward) if is_apart else (forward + backward,)))
    x = np.random.default_rng(1).standard_normal((3, 7, 5))
    expected = [_keras("gru", forward, x), _keras("gru", backward, x[:, ::-1])[:, ::-1]]
    output, _ = layer(torch.from_numpy(x))
    same((output,), (torch.from_numpy(np.concatenate(expected, 2)),), 1e-10)


@pytest.mark.parametrize(
    ("cell", "weights", "said"),
    [
        ("lsmt", [], "lstm"),
        ("lstm", [np.zeros((5, 16))], "there are 1 arrays; expected"),
        ("lstm", [np.zeros((5, 16)), np.zeros((4, 12))], r"recurrent_kernel has shape \(4, 12\); expected \(4, 16\)"),
        ("gru", [np.zeros((5, 12)), np.zeros((4, 12)), np.zeros(12)], r"bias has shape \(12,\); expected \(2, 12\)"),
        ("rnn", [np.zeros((5, 4), int), np.zeros((4, 4), int)], "expected float32"),
        ("rnn", [np.zeros((5, 0)), np.zeros((0, 0))], "kernel has shape"),
        ("rnn", [np.array("x"), np.zeros((4, 4))], "numbers that torch has"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(cell, weights, said):
    with pytest.raises(throughtime.InputError, match=said):
        throughtime.from_keras(cell, weights)
