"""Which options of torch's CUDA allocator this machine can have, and why not the others.

Facts: pytorch issue 122057 and pull request 189163 (Windows), issues 192330 (WSL), 192259 (ROCm), pull request 112121
(Jetson).
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..messages import Message
from .allocator_text import COLLECT, EXPANDABLE, SPLIT
from .allocator_torch import setter

WINDOWS_SINCE = (2, 14)
"""The first torch after the pull request for Windows. Whether a build has it is left to the read-back and the proof."""

_KINDS = {"cpu": "CPU", "mps": "MPS", "xpu": "XPU", "privateuseone": "DirectML"}


@dataclass(frozen=True)
class Machine:
    """What decides which options there are."""

    device: str
    """ "cuda" (also for ROCm), else the name to show."""
    torch_version: tuple[int, int]
    backend: str = "native"
    """The allocator in use; "" without CUDA."""
    rocm: bool = False
    system: str = "Linux"
    """As in `platform.system()`."""
    wsl: bool = False
    tegra: bool = False
    can_set: bool = True
    """torch can be told while it runs."""


def look(device: torch.device) -> Machine:
    """The facts of this process, for models that run on `device`."""
    cuda = device.type == "cuda" and torch.cuda.is_available()
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    kernel = platform.release().lower()
    return Machine(
        device="cuda" if cuda else _KINDS.get(device.type, "CPU" if device.type == "cuda" else device.type),
        torch_version=(int(version[1]), int(version[2])) if version else (0, 0),
        backend=torch.cuda.get_allocator_backend() if cuda else "",
        rocm=torch.version.hip is not None,
        system=platform.system(),
        wsl="microsoft" in kernel,
        tegra="tegra" in kernel or Path("/etc/nv_tegra_release").exists(),
        can_set=setter() is not None,
    )


def availability(machine: Machine) -> dict[str, Message | None]:
    """Per option: None where it can be had, else why not."""
    everywhere = _why_none(machine)
    if everywhere is not None:
        return dict.fromkeys((EXPANDABLE, SPLIT, COLLECT), everywhere)
    return {EXPANDABLE: _why_not_expandable(machine), SPLIT: None, COLLECT: None}


def _why_none(machine: Machine) -> Message | None:
    if machine.device != "cuda":
        return Message("allocator.no_cuda", {"device": machine.device})
    if machine.backend != "native":
        return Message("allocator.backend", {"backend": machine.backend})
    return None


def _why_not_expandable(machine: Machine) -> Message | None:
    """Reports of broken setups decide here, not the wish to try: where it goes wrong there, an allocation hangs or fails
    in the middle of an image, long after a small probe went well."""
    facts = {"torch": ".".join(map(str, machine.torch_version)), "since": ".".join(map(str, WINDOWS_SINCE))}
    if machine.rocm:
        return Message("allocator.rocm")
    if machine.system == "Windows" and machine.torch_version < WINDOWS_SINCE:
        return Message("allocator.windows", facts)
    if machine.wsl:
        return Message("allocator.wsl")
    if machine.tegra:
        return Message("allocator.tegra")
    return None
