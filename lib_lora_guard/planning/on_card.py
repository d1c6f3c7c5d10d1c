"""How much of a model that does not fit whole lies on the card: the guard's rule. Pure.

Forge leaves a quarter of the room free for swapping, 1.25 GB at most. Measured on a GPU (`benchmarks/memory_matrix.py`, rows
with swapped weights): beside the weights, the factors and what a step holds, torch took up to 365 MB for the copies of
swapped layers, and about a gigabyte lay idle while weights were copied in every step. What is not left idle need not be
copied.
"""

from __future__ import annotations

from .host_memory import MB, swap_budget_bytes

SWAPPING_BYTES = 768 * MB
"""Twice the most that was measured: on Windows the desktop takes some of it, and the driver does not say no."""


def weights_on_card_bytes(free_bytes: float, need_bytes: float) -> int:
    """`need_bytes`: what has to be free beside the weights while the model runs. Never less than Forge places."""
    return max(swap_budget_bytes(free_bytes, need_bytes), int(free_bytes - need_bytes) - SWAPPING_BYTES)
