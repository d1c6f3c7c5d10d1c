"""What leaves the device when a model comes to it, and how much of the coming one stays in RAM. Pure.

Forge asks for 1.3 times the weights and unloads whole models until that is free: a text encoder of 5 GB throws a denoiser of
9.5 GB out, and both are carried over the bus twice for one prompt. Here the cheaper of two ways is taken, in bytes moved
until everything is as before: make the room that is missing, out of as little as possible; or let the coming model run
swapped, where it runs only once or twice. Nobody is asked for more than is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Resident:
    """A model on the device that could leave it. `swappable_bytes` of it can leave while the rest stays; `returns`: it is
    needed again for the same picture, as the denoiser is."""

    on_device_bytes: int
    swappable_bytes: int
    returns: bool


@dataclass(frozen=True)
class Coming:
    """What is to be placed. `passes`: how often it runs before others want the room; None where that is often."""

    outside_bytes: int
    swappable_bytes: int
    passes: int | None


@dataclass(frozen=True)
class Eviction:
    """`leaving_bytes` for each resident, in their order (0: stays as it is). `swapped_bytes` of what comes stay in RAM."""

    leaving_bytes: tuple[int, ...]
    swapped_bytes: int
    moved_bytes: int
    """Over the bus, until the residents that return are back."""


def plan_eviction(coming: Coming, need_bytes: int, free_bytes: int, residents: Sequence[Resident]) -> Eviction:
    """`need_bytes`: what has to be free beside the weights while the coming model runs. `residents`: who leaves first, first.

    Where even everything that can leave is not enough, what does not fit stays in RAM, as far as it can be swapped.
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
            # What runs only as a whole leaves as a whole.
            wanted = resident.on_device_bytes
        leaving.append(wanted)
        short -= wanted
        # Who returns is carried twice, and something of what came has to leave for it again.
        moved += wanted * (3 if resident.returns else 1)
    swapped = min(coming.swappable_bytes, swapped + max(0, short))
    moved += coming.outside_bytes - swapped + swapped * (coming.passes or 1)
    return Eviction(tuple(leaving), swapped, moved)
