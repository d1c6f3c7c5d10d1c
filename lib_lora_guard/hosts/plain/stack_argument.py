"""Reads the `stack` argument of `LoraGuard.apply`: pairs of a file and a strength, or one line that says what is wrong."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ...files import shown

Argument: TypeAlias = Any
"""Anything: a caller may be wrong in every way."""

EXAMPLE = '[("style.safetensors", 0.8)]'


def read_stack(stack: Argument) -> list[tuple[Path, float]]:
    """Returns the pairs of a stack, with each strength as a float.

    A number out of range (NaN, infinity, 1e30) is left to the reader of the file, which names it in the user's language.

    Raises:
        TypeError: `stack` is no list of pairs, a file is no path, or a strength is no number.
    """
    pairs: Sequence[Argument] = stack if isinstance(stack, Sequence) and not isinstance(stack, str) else (None,)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise TypeError(f"stack must be a list of (file, strength) pairs: {EXAMPLE}")
    return [(_path(file), _strength(file, strength)) for file, strength in pairs]


def _path(file: Argument) -> Path:
    if not isinstance(file, (str, os.PathLike)) or not isinstance(os.fspath(file), str):
        raise TypeError(f"a file of the stack must be a path, such as in {EXAMPLE}; this is a {type(file).__name__}")
    return Path(file)


def _strength(file: Argument, strength: Argument) -> float:
    """Converts a number of any library. True is none: it stands where a strength was forgotten."""
    try:
        if not isinstance(strength, (bool, str, bytes)):
            return float(strength)
    except OverflowError:
        return float("inf")
    except (TypeError, ValueError, RuntimeError):
        pass
    name = shown(Path(str(file)).name)
    raise TypeError(f"{name}: its strength must be a number, such as in {EXAMPLE}; this is {_described(strength)}")


def _described(value: Argument) -> str:
    try:
        text = repr(value)
    except Exception:
        # Any object may stand here.
        text = "?"
    return f"{shown(' '.join(text.split()), 60)} ({type(value).__name__})"
