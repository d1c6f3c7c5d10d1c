"""Multiplies the strengths of the LoRA tags of a prompt. Pure text; the syntax of a strength is in `schedule`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .schedule import NAMES, ScheduleError, parse

NETWORKS = ("lora", "lyco", "loractl")
"""The names of a LoRA tag."""
_TAG = re.compile(r"<(\w+):([^>]+)>")
_DIGITS = 6


def times(prompt: str, factor: float) -> str:
    """Returns a prompt with all strengths of its LoRA tags multiplied, schedules and those of the hires pass too.

    A tag that is not understood stays as it is.

    Args:
        prompt: The text with its tags.
        factor: 1 leaves the prompt as it is.
    """

    def tag(found: re.Match[str]) -> str:
        if found[1] not in NETWORKS:
            return found[0]
        try:
            return f"<{found[1]}:{':'.join(_words(found[2].split(':'), factor))}>"
        except ScheduleError:
            return found[0]

    if factor == 1:
        return prompt
    # Behind the last ">" no tag ends. Looked for there, the end would be looked for anew at every "<lora:".
    tags, end, rest = prompt.rpartition(">")
    return _TAG.sub(tag, tags + end) + rest


def _words(words: Sequence[str], factor: float) -> list[str]:
    result: list[str] = []
    place, has_text = 0, False
    for word in words:
        name, equals, value = word.partition("=")
        # With two equals signs a host takes a word for an unnamed one.
        if equals and "=" not in value:
            has_text |= name == "te"
            result.append(f"{name}={_strength(value, factor)}" if name in NAMES and value else word)
            continue
        # Unnamed are the LoRA, its strength on the text encoder, that on the model, and the rank of a DyLoRA.
        result.append(_strength(word, factor) if place in (1, 2) else word)
        place += 1
    if place == 1 and not has_text:
        result.insert(1, _number(factor))
    return result


def _strength(text: str, factor: float) -> str:
    """Multiplies a number, or the strengths of a schedule.

    Raises:
        ScheduleError: `text` is neither.
    """
    parse(text)
    result = ""
    for pair in re.split("([,;])", text):
        strength, at, position = re.match("([^@~]*)([@~]?)(.*)", pair, re.DOTALL).groups()  # type: ignore[union-attr]  # matches any text
        result += pair if pair in (",", ";") else _number(float(strength) * factor) + at + position
    return result


def _number(value: float) -> str:
    # No "-0".
    return f"{value + 0.0:.{_DIGITS}g}"
