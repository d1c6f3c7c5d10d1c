"""The takeover of Forge's LoRA patcher. `install()` once, `uninstall()` to give everything back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch

from ...adapters.patch_tuples import OWN_KIND, calculate_own_kind
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
from .api import ForgeApi, probe
from .hook_table import LATER, START
from .parts import ForgeParts
from .types import Patcher


class ForgeTakeover(ForgeParts):
    """The parts, and the hooks that put them in place of Forge's functions. One per process; see `install`."""

    def __init__(
        self,
        api: ForgeApi,
        settings: LiveSettings | None = None,
        journal: Journal | None = None,
        corrections: Corrections | None = None,
    ) -> None:
        """
        Args:
            api: Forge.
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
        api = self.api
        parts = {module.__name__: module for module in (api.lora, api.operations, api.base)}
        lay(START, self, {**parts, "backend.memory_management": api.memory}, self.hooks)
        # Stays when the guard goes: patches of this kind may still lie on a patcher then.
        api.lora.extra_weight_calculators.setdefault(OWN_KIND, calculate_own_kind)

    def install_in_webui(self) -> list[HostError]:
        """Replaces what Forge loads long after preload.py has run. May be called again.

        Returns:
            What does not fit; the rest works without it.
        """
        modules = dict(sys.modules)
        misfits = self.web.install(self.hooks, modules)
        self.install_loaded(modules)
        saving.install(self.hooks, self.stacks.engines)
        return misfits

    def install_loaded(self, modules: Mapping[str, ModuleType]) -> None:
        """Replaces what Forge's own modules of these names have and what is not replaced yet."""
        lay(LATER, self, modules, self.hooks)

    def uninstall(self) -> None:
        """Gives everything back; LoRAs on loaded models are applied again by the host's own refresh."""
        self.web.uninstall()
        refresh = next(h for h in self.hooks.hooks if h.name == "refresh").original
        self.hooks.restore()
        self.copies.give_back()
        self.quant_states.drop()
        self.placement.forget_all()
        live = [loaded.model for loaded in self.api.memory.current_loaded_models]
        self.control.release_all(refresh, {id(p.lora_loader): p for p in live if hasattr(p, "lora_loader")})

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
        """Returns where Forge makes images. May start CUDA."""
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
        found = [self.stacks.report(image_model.lora_loader)]
        if self.stacks.is_reported(text_encoder):
            # Else the prompt was remembered, and the text encoder has the stack of another image.
            found.append(self.stacks.report(text_encoder.lora_loader))
        return [report for report in found if report is not None]

    def last_plan(self) -> LastPlan | None:
        """Returns what the present image model was loaded with."""
        return self.loading.plans.last


def make() -> ForgeTakeover:
    """Makes the takeover of this process.

    Raises:
        HostError: the host does not fit.
    """
    takeover = ForgeTakeover(probe(), of_process.settings, of_process.journal, OF_PROCESS)
    of_process.journal = takeover.journal
    return takeover


def install() -> ForgeTakeover:
    """Takes Forge's LoRA patcher over; a second call returns the first one's takeover.

    Raises:
        HostError: the host does not fit; nothing is replaced.
    """
    takeover = at_work.install(make)
    assert isinstance(takeover, ForgeTakeover)
    return takeover


def install_in_webui() -> list[HostError]:
    """Replaces what is loaded long after preload.py has run; does nothing where the takeover is not installed."""
    takeover = at_work.installed()
    return [] if takeover is None else takeover.install_in_webui()


def uninstall() -> None:
    """Undoes `install`; does nothing where nothing is installed."""
    at_work.uninstall()


def installed() -> ForgeTakeover | None:
    """Returns the takeover at work; None where there is none."""
    takeover = at_work.installed()
    return takeover if isinstance(takeover, ForgeTakeover) else None


def keep_journal(folder: Path) -> None:
    """Begins to write down what happens, in a file below `folder`; says how the last process died, if it did."""
    of_process.keep_journal(install().journal, folder)
