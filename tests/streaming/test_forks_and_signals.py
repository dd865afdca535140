"""A process that forks while another thread steps its streams, and signals that come in the middle of a long feed."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

import throughtime
from throughtime.kernels import native

pytestmark = [
    pytest.mark.skipif(native.module is None, reason="streams need the kernels"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork"),
]

FORKS = """
    import os, signal, threading
    import torch, throughtime

    torch.set_num_threads(1)
    layer = throughtime.LSTM(8, 512)
    stream, x = throughtime.stream(layer), torch.randn(4000, 8)
    began = stream.state()
    stream.feed(x)
    whole = stream.state()
    stream.restore(began)
    is_over = False

    def feed():
        while not is_over:
            stream.feed(x)
            stream.restore(began)

    threads = [threading.Thread(target=feed), threading.Thread(target=lambda: [stream.state() for _ in range(50)])]
    [thread.start() for thread in threads]
    ended = []
    for _ in range(5):
        child = os.fork()
        if not child:
            signal.alarm(20)
            stream.step(x[0])
            stream.restore(began)
            stream.feed(x)
            is_whole = stream.state() == whole
            del stream
            os._exit(0 if is_whole else 1)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    is_over = True
    [thread.join() for thread in threads]
    print(ended)
"""


def test_a_child_steps_the_streams_that_another_thread_was_at():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKS)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == "[0, 0, 0, 0, 0]\n", done.stderr


@pytest.fixture
def alarms():
    """Have a handler called in 50 ms."""
    before = signal.getsignal(signal.SIGALRM)

    def ring(handler):
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    yield ring
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_handler_may_use_the_stream_that_it_interrupts(alarms):
    layer = throughtime.LSTM(8, 512)
    stream, x, seen = throughtime.stream(layer), torch.randn(12_000, 8), []
    alarms(lambda *_: seen.append(stream.state()))
    stream.feed(x)
    expected = throughtime.stream(layer)
    expected.feed(x)
    assert len(seen) == 1
    assert seen[0] != stream.state() == expected.state()


def test_a_handler_that_raises_ends_a_long_feed(alarms):
    layer = throughtime.LSTM(8, 512)
    stream, x = throughtime.stream(layer), torch.randn(20_000, 8)

    def give_up(*_):
        raise TimeoutError("long enough")

    alarms(give_up)
    with pytest.raises(TimeoutError, match="long enough"):
        stream.feed(x)
    stream.reset()
    assert torch.equal(stream.feed(x[:10]), throughtime.stream(layer).feed(x[:10]))
