"""Decides which options of torch's CUDA allocator this machine supports, with the reason for each that it does not.

Facts: pytorch issue 122057 and pull request 189163 (Windows), issues 192330 (WSL), 192259 (ROCm), pull request 112121
(Jetson).
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from ..lazy_torch import torch
from ..messages import Message
from .allocator_text import COLLECT, EXPANDABLE, SPLIT
from .allocator_torch import setter
from .torch_build import torch_build

WINDOWS_SINCE = (2, 14)
"""The first torch with the pull request for Windows. Whether a build contains it, the read-back and the test allocation
tell.
"""

_DEVICE_NAMES = {"cpu": "CPU", "mps": "MPS", "xpu": "XPU", "privateuseone": "DirectML"}


@dataclass(frozen=True)
class Machine:
    """The facts that decide which options are available."""

    device: str
    """`cuda` (ROCm too), else the device's name for the user."""
    torch_version: tuple[int, int]
    backend: str = "native"
    """torch's allocator; "" without CUDA."""
    rocm: bool = False
    system: str = "Linux"
    """As in `platform.system()`."""
    wsl: bool = False
    tegra: bool = False
    can_set: bool = True
    """True if torch takes options while it runs."""


def look(device: torch.device | None) -> Machine:
    """Reads the facts of this process for models on `device` (None: on the CPU, without asking torch)."""
    kind = "cpu" if device is None else device.type
    cuda = kind == "cuda" and torch.cuda.is_available()
    build = torch_build()
    version = re.match(r"(\d+)\.(\d+)", build.version)
    kernel = platform.release().lower()
    return Machine(
        device="cuda" if cuda else _DEVICE_NAMES.get(kind, "CPU" if kind == "cuda" else kind),
        torch_version=(int(version[1]), int(version[2])) if version else (0, 0),
        backend=torch.cuda.get_allocator_backend() if cuda else "",
        rocm=build.rocm,
        system=platform.system(),
        wsl="microsoft" in kernel,
        tegra="tegra" in kernel or Path("/etc/nv_tegra_release").exists(),
        can_set=cuda and setter() is not None,
    )


def availability(machine: Machine) -> dict[str, Message | None]:
    """Returns, for each option, None if it is available, else the reason why it is not."""
    for_all = _why_unavailable(machine)
    if for_all is not None:
        return dict.fromkeys((EXPANDABLE, SPLIT, COLLECT), for_all)
    return {EXPANDABLE: _why_not_expandable(machine), SPLIT: None, COLLECT: None}


def _why_unavailable(machine: Machine) -> Message | None:
    if machine.device != "cuda":
        return Message("allocator.no_cuda", {"device": machine.device})
    if machine.backend != "native":
        return Message("allocator.backend", {"backend": machine.backend})
    return None


def _why_not_expandable(machine: Machine) -> Message | None:
    """Refuses machines with known failures. There an allocation hangs or fails in the middle of an image, long after a
    small test has succeeded.
    """
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
