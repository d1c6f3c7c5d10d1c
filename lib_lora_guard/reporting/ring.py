"""Keeps the last log lines in memory for the panel: bounded, and in the language of each reader."""

from __future__ import annotations

import logging
import secrets
from collections import deque
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ..errors import named
from ..files.header import shown
from ..messages import Joined, Message, in_language, message_of, with_error
from ..messages.catalogue import ENGLISH

CAPACITY_LINES = 2000
CAPACITY_BYTES = 2 << 20
LINE_CHARACTERS = 2000
"""Longest plain text, or fact of a sentence."""
ALIKE_LINES = 20
"""So many consecutive sentences of one kind (300 layers report the same) get their own lines; the rest share one line.
"""
PROBLEMS = ("preflight.helps",)
"""Sentences that are a problem although they are no errors."""
_FACTS = 500
"""Most facts in one sentence, nested ones included. Ours have up to ten; a stack of LoRAs has about ten for each."""


@dataclass(frozen=True)
class Line:
    """One line of the log. `message` and `error` are Messages if the catalogue has them."""

    number: int
    """Increases with every line."""
    time: float
    level: str
    message: str
    error: str | None = None
    """The exception being handled."""
    row: int = 0
    """The number under which the line first appeared. A line that repeats the last one replaces it: a reader replaces
    that row.
    """

    @property
    def said(self) -> str:
        """The sentence with its error."""
        return self.message if self.error is None else with_error(self.message, self.error)

    def text(self, language: str = ENGLISH) -> str:
        """Returns the line in `language`."""
        return str(in_language(self.said, language))


class LogRing(logging.Handler):
    """Keeps the last lines. Never raises.

    Stores plain values only, so no object of a log call (a model, a traceback) is kept alive. Readers hold the lock
    only while they copy references.
    """

    def __init__(self, capacity_lines: int = CAPACITY_LINES, capacity_bytes: int = CAPACITY_BYTES) -> None:
        super().__init__()
        self.boot = secrets.token_hex(8)
        """Tells a browser that the numbers start anew."""
        self._capacity_lines, self._capacity_bytes = capacity_lines, capacity_bytes
        self._lines: deque[tuple[Line, int]] = deque()
        self._bytes = 0
        self._last = 0
        self._run: _Run | None = None
        self.last_problem: Line | None = None
        """The last error, or the last sentence of PROBLEMS. Replaced as a whole; for any thread."""

    @property
    def last(self) -> int:
        """The number of the newest line; 0 before the first."""
        return self._last

    @property
    def bytes(self) -> int:
        """Approximate size of the lines."""
        return self._bytes

    def since(self, number: int, limit: int = 500) -> tuple[Line, ...]:
        """Returns the oldest `limit` lines after line `number`, oldest first. To get more, call again with the last
        number.
        """
        with self._locked():
            newer = [line for line, _ in takewhile(lambda kept: kept[0].number > number, reversed(self._lines))]
        newer.reverse()
        return tuple(newer[: max(0, limit)])

    def clear(self) -> None:
        """Drops every line; the numbers continue."""
        with self._locked():
            self._lines.clear()
            self._bytes, self._run = 0, None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message, error = _storable(message_of(record)), _error_of(record)
            size = _size(message) + _size(error)
        except Exception as problem:
            # A log call must not stop an image, whatever its arguments are.
            message, error = Message("log.unreadable", {"kind": type(problem).__name__}), None
            size = _size(message)
        self._add(record, message, error, size)

    def _locked(self) -> Any:
        assert self.lock is not None  # logging.Handler makes it
        return self.lock

    def _add(self, record: logging.LogRecord, message: str, error: str | None, size: int) -> None:
        with self._locked():
            run = self._run
            kind = (record.name, record.levelname, message.key if isinstance(message, Message) else message)
            if run is None or run.kind != kind or not self._lines:
                run = self._run = _Run(kind)
            replaces = run.take((message, error))
            if replaces:
                message = run.sentence(message)
                old, old_size = self._lines.pop()
                self._bytes -= old_size
            self._last += 1
            row = old.row if replaces else self._last
            line = Line(self._last, record.created, record.levelname, message, error, row)
            if record.levelno >= logging.ERROR or getattr(message, "key", "") in PROBLEMS:
                self.last_problem = line
            self._lines.append((line, size))
            self._bytes += size
            while len(self._lines) > self._capacity_lines or (
                self._bytes > self._capacity_bytes and len(self._lines) > 1
            ):
                self._bytes -= self._lines.popleft()[1]


class _Run:
    """Consecutive sentences of one kind."""

    def __init__(self, kind: tuple[str, str, str]) -> None:
        self.kind = kind
        self._previous: tuple[str, str | None] | None = None
        self._lines, self._times, self._alike = 0, 0, 0

    def take(self, said: tuple[str, str | None]) -> bool:
        """Counts one more; True if it shares the last line."""
        same, self._previous = said == self._previous, said
        if same and not self._alike:
            self._times += 1
            return True
        if self._lines >= ALIKE_LINES:
            self._alike += 1
            # The first one over the limit starts the line that the others share.
            return self._alike > 1
        self._lines += 1
        self._times = 1
        return False

    def sentence(self, message: str) -> Message:
        if self._alike:
            return Message("log.alike", {"message": message, "count": self._alike - 1})
        return Message("log.repeated", {"message": message, "count": self._times})


def _error_of(record: logging.LogRecord) -> str | None:
    error = record.exc_info[1] if record.exc_info else None
    return None if error is None else _storable(named(error))


def _storable(said: str) -> str:
    """Converts a text to plain, clean values, so that it can be stored."""
    return said.map(_Limit().plain) if isinstance(said, (Message, Joined)) else shown(str(said), LINE_CHARACTERS)


class _Limit:
    """Limits the number of facts in one line."""

    def __init__(self) -> None:
        self._facts = 0

    def plain(self, fact: Any) -> Any:
        self._facts += 1
        if self._facts > _FACTS:
            return "..."
        return fact if isinstance(fact, (bool, int, float)) else shown(str(fact), LINE_CHARACTERS)


def _size(said: str | None) -> int:
    """Estimates the bytes of a text: its English form and its facts."""
    return 0 if said is None else (5 if isinstance(said, Message) else 2) * len(said) + 300
