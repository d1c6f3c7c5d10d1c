"""Makes the parts of the takeover of Neo, each from those before it. Replaces nothing."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from types import ModuleType

import torch

from ...recorder.crash_report import Precaution
from ...runtime.advice import Advice
from ...runtime.corrections import Corrections
from ...runtime.image_words import ImageWords
from ...runtime.journal import Journal
from ...runtime.live_settings import LiveSettings
from ...runtime.machine import Machine
from ...runtime.precautions import Precautions
from ...runtime.preflight import Preflight
from ...runtime.ram_copies import RamCopies
from ...runtime.rule_log import RuleLog
from ...runtime.step_timer import StepTimer
from ..webui.checkpoint_reading import CheckpointReading
from ..webui.first_lora import FirstLora
from ..webui.free_memory import FreeMemory
from ..webui.lora_files import LoraFiles
from ..webui.models import about_model
from ..webui.quant_states import QuantStates
from ..webui.takeover import WebTakeover
from . import reference_images
from .access import NeoAccess
from .api import NeoApi
from .control import LoraControl
from .memory import NeoMemory, NeoSizes
from .patchers import NeoPatchers
from .stacks import NeoStacks
from .step_strengths import NeoStepStrengths
from .swapped import Swapped
from .unread_file import UnreadFile


class NeoParts:
    def __init__(
        self, api: NeoApi, settings: LiveSettings, machine: Machine, journal: Journal, corrections: Corrections
    ) -> None:
        """
        Args:
            api: Neo.
            settings: the user's.
            machine: reads the memory.
            journal: of the process.
            corrections: of the process.
        """
        self.api, self.settings, self.machine, self.journal = api, settings, machine, journal
        self.words = ImageWords(settings.language)
        self.rule_log = RuleLog(self.words)
        self.precautions = Precautions(self._planned)
        self.stacks = NeoStacks(settings, self._planned, journal.work, self.words)
        self.copies = RamCopies(settings.pins_swapped)
        self.quant_states = QuantStates(settings.pins_swapped)
        self.swapped = Swapped(self.copies)
        self.control = LoraControl(api, self.stacks, settings, journal, self.swapped)
        self.patchers = NeoPatchers(api.base)
        self.files = LoraFiles(settings, self.stacks.unpatched_shapes, self.words, self.patchers, UnreadFile)
        self.first_lora = FirstLora(functools.partial(NeoAccess, api), self.files)
        self.advice = Advice(api.memory, self.stacks.reports)
        self.web = WebTakeover(
            settings,
            self.files,
            self.stacks,
            NeoStepStrengths(self.stacks),
            journal,
            self.rule_log,
            self.advice,
            self._memory_settings,
            is_left_to_host=reference_images.are_there,
            folder=lambda: corrections.folder,
            after_image=self.first_lora.after_image,
        )
        self.preflight = Preflight(machine.snapshot, self.drop_caches, self.rule_log.tell, self.precautions)
        self.reading = CheckpointReading(self.preflight, self.advice.for_files)
        self.stacks.weight_files = lambda: self.reading.files if settings.uses_file_backups() else ()
        self.stacks.merges_from_file = settings.merges_from_file
        self.memory = NeoMemory(api.memory, self.stacks, journal, self.rule_log, self.swapped)
        self.free = FreeMemory(api.memory, self.rule_log)
        self.steps = StepTimer(NeoSizes(), journal, self.stacks.names_on, words=self.words)

    def drop_caches(self) -> int:
        """Gives back what is kept in RAM for speed alone; returns the bytes."""
        return self.web.prompts.forget() + self.files.drop_unused() + self.copies.drop_unused()

    def _planned(self, model: torch.nn.Module | None) -> frozenset[Precaution]:
        return self.journal.precautions(about_model(model))

    def _memory_settings(self, modules: Mapping[str, ModuleType]) -> Hashable:
        return (
            getattr(self.api.memory, "SETTING_RESERVED_VRAM", None),
            str(modules["modules.sd_models"].model_data.forge_loading_parameters),
        )
