"""A small draw of `benchmarks/onnx_parity.py`: random layers against ONNX Runtime, and back."""

import pytest

pytest.importorskip("onnxruntime", reason="the extra throughtime[onnx] isn't installed")

from benchmarks import onnx_parity

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("seed", range(1012, 1037))
def test_random_layers_are_computed_by_onnx_runtime_and_read_back(seed):
    assert onnx_parity.error(seed) <= onnx_parity.ALLOWED


def test_the_draw_has_every_kind_and_option():
    drawn = [onnx_parity.draw(seed) for seed in range(1012, 1037)]
    cells = {one.layer.cell for one in drawn}
    assert cells >= {"gru", "gru_reset_before", "mgu", "rnn_tanh", "rnn_relu"}
    assert len([cell for cell in cells if cell.startswith("lstm")]) == 4
    for flag in ("bias", "batch_first", "bidirectional"):
        assert {getattr(one.layer, flag) for one in drawn} == {False, True}
    assert {(one.has_lengths, one.has_state) for one in drawn} == {(a, b) for a in (False, True) for b in (False, True)}


def test_the_script_tells_the_worst_and_fails_above_what_is_allowed(capsys, monkeypatch):
    assert onnx_parity.main(["--count", "2"]) == 0
    assert "2 configurations" in capsys.readouterr().out
    monkeypatch.setattr(onnx_parity, "ALLOWED", 0.0)
    assert onnx_parity.main(["--count", "1"]) == 1
