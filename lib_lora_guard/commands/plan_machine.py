"""The machine that `plan` predicts for: what the user says, else what this one has. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..files import shown
from ..messages import Joined, Message
from ..planning.rates import DEFAULT_GPU, GpuRates, rates_of
from ..units import GB
from .arguments import Gpu, gpu_of

FREE_SHARE = 0.9
"""Share of a card that Forge finds free when it starts: some 11 GB of a 12 GB card with a desktop on it."""


@dataclass(frozen=True)
class Machine:
    """The machine. `vram_bytes` is what the host finds free when it starts, `notes` say what was read or taken."""

    vram_bytes: int
    ram_bytes: int
    rates: GpuRates
    notes: tuple[Message, ...]


def machine_for(vram_bytes: int | None, ram_bytes: int | None, gpu: Gpu | None) -> Machine:
    """Returns the machine. What is None is read here; the card is read only where the VRAM is read too.

    Args:
        vram_bytes: VRAM that the host finds free; None to read it.
        ram_bytes: Installed RAM; None to read it.
        gpu: The card; None for this machine's, or the default one where the VRAM was given.

    Raises:
        ValueError: A number can be read nowhere.
    """
    card = ""
    read: list[Message] = []
    if vram_bytes is None:
        card, here_bytes = this_card()
        if here_bytes is None:
            raise ValueError(Message("plan.no_card"))
        vram_bytes = here_bytes
        read.append(Message("plan.machine_vram", {"gb": vram_bytes / GB}))
    if ram_bytes is None:
        ram_bytes = _ram_bytes()
        read.append(Message("plan.machine_ram", {"gb": ram_bytes / GB}))
    if gpu is None and card:
        gpu = _gpu_here(card)
        read.append(Message("plan.machine_card", {"name": shown(card)}))
    gpu = gpu or Gpu(DEFAULT_GPU, rates_of(DEFAULT_GPU))
    notes = [Message("plan.machine", {"facts": Joined(read)})] if read else []
    if not gpu.is_known:
        notes.append(Message("plan.counted_as", {"card": shown(gpu.name), "known": gpu.rates.name}))
    return Machine(vram_bytes, ram_bytes, gpu.rates, tuple(notes))


def this_card() -> tuple[str, int | None]:
    """Returns the name of the first NVIDIA card and the VRAM that a host finds free there; ("", None) without one."""
    from ..memory import Nvml

    nvml = Nvml()
    try:
        found = nvml.first_card()
    finally:
        nvml.close()
    if found is None:
        return "", None
    name, total, free = found
    # A host that runs now holds VRAM that its next start finds free.
    return name, max(free, int(total * FREE_SHARE))


def _ram_bytes() -> int:
    from ..memory.snapshot import read_ram

    found = read_ram()[0].bytes
    if found is None:
        raise ValueError(Message("plan.no_ram"))
    return found


def _gpu_here(card: str) -> Gpu:
    try:
        return gpu_of(card)
    except ValueError:
        return Gpu(card, rates_of(DEFAULT_GPU))
