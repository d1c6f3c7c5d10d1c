"""The machine that `plan` predicts for: what the user says, else what this one has. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..files import shown
from ..messages import Joined, Message
from ..planning.rates import DEFAULT_GPU, RATES, GpuRates, nearest_rates, rates_of, relative_of
from ..units import GB

FREE_SHARE = 0.9
"""Share of a card that Forge finds free when it starts: some 11 GB of a 12 GB card with a desktop on it."""


@dataclass(frozen=True)
class Machine:
    """The machine. `vram_bytes` is what the host finds free when it starts, `notes` say what was read or taken."""

    vram_bytes: int
    ram_bytes: int
    rates: GpuRates
    notes: tuple[Message, ...]


def machine_for(vram_bytes: int | None, ram_bytes: int | None, gpu: str | None) -> Machine:
    """Returns the machine. What is None is read here; the card is read only where the VRAM is read too.

    Args:
        vram_bytes: VRAM that the host finds free; None to read it.
        ram_bytes: Installed RAM; None to read it.
        gpu: The card's name; None for this machine's, or the default one where the VRAM was given.

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
        gpu = card
        read.append(Message("plan.machine_card", {"name": shown(card)}))
    notes = [Message("plan.machine", {"facts": Joined(read)})] if read else []
    rates, counted = _rates(gpu or DEFAULT_GPU, vram_bytes)
    return Machine(vram_bytes, ram_bytes, rates, (*notes, *counted))


def _rates(gpu: str, vram_bytes: int) -> tuple[GpuRates, list[Message]]:
    """Returns the rates of a card, and the line that says which other card's they are."""
    try:
        return rates_of(gpu), []
    except ValueError:
        pass
    try:
        rates = nearest_rates(gpu, vram_bytes)
    except ValueError:
        # A driver that gives a card no proper name.
        rates = RATES[DEFAULT_GPU]
    facts = {"card": shown(gpu), "known": rates.name}
    if relative_of(gpu) is None:
        return rates, [Message("plan.counted_by_memory", {**facts, "gb": vram_bytes / GB})]
    return rates, [Message("plan.counted_as", facts)]


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
