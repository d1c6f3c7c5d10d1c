"""Knows how often the denoiser will be called before others need its room: the host says what it works on."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from ..planning.job_cost import USUAL_CALLS

log = logging.getLogger(__name__)


class Jobs(threading.local):
    """The requests that a thread works on, the innermost last: a detailer makes images of its own inside another's."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], int]] = []

    @contextlib.contextmanager
    def job(self, calls: Callable[[], int]) -> Iterator[None]:
        """Wraps a request.

        Args:
            calls: Returns the calls of the pass that begins next. Asked each time: a second pass has steps of its own.
        """
        self._calls.append(calls)
        try:
            yield
        finally:
            self._calls.pop()

    def calls(self) -> int:
        """Returns the calls of the pass that begins next; the usual number if no request says it."""
        try:
            return max(1, self._calls[-1]()) if self._calls else USUAL_CALLS
        except Exception:
            # Another extension's request.
            log.debug("the steps of a request are not known", exc_info=True)
            return USUAL_CALLS
