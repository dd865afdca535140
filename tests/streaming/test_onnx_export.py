"""Models as ONNX files: what ONNX Runtime computes of them step by step, and what is refused."""

import importlib

import pytest
import torch
from torch import nn

import throughtime
from throughtime.onnx import packages
from throughtime.streaming import onnx_export

pytest.importorskip("onnxruntime", reason="the extra throughtime[onnx] isn't installed")
import onnx
import onnxruntime

MODELS = {
    "an LSTM": lambda: throughtime.LSTM(3, 4, 2),
    "peepholes, coupled": lambda: throughtime.LSTM(3, 4, peepholes=True, coupled=True),
    "a GRU, reset before": lambda: throughtime.GRU(3, 5, reset_after=False, bias=False),
    "an MGU": lambda: throughtime.MGU(3, 4),
    "torch.nn's": lambda: nn.RNN(3, 4, nonlinearity="relu"),
    "a stack": lambda: nn.Sequential(
        nn.Linear(3, 6), throughtime.GRU(6, 5), nn.Dropout(0.5), throughtime.LSTM(5, 4), nn.Linear(4, 2, bias=False)
    ),
    "an embedding": lambda: nn.Sequential(nn.Embedding(9, 4), throughtime.LSTM(4, 8), nn.Linear(8, 9)),
}


def called(model, x, states):
    """Call the layers of a model one after the other, with a state for each that has one."""
    after, layers = [], model if isinstance(model, nn.Sequential) else [model]
    before = iter(states if states is not None else [None] * len(layers))
    for layer in layers:
        if isinstance(layer, nn.RNNBase):
            x, state = layer(x, next(before))
            after.append(state)
        else:
            x = layer(x)
    return x, after


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad
def test_it_is_stepped_as_the_model_is_whatever_the_steps_and_rows(name, tmp_path):
    model = MODELS[name]().eval()
    done = throughtime.export_onnx(model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(done.inputs)
    shape, states = {one.name: one.shape for one in session.get_inputs()}, None
    given = {place: torch.zeros(1, 2, shape[place][2]).numpy() for place in done.inputs[1:]}
    for steps in (1, 7, 1):
        x = torch.randint(9, (steps, 2)) if "ids" in done.inputs else torch.randn(steps, 2, 3)
        found = dict(zip(done.outputs, session.run(None, {done.inputs[0]: x.numpy(), **given}), strict=True))
        expected, states = called(model, x, states)
        torch.testing.assert_close(torch.from_numpy(found[done.outputs[0]]), expected, atol=1e-5, rtol=1e-5)
        given = {place: found[f"next_{place}"] for place in done.inputs[1:]}


def test_an_id_that_there_is_not_is_refused_by_the_runtime_too(tmp_path):
    model = throughtime.LSTM(5, 4)
    done = throughtime.export_onnx(model, tmp_path / "m.onnx", ids=True)
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    zeros = torch.zeros(1, 1, 4).numpy()
    for wrong in (5, -6):
        with pytest.raises(Exception, match=r"out of data bounds|indices element"):
            session.run(None, {"ids": torch.tensor([[wrong]]).numpy(), "h_0": zeros, "c_0": zeros})


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (lambda: throughtime.LSTM(3, 4, proj_size=2), "has no projection"),
        (lambda: throughtime.GRU(3, 4, layer_norm=True), "has no layer normalisation"),
        (lambda: throughtime.LSTM(3, 4, zoneout=(0.1, 0.0)), "has no zoneout"),
        (lambda: throughtime.LSTM(3, 4, bidirectional=True), "bidirectional"),
        (lambda: throughtime.LSTM(3, 4).double(), "float64"),
        (lambda: nn.Linear(3, 4), "no recurrent layer"),
    ],
)
def test_what_can_not_be_written_is_refused_by_name_and_leaves_nothing(layer, said, tmp_path):
    with pytest.raises(throughtime.InputError, match=said):
        throughtime.export_onnx(layer(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_fail_the_check(value, tmp_path):
    layer = throughtime.LSTM(3, 4)
    with torch.no_grad():
        layer.weight_hh_l0[0, 0] = value
    with pytest.raises(throughtime.InputError, match="expected finite weights"):
        throughtime.export_onnx(layer, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_put_in_place(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"before")
    arranged = onnx_export.layout.arranged
    monkeypatch.setattr(onnx_export.layout, "arranged", lambda tensor, blocks: arranged(tensor, blocks[::-1]))
    with pytest.raises(throughtime.InputError, match="differs from the model by"):
        throughtime.export_onnx(throughtime.GRU(3, 4), path)
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]


def test_it_replaces_what_a_link_leads_to_and_nothing_beside_it(tmp_path):
    beside, target, link = (tmp_path / name for name in ("link.onnx.part", "target.onnx", "link.onnx"))
    beside.write_text("somebody's")
    target.write_text("before")
    link.symlink_to(target)
    throughtime.export_onnx(throughtime.GRU(3, 4), link)
    assert link.is_symlink()
    assert len(onnx.load(str(target)).graph.node) == 3
    assert beside.read_text() == "somebody's"
    assert len(list(tmp_path.iterdir())) == 3
    for wrong in ("", tmp_path, tmp_path / "none" / "m.onnx"):
        with pytest.raises((throughtime.InputError, OSError)):
            throughtime.export_onnx(throughtime.GRU(3, 4), wrong)


def test_a_model_beyond_a_protobuf_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_MOST_BYTES", 100)
    with pytest.raises(throughtime.InputError, match="one ONNX file holds 100 at most"):
        throughtime.export_onnx(throughtime.GRU(3, 4), tmp_path / "m.onnx")


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_where_a_package_is_missing_a_line_says_what_to_install(missing, tmp_path, monkeypatch):
    def import_module(name):
        if name == missing:
            raise ImportError(name)
        return importlib.import_module(name)

    monkeypatch.setattr(packages, "import_module", import_module)
    with pytest.raises(throughtime.InputError, match=r"needs the package .*pip install 'throughtime\[onnx\]'"):
        throughtime.export_onnx(throughtime.GRU(3, 4), tmp_path / "m.onnx")


def test_names_and_shapes_are_those_of_any_steps_and_rows(tmp_path):
    done = throughtime.export_onnx(throughtime.LSTM(3, 4, 2), tmp_path / "m.onnx")
    graph = onnx.load(str(done.path)).graph
    shapes = {
        each.name: [d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim]
        for each in (*graph.input, *graph.output)
    }
    assert shapes["x"] == ["T", "B", 3]
    assert shapes["output"] == ["T", "B", 4]
    assert shapes["next_c_1"] == [1, "B", 4]
