"""Names of a package that are imported when they are first used."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def on_first_use(
    package: str, homes: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__` (PEP 562).

    Args:
        package: Its name.
        homes: The names that each of its modules gives it.
        modules: Modules of it that are attributes too, without having been imported.

    Example:
        >>> get, list_names = on_first_use("email", {"utils": ["parseaddr"]}, ["header"])
        >>> get("parseaddr")("Ada <ada@example.org>"), get("header").__name__
        (('Ada', 'ada@example.org'), 'email.header')
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)
        setattr(sys.modules[package], name, found)  # so that it is asked for once
        return found

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of, *modules})

    return get, list_names
