"""Decides how much of a model that does not fit is placed on the card: the guard's rule. Pure.

Forge leaves a quarter of the room free for swapping, at most 1.25 GB. A measurement (`benchmarks/memory_matrix.py`,
rows with swapped weights, Forge's swap method "Queue") showed that torch needs much less. It took at most 168 MB beside
the weights, the factors and a step's activations of transformers, and 379 MB of U-Nets, of which 275 MB were gaps between
weights of many sizes. The rest are copies of swapped layers: the one that runs and the next one. Every MB used for weights
is a MB not copied in every step.
"""

from __future__ import annotations

from ..units import MB
from .host_memory import swap_budget_bytes

SWAPPING_BYTES = 768 * MB
"""Left where the layers are not known: twice the measured maximum."""
COPIES = 2
"""Swapped layers that are on the card at the same time."""
LEAST_SWAPPING_BYTES = 256 * MB
"""Two copies of Flux's largest layer. Left by it, 78 MB of the card were still free in the tightest of the measured cases."""
GAPS_BYTES = 192 * MB
"""The same for U-Nets, whose weights leave gaps."""
DESKTOP_BYTES = 256 * MB
"""Where the driver spills into RAM it reports no error, and the desktop takes VRAM at any time."""
LEAST_SWAPPING_SHARE = 0.5
"""A placed model gives up layers only if less than this share of the room for swapping is free: free memory varies all
the time.
"""


def swapping_bytes(largest_copy_bytes: int, is_unet: bool, spills: bool) -> int:
    """Returns the VRAM to leave for swapping.

    Args:
        largest_copy_bytes: Of the largest layer, in the dtype that it is computed in.
        is_unet: Most weights are convolutions of many sizes.
        spills: The driver goes on in RAM where VRAM ends, instead of reporting an error.
    """
    copies = max(COPIES * largest_copy_bytes, LEAST_SWAPPING_BYTES)
    return copies + (GAPS_BYTES if is_unet else 0) + (DESKTOP_BYTES if spills else 0)


def weights_on_card_bytes(free_bytes: float, need_bytes: float, swapping: int | None = None) -> int:
    """Returns the bytes of weights to place on the card; never less than Forge places.

    Args:
        free_bytes: Free VRAM.
        need_bytes: VRAM to keep free beside the weights while the model runs.
        swapping: Bytes to leave for swapping, from `swapping_bytes`; None if the layers are not known.
    """
    left = SWAPPING_BYTES if swapping is None else swapping
    return max(swap_budget_bytes(free_bytes, need_bytes), int(free_bytes - need_bytes) - left)


def one_of_several_bytes(free_bytes: float, need_bytes: float, swapping: int) -> int:
    """Returns the bytes of weights to place of one of several models that the host places one after the other.

    A share of what is left, as of a model alone, would be taken anew for each: the later ones took the room that swapping needs.

    Args:
        free_bytes: As above.
        need_bytes: As above, and what the later models cannot do without.
        swapping: Bytes to leave for swapping.
    """
    return max(0, int(free_bytes - need_bytes) - swapping)


def change_bytes(
    on_card_bytes: int, outside_bytes: int, away_bytes: int, room_bytes: int, swapping: int | None = None
) -> int:
    """Returns the bytes of a placed model that may return to the card; negative for bytes that must leave it.

    Args:
        on_card_bytes: The part on the card.
        outside_bytes: The part in RAM.
        away_bytes: The part of `outside_bytes` that can return without a new placement.
        room_bytes: Free VRAM minus the VRAM to keep free; negative if some is missing.
        swapping: As above.
    """
    if outside_bytes == away_bytes <= room_bytes:
        return away_bytes
    room_for_all = room_bytes + on_card_bytes
    left = room_for_all - weights_on_card_bytes(room_for_all, 0, swapping)
    enough = left * LEAST_SWAPPING_SHARE if outside_bytes else 0
    if room_bytes < enough:
        return -min(on_card_bytes, left - room_bytes)
    return min(away_bytes, max(0, room_bytes - left))
