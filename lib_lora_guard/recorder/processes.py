"""Whether the process that left a file behind still runs. A number alone does not say: systems give it out again."""

from __future__ import annotations

import os
import platform

import psutil

_SAME_START_SECONDS = 5.0
"""Start times of one process may be read a little apart: some systems count them from a boot time that the clock corrects."""


def own_start_ms() -> int:
    """When this process began, in milliseconds since 1970."""
    return round(psutil.Process(os.getpid()).create_time() * 1000)


def machine_name() -> str:
    """Which machine or container the process numbers are of; a folder can be shared between several."""
    return platform.node()


def is_running(pid: int, start_ms: int) -> bool:
    """True unless no process, or a later one, has this number. A killed child nobody asked after is not running."""
    if not psutil.pid_exists(pid):
        return False
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - start_ms / 1000) <= _SAME_START_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
