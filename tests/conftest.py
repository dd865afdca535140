"""Settings for the whole run; the comparison helper stands in comparison.py."""

import jaxtyping
import pytest
import torch
from hypothesis import settings

# Every call into the equations has its shapes checked, from before anything is imported.
jaxtyping.install_import_hook("throughtime.cells", "beartype.beartype").__enter__()

settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
