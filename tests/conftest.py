"""Settings for the whole run; the comparison helper stands in comparison.py."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings

# A shell starts what runs in the background with Ctrl-C ignored, and nohup with SIGHUP; tests send both, to themselves and to what
# they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# THROUGHTIME_NATIVE=FILE runs the tests on another build of the kernels, as `make sanitize` does; "none" runs them without.
if (built := os.environ.get("THROUGHTIME_NATIVE")) == "none":
    sys.modules["throughtime.kernels._native"] = None  # type: ignore[assignment]  # what the import system takes for absent
elif built:
    spec = spec_from_file_location("throughtime.kernels._native", built)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])

# Every call into the equations has its shapes checked, from before anything is imported.
jaxtyping.install_import_hook("throughtime.cells", "beartype.beartype").__enter__()

from throughtime.kernels import native  # noqa: E402 after the hook

if native.module is not None:
    native.fill_blocks(True)

settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert sys.float_info.min / 2 > 0, "this thread takes denormals for zero now: what was loaded, or not restored?"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let this process have two gigabytes of memory more than it has, and no further."""
    resource = pytest.importorskip("resource")
    sizes = Path("/proc/self/statm")
    if not sizes.exists():
        pytest.skip("how much memory a process has isn't told here")
    there, (soft, hard) = (
        int(sizes.read_text().split()[0]) * resource.getpagesize(),
        resource.getrlimit(resource.RLIMIT_AS),
    )
    resource.setrlimit(resource.RLIMIT_AS, (there + (2 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def small_arrays_are_pooled() -> Iterator[Callable[[bool], None]]:
    """Have the kernels keep arrays of any size for the next ones, or, where it is called with false, large ones alone."""
    size = native.module.least_pooled()
    native.pool_from(0)
    yield lambda value: native.pool_from(0 if value else size)
    native.pool_from(size)
