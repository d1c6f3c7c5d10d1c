"""A lock between processes, on a small file. The system releases it when its process ends, however it ends, so no stale
lock remains. The file itself stays.

Sources: flock(2); Python's `msvcrt.locking`, which may lock a byte beyond the end of the file.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..private_files import open_private

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
    """Holds the lock while the block runs. Threads of one process exclude each other too.

    Args:
        path: The lock file, created if missing.
        wait_seconds: Timeout.

    Raises:
        TimeoutError: Another process or thread held the lock for longer than `wait_seconds`.
        OSError: The file cannot be opened, or the file system has no locks.
    """
    with open_private(path, "ab") as file:
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
