"""The takeover of Neo's LoRAs. `install()` once, `uninstall()` to give everything back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType

import torch

from ...errors import HostError
from ...memory import MemorySnapshot, Nvml
from ...planning.last_plan import LastPlan
from ...reporting.lora_rows import FileSheet
from ...reporting.report import ApplyReport
from ...runtime import installed as at_work
from ...runtime.corrections import OF_PROCESS, Corrections
from ...runtime.hooks import HookSet, lay
from ...runtime.journal import Journal
from ...runtime.live_settings import LiveSettings
from ...runtime.machine import Machine
from ..webui import of_process, saving
from ..webui.networks import STALE
from .api import NeoApi, probe
from .hook_table import LATER, START
from .parts import NeoParts
from .types import Patcher


class NeoTakeover(NeoParts):
    """The parts, and the hooks that put them in place of Neo's functions. One per process; see `install`."""

    def __init__(
        self,
        api: NeoApi,
        settings: LiveSettings | None = None,
        journal: Journal | None = None,
        corrections: Corrections | None = None,
    ) -> None:
        """
        Args:
            api: Neo.
            settings: the user's.
            journal: of the process.
            corrections: of the process.
        """
        machine = Machine(api.memory.get_torch_device)
        journal, corrections = journal or Journal(machine.snapshot), corrections or Corrections()
        super().__init__(api, settings or LiveSettings(), machine, journal, corrections)
        self.hooks = HookSet()

    def install(self) -> None:
        """Replaces the host's functions: all, or none where one fails."""
        modules = {module.__name__: module for module in (self.api.base, self.api.memory_module)}
        lay(START, self, modules, self.hooks)

    def install_in_webui(self) -> list[HostError]:
        """Replaces what Neo loads long after preload.py has run. May be called again.

        Returns:
            What does not fit; the rest works without it.
        """
        modules = dict(sys.modules)
        misfits = self.web.install(self.hooks, modules)
        self.install_loaded(modules)
        saving.install(self.hooks, self.stacks.engines, saving.NEOS_SAVE_ROWS)
        return misfits

    def install_loaded(self, modules: Mapping[str, ModuleType]) -> None:
        """Replaces what Neo's own modules of these names have and what is not replaced yet."""
        lay(LATER, self, modules, self.hooks)

    def uninstall(self) -> None:
        """Gives everything back; Neo applies the LoRAs on loaded models at their next load, and reads its files anew."""
        self.web.uninstall()
        self.hooks.restore()
        self.copies.give_back()
        self.quant_states.drop()
        found = [loaded.model for loaded in self.api.memory.current_loaded_models]
        self.control.release_all([patcher for patcher in found if patcher is not None])
        sd_models = sys.modules.get("modules.sd_models")
        model = None if sd_models is None else sd_models.model_data.get_sd_model()
        if model is not None:
            model.current_lora_hash = STALE

    def app_started(self) -> None:
        """Begins what may be done ahead once the WebUI is up."""
        self.web.app_started()

    def settings_changed(self) -> None:
        """Gives back LoRA files beyond what may be kept now."""
        self.files.trim()

    def snapshot(self, nvml: Nvml | None = None) -> MemorySnapshot:
        """Reads the memory of the host's device and of this machine now; `nvml`: asks the driver's library too."""
        return self.machine.snapshot(nvml)

    def device(self) -> torch.device:
        """Returns where Neo makes images. May start CUDA."""
        return self.machine.device()

    def reports(self) -> tuple[ApplyReport, ...]:
        """Returns the report of each living model's LoRAs as it was last published. For any thread."""
        return self.stacks.reports()

    def tell_of_slow_layers(self) -> None:
        """Says under the image which models had layers without VRAM for their LoRAs."""
        self.stacks.tell_of_slow_layers()

    def left_out(self) -> Mapping[str, str]:
        """Returns the LoRAs of the last prompt that are not applied, each with the reason."""
        return {**self.files.left_out, **self.files.missing, **self.web.schedules.left_out}

    def lora_sheets(self) -> Mapping[str, FileSheet]:
        """Returns facts of the LoRA files of the last prompt, by their names. For any thread."""
        return self.files.sheets()

    def free_vram(self) -> None:
        """Moves every model from the card into RAM. No image may be in the making."""
        self.api.memory.unload_all_models()
        self.api.memory.soft_empty_cache()

    def image_reports(self, image_model: Patcher, text_encoder: Patcher) -> list[ApplyReport]:
        """Returns what lies on the models that made the present image."""
        # A remembered prompt was encoded with another image's stack: then the text encoder has no report for it.
        found = [self.stacks.report_for(image_model), self.stacks.report_for(text_encoder)]
        return [report for report in found if report is not None]

    def last_plan(self) -> LastPlan | None:
        """Returns what the present image model was loaded with; None: Neo places its models itself."""
        return None


def make() -> NeoTakeover:
    """Makes the takeover of this process.

    Raises:
        HostError: the host does not fit.
    """
    takeover = NeoTakeover(probe(), of_process.settings, of_process.journal, OF_PROCESS)
    of_process.journal = takeover.journal
    return takeover


def install() -> NeoTakeover:
    """Takes Neo's LoRAs over; a second call returns the first one's takeover.

    Raises:
        HostError: the host does not fit; nothing is replaced.
    """
    takeover = at_work.install(make)
    assert isinstance(takeover, NeoTakeover)
    return takeover
