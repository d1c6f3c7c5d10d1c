"""Explains a line of the log with the line's own numbers. Pure."""

from __future__ import annotations

import string

from ..messages import Message
from ..messages.catalogue import ENGLISH, TEXTS


def why(message: str, language: str) -> str | None:
    """Returns what a line means and what can be done; None if the catalogue says nothing of it."""
    while isinstance(message, Message):
        key = f"why.{message.key}"
        if key in TEXTS:
            # A line of another version may lack a number.
            names = {name for _, name, _, _ in string.Formatter().parse(TEXTS[key][ENGLISH]) if name}
            return Message(key, message.facts).text(language) if names <= set(message.facts) else None
        # Lines that repeat, and findings of a rule, are wrapped.
        message = message.facts.get("message", message.facts.get("says", ""))
    return None
