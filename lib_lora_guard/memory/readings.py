"""Memory numbers of one moment, each with its source, and the budgets computed from them. Pure: takes no measurements.

A number that is not available is None with a reason, and everything computed from it is None too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from ..messages import Message

DISAGREEMENT_BYTES = 256 << 20
"""A larger difference between torch's and NVML's free memory is not explained by reading them at different moments."""


@dataclass(frozen=True)
class Reading:
    """One number with its source.

    Raises:
        ValueError: It has both a number and a reason, or neither.
    """

    bytes: int | None
    source: str
    """A Message for readings of this package, so that it can be translated."""
    missing: Message | None = None
    """The reason why there is no number."""

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.missing is None):
            raise ValueError(f"a reading has a number or a reason, not {self.bytes!r} and {self.missing!r}")


@dataclass(frozen=True)
class MemorySnapshot:
    """The memory of a device, of this machine and of this process. Made by `snapshot.take_snapshot`."""

    system: str
    """As in `platform.system()`."""
    vram_total: Reading
    vram_free: Reading
    """Reported by the driver through torch. On Windows it may include memory that other programs hold (see
    vram_free_nvml).
    """
    vram_free_nvml: Reading
    vram_reserved: Reading
    """Held by torch's allocator, used or not."""
    vram_active: Reading
    """The used part of `vram_reserved`."""
    vram_ours: Reading
    """Held by this process. NVML includes the CUDA context; torch's own count, used without NVML, does not."""
    vram_others: Reading
    """Neither free nor ours nor reserved by the driver, as far as the driver reports it."""
    ram_total: Reading
    ram_available: Reading
    """Physical RAM of the machine, reclaimable file cache included; limits of control groups are not applied."""
    ram_cgroup_room: Reading
    """The smallest room that a control group leaves to this process."""
    ram_and_swap_cgroup_room: Reading
    """The same for RAM and the group's swap together."""
    swap_total: Reading
    """On Windows the page files at their present size."""
    swap_free: Reading
    commit_limit: Reading
    commit_charge: Reading
    commit_room: Reading
    """Bytes that Windows lets this process commit: at most limit - charge, less in a job with its own limit."""
    pinned: Reading
    """Host memory of torch's pinned allocator, used or cached. Does not include memory that other code registered with
    CUDA.
    """
    rss: Reading
    rss_peak: Reading

    def readings(self) -> Iterator[tuple[str, Reading]]:
        """Yields the name of each field and its reading."""
        return ((name, getattr(self, name)) for name in _READINGS)

    @property
    def usable_vram_bytes(self) -> int | None:
        """Bytes that can still be allocated on the device: free, or held by torch without being used."""
        return usable_vram_bytes(
            self.vram_free, self.vram_reserved, self.vram_active, self.vram_total, self.vram_free_nvml
        )

    def fast_ram_bytes(self, floor_bytes: int) -> int | None:
        """Returns the RAM that can be filled without paging if `floor_bytes` stay free. To use more, choose another
        way.
        """
        return fast_ram_bytes(self.ram_available, self.ram_cgroup_room, self.ram_total, floor_bytes)

    @property
    def alive_ram_bytes(self) -> int | None:
        """Bytes, page file and swap included, that can be allocated before the system refuses or kills. Refuse to use
        more.

        Windows refuses commits above its limit, whatever RAM is free. The present limit counts, though a page file may
        grow. Linux overcommits and kills when RAM and swap, or those of a control group, are full.
        """
        if self.system == "Windows":
            rooms = [self.commit_room.bytes, _difference(self.commit_limit.bytes, self.commit_charge.bytes)]
            return _least(rooms, self.commit_limit.bytes)
        if self.ram_available.bytes is None:
            return None
        if self.system != "Linux":
            return _least([self.ram_available.bytes], self.ram_total.bytes)
        swap = self.swap_free.bytes or 0
        total = None if self.ram_total.bytes is None else self.ram_total.bytes + (self.swap_total.bytes or 0)
        return _least([self.ram_available.bytes + swap, self.ram_and_swap_cgroup_room.bytes], total)


_READINGS = tuple(field.name for field in fields(MemorySnapshot) if field.name != "system")
"""Worked out once: a snapshot is taken around every phase."""


def usable_vram_bytes(
    free: Reading, reserved: Reading, active: Reading, total: Reading, nvml_free: Reading | None = None
) -> int | None:
    """Computes `MemorySnapshot.usable_vram_bytes` from single readings."""
    trusted = trusted_free_bytes(free.bytes, None if nvml_free is None else nvml_free.bytes)
    if trusted is None:
        return None
    unused = _difference(reserved.bytes, active.bytes) or 0
    return _least([trusted + max(0, unused)], total.bytes)


def trusted_free_bytes(driver: int | None, nvml: int | None) -> int | None:
    """Chooses between two numbers for the free VRAM: NVML's if it is clearly smaller or the only one, else the
    driver's.

    Windows reports to each program what it could get if the others made room, which they do by paging.
    """
    if driver is None or (nvml is not None and driver - nvml > DISAGREEMENT_BYTES):
        return nvml
    return driver


def fast_ram_bytes(available: Reading, cgroup_room: Reading, total: Reading, floor_bytes: int) -> int | None:
    """Computes `MemorySnapshot.fast_ram_bytes` from single readings."""
    if available.bytes is None:
        return None
    room = _least([available.bytes, cgroup_room.bytes], total.bytes)
    return None if room is None else max(0, room - floor_bytes)


def _difference(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one - other


def _least(rooms: list[int | None], total: int | None) -> int | None:
    """Returns the smallest known number, clamped to 0..`total`; None if none is known."""
    known = [room for room in rooms if room is not None]
    if not known:
        return None
    return max(0, min(known) if total is None else min(*known, total))
