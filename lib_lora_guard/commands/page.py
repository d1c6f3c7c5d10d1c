"""Parts shared by the pages and documents of all commands. rich is imported when the first line is printed."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

MESSAGE_CHARACTERS = 300
"""Characters shown of a sentence with names from a file in it."""
SHOWN_KEYS = 20
"""Keys listed of those skipped or lost; their count is always given."""


def say(console: Console, text: str, style: str = "") -> None:
    """Prints one paragraph of plain text: no markup, no colours of numbers, no emoji codes."""
    from rich.text import Text

    console.print(Text(text, style=style), highlight=False)


def counts(counter: Counter[Any]) -> dict[str, int]:
    """Returns values as text with their counts, the most frequent first."""
    return {f"{value:g}" if isinstance(value, float) else str(value): count for value, count in counter.most_common()}
