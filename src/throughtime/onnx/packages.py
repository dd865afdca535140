"""The packages of the extra `throughtime[onnx]`, imported when something needs them."""

from importlib import import_module
from typing import Any

from throughtime.errors import InputError


def package(name: str, what: str) -> Any:
    """Return a package of the extra.

    Args:
        name: "onnx" or "onnxruntime".
        what: What needs it, for the message.

    Raises:
        InputError: It isn't there.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(f"{what} needs the package {name}: pip install 'throughtime[onnx]'") from error


def runtime(what: str) -> tuple[Any, Any]:
    """Return onnx and ONNX Runtime."""
    for part in ("checker", "helper", "numpy_helper"):
        package(f"onnx.{part}", what)
    return package("onnx", what), package("onnxruntime", what)
