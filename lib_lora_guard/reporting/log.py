"""One logger for the whole package, so that every line says who speaks."""

from __future__ import annotations

import logging
import sys

LEVELS = ("debug", "info", "warning", "error")
_ROOT = "lib_lora_guard"


def set_up(level: str = "info") -> logging.Logger:
    """Sends the package's messages to the console as `[LoRA Guard] ...`. Calling it again only changes the level."""
    logger = logging.getLogger(_ROOT)
    if not any(getattr(h, "lora_guard", False) for h in logger.handlers):
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(_Formatter())
        handler.lora_guard = True  # type: ignore[attr-defined]  # marks the one handler that is ours
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level.upper())
    return logger


class _Formatter(logging.Formatter):
    """Warnings and errors name their level; a traceback is for those who ask for debug messages."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        text = f"[LoRA Guard] {level}{record.getMessage()}"
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            text += f" ({type(error).__name__}: {error})"
            if logging.getLogger(_ROOT).isEnabledFor(logging.DEBUG):
                text += "\n" + self.formatException(record.exc_info)
        return text
