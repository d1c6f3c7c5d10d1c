"""One logger for the whole package, so that every line says who speaks; and its last lines, for the panel."""

from __future__ import annotations

import logging
import sys

from ..errors import named
from ..messages import in_language, message_of, with_error
from ..messages.catalogue import ENGLISH
from .ring import LogRing

LEVELS = ("debug", "info", "warning", "error")
_ROOT = "lib_lora_guard"


def set_up(level: str = "info", language: str | None = None) -> logging.Logger:
    """Sends the package's messages to the console as `[LoRA Guard] ...`, in `language`, and into the ring. Calling it again
    only changes the level, and the language where one is given."""
    logger = logging.getLogger(_ROOT)
    console = next((h for h in logger.handlers if getattr(h, "lora_guard", False)), None)
    if console is None:
        console = _Console(sys.stdout)
        console.setFormatter(_Formatter())
        logger.addHandler(console)
        logger.propagate = False
    if language is not None and isinstance(console.formatter, _Formatter):
        console.formatter.language = language
    current_ring()
    logger.setLevel(level.upper())
    return logger


def current_ring() -> LogRing:
    """The last lines of the package's log. It belongs to the logger, so that it outlives a "Reload UI"."""
    logger = logging.getLogger(_ROOT)
    ring = next((h for h in logger.handlers if isinstance(h, LogRing)), None)
    if ring is None:
        ring = LogRing()
        logger.addHandler(ring)
    return ring


class _Formatter(logging.Formatter):
    """Warnings and errors name their level; a traceback is for those who ask for debug messages."""

    def __init__(self, language: str = ENGLISH) -> None:
        super().__init__()
        self.language = language

    def format(self, record: logging.LogRecord) -> str:
        return self.formatted(record, self.language)

    def formatted(self, record: logging.LogRecord, language: str) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        said, trace = message_of(record), ""
        if record.exc_info and record.exc_info[1] is not None:
            said = with_error(said, named(record.exc_info[1]))
            if logging.getLogger(_ROOT).isEnabledFor(logging.DEBUG):
                trace = "\n" + self.formatException(record.exc_info)
        return f"[LoRA Guard] {level}{in_language(said, language)}{trace}"


class _Console(logging.StreamHandler):  # type: ignore[type-arg]  # can be subscripted from Python 3.11 only
    """A console that cannot show a language (a Western code page of Windows and Chinese) gets English."""

    lora_guard = True
    """Marks the one console handler that is ours."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            if isinstance(self.formatter, _Formatter):
                text = self.formatter.formatted(record, ENGLISH)
            text = text.encode(encoding, "replace").decode(encoding)
        return text
