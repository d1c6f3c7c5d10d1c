"""The logger of the whole package: marks each line with the extension's name and keeps the last lines for the panel."""

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
    """Sends the package's messages to the console, as `[LoRA Guard] ...`, and into the ring.

    Another call only changes the level, and the language if one is given.

    Args:
        level: One of LEVELS.
        language: A language of the catalogue; None leaves it as it is.
    """
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
    """Returns the ring with the package's last log lines. The logger owns it, so it survives a "Reload UI"."""
    logger = logging.getLogger(_ROOT)
    ring = next((h for h in logger.handlers if isinstance(h, LogRing)), None)
    if ring is None:
        ring = LogRing()
        logger.addHandler(ring)
    return ring


class _Formatter(logging.Formatter):
    """Names the level of warnings and errors; adds tracebacks only at debug level."""

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
    """Falls back to English if the console's encoding lacks the language's characters (Chinese on a Western code page
    of Windows).
    """

    lora_guard = True
    """Marks our own console handler."""

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
