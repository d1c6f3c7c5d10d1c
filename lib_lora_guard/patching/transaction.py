"""A transaction: every change is noted with its undo before the first one starts.

An interrupt (Ctrl+C, an alarm's handler, an exception set by another thread) can come between any two instructions, twice
too. So nothing is noted while changes are made: a note could be missed. Each undo finds out from the model what there is
to be undone, and may run again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from ..messages import say

log = logging.getLogger(__name__)


class Undoable(Protocol):
    """Something that a change puts on a model: both of its ways may run again, wherever they were interrupted."""

    def attach(self) -> object:
        """Puts it on."""

    def detach(self) -> object:
        """Takes it off."""


U = TypeVar("U", bound=Undoable)


class Replaceable(Undoable, Protocol):
    """One that can take another's place."""

    def replace(self: U, other: U) -> object:
        """Puts this one on and takes `other` off."""


R = TypeVar("R", bound=Replaceable)
Pair: TypeAlias = tuple[R | None, R | None]
"""What is on the model before a change and after it, in one place; None for nothing."""


class Step(NamedTuple):
    """Another change with its undo.

    `undo` must be right whether `do` ran wholly, in part or not at all, and when it has itself run in part before.
    """

    do: Callable[[], object]
    undo: Callable[[], object]


class Transaction(Generic[R]):
    """Changes that are made together or not at all.

    Args:
        pairs: What leaves, what comes and what is replaced, in order.
        also: Further changes, after these.
    """

    def __init__(self, pairs: Sequence[Pair[R]], also: Sequence[Step] = ()) -> None:
        self.pairs, self.also = pairs, also

    def do(self, start: int, end: int) -> None:
        """Makes the changes of the pairs `start : end`."""
        for old, new in self.pairs[start:end]:
            if new is None and old is not None:
                # Without a call: a removal is nothing else.
                old.detach()
            else:
                _exchange(old, new)

    def do_also(self) -> None:
        """Makes the further changes."""
        for step in self.also:
            step.do()

    def undo(self) -> tuple[Transaction[R] | None, Exception | None]:
        """Undoes all changes, last first, also those that were not made. An undo that fails does not stop the others.

        Returns:
            The changes whose undo has failed, to be tried again when its cause (memory, mostly) is over, with the last
            error; None twice if all is undone.
        """
        pairs: list[Pair[R]] = []
        also: list[Step] = []
        last: Exception | None = None
        for step in reversed(self.also):
            try:
                step.undo()
            except Exception as error:
                also.insert(0, step)
                last = error
                say(log, logging.ERROR, "memory.undo_failed", exc_info=True)
        for old, new in reversed(self.pairs):
            try:
                _exchange(new, old)
            except Exception as error:
                pairs.insert(0, (old, new))
                last = error
                say(log, logging.ERROR, "memory.undo_failed", exc_info=True)
        return (Transaction(pairs, also) if pairs or also else None), last


def _exchange(old: R | None, new: R | None) -> None:
    if new is None:
        if old is not None:
            old.detach()
    elif old is None:
        new.attach()
    else:
        new.replace(old)
