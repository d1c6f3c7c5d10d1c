"""One look at everything the panel shows. Reads only; called from the web server's threads while images are made."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import torch

from ..memory import HostMemory, MemorySnapshot, Nvml, take_snapshot
from ..memory.allocator import AllocatorState
from ..memory.nvml import GpuProcesses
from ..memory.paced_nvml import PacedNvml
from ..messages import Message
from ..recorder.crash import Crash
from ..recorder.crash_report import crash_report
from ..reporting.headline import BAD, WARNING, Headline, Problem, Scene, headline, problems
from ..reporting.lora_rows import lora_rows, model_name
from ..reporting.report import ApplyReport
from ..reporting.status import MemoryFigure, OtherPrograms, PanelStatus, model_status
from ..reporting.timeline import Timeline
from ..settings import LoraMode, Settings
from ..ui.memory_figures import RAM, VRAM, memory_figures, other_programs, step_need
from ..ui.settings_section import MODE_KEYS
from ..version import __version__
from .installed import Takeover

log = logging.getLogger(__name__)

_IMAGE_MODEL = Message("panel.model.image")


class InForce(Protocol):
    """The user's settings as the host has put them into force: `hosts.webui.options.GuardOptions`."""

    settings: Settings
    allocator: AllocatorState | None

    def mode(self) -> LoraMode: ...
    def apply(self) -> Settings: ...


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


@dataclass(frozen=True)
class Work:
    """What the host says of its work beside the guard."""

    checkpoint: str | None = None
    """The name of the loaded one."""
    steps: tuple[int, int] | None = None
    """Steps done and steps of the present pass."""


NO_WORK = Work()


def collect(
    takeover: Takeover | None,
    options: InForce | None,
    machine: Machine | None = None,
    work: Work = NO_WORK,
    timeline: Timeline | None = None,
    crash: Crash | None = None,
) -> PanelStatus:
    """Returns the state of the guard, of the models it works on and of the machine.

    Args:
        takeover: None where none is in place.
        options: None where the host does not fit or its flags say so.
        machine: reads the memory.
        work: the host's.
        timeline: of the process.
        crash: how the last run died, if it did.
    """
    figures, programs = _memory(machine or Machine(), takeover)
    reports = _reports(takeover)
    left_out = {} if takeover is None else dict(takeover.left_out())
    rows = lora_rows(reports, left_out, {} if takeover is None else takeover.lora_sheets())
    refused = {row.name: row.refused for row in rows if row.refused is not None}
    return PanelStatus(
        mode=_mode(takeover, options),
        enabled=takeover is not None,
        version=__version__,
        headline=_headline(takeover, options, work, timeline, len(rows) - len(refused)),
        problems=_problems(refused, crash),
        models=tuple(model_status(report) for report in reports),
        loras=rows,
        memory=figures,
        step=None if takeover is None else step_need(takeover.last_plan()),
        programs=programs,
        allocator=() if options is None or options.allocator is None else allocator_lines(options.allocator),
    )


def _headline(
    takeover: Takeover | None, options: InForce | None, work: Work, timeline: Timeline | None, loras: int
) -> Headline:
    if options is None:
        return Headline(BAD, Message("panel.not_in_place"))
    if takeover is None:
        return Headline(WARNING, Message("panel.headline.off"))
    timeline = timeline or Timeline()
    last = next((image for image in reversed(timeline.images()) if image.ended is not None), None)
    return headline(Scene(timeline.now(), work.steps, work.checkpoint, loras, last))


def _problems(refused: dict[str, str], crash: Crash | None) -> tuple[Problem, ...]:
    return problems(refused, [] if crash is None else crash_report(crash), "" if crash is None else str(crash.time))


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


def _reports(takeover: Takeover | None) -> list[ApplyReport]:
    """Returns the reports, the image model's first."""
    reports = () if takeover is None else takeover.reports()
    return sorted(reports, key=lambda report: (model_name(report.model) != _IMAGE_MODEL, str(report.model)))


def _memory(machine: Machine, takeover: Takeover | None) -> tuple[tuple[MemoryFigure, ...], OtherPrograms | None]:
    try:
        snapshot, others = machine.look(takeover)
    # The panel shows the log, too: a driver that fails in a new way must not take it away.
    except Exception as error:
        log.debug("memory could not be read", exc_info=True)
        missing = Message("panel.unknown", {"error": str(error).strip().split("\n")[0] or type(error).__name__})
        return (MemoryFigure(VRAM, missing=missing), MemoryFigure(RAM, missing=missing)), None
    return memory_figures(snapshot), other_programs(snapshot, others)
