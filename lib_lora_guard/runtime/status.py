"""One look at everything the panel shows. Reads only; called from the web server's threads while images are made."""

from __future__ import annotations

import logging
from typing import Protocol

import torch

from ..memory import HostMemory, MemorySnapshot, Nvml, take_snapshot
from ..memory.allocator import AllocatorState
from ..memory.nvml import GpuProcesses
from ..memory.paced_nvml import PacedNvml
from ..messages import Message
from ..reporting.status import MemoryFigure, ModelStatus, OtherPrograms, PanelStatus, model_status
from ..settings import LoraMode, Settings
from ..ui.memory_figures import memory_figures, other_programs, step_need
from ..ui.settings_section import MODE_KEYS
from ..version import __version__
from .installed import Takeover

log = logging.getLogger(__name__)


class InForce(Protocol):
    """The user's settings as the host has put them into force: `hosts.webui.options.GuardOptions`."""

    settings: Settings
    allocator: AllocatorState | None

    def mode(self) -> LoraMode: ...
    def apply(self) -> object: ...


class Machine:
    """Asked for its memory about once a second. Made once: what does not change is looked up once, NVML keeps its session."""

    def __init__(self, nvml: Nvml | None = None) -> None:
        """`nvml` is for tests."""
        self._nvml, self._host = nvml or PacedNvml(), HostMemory()

    def look(self, takeover: Takeover | None) -> tuple[MemorySnapshot, GpuProcesses]:
        """Returns the memory now, and the other programs that use the card. Starts no CUDA: that alone takes hundreds
        of MB of the card."""
        may_start = torch.cuda.is_available() and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's own
        if takeover is None or may_start:
            # The host's own answer to which device it is would start it.
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            snapshot = take_snapshot(device, self._nvml, self._host)
        else:
            device, snapshot = takeover.device(), takeover.snapshot(self._nvml)
        return snapshot, self._nvml.other_processes(device)


def collect(takeover: Takeover | None, options: InForce | None, machine: Machine | None = None) -> PanelStatus:
    """The state of the guard, of the models it works on and of the machine. `takeover` is None where none is in place,
    `options` where the host does not fit or its flags say so."""
    figures, programs = _memory(machine or Machine(), takeover)
    return PanelStatus(
        mode=_mode(takeover, options),
        enabled=takeover is not None,
        version=__version__,
        models=_models(takeover),
        left_out=() if takeover is None else tuple(takeover.left_out().items()),
        memory=figures,
        step=None if takeover is None else step_need(takeover.last_plan()),
        programs=programs,
        allocator=() if options is None or options.allocator is None else allocator_lines(options.allocator),
        problem=Message("panel.not_in_place") if options is None else None,
    )


def allocator_lines(state: AllocatorState) -> tuple[str, ...]:
    """Each option with what is true of it; one line where the same is true of all."""
    states = {name: option.reason for name, option in state.options().items()}
    first = next(iter(states.values()))
    if all(reason == first for reason in states.values()):
        return (first, *state.notes)
    lines = (
        Message("panel.allocator.option", {"name": Message(f"settings.{name}"), "state": reason})
        for name, reason in states.items()
    )
    return (*lines, *state.notes)


def _mode(takeover: Takeover | None, options: InForce | None) -> str:
    if takeover is None or options is None:
        return Message("panel.mode.off")
    mode = options.mode()
    key = MODE_KEYS[mode]
    sentence = "panel.mode" if mode is options.settings.mode else "panel.mode.low_bits"
    return Message(sentence, {"name": Message(key), "what": Message(f"{key}.info")})


def _models(takeover: Takeover | None) -> tuple[ModelStatus, ...]:
    reports = () if takeover is None else takeover.reports()
    return tuple(sorted((model_status(report) for report in reports), key=lambda model: model.name))


def _memory(machine: Machine, takeover: Takeover | None) -> tuple[tuple[MemoryFigure, ...], OtherPrograms | None]:
    try:
        snapshot, others = machine.look(takeover)
    # The panel shows the log, too: a driver that fails in a new way must not take it away.
    except Exception as error:
        log.debug("memory could not be read", exc_info=True)
        missing = Message("panel.unknown", {"error": str(error).strip().split("\n")[0] or type(error).__name__})
        return (MemoryFigure("VRAM", missing=missing), MemoryFigure("RAM", missing=missing)), None
    return memory_figures(snapshot), other_programs(snapshot, others)
