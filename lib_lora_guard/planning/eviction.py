"""Decides which models leave the device when another one is loaded, and how much of the new one stays in RAM. Pure.

Forge requests 1.3 times the weights and unloads whole models until that is free. A text encoder of 5 GB evicts a
denoiser of 9.5 GB, and both cross the bus twice for one prompt. Here the cheaper of two ways is chosen, by the bytes
moved until the previous state is restored. The first evicts as little as possible for the missing room. The second runs
the new model swapped, if it runs only once or twice. No more is evicted than is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Resident:
    """A model on the device that could leave it."""

    on_device_bytes: int
    swappable_bytes: int
    """The part that can leave while the rest stays."""
    returns: bool
    """True if the same image needs it again, like the denoiser."""


@dataclass(frozen=True)
class Coming:
    """The model to place."""

    outside_bytes: int
    swappable_bytes: int
    passes: int | None
    """Number of its runs before others need the room; None if it runs often."""


@dataclass(frozen=True)
class Eviction:
    """The decision."""

    leaving_bytes: tuple[int, ...]
    """For each resident, in the given order; 0: it stays."""
    swapped_bytes: int
    """The part of the new model that stays in RAM."""
    moved_bytes: int
    """Bytes over the bus until the residents that return are back."""


def plan_eviction(coming: Coming, need_bytes: int, free_bytes: int, residents: Sequence[Resident]) -> Eviction:
    """Chooses the cheaper way. If evicting everything is not enough, the rest of the new model stays in RAM, as far as
    swappable.

    Args:
        coming: The model to place.
        need_bytes: VRAM to keep free beside the weights while it runs.
        free_bytes: Free VRAM.
        residents: In eviction order.
    """
    short = coming.outside_bytes + need_bytes - free_bytes
    whole = _make_room(coming, short, residents)
    if short <= 0 or coming.passes is None:
        return whole
    swapped = min(coming.swappable_bytes, short)
    kept_out = _make_room(coming, short - swapped, residents, swapped)
    return kept_out if kept_out.moved_bytes < whole.moved_bytes else whole


def _make_room(coming: Coming, short: int, residents: Sequence[Resident], swapped: int = 0) -> Eviction:
    leaving: list[int] = []
    moved = 0
    for resident in residents:
        wanted = max(0, min(short, resident.on_device_bytes))
        if wanted > resident.swappable_bytes:
            # The rest could not run without it: evict the whole model.
            wanted = resident.on_device_bytes
        leaving.append(wanted)
        short -= wanted
        # A resident that returns moves twice, and a part of the new model has to leave for it again.
        moved += wanted * (3 if resident.returns else 1)
    swapped = min(coming.swappable_bytes, swapped + max(0, short))
    moved += coming.outside_bytes - swapped + swapped * (coming.passes or 1)
    return Eviction(tuple(leaving), swapped, moved)
