"""A transaction: every change is noted with its undo before the first one starts.

An interrupt (Ctrl+C, an alarm's handler, an exception set by another thread) can come between any two instructions, twice
too. So nothing is noted while changes are made: a note could be missed. Each undo finds out from the model what there is
to be undone, and may run again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..messages import say

log = logging.getLogger(__name__)


class Step(NamedTuple):
    """One change with its undo.

    `undo` must be right whether `do` ran wholly, in part or not at all, and when it has itself run in part before.
    `parties` are what the two work on.
    """

    do: Callable[[], object]
    undo: Callable[[], object]
    parties: tuple[object, ...] = ()


class Transaction:
    """Changes that are made together or not at all.

    Args:
        steps: The changes, in order.
    """

    def __init__(self, steps: Iterable[Step]) -> None:
        self.steps = tuple(steps)

    def undo(self) -> tuple[Transaction | None, Exception | None]:
        """Undoes all steps, last first. An undo that fails does not stop the others.

        Returns:
            The steps whose undo has failed, to be tried again when its cause (memory, mostly) is over, with the last
            error; None twice if all is undone.
        """
        failed: list[Step] = []
        last: Exception | None = None
        for step in reversed(self.steps):
            try:
                step.undo()
            except Exception as error:
                failed.insert(0, step)
                last = error
                say(log, logging.ERROR, "memory.undo_failed", exc_info=True)
        return (Transaction(failed) if failed else None), last
