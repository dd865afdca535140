"""Every example in a docstring runs and gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

import throughtime
from throughtime.kernels import native

MODULES = [
    m.name
    for m in pkgutil.walk_packages(throughtime.__path__, "throughtime.")
    if not m.name.endswith(("__main__", "_native"))
]


@pytest.mark.parametrize("name", ["throughtime", *MODULES])
def test_docstring_examples(name, tmp_path, monkeypatch):
    if native.module is None and name == "throughtime.streaming.engine":
        pytest.skip("streams need the kernels")
    if name == "throughtime.opacus":
        pytest.importorskip("opacus", reason="Opacus isn't installed")
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0
