"""Stands in place of Forge's functions that load and unload models: room is made by the guard's numbers, a new stack of LoRAs
moves nothing, and each load and unload is recorded.

Source: Forge's `backend/memory_management.py` (`load_models_gpu`, `unload_model_clones`, `LoadedModel`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Concatenate

import torch

from ...planning import activations
from ...recorder.flight_recorder import Phase
from ...runtime.hooks import P, R, signature_of
from ...runtime.journal import Journal
from ...runtime.last_plan import LastPlans
from ...runtime.needs import Needs, Reservations
from ...runtime.room import Room
from .eviction import ForgeEviction
from .facts import about_patcher, is_denoiser, is_forges_text_encoder, is_forges_vae, loaded_module
from .handover import Placement
from .lora_loading import LoraLoading
from .memory import ForgeMemory
from .phases import leaving_plan, moving_plan
from .residency import Residency
from .types import LoadedModel, Patcher


@dataclass(frozen=True)
class _Plan:
    """For a load that the guard makes room for."""

    device: torch.device
    needs: Needs


class Loading:
    """Each public method stands in place of Forge's function of its name."""

    def __init__(
        self,
        memory: ForgeMemory,
        reservations: Reservations,
        room: Room,
        eviction: ForgeEviction,
        placement: Placement,
        residency: Residency,
        loras: LoraLoading,
        journal: Journal,
    ) -> None:
        """
        Args:
            memory: Forge's, before its functions are replaced.
            reservations: says what has to be free.
            room: makes room.
            eviction: is told that room has been made.
            placement: hands models over.
            residency: keeps copies in RAM of layers.
            loras: of the models.
            journal: of the process.
        """
        self._memory, self._reservations, self._room, self._eviction = memory, reservations, room, eviction
        self._placement, self._residency, self._loras, self._journal = placement, residency, loras, journal
        self.plans = LastPlans(memory)
        self._signature = signature_of(memory.forges.load_models_gpu, _forges_load)

    def load_models_gpu(self, original: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Stands in place of `load_models_gpu(models, memory_required, hard_memory_preservation)`."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        patchers: list[Patcher] = list(given["models"])
        given["models"] = patchers
        device = self._planned_device(patchers)
        if device is not None:
            self._memory.drop_abandoned()
        already_loaded = [p for p in patchers if self._memory.is_loaded(p)]
        others = [p for p in patchers if p not in already_loaded]
        self._loras.drop_surplus(others)
        factors = sum(self._loras.coming_bytes(p) for p in others)
        given["hard_memory_preservation"] += factors
        plan = None if device is None else self._plan(patchers, device, bound, factors)
        needed = self._memory.inference_bytes() + given["hard_memory_preservation"]
        handed_over = [p for p in others if self._placement.hand_over(p, needed, patchers, plan is not None)]
        self._loras.handed_over(handed_over)
        placing = [p for p in others if p not in handed_over]
        denoisers = [p for p in patchers if is_denoiser(p.model)]
        # What was handed over Forge does not move, and `grow` keeps the pinned copies of what comes back. Text encoders have others.
        moving = [p.model for p in others if p in placing or is_forges_text_encoder(p.model)]
        keeping = self._residency.placing(moving if plan is not None else [])
        with self._loading(patchers, plan, placing) as later_bytes, keeping:
            given["hard_memory_preservation"] += later_bytes
            result = original(*bound.args, **bound.kwargs)
        self._loras.after_load(handed_over, already_loaded)
        if plan is not None:
            for patcher in denoisers:
                self._residency.pin(patcher.model)
        if plan is not None and denoisers:
            self.plans.note(denoisers[0].model, plan.device, plan.needs, self._loras.step_bytes(denoisers[0]))
        return result

    def model_unload(
        self,
        original: Callable[Concatenate[LoadedModel, bool, P], R],
        loaded: LoadedModel,
        avoid_model_moving: bool = False,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R | None:
        """Stands in place of `LoadedModel.model_unload`."""
        if avoid_model_moving and self._placement.give_up(loaded):
            return None
        self._room.forget_share(loaded_module(loaded))
        if avoid_model_moving:
            return original(loaded, avoid_model_moving, *args, **kwargs)
        model = loaded_module(loaded)
        with self._loras.moving_away(loaded.model):
            if model is not None:
                self._residency.to_ram(model)
            planned = leaving_plan(self._memory.forges, loaded)
            with self._journal.phase(Phase.UNLOAD, about_patcher(loaded.model), planned):
                return original(loaded, avoid_model_moving, *args, **kwargs)

    def unload_model_clones(self, original: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Stands in place of `unload_model_clones`: what Forge unloads in it is about to be placed again."""
        with self._placement.replacing():
            return original(*args, **kwargs)

    def _planned_device(self, patchers: Sequence[Patcher]) -> torch.device | None:
        """Returns the device of a load that the guard makes room for; None for any other load."""
        device = patchers[0].load_device if patchers else None
        is_one = all(patcher.load_device == device for patcher in patchers)
        return device if is_one and self._memory.plans_for(device) else None

    def _plan(
        self, patchers: Sequence[Patcher], device: torch.device, bound: inspect.BoundArguments, factor_bytes: int
    ) -> _Plan:
        """Replaces the numbers that Forge was called with by one number, for eviction and for placement."""
        given = bound.arguments
        estimate = _estimate_bytes(patchers, given.get("memory_required", 0))
        hard = given["hard_memory_preservation"]
        needs = self._reservations.needs(patchers, device, estimate, hard, factor_bytes)
        given["hard_memory_preservation"] = needs.free_bytes - needs.inference_bytes
        if "memory_required" in given:
            given["memory_required"] = 0
        return _Plan(device, needs)

    def _fixed_bytes_of_later(self, placing: Sequence[Patcher], plan: _Plan) -> int:
        """Returns what has to stay free while Forge places the first of several models that do not fit: it places one after the
        other, each in what those before have left, and of the later ones a part cannot be swapped."""
        if len(placing) < 2:
            return 0
        outside = sum(self._memory.size_bytes(p.model, outside=plan.device) for p in placing)
        if outside <= self._memory.free_bytes(plan.device) - plan.needs.free_bytes:
            return 0
        return self._fixed_bytes(placing[1:], plan)

    def _surplus_bytes(self, placing: Sequence[Patcher], plan: _Plan, later_bytes: int) -> int:
        """Returns the part of `later_bytes` that the model which Forge is about to place need not leave: it is its own, or of
        those before."""
        coming = [p for p in placing if not self._memory.is_loaded(p)]
        return later_bytes - self._fixed_bytes(coming[1:], plan)

    def _fixed_bytes(self, patchers: Sequence[Patcher], plan: _Plan) -> int:
        return sum(self._memory.fixed_bytes(p.model, plan.device) for p in patchers)

    @contextlib.contextmanager
    def _loading(self, patchers: Sequence[Patcher], plan: _Plan | None, placing: Sequence[Patcher]) -> Iterator[int]:
        """Wraps Forge's own loading, of which the models `placing` have to be placed. First Forge makes room, then merges may
        take some.

        Yields:
            What the first one has to leave free for the others.
        """
        about = about_patcher(patchers[0]) if patchers else None
        if plan is None:
            with self._journal.phase(Phase.MOVE_TO_GPU, about), self._room.moving():
                yield 0
            return
        planned = moving_plan(self._memory.forges, patchers, plan.device, plan.needs.free_bytes)
        with self._journal.phase(Phase.MOVE_TO_GPU, about, planned):
            self._room.prepare(patchers, plan.device, plan.needs)
            swapping = max(self._memory.swapping_bytes(patcher.model) for patcher in patchers)
            stays_out = self._room.stays_out(patchers, plan.device, plan.needs)
            later = self._fixed_bytes_of_later(placing, plan)
            surplus = functools.partial(self._surplus_bytes, placing, plan, later) if later else None
            with self._eviction.planned(len(placing), swapping, stays_out, surplus), self._room.moving():
                yield later
            self._room.watch_share(patchers, plan.device)
            if placing:
                self._room.give_back_unused(plan.device, plan.needs.free_bytes)


def _forges_load(models: Sequence[Patcher], memory_required: float = 0, hard_memory_preservation: float = 0) -> None:
    """Has Forge's parameters, for when another extension's wrapper hides them."""


def _estimate_bytes(patchers: Sequence[Patcher], memory_required: float) -> float:
    """Returns what a step takes of what Forge requests for it: a VAE's decoder was seen to take and hold a share of that."""
    has_vae = any(is_forges_vae(patcher.model) for patcher in patchers)
    return float(memory_required) * (activations.VAE_HOLDS_WHERE_FORGE_HAS if has_vae else 1.0)
