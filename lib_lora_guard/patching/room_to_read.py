"""Reads how much RAM there is for the tensors of a LoRA file."""

from __future__ import annotations

from ..files import unread_bytes
from ..memory.snapshot import take_snapshot
from ..planning.limits import room_to_read_bytes


def room_now_bytes(needed_bytes: int) -> int | None:
    """Returns the RAM in bytes that a file may take now, whatever it needs; None where the system does not say.

    Other files may still be on their way. Windows counts their memory from the start, other systems as it is written to.
    """
    snapshot = take_snapshot(None)
    alive = snapshot.alive_ram_bytes
    return room_to_read_bytes(alive if alive is None or snapshot.system == "Windows" else alive - unread_bytes())
