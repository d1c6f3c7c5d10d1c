"""Answers the tab's request, about one per second. `javascript/lora_guard*.js` is the client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..messages.catalogue import TEXTS
from ..messages.catalogue.panel import LABELS
from ..reporting.curve import curve_json
from ..reporting.headline import BAD, Problem
from ..reporting.log import current_ring
from ..reporting.ring import Line, LogRing
from ..reporting.status import PanelStatus, as_json
from ..reporting.timeline import Timeline, image_of
from ..reporting.why import why
from ..settings import Language
from .language import reader_language

PAGE_LINES = 500
"""Most lines in one answer. A browser that is further behind asks again at once."""


class Panel:
    """Builds the answers for one host."""

    def __init__(
        self,
        status: Callable[[], PanelStatus],
        language: Callable[[], tuple[Language, str | None]],
        ring: Callable[[], LogRing] = current_ring,
        timeline: Callable[[], Timeline | None] = lambda: None,
    ) -> None:
        """Takes the sources of the answers.

        Args:
            status: Reads the present status.
            language: Returns the setting and the host's own language.
            ring: Returns the ring with the log lines.
            timeline: Returns the samples of the memory; None if there are none.
        """
        self._status, self._language, self._ring, self._timeline = status, language, ring, timeline

    def reader(self, accepted: str | None) -> str:
        """Returns the language of a reader, by the Accept-Language header."""
        wanted, host_language = self._language()
        return reader_language(wanted, host_language, accepted)

    def status(self, language: str) -> dict[str, Any]:
        """Returns the present status. The last error of the log is among its problems."""
        status, ring = self._status(), self._ring()
        line = ring.last_problem
        if line is not None:
            problem = Problem(f"log-{ring.boot}-{line.row}", BAD, line.said)
            status = replace(status, problems=(*status.problems, problem))
        return as_json(status, language)

    def log(self, since: int, language: str) -> dict[str, Any]:
        """Returns the lines after line `since`, PAGE_LINES at most."""
        ring, timeline = self._ring(), self._timeline() or Timeline()
        lines, images = ring.since(since, PAGE_LINES), timeline.images()
        return {
            "boot": ring.boot,
            "more": len(lines) == PAGE_LINES,
            "lines": [line_json(line, language, image_of(images, line.time)) for line in lines],
        }

    def answer(
        self, since: int, boot: str, language: str, accepted: str | None = None, sample: int = 0
    ) -> dict[str, Any]:
        """Returns all lines after line `since`, the samples after `sample`, and the present status.

        If the ring or the language has changed (`known` is false), it returns the log from its start, with the labels.

        Args:
            since: Number of the last line that the browser has.
            boot: The browser's `LogRing.boot`.
            language: The language that the browser shows.
            accepted: The browser's Accept-Language header.
            sample: Number of the last sample that the browser has.
        """
        reader = self.reader(accepted)
        known = boot == self._ring().boot and language == reader
        answer = {
            **self.log(since if known else 0, reader),
            "language": reader,
            "known": known,
            "curve": curve_json(self._timeline() or Timeline(), sample if known else 0),
            "status": self.status(reader),
        }
        if not known:
            answer["labels"] = labels(reader)
        return answer


def labels(language: str) -> dict[str, str]:
    """Returns the texts that the browser inserts itself."""
    return {key[len(LABELS) :]: texts[language] for key, texts in TEXTS.items() if key.startswith(LABELS)}


def line_json(line: Line, language: str, image: int = 0) -> dict[str, Any]:
    """Returns a line of the log with its explanation, if the catalogue has one."""
    return {
        "number": line.number,
        "row": line.row,
        "time": round(line.time, 3),
        "level": line.level.lower(),
        "text": line.text(language),
        "image": image,
        "why": why(line.message, language),
    }
