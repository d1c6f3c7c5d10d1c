"""A transaction: every change is recorded with its undo before the next one starts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType

from ..messages import say

log = logging.getLogger(__name__)


class Transaction:
    """Undoes its changes, last first, if its block ends in an exception.

    >>> with Transaction() as transaction:
    ...     transaction.do(change, undo)

    An undo that fails does not stop the others. It is kept in `failed`, to be tried again when its cause (memory,
    mostly) is over.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self.failed: list[Callable[[], object]] = []

    def do(self, change: Callable[[], object], undo: Callable[[], object]) -> None:
        """Makes a change. `undo` must be right whether `change` ran wholly, in part or not at all."""
        self._undo.append(undo)
        change()

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.rollback()

    def rollback(self) -> None:
        """Undoes the changes, last first."""
        while self._undo:
            undo = self._undo.pop()
            try:
                undo()
            except Exception:
                self.failed.append(undo)
                say(log, logging.ERROR, "memory.undo_failed", exc_info=True)
