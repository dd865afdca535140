import pytest
import torch

import throughtime
from throughtime import insight
from throughtime.insight import adjoint, recording, report
from throughtime.insight.threads import SMALL, step_threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_small_steps_take_one_thread_and_large_ones_all():
    with step_threads(SMALL):
        assert torch.get_num_threads() == 1
    with step_threads(SMALL + 1):
        assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), step_threads():
        _ = 1 / 0
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_no_time_loop_of_a_report_waits_for_a_second_thread_at_each_step(monkeypatch):
    """Beside other programs such a loop took 150 seconds of CPU in place of 8: two threads spinning for each other."""
    seen = {}

    def watch(module, name):
        function = getattr(module, name)

        def watched(*arguments, **options):
            seen.setdefault(name, set()).add(torch.get_num_threads())
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, watched)

    watch(recording.sequence, "forward")
    watch(adjoint.Step, "back")
    watch(torch.linalg, "qr")
    layer = throughtime.LSTM(report.NOISE_WIDTH, 6)
    insight.record(layer, torch.randn(5, 2, report.NOISE_WIDTH))
    insight.measure_finite(lambda dtype: report.record_noise(layer, 40, dtype=dtype), lags=20, probes=4)
    assert seen == {"forward": {1}, "back": {1}, "qr": {1}}
    assert torch.get_num_threads() == 2
