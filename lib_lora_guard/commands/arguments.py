"""What users type, as values. Each raises ValueError with what was expected, which argparse shows with the usage."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..replay.field_cases import CASES

_T = TypeVar("_T")

_SIZE = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)\s*(gib|gb|g|mib|mb|m)?", re.ASCII | re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_RESOLUTION = re.compile(r"(\d{2,5})\s*[x*]\s*(\d{2,5})", re.ASCII | re.IGNORECASE)
_GB, _MB = 1 << 30, 1 << 20
_SMALLEST_SIDE, _LARGEST_SIDE = 64, 16384


def size(text: str) -> int:
    """ "12GB", "12 GiB", "8192MB", "12": bytes. GB and GiB are alike, as memory is sold."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"expected a size such as 12GB or 8192MB, found {text!r}")
    return int(float(found[1]) * (_MB if (found[2] or "g").lower().startswith("m") else _GB))


def lora(text: str) -> tuple[Path, float]:
    """ "style.safetensors:0.8": file and strength, 1 where none is given. A colon belongs to the path (C:\\x.safetensors)
    unless a number is all that follows it."""
    path, colon, tail = text.rpartition(":")
    if not colon or not path or not _NUMBER.fullmatch(tail):
        return Path(text), 1.0
    if not math.isfinite(strength := float(tail)):
        raise ValueError(f"expected a strength such as 0.8, found {tail!r}")
    return Path(path), strength


def resolution(text: str) -> tuple[int, int]:
    """ "1024x768": width and height."""
    found = _RESOLUTION.fullmatch(text.strip())
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(_SMALLEST_SIDE <= side <= _LARGEST_SIDE for side in sides):
        raise ValueError(f"expected a size in pixels such as 1024x1024, found {text!r}")
    return sides


def batch(text: str) -> int:
    """1 to 64 pictures at once."""
    if not re.fullmatch(r"\d{1,2}", text, re.ASCII) or not 1 <= int(text) <= 64:
        raise ValueError(f"expected a number of pictures from 1 to 64, found {text!r}")
    return int(text)


def row(text: str) -> int:
    """A field report's number."""
    if not re.fullmatch(r"\d{1,3}", text, re.ASCII) or not 1 <= int(text) <= len(CASES):
        raise ValueError(f"expected the number of a configuration from 1 to {len(CASES)}, found {text!r}")
    return int(text)


def typed(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """`parse` for argparse, which shows the text of no other error than its own."""

    def convert(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
