"""Parses the values that users type. Each function raises ValueError with what was expected; argparse shows it."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ..files.header import is_file, shown
from ..messages import Message, reason
from ..planning.rates import nearest_rates
from ..units import GB, MB
from . import webui_files
from .page import in_users_language

_T = TypeVar("_T")

_SIZE = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)\s*(gib|gb|g|mib|mb|m)?", re.ASCII | re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_STRENGTH = re.compile(r":" + _NUMBER.pattern, re.ASCII | re.IGNORECASE)
_RESOLUTION = re.compile(r"(\d{2,5})\s*[x*]\s*(\d{2,5})", re.ASCII | re.IGNORECASE)
_LARGEST_PLAIN_GB = 1024
"""A larger number without a unit is more likely in MB."""
_SMALLEST_SIDE, _LARGEST_SIDE = 64, 16384


def size(text: str) -> int:
    """Parses "12GB", "12 GiB", "8192MB" or "12" (GB) into bytes. GB and GiB are alike: memory is sold in powers of two.

    Raises:
        ValueError: The text is no size, or 0, or a number without a unit that can hardly be GB.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or float(found[1]) == 0:
        raise ValueError(Message("command.size", {"found": repr(text)}))
    if found[2] is None and float(found[1]) > _LARGEST_PLAIN_GB:
        facts = {"found": repr(text), "number": found[1], "gb": float(found[1]) / 1024}
        raise ValueError(Message("command.size_unit", facts))
    return int(float(found[1]) * (MB if (found[2] or "g").lower().startswith("m") else GB))


def joined(words: Sequence[str]) -> list[str]:
    """Puts a strength back to its file: PowerShell ends a word behind a quote, and splits "my style.safetensors":0.8."""
    whole: list[str] = []
    for word in words:
        if _STRENGTH.fullmatch(word) and whole and not whole[-1].startswith("-"):
            whole[-1] += word
        else:
            whole.append(word)
    return whole


def model(text: str) -> Path:
    """Parses the name of a model file: a path, or a name in the WebUI's list of checkpoints."""
    return _file(text, webui_files.MODELS)


def part(text: str) -> Path:
    """Parses the name of a text encoder or VAE: a path, or a name in the WebUI's list."""
    return _file(text, webui_files.PARTS)


def lora_file(text: str) -> Path:
    """Parses the name of a LoRA file: a path, or a name in the WebUI's list of LoRAs."""
    return _file(text, webui_files.LORAS)


def any_file(text: str) -> Path:
    """Parses the name of a file to look into: a path, or a name in one of the WebUI's lists, that of LoRAs first."""
    return _file(text, (*webui_files.LORAS, *webui_files.MODELS, *webui_files.PARTS))


def _file(text: str, folders: tuple[str, ...]) -> Path:
    # A path that was copied with its quotes, where the console has not taken them off.
    path = Path(text[1:-1] if len(text) > 2 and text[0] == text[-1] == '"' else text)
    return path if is_file(path) else webui_files.find(path, folders, webui_files.webui_models()) or path


def lora(text: str) -> tuple[Path, float]:
    """Parses "style.safetensors:0.8" into file and strength, which is 1 by default.

    A colon belongs to the path (C:\\x.safetensors) unless a number is all that follows it, or the file is what stands
    before it.

    Raises:
        ValueError: The strength is no number, or not finite.
    """
    path, colon, tail = text.rpartition(":")
    if not colon or not path or not _NUMBER.fullmatch(tail):
        if colon and not is_file(Path(text)) and is_file(lora_file(path)):
            facts = {"file": shown(lora_file(path).name), "found": repr(tail)}
            raise ValueError(Message("command.strength_after", facts))
        return lora_file(text), 1.0
    if not math.isfinite(strength := float(tail)):
        raise ValueError(Message("command.strength", {"found": repr(tail)}))
    return lora_file(path), strength


def gpu(text: str) -> str:
    """Parses the name of a card, known or not.

    Raises:
        ValueError: The text is no name of a card.
    """
    nearest_rates(text)
    return text


def resolution(text: str) -> tuple[int, int]:
    """Parses "1024x768" into width and height, in pixels.

    Raises:
        ValueError: The text is no size in pixels, or a side is too small or too large.
    """
    found = _RESOLUTION.fullmatch(text.strip())
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(_SMALLEST_SIDE <= side <= _LARGEST_SIDE for side in sides):
        raise ValueError(Message("command.resolution", {"found": repr(text)}))
    return sides


def batch(text: str) -> int:
    """Parses the number of pictures at once, 1 to 64.

    Raises:
        ValueError: The text is no such number.
    """
    if not re.fullmatch(r"\d{1,2}", text, re.ASCII) or not 1 <= int(text) <= 64:
        raise ValueError(Message("command.batch", {"found": repr(text)}))
    return int(text)


def row(text: str) -> int:
    """Parses the number of a configuration of the field reports.

    Raises:
        ValueError: There is no configuration of that number.
    """
    from ..replay.field_cases import CASES

    if not re.fullmatch(r"\d{1,3}", text, re.ASCII) or not 1 <= int(text) <= len(CASES):
        raise ValueError(Message("command.row", {"most": len(CASES), "found": repr(text)}))
    return int(text)


def typed(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """Wraps `parse` for argparse, which shows the text of its own kind of error only."""

    def convert(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(in_users_language(reason(error))) from None

    return convert
