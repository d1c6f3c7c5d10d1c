"""The file that a bake writes to until it is complete. Its name tells whose it is: the next bake in the folder removes those of
dead processes, which may be as large as a model.
"""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from pathlib import Path

from ..recorder.processes import is_running, machine_name, own_start_ms

_NAME = re.compile(r".{0,40}\.(\d{1,9})-(\d{1,15})-([0-9a-f]{8})-[0-9a-f]{8}\.partial", re.DOTALL)


def unfinished(output: Path) -> Path:
    """Returns a new name beside `output`."""
    owner = f"{os.getpid()}-{own_start_ms()}-{_system()}"
    return output.with_name(f"{output.name[:40]}.{owner}-{os.urandom(4).hex()}.partial")


def remove_abandoned(folder: Path) -> tuple[int, int]:
    """Deletes the unfinished files of dead processes.

    Files of other machines, and of containers with numbers of their own, stay: whether their process runs cannot be seen here.

    Returns:
        How many there were, and their bytes.
    """
    count = size = 0
    try:
        found = list(folder.iterdir())
    except OSError:
        return 0, 0
    for path in found:
        name = _NAME.fullmatch(path.name)
        if name is None or name[3] != _system() or is_running(int(name[1]), int(name[2])):
            continue
        with contextlib.suppress(OSError):
            taken = path.lstat().st_size
            path.unlink()
            count, size = count + 1, size + taken
    return count, size


def _system() -> str:
    """Names the machine, or the container, that gives out the numbers of processes."""
    numbers = ""
    with contextlib.suppress(OSError):
        numbers = str(os.stat("/proc/self/ns/pid").st_ino)
    return f"{zlib.crc32(f'{machine_name()} {numbers}'.encode('utf-8', 'replace')):08x}"
