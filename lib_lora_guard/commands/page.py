"""Parts shared by the pages and documents of all commands. rich is imported when the first line is printed."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..files import shown
from ..messages import in_language
from ..messages.catalogue import ENGLISH
from ..messages.languages import AUTO, language_of, system_locale

if TYPE_CHECKING:
    from rich.console import Console

MESSAGE_CHARACTERS = 300
"""Characters shown of a sentence with names from a file in it."""
SHOWN_KEYS = 20
"""Keys listed of those skipped or lost; their count is always given."""


def users_language() -> str:
    """Returns the catalogue's language for the user of a command: that of the system, if the console has its letters."""
    language = language_of(AUTO, system=system_locale())
    try:
        "内存".encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (LookupError, UnicodeEncodeError):
        return ENGLISH
    return language


def in_users_language(said: str) -> str:
    """Returns a sentence in the language of the user of a command."""
    return str(in_language(said, users_language()))


def say(console: Console, text: str, style: str = "") -> None:
    """Prints one paragraph of plain text: no markup, no colours of numbers, no emoji codes.

    A terminal breaks it between words; in a file or a pipe it stays one line, unless COLUMNS asks for a width.
    """
    from rich.text import Text

    console.print(
        Text(text, style=style), highlight=False, soft_wrap=not (console.is_terminal or "COLUMNS" in os.environ)
    )


@dataclass(frozen=True)
class Page:
    """A page of sentences in one language."""

    console: Console
    language: str

    def text(self, said: str) -> str:
        """Returns a sentence, or a word of a table, in the page's language."""
        return str(in_language(said, self.language))

    def say(self, said: str, style: str = "", limit: int | None = None) -> None:
        """Prints one paragraph. `limit` are the characters shown of one with names from a file in it; None for all."""
        text = self.text(said)
        say(self.console, text if limit is None else shown(text, limit), style)

    def gap(self) -> None:
        """Prints an empty line."""
        say(self.console, "")


def counts(counter: Counter[Any]) -> dict[str, int]:
    """Returns values as text with their counts, the most frequent first."""
    return {f"{value:g}" if isinstance(value, float) else str(value): count for value, count in counter.most_common()}
