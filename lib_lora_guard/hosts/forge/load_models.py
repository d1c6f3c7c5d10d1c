"""What happens when Forge loads and unloads models: room is made by the guard's numbers, a new stack of LoRAs re-places
nothing, and each of it is noted.

Source: Forge's `backend/memory_management.py` (`load_models_gpu`, `LoadedModel`) and `backend/patcher/base.py`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ...memory import rules
from ...recorder.flight_recorder import Phase
from ...runtime.hooks import signature_of
from ...runtime.journal import Journal
from ...runtime.last_plan import LastPlans
from ...runtime.preflight import Preflight
from ...runtime.rule_log import RuleLog
from ...weights.storage import WIDE_DTYPES
from ..webui.lora_files import LoraFiles
from .api import ForgeApi
from .calibration import ForgeCalibration
from .facts import about_patcher
from .handover import Placement
from .lora_loader import LoaderControl
from .memory import ForgeMemory
from .patches import device_elements
from .phases import leaving_plan, moving_plan


def _forges_load(models: Any, memory_required: float = 0, hard_memory_preservation: float = 0) -> None:
    """Forge's parameters, where another extension's wrapper hides them."""


class Loading:
    """Each method stands in place of the host's function of its name."""

    def __init__(
        self,
        api: ForgeApi,
        control: LoaderControl,
        files: LoraFiles,
        memory: ForgeMemory,
        placement: Placement,
        preflight: Preflight,
        calibration: ForgeCalibration,
        rule_log: RuleLog,
        journal: Journal,
    ) -> None:
        self._api, self._control, self._files, self._memory = api, control, files, memory
        self._placement, self._preflight, self._calibration, self._journal = placement, preflight, calibration, journal
        self._rule_log = rule_log
        self.plans = LastPlans(api.memory, control.resident_bytes)
        self._signature = signature_of(api.memory.load_models_gpu, _forges_load)

    def refresh(self, original: Any, loader: Any, *args: Any, **kwargs: Any) -> Any:
        with self._journal.phase(Phase.APPLY_LORA):
            return self._control.refresh(original, loader, *args, **kwargs)

    def has_online_lora(self, original: Any, patcher: Any) -> bool:
        # True makes Forge reserve and move the factors itself; the guard does both for the stacks it applies.
        return bool(patcher.lora_patches) and self._control.is_left_to_host(patcher)

    def model_unload(self, original: Any, loaded: Any, *args: Any, **kwargs: Any) -> Any:
        stays = bool(args[0] if args else kwargs.get("avoid_model_moving", False))
        loader = getattr(loaded.model, "lora_loader", None)
        if stays and self._placement.give_up(loaded):
            return None
        self._memory.residency.forget(loaded)
        self._memory.forget_share(getattr(loaded, "real_model", None))
        if not stays:
            self._control.before_move(loader)
        try:
            if stays:
                return original(loaded, *args, **kwargs)
            with self._journal.phase(Phase.UNLOAD, about_patcher(loaded.model), leaving_plan(self._api.memory, loaded)):
                return original(loaded, *args, **kwargs)
        finally:
            if not stays:
                self._control.drop_device_copies(loader)

    def unload_model_clones(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        with self._placement.replacing():
            return original(*args, **kwargs)

    def model_load(self, original: Any, loaded: Any, *args: Any, **kwargs: Any) -> Any:
        with self._control.loading(loaded.model):
            return original(loaded, *args, **kwargs)

    def load_models_gpu(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        patchers = given["models"] = list(given["models"])
        device = patchers[0].load_device if patchers else None
        plans = all(p.load_device == device for p in patchers) and self._memory.plans_for(device)
        if plans:
            self._memory.drop_abandoned()
        already_loaded = [p for p in patchers if self._is_loaded(p)]
        others = [p for p in patchers if p not in already_loaded]
        factors = sum(self._calibration.factor_bytes(p, self.factor_bytes(p)) for p in others)
        given["hard_memory_preservation"] += factors
        if plans:
            self._rule_log.tell(rules.with_factors(0, factors)[1])
            needs = self._memory.needs(
                patchers, device, given.get("memory_required", 0), given["hard_memory_preservation"]
            )
            # One number for eviction and for placement.
            given["hard_memory_preservation"] = needs.free_bytes - needs.inference_bytes
            if "memory_required" in given:
                given["memory_required"] = 0
        needed = self._api.memory.minimum_inference_memory() + given["hard_memory_preservation"]
        handed_over = [p for p in others if self._placement.hand_over(p, needed, staying=patchers)]
        for patcher in handed_over:
            self._control.expect(patcher)
        planned = moving_plan(self._api.memory, patchers, device, needs.free_bytes) if plans else None
        # First the host makes room, then merges may take some.
        with self._journal.phase(Phase.MOVE_TO_GPU, about_patcher(patchers[0]) if patchers else None, planned):
            if plans:
                self._memory.prepare(patchers, device, needs)
            places = len(others) - len(handed_over)
            with self._memory.planned(places) if plans else contextlib.nullcontext(), self._preflight.careful("moving"):
                result = original(*bound.args, **bound.kwargs)
            if plans:
                self._memory.watch_share(patchers, device)
                if places:
                    self._memory.give_back_unused(device, needs.free_bytes)
        # Forge refreshes a patcher when it is loaded and never again; what failed then is tried again here.
        for patcher in [*handed_over, *already_loaded]:
            if hasattr(patcher, "lora_loader"):
                self._control.remind(patcher)
        if any(hasattr(patcher.model, "diffusion_model") for patcher in already_loaded):
            self._files.remind()
        if plans:
            self.plans.note(patchers, device, needs, factors)
        return result

    def _is_loaded(self, patcher: Any) -> bool:
        return any(loaded.model is patcher for loaded in self._api.memory.current_loaded_models)

    def factor_bytes(self, patcher: Any) -> int:
        """Device bytes that the coming refresh of `patcher` will need and that are not there yet."""
        patches = getattr(patcher, "lora_patches", None)
        if not patches or patcher.load_device.type == "cpu" or self._control.is_left_to_host(patcher):
            return 0
        dtype = getattr(patcher.model, "computation_dtype", None)
        element_bytes = torch.empty(0, dtype=dtype if isinstance(dtype, torch.dtype) else torch.float16).element_size()
        merges = getattr(patcher.model, "storage_dtype", torch.float16) in WIDE_DTYPES
        elements = device_elements(patches, self._api.lora.extra_weight_calculators, merges)
        return max(0, elements * element_bytes - self._control.resident_bytes(patcher.lora_loader))
