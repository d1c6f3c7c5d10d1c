"""How much of a model that does not fit whole lies on the card: the guard's rule. Pure.

Forge leaves a quarter of the room free for swapping, 1.25 GB at most. Measured on a GPU (`benchmarks/memory_matrix.py`, rows
with swapped weights, Forge's swap method "Queue"): beside the weights, the factors and what a step holds, torch took up to
379 MB, for the gaps between weights (275 MB of it in SDXL) and the copies of swapped layers, while about a gigabyte lay idle
and weights were copied in every step. What is not left idle need not be copied.
"""

from __future__ import annotations

from .host_memory import MB, swap_budget_bytes

SWAPPING_BYTES = 768 * MB
"""Twice the most that was measured: on Windows the desktop takes some of it, and the driver does not say no."""
LEAST_SWAPPING_SHARE = 0.5
"""A placed model gives layers up only below this part of what was left for swapping: free memory is never twice the same."""


def weights_on_card_bytes(free_bytes: float, need_bytes: float) -> int:
    """`need_bytes`: what has to be free beside the weights while the model runs. Never less than Forge places."""
    return max(swap_budget_bytes(free_bytes, need_bytes), int(free_bytes - need_bytes) - SWAPPING_BYTES)


def change_bytes(on_card_bytes: int, outside_bytes: int, away_bytes: int, room_bytes: int) -> int:
    """How much of a placed model may return to the card, or has to leave it (below 0).

    `outside_bytes` of it lie in RAM, `away_bytes` of these can return without being placed anew; `room_bytes`: free now less what
    has to be free, below 0 where that is missing.
    """
    if outside_bytes == away_bytes <= room_bytes:
        return away_bytes
    room_for_all = room_bytes + on_card_bytes
    left = room_for_all - weights_on_card_bytes(room_for_all, 0)
    enough = left * LEAST_SWAPPING_SHARE if outside_bytes else 0
    if room_bytes < enough:
        return -min(on_card_bytes, left - room_bytes)
    return min(away_bytes, max(0, room_bytes - left))
