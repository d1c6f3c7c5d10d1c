"""Reads how much RAM there is for the tensors of a LoRA file."""

from __future__ import annotations

from ..memory.snapshot import take_snapshot
from ..planning.limits import room_to_read_bytes


def room_now_bytes(needed_bytes: int) -> int | None:
    """Returns the RAM in bytes that a file may take now, whatever it needs; None where the system does not say."""
    return room_to_read_bytes(take_snapshot(None).alive_ram_bytes)
