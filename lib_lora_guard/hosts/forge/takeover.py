"""The takeover of Forge's LoRA patcher. `install()` once, `uninstall()` to give everything back."""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path
from typing import Any

from ...adapters.patch_tuples import OWN_KIND, calculate_own_kind
from ...errors import HostError
from ...memory import HostMemory, MemorySnapshot, Nvml, take_snapshot
from ...messages import say
from ...recorder.crash import last_crash
from ...recorder.crash_report import crash_report
from ...recorder.flight_recorder import FlightRecorder, Phase
from ...runtime.advice import Advice
from ...runtime.precautions import Cautions
from ...runtime.preflight import Preflight
from ...runtime.step_timer import StepTimer
from ..hooks import HookSet
from ..webui import schedules
from ..webui.conditioning import Conditioning
from ..webui.lora_files import LoraFiles
from ..webui.networks import LoraStack
from ..webui.unload import UnloadRequests
from . import saving
from .api import ForgeApi, check_networks, check_processing, probe
from .calibration import ForgeCalibration, around
from .handover import Placement
from .load_models import Loading
from .lora_loader import LoaderControl
from .memory import ForgeMemory
from .phases import Journal, decoding_plan, encoding_plan, reading_plan, text_encoder_plan
from .residency import Residency
from .sizes import module_size
from .vae import VaeRoom

log = logging.getLogger(__name__)


