"""Limits that every plan keeps to."""

from __future__ import annotations

from ..units import GB

RAM_FLOOR_BYTES = 2 * GB
"""RAM that is left to the system. Below it Windows starts to use the page file."""


def room_to_read_bytes(alive_bytes: int | None) -> int | None:
    """Returns how much may be read or moved into RAM before the process is in danger.

    Args:
        alive_bytes: The RAM that the process survives using; None where the system does not say.
    """
    return None if alive_bytes is None else max(0, alive_bytes - RAM_FLOOR_BYTES // 4)
