"""Reads Forge's names for the LoRAs of a stack.

Source: Forge's `backend/patcher/base.py` (`ModelPatcher.add_patches`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PureWindowsPath
from typing import NamedTuple

from .types import Identifier


class LoraIdentifier(NamedTuple):
    """The four fields of an identifier that Forge has made."""

    filename: str
    strength: float
    strength_model: float
    online: bool


def parse(identifier: Identifier) -> LoraIdentifier | None:
    """Returns the fields; None for a key that another extension has put into the stack."""
    return LoraIdentifier(*identifier) if isinstance(identifier, tuple) and len(identifier) == 4 else None


def describe(identifier: Identifier) -> tuple[str, float]:
    """Returns the file name without its folder, and the strength. A key of another extension is its own name."""
    if isinstance(identifier, tuple) and len(identifier) >= 2 and isinstance(identifier[1], (int, float)):
        # PureWindowsPath splits at both kinds of slashes.
        return PureWindowsPath(str(identifier[0])).name or str(identifier[0]), float(identifier[1])
    return str(identifier), 1.0


def with_strength(identifier: Identifier, strength: float) -> Identifier:
    """Returns the identifier of the same LoRA at another strength; a key of another extension stays as it is.

    The result is a plain tuple: Forge compares stacks by the text of their identifiers.
    """
    fields = parse(identifier)
    return identifier if fields is None or fields.strength == strength else tuple(fields._replace(strength=strength))


def with_online(identifier: Identifier, online: bool) -> Identifier:
    """Returns the identifier of the same LoRA, to be applied in each forward pass (`online`) or merged."""
    fields = parse(identifier)
    return (str(identifier), 1.0, 1.0, online) if fields is None else tuple(fields._replace(online=online))


def stack_name(identifiers: Iterable[Identifier]) -> str:
    """Returns Forge's name for a stack, which `LoraLoader.loaded_hash` holds and other extensions compare."""
    return str(list(identifiers))
