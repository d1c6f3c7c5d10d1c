"""The text for a bug report: versions, machine, settings and the log, without prompts, names or paths. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..messages import Joined, Message
from .ring import Line

LINES = 120
HIDDEN = "…"

_HARMLESS = {
    "KModel", "JointTextEncoder", "IntegratedAutoencoderKL", "UNet2DConditionModel", "cpu", "cuda", "nf4", "fp4", "gguf",
    "fp8_e4m3fn", "fp8_e5m2", "bf16", "fp16", "fp32", "float16", "bfloat16", "float32", "Automatic", "fp16 LoRA", "Merge",
}  # fmt: skip
"""Texts in a sentence that are never a user's."""
_DEVICE = re.compile(r"cuda:\d{1,2}")


def bug_report(facts: Sequence[tuple[str, str]], lines: Iterable[Line]) -> str:
    """Returns the text.

    Args:
        facts: Titles and values; they hold no name of a file.
        lines: Of the log, oldest first.
    """
    shown = [_line(line) for line in lines if isinstance(line.message, Message)]
    return "\n".join([*(f"{title}: {value}" for title, value in facts), "", *shown[-LINES:], ""])


def without_names(message: str) -> str:
    """Returns a sentence with every text in it that may be a user's replaced by HIDDEN. Numbers stay."""
    return message.map(_harmless) if isinstance(message, (Message, Joined)) else HIDDEN


def _line(line: Line) -> str:
    # The kind of an error says enough; its text may quote a path.
    kind = "" if line.error is None else f" ({re.split('[^A-Za-z_.]', str(line.error))[0]})"
    return f"{line.level.lower()}: {without_names(line.message)}{kind}"


def _harmless(fact: object) -> object:
    if isinstance(fact, (bool, int, float)):
        return fact
    return fact if str(fact) in _HARMLESS or _DEVICE.fullmatch(str(fact)) else HIDDEN
