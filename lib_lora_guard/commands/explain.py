"""`lora-guard explain`: what a pasted console log shows about LoRAs and memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..explaining import Explanation
from ..explaining.reading import HEAD_BYTES, TAIL_BYTES
from ..files.header import opened
from ..messages import Message
from ..version import __version__
from .page import say

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "lora-guard/explain/1"
PIPED = "-"
MOST_PIPED_BYTES = 256 << 20
"""Read at most of what is piped in; of a file the beginning and the end are read."""


def read_log(name: str) -> bytes:
    """Reads a log; of a long one the beginning and the end.

    Args:
        name: The file, or PIPED for what is piped in.

    Raises:
        FileFormatError: There is no such file, or it cannot be read.
    """
    if name == PIPED:
        return sys.stdin.buffer.read(MOST_PIPED_BYTES)
    with opened(Path(name), is_listed=False) as (file, facts):
        if facts.st_size <= HEAD_BYTES + TAIL_BYTES + 1:
            return file.read()
        head = file.read(HEAD_BYTES)
        file.seek(-TAIL_BYTES, os.SEEK_END)
        # More than both parts together, so that it is seen as cut.
        return head + b"\n\n" + file.read()


def explain_document(found: Explanation) -> dict[str, Any]:
    """Returns the explanation as one JSON document, in English."""
    return {
        "schema": SCHEMA,
        "version": __version__,
        "answer": str(found.answer()),
        "lines": found.lines,
        "host": None if found.host is None else str(found.host),
        "findings": [
            {"name": one.name, "is_harmless": one.is_harmless, "said": str(one.said), "do": str(one.do)}
            for one in found.findings
        ],
        "guard_says": list(found.ours),
    }


def print_explanation(console: Console, found: Explanation, language: str) -> None:
    """Prints the answer and what to do, then what else happened, the worst first."""
    say(console, found.answer().text(language), "bold")
    bad = [one for one in found.findings if not one.is_harmless]
    for number, one in enumerate(bad):
        if number:
            say(console, f"\n{number + 1}. {one.said.text(language)}")
        say(console, Message("explain.do", {"do": one.do}).text(language))
    if found.host is not None:
        say(console, "\n" + found.host.text(language))
    if found.ours:
        say(console, "\n" + Message("explain.ours").text(language))
        for line in found.ours:
            say(console, f"- {line}")
    harmless = [one for one in found.findings if one.is_harmless]
    if harmless:
        say(console, "\n" + Message("explain.harmless_heading").text(language))
    for one in harmless:
        say(console, f"- {one.said.text(language)}")
        say(console, Message("explain.do", {"do": one.do}).text(language))
