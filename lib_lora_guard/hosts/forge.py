"""The takeover of Forge's LoRA patcher. `install()` once, `uninstall()` to give everything back."""

from __future__ import annotations

import atexit
import contextlib
import inspect
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from ..adapters.patch_tuples import OWN_KIND, calculate_own_kind
from ..errors import HostError
from ..memory import HostMemory, MemorySnapshot, rules, take_snapshot
from ..reporting.crash import last_crash
from ..reporting.crash_report import crash_report
from ..reporting.flight_recorder import FlightRecorder, Phase
from ..reporting.messages import say
from ..weights.storage import WIDE_DTYPES
from . import forge_saving, forge_schedules
from .forge_conds import Conditioning
from .forge_files import LoraFiles
from .forge_journal import Journal
from .forge_loader import LoaderControl
from .forge_memory import ForgeMemory
from .forge_networks import LoraStack
from .forge_patches import device_elements
from .forge_placement import Placement
from .forge_preflight import Preflight
from .forge_probe import ForgeApi, check_networks, check_processing, probe
from .forge_residency import Residency
from .forge_unload import UnloadRequests
from .hooks import HookSet

log = logging.getLogger(__name__)


class ForgeTakeover:
    """The installed hooks and what they share. One per process; see `install`."""

    def __init__(self, api: ForgeApi) -> None:
        self.api = api
        self.control = LoaderControl(api)
        self.files = LoraFiles()
        self._host_memory = HostMemory()
        residency = Residency(self.control.merged_layers)
        self.placement = Placement(api, residency.away_bytes)
        self.journal = _journal or Journal(self.snapshot)
        self.memory = ForgeMemory(api.memory, residency)
        self.preflight = Preflight(self.snapshot, self.drop_caches, self.memory.tell)
        self.memory.take_back = self.placement.take_back
        self.memory.ram_room_bytes = self.preflight.room_bytes
        self.control.precautions = lambda model: self.journal.precautions(model)
        self.conditioning: Conditioning | None = None
        self.schedules = forge_schedules.Schedules(self.control)
        self.hooks = HookSet()
        self._load_models_signature = inspect.signature(api.memory.load_models_gpu)

    def install(self) -> None:
        """Replaces the host's functions: all, or none where one fails."""
        api = self.api
        with self.hooks as hooks:
            hooks.add(api.lora.LoraLoader, "refresh", self._refresh)
            hooks.add(api.operations, "merge_lora_to_weight", self.control.merge_lora_to_weight)
            hooks.add(api.base.ModelPatcher, "has_online_lora", self._has_online_lora)
            hooks.add(api.memory.LoadedModel, "model_load", self._model_load)
            hooks.add(api.memory.LoadedModel, "model_unload", self._model_unload)
            hooks.add(api.memory, "unload_model_clones", self._unload_model_clones)
            hooks.add(api.memory, "load_models_gpu", self._load_models_gpu)
            hooks.add(api.memory, "free_memory", self.memory.free_memory)
            hooks.add(api.memory, "get_free_memory", self.memory.get_free_memory)
            if hasattr(api.base.ModelPatcher, "memory_required"):
                hooks.add(api.base.ModelPatcher, "memory_required", self.memory.patcher_memory_required)
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
        """Takes over what a model says it needs for a step, and notes each step."""
        if not _is_hooked(k_model.KModel.memory_required):
            with HookSet() as hooks:
                hooks.add(k_model.KModel, "memory_required", self.memory.memory_required)
                if hasattr(k_model.KModel, "apply_model"):
                    self.journal.lay_around(hooks, k_model.KModel, "apply_model", Phase.SAMPLING_STEP)
            self.hooks.hooks += hooks.hooks

    def install_vae_phases(self, vae: Any) -> None:
        """Notes when a picture is decoded or encoded: where most images die."""
        if not _is_hooked(vae.VAE.decode_inner):
            with HookSet() as hooks:
                self.journal.lay_around(hooks, vae.VAE, "decode_inner", Phase.VAE_DECODE)
                self.journal.lay_around(hooks, vae.VAE, "encode_inner", Phase.VAE_ENCODE)
            self.hooks.hooks += hooks.hooks

    def install_reading(self, sd_models: Any) -> None:
        """Looks at RAM before a checkpoint is read."""
        if not _is_hooked(sd_models.forge_loader):
            with HookSet() as hooks:
                hooks.add(sd_models, "forge_loader", self.preflight.before_reading)
                self.journal.lay_around(hooks, sd_models, "forge_loader", Phase.LOAD_CHECKPOINT)
            self.hooks.hooks += hooks.hooks

    def snapshot(self) -> MemorySnapshot:
        """The memory of the host's device and of this machine now."""
        return take_snapshot(self.api.memory.get_torch_device(), host=self._host_memory)

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
        self.hooks.hooks += hooks.hooks

    def uninstall(self) -> None:
        """Gives everything back; LoRAs on loaded models are applied again by the host's own refresh."""
        self.schedules.forget()
        refresh = next(h for h in self.hooks.hooks if h.name == "refresh").original
        self.hooks.restore()
        self.placement.forget_all()
        live = [loaded.model for loaded in self.api.memory.current_loaded_models]
        self.control.release_all(refresh, {id(p.lora_loader): p for p in live if hasattr(p, "lora_loader")})

    def _refresh(self, original: Any, loader: Any, *args: Any, **kwargs: Any) -> Any:
        with self.journal.phase(Phase.APPLY_LORA):
            return self.control.refresh(original, loader, *args, **kwargs)

    def _has_online_lora(self, original: Any, patcher: Any) -> bool:
        # True makes Forge reserve and move the factors itself; the guard does both for the stacks it applies.
        return bool(patcher.lora_patches) and self.control.is_left_to_host(patcher)

    def _model_unload(self, original: Any, loaded: Any, *args: Any, **kwargs: Any) -> Any:
        stays = bool(args[0] if args else kwargs.get("avoid_model_moving", False))
        loader = getattr(loaded.model, "lora_loader", None)
        if stays and self.placement.give_up(loaded):
            return None
        self.memory.residency.forget(loaded)
        self.memory.forget_share(getattr(loaded, "real_model", None))
        if not stays:
            self.control.before_move(loader)
        try:
            if stays:
                return original(loaded, *args, **kwargs)
            with self.journal.phase(Phase.UNLOAD, loaded.model):
                return original(loaded, *args, **kwargs)
        finally:
            if not stays:
                self.control.drop_device_copies(loader)

    def _unload_model_clones(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        with self.placement.replacing():
            return original(*args, **kwargs)

    def _model_load(self, original: Any, loaded: Any, *args: Any, **kwargs: Any) -> Any:
        with self.control.loading(loaded.model):
            return original(loaded, *args, **kwargs)

    def _load_models_gpu(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        bound = self._load_models_signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        patchers = given["models"] = list(given["models"])
        device = patchers[0].load_device if patchers else None
        plans = all(p.load_device == device for p in patchers) and self.memory.plans_for(device)
        if plans:
            self.memory.drop_abandoned()
        already_loaded = [p for p in patchers if self._is_loaded(p)]
        others = [p for p in patchers if p not in already_loaded]
        factors = sum(self._factor_bytes(p) for p in others)
        given["hard_memory_preservation"] += factors
        if plans:
            self.memory.tell(rules.with_factors(0, factors)[1])
            needs = self.memory.needs(
                patchers, device, given.get("memory_required", 0), given["hard_memory_preservation"]
            )
            # One number for eviction and for placement.
            given["hard_memory_preservation"] = needs.free_bytes - needs.inference_bytes
            if "memory_required" in given:
                given["memory_required"] = 0
        needed = self.api.memory.minimum_inference_memory() + given["hard_memory_preservation"]
        handed_over = [p for p in others if self.placement.hand_over(p, needed, staying=patchers)]
        for patcher in handed_over:
            self.control.expect(patcher)
        # First the host makes room, then merges may take some.
        with self.journal.phase(Phase.MOVE_TO_GPU, patchers[0] if patchers else None):
            if plans:
                self.memory.prepare(patchers, device, needs)
            with self.memory.planned() if plans else contextlib.nullcontext():
                result = original(*bound.args, **bound.kwargs)
            if plans:
                self.memory.watch_share(patchers, device)
        # Forge refreshes a patcher when it is loaded and never again; what failed then is tried again here.
        for patcher in [*handed_over, *already_loaded]:
            if hasattr(patcher, "lora_loader"):
                self.control.remind(patcher)
        if any(hasattr(patcher.model, "diffusion_model") for patcher in already_loaded):
            self.files.remind()
        return result

    def _is_loaded(self, patcher: Any) -> bool:
        return any(loaded.model is patcher for loaded in self.api.memory.current_loaded_models)

    def _factor_bytes(self, patcher: Any) -> int:
        """Device bytes that the coming refresh of `patcher` will need and that are not there yet."""
        patches = getattr(patcher, "lora_patches", None)
        if not patches or patcher.load_device.type == "cpu" or self.control.is_left_to_host(patcher):
            return 0
        dtype = getattr(patcher.model, "computation_dtype", None)
        element_bytes = torch.empty(0, dtype=dtype if isinstance(dtype, torch.dtype) else torch.float16).element_size()
        merges = getattr(patcher.model, "storage_dtype", torch.float16) in WIDE_DTYPES
        elements = device_elements(patches, self.api.lora.extra_weight_calculators, merges)
        return max(0, elements * element_bytes - self.control.resident_bytes(patcher.lora_loader))


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
    atexit.register(_journal.recorder.close)
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
                _takeover.schedules.install(_takeover.hooks, forge_schedules.probe())
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
    forge_saving.install(_takeover.hooks, _takeover.control.engines)
    return misfits


def uninstall() -> None:
    """Undoes `install`; does nothing where nothing is installed."""
    global _takeover
    takeover, _takeover = _takeover, None
    if takeover is not None:
        takeover.uninstall()


def installed() -> ForgeTakeover | None:
    return _takeover