class ForgeTakeover:
    """The installed hooks and what they share. One per process; see `install`."""

    def __init__(self, api: ForgeApi) -> None:
        self.api = api
        self.control = LoaderControl(api)
        self.files = LoraFiles()
        self.files.unpatched_shapes = self.control.unpatched_shapes
        self._host_memory = HostMemory()
        residency = Residency(self.control.merged_layers)
        self.placement = Placement(api, residency.away_bytes)
        self.journal = _journal or Journal(self.snapshot)
        self.steps = StepTimer(api.memory, lambda: self.journal)
        self.calibration = ForgeCalibration(api.memory)
        self.memory = ForgeMemory(api.memory, residency, self.calibration)
        self.cautions = Cautions(lambda model: self.journal.precautions(model))
        self.advice = Advice(api.memory, self.control.reports)
        self.preflight = Preflight(self.snapshot, self.drop_caches, self.memory.tell, self.cautions)
        self.preflight.advise = self.advice.for_files
        self.memory.take_back = self.placement.take_back
        self.memory.ram_room_bytes = self.preflight.room_bytes
        self.memory.leaving = self.preflight.leaving
        self.control.precautions = lambda model: self.journal.precautions(model)
        self.control.watch = lambda phase, ram_bytes: self.journal.work(phase, ram_bytes)
        self.loading = Loading(
            api,
            self.control,
            self.files,
            self.memory,
            self.placement,
            self.preflight,
            self.calibration,
            lambda: self.journal,
        )
        self.conditioning: Conditioning | None = None
        self.schedules = schedules.Schedules(self.control)
        self.hooks = HookSet()

    def install(self) -> None:
        """Replaces the host's functions: all, or none where one fails."""
        api = self.api
        with self.hooks as hooks:
            hooks.add(api.lora.LoraLoader, "refresh", around(self.calibration.refresh, self.loading.refresh))
            hooks.add(api.operations, "merge_lora_to_weight", self.control.merge_lora_to_weight)
            hooks.add(api.base.ModelPatcher, "has_online_lora", self.loading.has_online_lora)
            hooks.add(
                api.memory.LoadedModel, "model_load", around(self.calibration.model_load, self.loading.model_load)
            )
            hooks.add(api.memory.LoadedModel, "model_unload", self.loading.model_unload)
            hooks.add(api.memory, "unload_model_clones", self.loading.unload_model_clones)
            hooks.add(
                api.memory, "load_models_gpu", around(self.calibration.load_models_gpu, self.loading.load_models_gpu)
            )
            hooks.add(api.memory, "module_size", module_size)
            hooks.add(api.memory, "free_memory", self.memory.free_memory)
            hooks.add(api.memory, "get_free_memory", self.memory.free.get_free_memory)
            if hasattr(api.memory, "compute_model_gpu_memory_when_using_cpu_swap"):
                hooks.add(api.memory, "compute_model_gpu_memory_when_using_cpu_swap", self.memory.weights_on_card)
            if hasattr(api.base.ModelPatcher, "memory_required"):
                hooks.add(api.base.ModelPatcher, "memory_required", self.calibration.estimates.patcher_memory_required)
            # Stays when the guard goes: patches of this kind may still lie on a patcher then.
            api.lora.extra_weight_calculators.setdefault(OWN_KIND, calculate_own_kind)
            for name in ("model_lora_keys_unet", "model_lora_keys_clip"):
                hooks.add(api.lora, name, _with_fresh_key_map)

    def install_file_reader(self, networks: Any) -> None:
        """Takes over how Forge's LoRA extension reads files. Its module is loaded long after preload.py has run."""
        if _is_hooked(networks.load_lora_for_models):
            return
        stack = LoraStack(networks, self.files, self.control.require_all_refreshes)
        with_reader = HookSet()
        with with_reader:
            with_reader.add(networks, "load_lora_state_dict", self.files.load_state)
            with_reader.add(networks, "load_lora_for_models", self.files.load_for_models)
            with_reader.add(networks, "load_networks", stack.load_networks)
        self.hooks.hooks += with_reader.hooks

    def install_conditioning(self, processing: Any, shared: Any) -> None:
        """Lets Forge encode a prompt anew only where something that the text encoder sees has changed."""
        owner = processing.StableDiffusionProcessing
        if _is_hooked(owner.get_conds_with_caching):
            return
        self.conditioning = Conditioning(
            shared,
            lambda: (self.control.mode(), self.control.as_trained),
            self.control.has_applied,
            lambda: self.journal.phase(Phase.ENCODE_PROMPT),
        )
        with_conditioning = HookSet()
        with with_conditioning:
            with_conditioning.add(owner, "cached_params", self.conditioning.cached_params)
            with_conditioning.add(owner, "get_conds_with_caching", self.conditioning.get_conds_with_caching)
        self.hooks.hooks += with_conditioning.hooks

    def install_estimates(self, k_model: Any) -> None:
        """Takes over what a model says it needs for a step, and notes and times each step."""
        if not _is_hooked(k_model.KModel.memory_required):
            with HookSet() as hooks:
                hooks.add(k_model.KModel, "memory_required", self.calibration.estimates.memory_required)
                if hasattr(k_model.KModel, "apply_model"):
                    hooks.add(k_model.KModel, "apply_model", self.steps.apply_model)
            self.hooks.hooks += hooks.hooks

    def install_vae_phases(self, vae: Any) -> None:
        """Looks at the memory before a picture is decoded or encoded, where most images die, and notes it."""
        if not _is_hooked(vae.VAE.decode_inner):
            memory = self.api.memory
            with HookSet() as hooks:
                VaeRoom(memory, self.preflight, self.cautions).stand_in(hooks, vae.VAE)
                self.journal.lay_around(
                    hooks, vae.VAE, "decode_inner", Phase.VAE_DECODE, functools.partial(decoding_plan, memory)
                )
                self.journal.lay_around(
                    hooks, vae.VAE, "encode_inner", Phase.VAE_ENCODE, functools.partial(encoding_plan, memory)
                )
            self.hooks.hooks += hooks.hooks

    def install_reading(self, sd_models: Any) -> None:
        """Looks at RAM before a checkpoint is read."""
        if not _is_hooked(sd_models.forge_loader):
            with HookSet() as hooks:
                hooks.add(sd_models, "forge_loader", self.preflight.before_reading)
                self.journal.lay_around(hooks, sd_models, "forge_loader", Phase.LOAD_CHECKPOINT, reading_plan)
                loader = sys.modules.get("backend.loader")
                if hasattr(loader, "load_huggingface_component"):
                    self.journal.lay_around(
                        hooks, loader, "load_huggingface_component", Phase.LOAD_TEXT_ENCODER, text_encoder_plan
                    )
            self.hooks.hooks += hooks.hooks

    def snapshot(self, nvml: Nvml | None = None) -> MemorySnapshot:
        """The memory of the host's device and of this machine now. `nvml`: ask the driver's library too."""
        return take_snapshot(self.api.memory.get_torch_device(), nvml, self._host_memory)

    def drop_caches(self) -> int:
        """Gives back what is kept in RAM for speed alone; returns the bytes."""
        prompts = 0 if self.conditioning is None else self.conditioning.forget()
        return prompts + self.files.drop_unused()

    def install_unload_requests(self, processing: Any, sd_models: Any) -> None:
        """Takes over when Forge unloads all models before an image."""
        if _is_hooked(processing.manage_model_and_prompt_cache):
            return

        def settings() -> object:
            memory, stream = self.api.memory, sys.modules.get("backend.stream")
            return (
                getattr(memory, "current_inference_memory", None),
                getattr(memory, "PIN_SHARED_MEMORY", None),
                getattr(stream, "stream_activated", None),
                str(sd_models.model_data.forge_loading_parameters),
            )

        requests = UnloadRequests(processing, settings, self.memory.tell)
        with HookSet() as hooks:
            hooks.add(processing, "manage_model_and_prompt_cache", requests.before_image)
            self.advice.lay_around(hooks, processing)
        self.hooks.hooks += hooks.hooks

    def uninstall(self) -> None:
        """Gives everything back; LoRAs on loaded models are applied again by the host's own refresh."""
        self.schedules.forget()
        refresh = next(h for h in self.hooks.hooks if h.name == "refresh").original
        self.hooks.restore()
        self.placement.forget_all()
        live = [loaded.model for loaded in self.api.memory.current_loaded_models]
        self.control.release_all(refresh, {id(p.lora_loader): p for p in live if hasattr(p, "lora_loader")})


