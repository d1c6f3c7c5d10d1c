"""The takeover that is at work in this process. The settings page switches it off and on; the tab and the log show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from ..errors import HostError
from ..memory import MemorySnapshot, Nvml
from ..planning.last_plan import LastPlan
from ..reporting.lora_rows import FileSheet
from ..reporting.report import ApplyReport
from .image_words import ImageWords
from .live_settings import LiveSettings
from .ram_copies import RamCopies


class Takeover(Protocol):
    """The guard in place of a host's LoRA patcher."""

    settings: LiveSettings
    words: ImageWords
    """What is said of the LoRAs of the image that is being made."""
    copies: RamCopies
    """Of layers of the loaded models."""

    def install(self) -> None:
        """Replaces the host's functions: all, or none where one fails."""
        ...

    def install_in_webui(self) -> list[HostError]:
        """Replaces what the host loads after its start. May be called again.

        Returns:
            What does not fit; the rest works without it.
        """
        ...

    def uninstall(self) -> None:
        """Gives everything back; the host applies the LoRAs on loaded models itself."""
        ...

    def app_started(self) -> None:
        """Begins what may be done ahead once the host is up. Never waits."""
        ...

    def settings_changed(self) -> None:
        """Carries out what waits for no image, not even for the end of the present one."""
        ...

    def snapshot(self, nvml: Nvml | None = None) -> MemorySnapshot:
        """Reads the memory now; `nvml`: asks the driver's library too."""
        ...

    def device(self) -> torch.device:
        """Returns where the host makes images. May start CUDA."""
        ...

    def reports(self) -> tuple[ApplyReport, ...]:
        """Returns what lies on each model. For any thread."""
        ...

    def tell_of_slow_layers(self) -> None:
        """Says under the image which models had layers without VRAM for their LoRAs."""
        ...

    def left_out(self) -> Mapping[str, str]:
        """Returns the LoRAs of the last prompt that are not applied, each with the reason."""
        ...

    def lora_sheets(self) -> Mapping[str, FileSheet]:
        """Returns facts of the LoRA files of the last prompt, by their names. For any thread."""
        ...

    def free_vram(self) -> None:
        """Moves every model from the card into RAM, as the host does it. No image may be in the making."""
        ...

    def drop_caches(self) -> int:
        """Gives back what is kept in RAM for speed alone; returns the bytes."""
        ...

    def image_reports(self, image_model: Any, text_encoder: Any) -> list[ApplyReport]:
        """Returns what lies on the models that made the present image.

        Args:
            image_model: its patcher.
            text_encoder: its patcher. A remembered prompt was encoded with the stack of another image; it has no report.
        """
        ...

    def last_plan(self) -> LastPlan | None:
        """Returns what the present image model was loaded with."""
        ...


_factory: Callable[[], Takeover] | None = None
_takeover: Takeover | None = None


def install(factory: Callable[[], Takeover] | None = None) -> Takeover:
    """Puts a takeover to work; a second call returns the first one's.

    Args:
        factory: makes the takeover of this host; None for that of the last call.

    Raises:
        HostError: the host does not fit; nothing is replaced.
    """
    global _factory, _takeover
    _factory = factory or _factory
    if _takeover is None:
        if _factory is None:
            raise HostError("no host is known")
        takeover = _factory()
        takeover.install()
        _takeover = takeover
    return _takeover


def uninstall() -> None:
    """Undoes `install`; does nothing where nothing is installed."""
    global _takeover
    takeover, _takeover = _takeover, None
    if takeover is not None:
        takeover.uninstall()


def installed() -> Takeover | None:
    """Returns the takeover at work; None where there is none."""
    return _takeover
