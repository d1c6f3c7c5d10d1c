"""Asks whether a host's module has what the guard needs. Nothing is changed here."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

from ..errors import HostError


def module(name: str) -> ModuleType:
    """Imports a module of the host.

    Raises:
        HostError: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise HostError(f"{name} cannot be imported: {error}") from error


def attribute(owner: Any, path: str) -> Any:
    """Returns `owner.a.b` for the path "a.b".

    Raises:
        HostError: it is missing.
    """
    value = owner
    for part in path.split("."):
        if not hasattr(value, part):
            raise HostError(f"{owner.__name__}.{path} is missing")
        value = getattr(value, part)
    return value


def parameters(owner: ModuleType, path: str, wanted: list[str]) -> None:
    """Checks that a function has the parameters that the guard passes by name.

    Raises:
        HostError: some are missing.
    """
    present = inspect.signature(attribute(owner, path)).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in present.values()):
        # Another extension's wrapper that takes whatever comes.
        return
    found = list(present)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise HostError(f"{owner.__name__}.{path} has no parameter {', '.join(missing)} (it has {', '.join(found)})")
