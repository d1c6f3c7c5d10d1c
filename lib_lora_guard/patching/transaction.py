"""All or nothing: every change is recorded with its undo before the next one starts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType

from ..messages import say

log = logging.getLogger(__name__)


class Transaction:
    """`with Transaction() as t: t.do(change, undo)`. An exception in the block undoes what was done, last first.

    `undo` must be right whether `change` ran wholly, in part or not at all. An undo that itself fails does not stop
    the others; it is kept in `failed`, to be tried again when what stopped it (memory, mostly) is over.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self.failed: list[Callable[[], object]] = []

    def do(self, change: Callable[[], object], undo: Callable[[], object]) -> None:
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
        while self._undo:
            undo = self._undo.pop()
            try:
                undo()
            except Exception:
                self.failed.append(undo)
                say(log, logging.ERROR, "memory.undo_failed", exc_info=True)
