"""What the tab asks for about once a second, and what it is told. `javascript/lora_guard.js` is the other side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..messages.catalogue import TEXTS
from ..messages.catalogue.panel import LABELS
from ..reporting.log import current_ring
from ..reporting.ring import Line, LogRing
from ..reporting.status import PanelStatus, as_json
from ..settings import Language
from .language import reader_language

PAGE_LINES = 500
"""In one answer. A browser that is behind by more asks again at once."""


class Panel:
    """Answers of one host. `status()` looks at everything now; `language()` is the setting and the host's own language."""

    def __init__(
        self,
        status: Callable[[], PanelStatus],
        language: Callable[[], tuple[Language, str | None]],
        ring: Callable[[], LogRing] = current_ring,
    ) -> None:
        self._status, self._language, self._ring = status, language, ring

    def answer(self, since: int, boot: str, language: str, accepted: str | None = None) -> dict[str, Any]:
        """Everything after line `since` of the log that a browser knows as `boot` and shows in `language`.

        Where either is no longer so (`known` is false) the log is told from its start, with the labels. `accepted` is the
        browser's Accept-Language.
        """
        wanted, host_language = self._language()
        reader = reader_language(wanted, host_language, accepted)
        ring = self._ring()
        known = boot == ring.boot and language == reader
        lines = ring.since(since if known else 0, PAGE_LINES)
        answer: dict[str, Any] = {
            "boot": ring.boot,
            "language": reader,
            "known": known,
            "more": len(lines) == PAGE_LINES,
            "lines": [_line(line, reader) for line in lines],
            "status": as_json(self._status(), reader),
        }
        if not known:
            answer["labels"] = labels(reader)
        return answer


def labels(language: str) -> dict[str, str]:
    """The texts that the browser puts into place itself."""
    return {key[len(LABELS) :]: texts[language] for key, texts in TEXTS.items() if key.startswith(LABELS)}


def _line(line: Line, language: str) -> dict[str, Any]:
    return {
        "number": line.number,
        "row": line.row,
        "time": round(line.time, 3),
        "level": line.level.lower(),
        "text": line.text(language),
    }
