"""Decides how much of a model that does not fit is placed on the card: the guard's rule. Pure.

Forge leaves a quarter of the room free for swapping, at most 1.25 GB. A measurement (`benchmarks/memory_matrix.py`,
rows with swapped weights, Forge's swap method "Queue") showed that torch needs much less. It took at most 379 MB beside
the weights, the factors and a step's activations. These are gaps between weights (275 MB of it in SDXL) and copies of
swapped layers. About a gigabyte stayed unused while weights were copied in every step. Every MB used for weights is a
MB not copied.
"""

from __future__ import annotations

from ..units import MB
from .host_memory import swap_budget_bytes

SWAPPING_BYTES = 768 * MB
"""Twice the measured maximum: on Windows the desktop takes some of it, and the driver reports no error."""
LEAST_SWAPPING_SHARE = 0.5
"""A placed model gives up layers only if less than this share of the room for swapping is free: free memory varies all
the time.
"""


def weights_on_card_bytes(free_bytes: float, need_bytes: float) -> int:
    """Returns the bytes of weights to place on the card; never less than Forge places.

    Args:
        free_bytes: Free VRAM.
        need_bytes: VRAM to keep free beside the weights while the model runs.
    """
    return max(swap_budget_bytes(free_bytes, need_bytes), int(free_bytes - need_bytes) - SWAPPING_BYTES)


def change_bytes(on_card_bytes: int, outside_bytes: int, away_bytes: int, room_bytes: int) -> int:
    """Returns the bytes of a placed model that may return to the card; negative for bytes that must leave it.

    Args:
        on_card_bytes: The part on the card.
        outside_bytes: The part in RAM.
        away_bytes: The part of `outside_bytes` that can return without a new placement.
        room_bytes: Free VRAM minus the VRAM to keep free; negative if some is missing.
    """
    if outside_bytes == away_bytes <= room_bytes:
        return away_bytes
    room_for_all = room_bytes + on_card_bytes
    left = room_for_all - weights_on_card_bytes(room_for_all, 0)
    enough = left * LEAST_SWAPPING_SHARE if outside_bytes else 0
    if room_bytes < enough:
        return -min(on_card_bytes, left - room_bytes)
    return min(away_bytes, max(0, room_bytes - left))
