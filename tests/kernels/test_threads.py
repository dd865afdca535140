"""Threads of our own, where a process has no OpenMP: kept, fewer where no more can be had, new after a fork; and Ctrl-C."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from comparison import HAS_NATIVE
from torch import Tensor

import throughtime
from throughtime.kernels import native

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels aren't built")

TASKS = Path("/proc/self/task")


def train(threads: int, layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output, _ = layer(x)
        return [output, *torch.autograd.grad(output.sum(), list(layer.parameters()))]
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def own_threads():
    native.use_own_threads(True)
    yield
    native.use_own_threads(False)


def test_they_change_no_bit(own_threads):
    layer, x = throughtime.LSTM(5, 40), torch.randn(30, 12, 5)
    native.use_own_threads(False)
    expected = train(1, layer, x)
    native.use_own_threads(True)
    for threads in (2, 3, 5):
        assert all(map(torch.equal, train(threads, layer, x), expected))


@pytest.mark.skipif(not TASKS.exists(), reason="the system doesn't list threads")
def test_they_are_kept(own_threads):
    layer, x = throughtime.GRU(5, 40), torch.randn(30, 12, 5)
    train(3, layer, x)
    before = {task.name for task in TASKS.iterdir()}
    for _ in range(20):
        train(3, layer, x)
    assert {task.name for task in TASKS.iterdir()} == before


def test_calls_at_the_same_time_have_each_their_own(own_threads):
    layer, x = throughtime.LSTM(5, 40), torch.randn(30, 12, 5)
    expected, found = train(2, layer, x), []
    torch.set_num_threads(2)
    callers = [threading.Thread(target=lambda: found.extend(layer(x)[0] for _ in range(10))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    torch.set_num_threads(1)
    assert len(found) == 40
    assert all(torch.equal(output, expected[0]) for output in found)


def in_a_process(*lines: str) -> subprocess.CompletedProcess[str]:
    script = [
        "import os, resource, signal, sys, threading, time, torch, throughtime",
        "from throughtime.kernels import native",
    ]
    script += ["torch.manual_seed(0)", "layer, x = throughtime.LSTM(5, 40), torch.randn(30, 12, 5)", *lines]
    command = [sys.executable, "-c", "\n".join(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="counts on Linux's limits")
def test_where_no_thread_can_be_made_fewer_do_the_work():
    """A thread's stack doesn't fit in the memory that is left."""
    ended = in_a_process(
        "torch.set_num_threads(1)",
        "expected = layer(x)[0]",
        "native.use_own_threads(True)",
        "torch.set_num_threads(64)",
        "used = 4096 * int(open('/proc/self/statm').read().split()[0])",
        "resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20), resource.RLIM_INFINITY))",  # two or three stacks
        "print(torch.equal(layer(x)[0], expected), len(os.listdir('/proc/self/task')) < 40)",
    )
    assert (ended.returncode, ended.stdout) == (0, "True True\n"), ended.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_after_a_fork_there_are_new_ones():
    ended = in_a_process(
        "native.use_own_threads(True)",
        "torch.set_num_threads(3)",
        "expected = layer(x)[0]",
        "child = os.fork()",
        "if not child:",
        "    signal.alarm(60)",
        "    os._exit(0 if torch.equal(layer(x)[0], expected) else 1)",
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))",
    )
    assert (ended.returncode, ended.stdout) == (0, "0\n"), ended.stderr


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2, reason="there is one core, or none can be chosen"
)
@pytest.mark.parametrize(("rows", "calls"), [(2, 50), (64, 20)], ids=["meeting at each step", "with rows of their own"])
def test_where_threads_share_a_core_one_works_alone_until_they_have_two(rows, calls):
    ended = in_a_process(
        f"layer, x, cores = throughtime.LSTM(5, 256), torch.randn(100, {rows}, 5), os.sched_getaffinity(0)",
        "def confine(to):",
        "    for task in os.listdir('/proc/self/task'):",
        "        os.sched_setaffinity(int(task), to)",
        "torch.set_num_threads(1)",
        "expected = layer(x)[0]",
        "torch.set_num_threads(2)",
        "layer(x)",
        "confine({min(cores)})",
        "before = native.meetings()",
        f"outputs = [layer(x)[0] for _ in range({calls})]",
        "shared = native.meetings()",
        "confine(cores)",
        "time.sleep(0.5)",
        "outputs.append(layer(x)[0])",
        "print(shared.alone - before.alone > shared.teams - before.teams, native.meetings().teams > shared.teams)",
        "print(all(torch.equal(output, expected) for output in outputs))",
    )
    assert (ended.returncode, ended.stdout) == (0, "True True\nTrue\n"), ended.stderr


LONG = {
    "forward": ("LSTM(8, 512)", 200_000, "layer(x)"),
    "both ways": ("LSTM(8, 512, bidirectional=True)", 100_000, "layer(x)"),
    "a variant": ("LSTM(8, 512, layer_norm=True)", 100_000, "layer(x)"),
    "backward": ("LSTM(8, 512)", 60_000, "torch.autograd.grad(loss, list(layer.parameters()))"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent")
@pytest.mark.parametrize("what", LONG)
def test_ctrl_c_is_answered_in_the_middle_of_a_call(what):
    """The call would go on for many seconds; the exception comes at once, and the layer works afterwards."""
    layer, steps, call = LONG[what]
    ended = in_a_process(
        f"layer, x = throughtime.{layer}, torch.randn({steps}, 1, 8)",
        "torch.set_num_threads(1)",
        f"torch.set_grad_enabled({what == 'backward'})",
        f"loss = layer(x)[0].sum() if {what == 'backward'} else None",
        "sent = []",
        "def send():",
        "    time.sleep(0.5)",
        "    sent.append(time.monotonic())",
        "    os.kill(os.getpid(), signal.SIGINT)",
        "threading.Thread(target=send).start()",
        "try:",
        f"    {call}",
        "except KeyboardInterrupt:",
        "    waited = time.monotonic() - sent[0]",
        "layer(x[:3])",
        "print(waited)",
    )
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 3  # a tenth of a second where nothing else runs


def test_a_process_ends_while_another_thread_is_in_a_long_call():
    ended = in_a_process(
        "layer, x = throughtime.LSTM(8, 512), torch.randn(100_000, 1, 8)",
        "torch.set_grad_enabled(False)",
        "torch.set_num_threads(1)",
        "threading.Thread(target=layer, args=(x,), daemon=True).start()",
        "time.sleep(0.7)",
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_has_memory_that_another_thread_was_about_to_hand_back():
    """To hand back a gigabyte takes the system some time, in which the process forks."""
    ended = in_a_process(
        "torch.set_num_threads(1)",
        "layer, x = throughtime.LSTM(64, 512), torch.randn(20, 8, 64)",
        "def call():",
        "    with torch.no_grad(): layer(x)",
        "call()",
        "ended = set()",
        "for _ in range(4):",
        "    native.new(x, 1 << 28).fill_(1.0)",
        "    thread = threading.Thread(target=call)",
        "    thread.start()",
        "    for _ in range(10):",
        "        time.sleep(0.003)",
        "        child = os.fork()",
        "        if not child:",
        "            signal.alarm(20)",
        "            call()",
        "            os._exit(0)",
        "        ended.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))",
        "        if ended != {0}: break",
        "    thread.join()",
        "    native.release_memory()",
        "print(ended)",
    )
    assert (ended.returncode, ended.stdout) == (0, "{0}\n"), ended.stderr
