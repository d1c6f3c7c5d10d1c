"""Knows how often the denoiser will be called before others need its room: the host says what it works on."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..planning.job_cost import USUAL_CALLS

log = logging.getLogger(__name__)


class Pass(NamedTuple):
    """Calls of one model in a row."""

    calls: int = USUAL_CALLS
    is_last: bool = False
    """True if another checkpoint follows, for which the host unloads all models."""


class Jobs(threading.local):
    """The requests that a thread works on, the innermost last: a detailer makes images of its own inside another's."""

    def __init__(self) -> None:
        self._passes: list[Callable[[], Pass]] = []

    @contextlib.contextmanager
    def job(self, next_pass: Callable[[], Pass]) -> Iterator[None]:
        """Wraps a request.

        Args:
            next_pass: Returns the pass that begins next. Asked each time: a second pass has steps of its own.
        """
        self._passes.append(next_pass)
        try:
            yield
        finally:
            self._passes.pop()

    def next_pass(self) -> Pass:
        """Returns the pass that begins next; the usual one if no request says it."""
        try:
            found = self._passes[-1]() if self._passes else Pass()
            return found._replace(calls=max(1, found.calls))
        except Exception:
            # Another extension's request.
            log.debug("the steps of a request are not known", exc_info=True)
            return Pass()
