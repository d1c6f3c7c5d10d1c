"""One look at everything the panel shows. Reads only; called from the web server's threads while images are made."""

from __future__ import annotations

from typing import Protocol

import psutil
import torch

from ..memory.allocator import AllocatorState
from ..memory.probe import measure_budget
from ..reporting.messages import Message
from ..reporting.status import MemoryFigure, ModelStatus, PanelStatus, model_status
from ..settings import LoraMode, Settings
from ..ui.settings_section import MODE_KEYS
from ..version import __version__
from ..weights.storage import MB
from .forge import ForgeTakeover


class InForce(Protocol):
    """What the host made of the user's settings: `forge_options.GuardOptions`."""

    settings: Settings
    allocator: AllocatorState | None

    def mode(self) -> LoraMode: ...
    def apply(self) -> object: ...


def collect(takeover: ForgeTakeover | None, options: InForce | None) -> PanelStatus:
    """The state of the guard, of the models it works on and of the machine. `takeover` is None where none is in place,
    `options` where the host does not fit or its flags say so."""
    return PanelStatus(
        mode=_mode(takeover, options),
        enabled=takeover is not None,
        version=__version__,
        models=_models(takeover),
        left_out=() if takeover is None else tuple({**takeover.files.left_out, **takeover.files.missing}.items()),
        memory=(_vram(), _ram()),
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


def _mode(takeover: ForgeTakeover | None, options: InForce | None) -> str:
    if takeover is None or options is None:
        return Message("panel.mode.off")
    mode = options.mode()
    key = MODE_KEYS[mode]
    sentence = "panel.mode" if mode is options.settings.mode else "panel.mode.low_bits"
    return Message(sentence, {"name": Message(key), "what": Message(f"{key}.info")})


def _models(takeover: ForgeTakeover | None) -> tuple[ModelStatus, ...]:
    reports = () if takeover is None else takeover.control.reports()
    return tuple(sorted((model_status(report) for report in reports), key=lambda model: model.name))


def _vram() -> MemoryFigure:
    """Of the device that torch uses. Asking must not be what starts CUDA: that alone takes hundreds of MB of it."""
    if not torch.cuda.is_available():
        return MemoryFigure("VRAM", 0, 0, 0, Message("panel.source.no_vram"))
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own
        return MemoryFigure("VRAM", 0, 0, 0, Message("panel.source.not_yet"))
    free, total = torch.cuda.mem_get_info()
    source = Message("panel.source.cuda", {"device": torch.cuda.get_device_name()})
    return MemoryFigure("VRAM", free / MB, (total - free) / MB, total / MB, source)


def _ram() -> MemoryFigure:
    total = psutil.virtual_memory().total
    free = measure_budget(torch.device("cpu"), 0).ram_spare_bytes
    return MemoryFigure("RAM", free / MB, (total - free) / MB, total / MB, Message("panel.source.system"))
