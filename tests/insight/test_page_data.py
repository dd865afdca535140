"""What a page is given, unpacked again, is what was measured; and it is always JSON."""

import base64
import json

import numpy as np
import pytest
import torch

from throughtime import insight
from throughtime.insight.page_data import DECADES, LONGEST, matrix_data, reading_data
from throughtime.insight.report import make_layer, record_noise


def unpacked(packed, kind=np.uint8):
    return torch.from_numpy(
        np.frombuffer(base64.b64decode(packed["data"]), kind).reshape(packed["shape"]).astype(np.float64)
    )


def report_of(recorded, lags, probes):
    lanes = insight.measure(recorded, lags=lags, probes=probes)
    steps, rows, _ = recorded.recording.outputs.shape
    return insight.GradientReport("it", "on noise", "lstm", steps, rows, probes, lags, lanes, [])


@pytest.mark.parametrize(("lags", "probes"), [(12, 9), (20, 20), (1, 1)])
def test_the_matrix_is_the_lag_matrix(lags, probes):
    report = report_of(record_noise(make_layer("lstm", 8, 2), steps=20), lags, probes)
    given = matrix_data(report)
    assert given["lane"] == 1
    lag = report.lanes[1].lag
    norms, low, high = unpacked(given["norms"]), given["norms"]["low"], given["norms"]["high"]
    assert high - low == DECADES
    for row, s in enumerate(lag.losses.tolist()):
        followed = range(max(0, s - lags + 1), s + 1)
        assert [t for t in range(20) if norms[row, t] > 0] == list(followed)
        for t in followed:
            exact = max(lag.matrix[row, t].log10().item(), low)
            assert low + (norms[row, t].item() - 1) / 254 * DECADES == pytest.approx(exact, abs=DECADES / 254)
    assert all(a <= b for a, b in zip(given["lowest"], given["highest"], strict=True))


def test_the_reading_is_the_first_row():
    recorded = record_noise(make_layer("lstm", 8, 2), steps=20)
    given = reading_data(recorded, [str(t) for t in range(30)], lags=12)
    assert given["texts"] == [str(t) for t in range(21)]
    for lane, shown in zip(recorded.recording.lanes, given["lanes"], strict=True):
        parts = [*lane.states, *(lane.saved_fields[gate] for gate in "ifo")]
        for field, exact in zip(shown["fields"], parts, strict=True):
            values = field["low"] + unpacked(field) / 255 * (field["high"] - field["low"])
            torch.testing.assert_close(values, exact[:, 0].double(), atol=(field["high"] - field["low"]) / 500, rtol=0)
    reach = insight.input_reach(*recorded, lags=12)[:, :, 0].double()
    shares = unpacked(given["shares"], np.dtype("<u2")) / 65535
    torch.testing.assert_close(shares, reach / reach.sum(1, keepdim=True), atol=1e-5, rtol=0)


def test_a_long_sequence_is_cut():
    given = reading_data(record_noise(make_layer("rnn", 3), steps=LONGEST + 9), None, lags=5)
    assert given["steps"] == LONGEST
    assert given["shares"]["shape"] == [LONGEST, 5]
    assert [field["name"] for field in given["lanes"][0]["fields"]] == ["h"]


def test_an_explosion_is_json_too():
    recorded = record_noise(make_layer("rnn_relu", 16, 1, "orthogonal:9"), steps=150)
    assert not recorded.recording.outputs.isfinite().all()
    report = report_of(recorded, 120, 8)
    given = {"report": report.to_json(), "matrix": matrix_data(report), "reading": reading_data(recorded, None, 120)}
    json.dumps(given, allow_nan=False)
