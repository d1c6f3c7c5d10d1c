"""Numbers of memory at one moment, each with its source, and the budgets that follow from them. Pure: nothing is asked here.

A number that cannot be had is None with the reason, and what depends on it is None too: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from ..messages import Message

DISAGREEMENT_BYTES = 256 << 20
"""Above this, torch's and NVML's free memory do not merely differ by the moment they were read at."""


@dataclass(frozen=True)
class Reading:
    """One number and who says so. Raises ValueError where it has neither a number nor a reason, or both."""

    bytes: int | None
    source: str
    """A Message for readings of this package, so that it has translations."""
    missing: Message | None = None
    """Why there is no number."""

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.missing is None):
            raise ValueError(f"a reading has a number or a reason, not {self.bytes!r} and {self.missing!r}")


@dataclass(frozen=True)
class MemorySnapshot:
    """The memory of a device, of this machine and of this process. `snapshot.take_snapshot` makes them."""

    system: str
    """As in `platform.system()`."""
    vram_total: Reading
    vram_free: Reading
    """The driver's, through torch. On Windows memory that other programs hold may count as free (see vram_free_nvml)."""
    vram_free_nvml: Reading
    vram_reserved: Reading
    """What torch's allocator holds, used or not."""
    vram_active: Reading
    """What of it is used."""
    vram_ours: Reading
    """What this process holds. NVML counts the CUDA context too; torch's own count, where NVML has none, does not."""
    vram_others: Reading
    """Neither free nor ours nor set aside by the driver, as far as it says."""
    ram_total: Reading
    ram_available: Reading
    """Physical, file cache that can be given up counted in; of the machine, whatever a control group allows."""
    ram_cgroup_room: Reading
    """The least that a control group around this process leaves it."""
    ram_and_swap_cgroup_room: Reading
    """The same with the swap that the group allows."""
    swap_total: Reading
    """On Windows the page files at their present size."""
    swap_free: Reading
    commit_limit: Reading
    commit_charge: Reading
    commit_room: Reading
    """What Windows lets this process commit: never more than limit - charge, less in a job with a limit of its own."""
    pinned: Reading
    """Host memory of torch's pinned allocator, used or cached. Memory that others registered with CUDA is not in it."""
    rss: Reading
    rss_peak: Reading

    def readings(self) -> Iterator[tuple[str, Reading]]:
        """Every reading with the name of its field."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Reading):
                yield field.name, value

    @property
    def driver_disagreement_bytes(self) -> int | None:
        """How much more the driver says is free than NVML (negative: less). None where one of them is missing."""
        if self.vram_free.bytes is None or self.vram_free_nvml.bytes is None:
            return None
        return self.vram_free.bytes - self.vram_free_nvml.bytes

    @property
    def usable_vram_bytes(self) -> int | None:
        """What can still be placed on the device: free, and held by torch without being used."""
        return usable_vram_bytes(
            self.vram_free, self.vram_reserved, self.vram_active, self.vram_total, self.vram_free_nvml
        )

    def fast_ram_bytes(self, floor_bytes: int) -> int | None:
        """RAM that can be filled without paging, `floor_bytes` left to everything else. Beyond it: choose another way."""
        return fast_ram_bytes(self.ram_available, self.ram_cgroup_room, self.ram_total, floor_bytes)

    @property
    def alive_ram_bytes(self) -> int | None:
        """What can be allocated, page file and swap counted in, before the system refuses or kills. Beyond it: refuse.

        Windows refuses commits above its limit, whatever RAM is free; the limit is today's, though a page file may grow.
        Linux overcommits and kills when RAM and swap, or those of a control group, are full.
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


def usable_vram_bytes(
    free: Reading, reserved: Reading, active: Reading, total: Reading, nvml_free: Reading | None = None
) -> int | None:
    """See MemorySnapshot."""
    trusted = trusted_free_bytes(free.bytes, None if nvml_free is None else nvml_free.bytes)
    if trusted is None:
        return None
    unused = _difference(reserved.bytes, active.bytes) or 0
    return _least([trusted + max(0, unused)], total.bytes)


def trusted_free_bytes(driver: int | None, nvml: int | None) -> int | None:
    """Of two numbers for the same free VRAM the one that counts: NVML's where it says clearly less than the driver, or alone.
    Windows tells each program how much it could have if the others made room, which they do by paging."""
    if driver is None or (nvml is not None and driver - nvml > DISAGREEMENT_BYTES):
        return nvml
    return driver


def fast_ram_bytes(available: Reading, cgroup_room: Reading, total: Reading, floor_bytes: int) -> int | None:
    """See MemorySnapshot."""
    if available.bytes is None:
        return None
    room = _least([available.bytes, cgroup_room.bytes], total.bytes)
    return None if room is None else max(0, room - floor_bytes)


def _difference(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one - other


def _least(rooms: list[int | None], total: int | None) -> int | None:
    """The smallest number that is known, between 0 and `total`; None where none is."""
    known = [room for room in rooms if room is not None]
    if not known:
        return None
    return max(0, min(known) if total is None else min(*known, total))
