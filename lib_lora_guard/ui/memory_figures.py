"""Converts a memory snapshot to the panel's figures: the numbers that the guard plans with, and their sources. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from ..memory.nvml import SOURCE, GpuProcess, GpuProcesses
from ..memory.readings import MemorySnapshot, Reading, trusted_free_bytes
from ..messages import Joined, Message
from ..planning.last_plan import LastPlan
from ..reporting.status import Amount, MemoryFigure, OtherPrograms, StepNeed
from ..units import MB

WORTH_SAYING_BYTES = 256 * MB
"""Closing other programs is not worth it if they hold less VRAM than this."""
MOST_PROGRAMS = 4

VRAM, RAM = Message("panel.vram"), Message("panel.ram")
_RAM_NUMBERS = ("ram_", "swap_", "commit_", "pinned", "rss")


def memory_figures(snapshot: MemorySnapshot) -> tuple[MemoryFigure, MemoryFigure]:
    """Returns the figures for VRAM and RAM."""
    return _vram(snapshot), _ram(snapshot)


def other_programs(snapshot: MemorySnapshot, others: GpuProcesses) -> OtherPrograms | None:
    """Returns the other programs on the card; None if they hold too little to matter.

    Windows reports which programs use the card, but not how much each of them uses.
    """
    known = sum(process.bytes or 0 for process in others.processes)
    together = known or snapshot.vram_others.bytes or 0
    named = [process for process in others.processes if process.name and (process.bytes or not known)]
    if together <= WORTH_SAYING_BYTES or not named:
        return None
    largest = tuple(_program(process) for process in named[:MOST_PROGRAMS])
    return OtherPrograms(together / MB, largest, more=len(named) > MOST_PROGRAMS)


def step_need(plan: LastPlan | None) -> StepNeed | None:
    """Returns the memory need of the last planned step; None before the first load."""
    if plan is None:
        return None
    parts = {
        "panel.step.weights": plan.on_card_bytes,
        "panel.step.factors": plan.factor_bytes,
        "panel.step.other": plan.other_bytes,
        "panel.step.compute": plan.step_bytes,
    }
    amounts = tuple(Amount(Message(key), size / MB) for key, size in parts.items() if size)
    return StepNeed(plan.model, plan.device_bytes / MB, amounts, plan.copied_bytes / MB)


def _vram(snapshot: MemorySnapshot) -> MemoryFigure:
    numbers = _numbers(snapshot, ("vram_",))
    free, total = snapshot.usable_vram_bytes, snapshot.vram_total.bytes
    if free is None or total is None:
        # If nothing is known, the reason is shown once.
        known = tuple(number for number in numbers if number.mb is not None)
        return MemoryFigure(VRAM, numbers=known, missing=snapshot.vram_total.missing or snapshot.vram_free.missing)
    cached = max(0, (snapshot.vram_reserved.bytes or 0) - (snapshot.vram_active.bytes or 0))
    ours = min(max(0, (snapshot.vram_ours.bytes or 0) - cached), total - free)
    held = max(0, min(cached, free))
    used = (
        Amount(Message("panel.part.ours"), ours / MB, snapshot.vram_ours.source),
        Amount(Message("panel.part.others"), (total - free - ours) / MB, snapshot.vram_others.source),
        Amount(Message("panel.part.cache"), held / MB, snapshot.vram_reserved.source),
    )
    # The one that counts.
    trusted = trusted_free_bytes(snapshot.vram_free.bytes, snapshot.vram_free_nvml.bytes)
    counted = snapshot.vram_free if trusted == snapshot.vram_free.bytes else snapshot.vram_free_nvml
    source = _from([counted, snapshot.vram_active, snapshot.vram_ours])
    return MemoryFigure(VRAM, (free - held) / MB, total / MB, used, (), numbers, source)


def _ram(snapshot: MemorySnapshot) -> MemoryFigure:
    numbers = _numbers(snapshot, _RAM_NUMBERS)
    free, total = snapshot.fast_ram_bytes(0), snapshot.ram_total.bytes
    if free is None or total is None:
        return MemoryFigure(RAM, numbers=numbers, missing=snapshot.ram_available.missing or snapshot.ram_total.missing)
    ours = min(snapshot.rss.bytes or 0, total - free)
    used = (
        Amount(Message("panel.part.ours"), ours / MB, snapshot.rss.source),
        Amount(Message("panel.part.rest"), (total - free - ours) / MB, snapshot.ram_available.source),
    )
    return MemoryFigure(
        RAM, free / MB, total / MB, used, (_page_file(snapshot),), numbers, _from([snapshot.ram_available])
    )


def _page_file(snapshot: MemorySnapshot) -> Amount:
    """Returns the room for further allocations. Windows fails at its commit limit, even if the page file has unused
    space.
    """
    if snapshot.system == "Windows":
        return _amount(Message("panel.beside.commit"), snapshot.commit_room)
    return _amount(Message("panel.beside.swap"), snapshot.swap_free)


def _numbers(snapshot: MemorySnapshot, kinds: tuple[str, ...]) -> tuple[Amount, ...]:
    """Returns all readings of these kinds, except those that other systems alone have."""
    return tuple(
        _amount(Message(f"panel.number.{name}"), reading)
        for name, reading in snapshot.readings()
        if name.startswith(kinds) and (reading.missing is None or reading.missing.key != "readings.not_windows")
    )


def _amount(name: Message, reading: Reading) -> Amount:
    mb = None if reading.bytes is None else reading.bytes / MB
    return Amount(name, mb, reading.source, reading.missing)


def _from(readings: Iterable[Reading]) -> Message:
    known = {str(reading.source): reading.source for reading in readings if reading.bytes is not None}
    return Message("panel.source", {"sources": Joined(known.values(), "list.semicolon")})


def _program(process: GpuProcess) -> Amount:
    if process.bytes:
        return Amount(process.name, process.bytes / MB, SOURCE)
    return Amount(process.name, None, SOURCE, Message("readings.nvml_hidden"))