def _with_fresh_key_map(original: Any, model: Any, key_map: Any = None) -> Any:
    # The host's default is one dict for all calls: keys of earlier checkpoints would match this LoRA too.
    return original(model, {} if key_map is None else key_map)


def _is_hooked(function: Any) -> bool:
    """True where one of our hooks is at work in the chain of wrappers. A module that was loaded again has none, and one that
    another extension has wrapped may keep a hook that only passes on."""
    while function is not None:
        if getattr(getattr(function, "lora_guard_hook", None), "active", False):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


_takeover: ForgeTakeover | None = None
_journal: Journal | None = None
"""Of the process, not of one takeover: switching the guard off and on is no clean end."""


def keep_journal(folder: Path) -> None:
    """Begins to write down what happens, in a file below `folder`; says how the last process died, if it did."""
    global _journal
    if _journal is not None:
        return
    crash = last_crash(folder)
    takeover = install()
    _journal = Journal(takeover.snapshot, FlightRecorder.open(folder), crash)
    takeover.journal = _journal
    _journal.close_at_the_end()
    if crash is not None:
        for line in crash_report(crash):
            say(log, logging.WARNING, "flight.line", line=line)


def install() -> ForgeTakeover:
    """Takes Forge's LoRA patcher over; a second call returns the first one's takeover.

    Raises HostError, with nothing replaced, where the host does not fit.
    """
    global _takeover
    if _takeover is None:
        takeover = ForgeTakeover(probe())
        takeover.install()
        _takeover = takeover
    return _takeover


def install_in_webui() -> list[HostError]:
    """Called when Forge runs the extension's scripts: what is loaded long after preload.py has run. Does nothing where the
    takeover is not installed. Returns what does not fit; the rest works without it."""
    if _takeover is None:
        return []
    misfits = []
    networks, processing = sys.modules.get("networks"), sys.modules.get("modules.processing")
    if networks is None:
        log.debug("Forge's LoRA extension is not loaded; LoRA files stay with whoever reads them")
    else:
        try:
            check_networks(networks)
            _takeover.install_file_reader(networks)
        except HostError as error:
            misfits.append(error)
        try:
            if "extra_networks_lora" in sys.modules:
                _takeover.schedules.install(_takeover.hooks, schedules.probe())
        except HostError as error:
            misfits.append(error)
    if processing is not None:
        try:
            check_processing(processing)
            _takeover.install_conditioning(processing, sys.modules["modules.shared"])
        except HostError as error:
            misfits.append(error)
    k_model, sd_models = sys.modules.get("backend.modules.k_model"), sys.modules.get("modules.sd_models")
    if k_model is not None and hasattr(getattr(k_model, "KModel", None), "memory_required"):
        _takeover.install_estimates(k_model)
    if sd_models is not None and hasattr(processing, "manage_model_and_prompt_cache"):
        _takeover.install_unload_requests(processing, sd_models)
    if sd_models is not None and hasattr(sd_models, "forge_loader"):
        _takeover.install_reading(sd_models)
    vae = sys.modules.get("backend.patcher.vae")
    if vae is not None and hasattr(getattr(vae, "VAE", None), "decode_inner"):
        _takeover.install_vae_phases(vae)
    saving.install(_takeover.hooks, _takeover.control.engines)
    _takeover.calibration.install_in_webui(_takeover.hooks)
    return misfits


def uninstall() -> None:
    """Undoes `install`; does nothing where nothing is installed."""
    global _takeover
    takeover, _takeover = _takeover, None
    if takeover is not None:
        takeover.uninstall()


def installed() -> ForgeTakeover | None:
    return _takeover
