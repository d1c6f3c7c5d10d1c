"""Makes the parts of the takeover of Forge, each from those before it. Replaces nothing."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from types import ModuleType

import torch

from ...recorder.crash_report import Precaution
from ...runtime.advice import Advice
from ...runtime.corrections import Corrections
from ...runtime.image_words import ImageWords
from ...runtime.job_costs import JobCosts
from ...runtime.jobs import Jobs
from ...runtime.journal import Journal
from ...runtime.links import LinkRates
from ...runtime.live_settings import LiveSettings
from ...runtime.machine import Machine
from ...runtime.needs import Reservations
from ...runtime.precautions import Precautions
from ...runtime.preflight import Preflight
from ...runtime.ram_copies import RamCopies
from ...runtime.room import Room
from ...runtime.rule_log import RuleLog
from ...runtime.step_timer import StepTimer
from ...runtime.swapping import SwappingRoom
from ...runtime.vae_room import VaeRoom
from ..webui.checkpoint_reading import CheckpointReading
from ..webui.first_lora import FirstLora
from ..webui.free_memory import FreeMemory
from ..webui.lora_files import LoraFiles
from ..webui.quant_states import QuantStates
from ..webui.takeover import WebTakeover
from . import facts
from .access import ForgeAccess
from .api import ForgeApi
from .calibration import ForgeCalibration
from .eviction import ForgeEviction
from .facts import about_model
from .handover import Placement
from .load_models import Loading
from .lora_loader import LoaderControl
from .lora_loading import LoraLoading
from .memory import ForgeMemory
from .patches import PatchReader
from .residency import Residency
from .stacks import ForgeStacks
from .step_strengths import ForgeStepStrengths
from .vae import ForgeVae


class ForgeParts:
    def __init__(
        self, api: ForgeApi, settings: LiveSettings, machine: Machine, journal: Journal, corrections: Corrections
    ) -> None:
        """
        Args:
            api: Forge.
            settings: the user's.
            machine: reads the memory.
            journal: of the process.
            corrections: of the process.
        """
        self.api, self.settings, self.machine, self.journal = api, settings, machine, journal
        self.words = ImageWords(settings.language)
        self.rule_log = RuleLog(self.words)
        self.jobs = Jobs()
        self.precautions = Precautions(self._planned)
        self.stacks = ForgeStacks(PatchReader(api.lora), settings, self._planned, journal.work, self.words)
        self.control = LoaderControl(api, self.stacks, settings)
        self.files = LoraFiles(settings, self.stacks.unpatched_shapes, self.words)
        self.first_lora = FirstLora(functools.partial(ForgeAccess, api), self.files)
        self.advice = Advice(api.memory, self.stacks.reports)
        self.web = WebTakeover(
            settings,
            self.files,
            self.stacks,
            ForgeStepStrengths(self.stacks),
            journal,
            self.rule_log,
            self.advice,
            self._memory_settings,
            self.jobs,
            folder=lambda: corrections.folder,
            after_image=self.first_lora.after_image,
        )
        self.copies = RamCopies(settings.pins_swapped)
        self.quant_states = QuantStates(settings.pins_swapped)
        self.preflight = Preflight(machine.snapshot, self.drop_caches, self.rule_log.tell, self.precautions)
        self.reading = CheckpointReading(self.preflight, self.advice.for_files)
        self.stacks.weight_files = lambda: self.reading.files if settings.uses_file_backups() else ()
        self.stacks.merges_from_file = settings.merges_from_file
        self.residency = Residency(self.stacks.merged_layers, self.copies)
        self.placement = Placement(
            api.memory, api.base.ModelPatcher, self.residency.away_bytes, self.residency.loose_bytes
        )
        self.steps = StepTimer(api.memory, journal, self.stacks.names_on, words=self.words)
        self.calibration = ForgeCalibration(api.memory, corrections)
        self.free = FreeMemory(api.memory, self.rule_log)
        self.memory = ForgeMemory(api.memory, self.residency, self.placement, self.free, SwappingRoom(facts))
        self.links = LinkRates(lambda: corrections.folder, lambda: self.copies.works)
        costs = JobCosts(self.jobs, self.links.of, settings.plans_residency)
        self.room = Room(self.memory, self.preflight, self.rule_log, costs)
        self.eviction = ForgeEviction(self.memory, self.room, self.rule_log)
        self.reservations = Reservations(self.memory, self.rule_log, self.calibration)
        self.loras = LoraLoading(self.stacks, self.files, self.calibration)
        self.loading = Loading(
            self.memory,
            self.reservations,
            self.room,
            self.eviction,
            self.placement,
            self.residency,
            self.loras,
            journal,
        )
        self.vae = ForgeVae(api.memory, VaeRoom(self.preflight, self.words), self.precautions)

    def drop_caches(self) -> int:
        """Gives back what is kept in RAM for speed alone; returns the bytes."""
        return self.web.prompts.forget() + self.files.drop_unused() + self.copies.drop_unused()

    def _planned(self, model: torch.nn.Module | None) -> frozenset[Precaution]:
        return self.journal.precautions(about_model(model))

    def _memory_settings(self, modules: Mapping[str, ModuleType]) -> Hashable:
        memory, stream = self.api.memory, modules.get("backend.stream")
        return (
            getattr(memory, "current_inference_memory", None),
            getattr(memory, "PIN_SHARED_MEMORY", None),
            getattr(stream, "stream_activated", None),
            str(modules["modules.sd_models"].model_data.forge_loading_parameters),
        )
