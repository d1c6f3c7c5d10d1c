"""Work under a lock that other threads get again, also where interrupts end it.

Python 3.10 looks for signals before the handler of an exception runs. An interrupt that comes there, while an error or another interrupt
leaves `with lock:`, ends the handler that would release the lock: other threads wait for good, and this one takes itself for busy.
Later Pythons do not look there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["is_held", "while_locked"]

T = TypeVar("T")


def is_held(lock: threading.RLock) -> bool:
    """Returns True where this thread has the lock."""
    return lock._is_owned()  # type: ignore[attr-defined, no-any-return]  # typeshed has left it out; `threading.Condition` uses it


def while_locked(lock: threading.RLock, work: Callable[[], T]) -> T:
    """Returns what `work` does. The lock is taken meanwhile; afterwards this thread has it only if it had it before.

    Two interrupts within microseconds of each other may come where an error ends the work. Hence two handlers, as in the engine.

    Args:
        lock: The lock. A plain `Lock` does not know whose it is, so it cannot be told that it was left behind.
        work: The work.
    """
    was_held = is_held(lock)
    try:
        try:
            with lock:
                return work()
        except BaseException:
            _release_again(lock, was_held)
            raise
    except BaseException:
        _release_again(lock, was_held)
        raise


def _release_again(lock: threading.RLock, was_held: bool) -> None:
    if not was_held and is_held(lock):
        lock.release()
