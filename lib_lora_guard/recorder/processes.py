"""Checks whether the process that left a file behind still runs. The process number is not enough: systems reuse it."""

from __future__ import annotations

import os
import platform

import psutil

_SAME_START_SECONDS = 5.0
"""Tolerance for start times of one process: some systems derive them from a boot time that changes with the clock."""


def own_start_ms() -> int:
    """Returns the start of this process, in milliseconds since 1970."""
    return round(psutil.Process(os.getpid()).create_time() * 1000)


def machine_name() -> str:
    """Returns the name of the machine or container; several of them may share a folder."""
    return platform.node()


def is_running(pid: int, start_ms: int) -> bool:
    """True unless no process, or a later one, has this number. A killed child that was not waited for (a zombie) does
    not run.
    """
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
