"""Shares of this machine's memory that are taken where the user sets no number."""

from __future__ import annotations

from functools import cache

from ..units import MB
from .snapshot import read_ram

KEPT_FILES_SHARE = 8
"""LoRA files that stay in RAM take an eighth of it. They are given back when RAM is short."""
_STEP_MB = 64
_UNKNOWN_MB = 1024


@cache
def usual_kept_files_mb() -> int:
    """Returns how many MB of LoRA files stay in RAM: a share of what is installed."""
    installed_bytes = read_ram()[0].bytes
    if installed_bytes is None:
        return _UNKNOWN_MB
    return max(_STEP_MB, installed_bytes // KEPT_FILES_SHARE // MB // _STEP_MB * _STEP_MB)
