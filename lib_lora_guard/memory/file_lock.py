"""One process at a time: a lock on a small file, held by the system. It ends with its process however that ends, so that
none is ever left behind. The file itself stays.

Sources: flock(2); Python's `msvcrt.locking`, which may lock a byte that the file does not have.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextmanager
def locked(path: Path, wait_seconds: float) -> Iterator[None]:
    """Holds the lock while the block runs; threads exclude each other too. Raises TimeoutError where somebody else holds it
    for longer than `wait_seconds`, another OSError where the file cannot be had or the file system knows no locks."""
    with path.open("ab") as file:
        until = time.monotonic() + wait_seconds
        while True:
            try:
                _lock(file.fileno())
                break
            except (BlockingIOError, PermissionError) as held:
                if time.monotonic() >= until:
                    raise TimeoutError(f"{path.name} is in use") from held
                time.sleep(0.002)
        try:
            yield
        finally:
            _unlock(file.fileno())
