"""What the host asks to be free and what it places agree, and nobody leaves the device who need not.

Forge plans with two numbers: it evicts for 1.3 times the weights and a model's own estimate, and places by the "GPU Weights"
slider alone. Both come from `Needs` here. Before the host loads a model, room is made by `planning.eviction`; what the host
asks for itself then is there already. Sources: Forge's `backend/memory_management.py` (`load_models_gpu`, `free_memory`).
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...memory import rules
from ...memory.out_of_memory import is_out_of_memory
from ...messages import Message, say
from ...planning import activations
from ...planning.eviction import Coming, Eviction, Resident, plan_eviction
from ...planning.host_memory import swap_budget_bytes
from ...planning.on_card import change_bytes, weights_on_card_bytes
from ...runtime.hooks import signature_of
from ...runtime.rule_log import RuleLog
from ...weights.storage import MB
from .calibration import ForgeCalibration
from .free_memory import ForgeFree
from .residency import Residency

log = logging.getLogger(__name__)

TEXT_ENCODER_PASSES = 2
"""The prompt and the negative one."""
VAE_PASSES = 1


@dataclass(frozen=True)
class Needs:
    """What has to be free beside the weights while models run, as predicted, and by how much measured peaks correct that.
    `free_bytes` is the sum that counts."""

    inference_bytes: int
    estimate_bytes: int
    """Of a step as it comes from `Estimates`, which corrects it itself."""
    hard_bytes: int
    estimate_correction_bytes: int = 0
    hard_correction_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        """Not below 0 in any part."""
        estimate = self.estimate_bytes + self.estimate_correction_bytes
        return max(self.inference_bytes, estimate) + max(0, self.hard_bytes + self.hard_correction_bytes)


class ForgeMemory:
    def __init__(
        self,
        memory: Any,
        residency: Residency,
        rule_log: RuleLog,
        calibration: ForgeCalibration | None = None,
        *,
        take_back: Callable[[Any], list[Any]] = lambda device: [],
        ram_room_bytes: Callable[[], int | None] = lambda: None,
        leaving: Callable[[Any, int], contextlib.AbstractContextManager[int]] | None = None,
    ) -> None:
        """
        Args:
            memory: Forge's `backend.memory_management`.
            residency: moves parts of models.
            rule_log: of the takeover.
            calibration: of the takeover.
            take_back: returns loaded models that the host has forgotten though they lie on a device.
            ram_room_bytes: returns how much may be moved into RAM; None where that is not known.
            leaving: wraps a whole model's move off the card; yields how much of it may go.
        """
        self._memory, self.residency = memory, residency
        self._calibration = calibration or ForgeCalibration(memory)
        self._free_signature = signature_of(memory.free_memory, _forges_free)
        budget = getattr(memory, "compute_model_gpu_memory_when_using_cpu_swap", _forges_budget)
        self._budget_signature = signature_of(budget, _forges_budget)
        self._planned = threading.local()
        """`.depth` above 0 on a thread for which room has been made already."""
        self._rule_log = rule_log
        self._shares: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
        """Bytes on the device after the last load."""
        self.free = ForgeFree(memory, rule_log)
        self.take_back, self.ram_room_bytes, self.leaving = take_back, ram_room_bytes, leaving or _all_of_it

    # -- what the host calls

    def free_memory(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of `free_memory`: as much as was asked for, out of as little as possible."""
        bound = self._free_signature.bind(*args, **kwargs)
        bound.apply_defaults()
        asked, device = bound.arguments["memory_required"], bound.arguments["device"]
        if getattr(self._planned, "depth", 0):
            return None
        if not self.plans_for(device):
            return original(*bound.args, **bound.kwargs)
        if bound.arguments.get("free_all"):
            return self._free_all(original, bound, device)
        wanted, finding = rules.request_bytes(float(asked), self._total_bytes(device))
        self._rule_log.tell(finding)
        if math.isinf(wanted):
            return self._free_all(original, bound, device)
        self.drop_abandoned()
        keep = [one.model for one in bound.arguments["keep_loaded"]]
        self.make_room(device, Coming(0, 0, None), int(wanted), keep)
        return None

    def weights_on_card(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
        """In place of `compute_model_gpu_memory_when_using_cpu_swap`: how much of a model that does not fit is placed."""
        by_host = int(original(*args, **kwargs))
        if getattr(self._planned, "places", 0) != 1 or not self._knows_swapping():
            # A load that the guard does not plan, or several models, each of which is placed into what the others left.
            return by_host
        bound = self._budget_signature.bind(*args, **kwargs)
        free, need = list(bound.arguments.values())[:2]
        if by_host != swap_budget_bytes(free, need):
            # Another extension's rule, or a fork's.
            return by_host
        return weights_on_card_bytes(free, need)

    # -- what the takeover of loading asks

    def plans_for(self, device: Any) -> bool:
        """False where the host moves models by a rule of its own: not CUDA, or told to keep nothing on the card."""
        state = getattr(getattr(self._memory, "vram_state", None), "name", "NORMAL_VRAM")
        always = bool(getattr(self._memory, "ALWAYS_VRAM_OFFLOAD", False))
        return getattr(device, "type", "") == "cuda" and state in ("LOW_VRAM", "NORMAL_VRAM") and not always

    def needs(self, patchers: Sequence[Any], device: Any, required: float, hard_bytes: float) -> Needs:
        """The numbers of one `load_models_gpu`, checked. A slider out of range is put right in the host itself."""
        total = self._total_bytes(device)
        shares = [share for share in map(_share_of_forges_estimate, patchers) if share is not None]
        estimate, finding = rules.request_bytes(float(required) * min(shares, default=1.0), total)
        self._rule_log.tell(finding)
        inference, finding = rules.inference_bytes(float(self._memory.minimum_inference_memory()), total)
        self._rule_log.tell(finding)
        if finding is not None and hasattr(self._memory, "current_inference_memory"):
            self._memory.current_inference_memory = inference
        hard, finding = rules.request_bytes(float(hard_bytes), total)
        self._rule_log.tell(finding)
        found = self._corrected(Needs(inference, int(min(estimate, total)), int(min(hard, total))), patchers, device)
        names = " + ".join(type(patcher.model).__name__ for patcher in patchers)
        estimate = found.estimate_bytes + found.estimate_correction_bytes
        self._rule_log.tell(rules.room_for_a_step(found.inference_bytes, estimate, names)[1])
        return found

    def prepare(self, patchers: Sequence[Any], device: Any, needs: Needs) -> None:
        """Makes room for `patchers`, of which some may be loaded already, and brings back what had to leave before."""
        outside = 0
        for patcher in patchers:
            loaded = self.loaded(patcher)
            if loaded is not None and loaded.model is patcher:
                # The host does not place again what it has placed: only what we took can come back.
                outside += self.residency.away_bytes(patcher.model)
            else:
                outside += int(self._memory.module_size(patcher.model, exclude_device=device))
        coming = Coming(outside, outside, _passes(patchers))
        plan = self.make_room(device, coming, needs.free_bytes, patchers)
        if plan.swapped_bytes and coming.passes is not None:
            names = " + ".join(type(patcher.model).__name__ for patcher in patchers)
            say(log, logging.INFO, "memory.swapped", model=names, size_mb=plan.swapped_bytes / MB, passes=coming.passes)
        for patcher in patchers:
            loaded = self.loaded(patcher)
            if loaded is not None:
                self._fit(loaded, device, needs.free_bytes, may_leave=loaded.model is patcher)

    def _fit(self, loaded: Any, device: Any, need_bytes: int, may_leave: bool) -> None:
        """More or less of what is placed: it was for a smaller picture or fewer LoRAs, and nobody else is left to make room; or
        it had to leave, and there is room again."""
        model = loaded.model.model
        on_card, outside = (
            int(self._memory.module_size(model, **side))
            for side in ({"include_device": device}, {"exclude_device": device})
        )
        room = int(self._memory.get_free_memory(device)) - need_bytes
        away = self.residency.away_bytes(model)
        change = change_bytes(on_card, outside, away, room) if self._knows_swapping() else room
        if change < 0 and may_leave:
            self._shrink(loaded, min(-change, self.residency.swappable_bytes(loaded)))
        else:
            self.residency.grow(loaded, change)

    @contextlib.contextmanager
    def planned(self, places: int = 1) -> Iterator[None]:
        """While the host loads what room has been made for. `places`: how many models it has to place."""
        depth, before = getattr(self._planned, "depth", 0), getattr(self._planned, "places", 0)
        self._planned.depth, self._planned.places = depth + 1, places
        try:
            yield
        finally:
            self._planned.depth, self._planned.places = depth, before

    def _knows_swapping(self) -> bool:
        """True where what swapping takes was measured, and free memory is believed. Copies on a stream of their own ("Async") pile
        up where the card is slower than the bus, and a driver that spills says no number of its own to torch."""
        stream = sys.modules.get("backend.stream")
        is_async = bool(getattr(stream, "should_use_stream", lambda: False)())
        return not is_async and self.free.is_believed

    def loaded(self, patcher: Any) -> Any:
        """What is loaded of the patcher's model, for it or for another patcher; None where that is nothing."""
        clones = [
            one for one in self._memory.current_loaded_models if one.model is patcher or patcher.is_clone(one.model)
        ]
        return clones[0] if len(clones) == 1 else None

    def make_room(self, device: Any, coming: Coming, need_bytes: int, staying: Sequence[Any]) -> Eviction:
        """Carries out `plan_eviction` with everything loaded on `device` but `staying` and its clones."""
        free = int(self._memory.get_free_memory(device))
        if coming.outside_bytes + need_bytes > free:
            self._memory.current_loaded_models.extend(self.take_back(device))
        # Who was used longest ago first, as in the host.
        leaving = [
            one
            for one in reversed(self._memory.current_loaded_models)
            if one.device == device and not any(p is one.model or p.is_clone(one.model) for p in staying)
        ]
        residents = [self._resident(one, device) for one in leaving]
        plan = plan_eviction(coming, need_bytes, free, residents)
        has_moved = False
        for one, resident, wanted in zip(leaving, residents, plan.leaving_bytes, strict=True):
            if wanted:
                has_moved |= self._send_away(one, resident, wanted)
        if has_moved:
            self._memory.soft_empty_cache()
        self.drop_abandoned()
        return plan

    def give_back_unused(self, device: Any, need_bytes: int) -> None:
        """After a load: what torch holds of the card without using it, where that is more than a step takes of it. Baking
        GGUF weights leaves gigabytes of old pieces; on Windows they push other programs, or the step itself, into RAM."""
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if unused > need_bytes:
            log.debug("%d bytes of the card are held and not used after a load", unused)
            self._memory.soft_empty_cache()

    def watch_share(self, patchers: Sequence[Any], device: Any) -> None:
        """Notes how much of each model is on the device after a load, and says where that shrinks for no reason."""
        for patcher in patchers:
            now = int(self._memory.module_size(patcher.model, include_device=device))
            before = self._shares.get(patcher.model)
            if before is not None:
                self._rule_log.tell(
                    rules.share_on_device(before, now, was_needed=False, model=type(patcher.model).__name__)
                )
            self._shares[patcher.model] = now

    def forget_share(self, model: torch.nn.Module | None) -> None:
        """There is a reason: somebody needed the room."""
        if model is not None:
            self._shares.pop(model, None)

    # -- inside

    def _corrected(self, needs: Needs, patchers: Sequence[Any], device: Any) -> Needs:
        """With what was measured of such loads and decodes, as far as the card goes."""
        coming = [patcher for patcher in patchers if self.loaded(patcher) is None]
        estimate = self._calibration.decode_bytes()
        hard = self._calibration.load_bytes(coming, device)
        if estimate or hard:
            room = max(0, self._total_bytes(device) - needs.free_bytes)
            estimate = min(estimate, room)
            hard = min(hard, max(0, room - max(0, estimate)))
            log.debug("corrected by %d and %d bytes: %s", estimate, hard, needs)
        return replace(needs, estimate_correction_bytes=estimate, hard_correction_bytes=hard)

    def _send_away(self, loaded: Any, resident: Resident, wanted_bytes: int) -> bool:
        if wanted_bytes < resident.on_device_bytes:
            return self._shrink(loaded, wanted_bytes)
        name = type(loaded.model.model).__name__
        with self.leaving(loaded.model.model, wanted_bytes) as may_leave:
            if may_leave < resident.on_device_bytes:
                return self._shrink(loaded, min(may_leave, resident.swappable_bytes))
            if not self._fits_in_ram(name, wanted_bytes):
                return False
            self.forget_share(loaded.model.model)
            try:
                # Layer by layer first: where RAM runs out on the way, the model can still run.
                self.residency.shrink(loaded, wanted_bytes)
                self._memory.current_loaded_models.remove(loaded)
                loaded.model_unload()
                say(log, logging.INFO, "memory.left", model=name, size_mb=resident.on_device_bytes / MB)
            except Exception as error:
                _tell_or_raise(error, name)
            return True

    def _free_all(self, original: Callable[..., Any], bound: inspect.BoundArguments, device: Any) -> Any:
        # What is no one's any more, as after another checkpoint was chosen, is freed where it lies instead of being moved.
        gc.collect()
        forgotten = self.take_back(device)
        self._memory.current_loaded_models.extend(forgotten)
        # Held meanwhile, or the host would forget them again.
        held = [one.model for one in forgotten]
        try:
            return original(*bound.args, **bound.kwargs)
        finally:
            del held

    def _shrink(self, loaded: Any, wanted_bytes: int) -> bool:
        """True where something may have left."""
        name = type(loaded.model.model).__name__
        if not self._fits_in_ram(name, wanted_bytes):
            return False
        self.forget_share(loaded.model.model)
        try:
            moved = self.residency.shrink(loaded, wanted_bytes)
        except Exception as error:
            _tell_or_raise(error, name)
            return True
        if moved:
            say(log, logging.INFO, "memory.shrunk", model=name, size_mb=moved / MB)
        return moved > 0

    def _fits_in_ram(self, name: str, size_bytes: int) -> bool:
        """False where it would be carried into a page file that has no room for it, and the process ended for that."""
        room = self.ram_room_bytes()
        if room is None or size_bytes <= room:
            return True
        error = Message("memory.ram_room", {"room_mb": room / MB, "size_mb": size_bytes / MB})
        say(log, logging.WARNING, "memory.not_moved", model=name, error=error)
        return False

    def _resident(self, loaded: Any, device: Any) -> Resident:
        on_device = int(self._memory.module_size(loaded.model.model, include_device=device))
        swappable = min(on_device, self.residency.swappable_bytes(loaded))
        return Resident(on_device, swappable, returns=hasattr(loaded.model.model, "diffusion_model"))

    def drop_abandoned(self) -> None:
        """What nobody holds any more goes from the host's list, as in its own `free_memory`: the count is that of the
        list's reference and of the question."""
        loaded = self._memory.current_loaded_models
        for place in range(len(loaded) - 1, -1, -1):
            if sys.getrefcount(loaded[place].model) <= 2:
                loaded.pop(place).model_unload(avoid_model_moving=True)

    def _total_bytes(self, device: Any) -> int:
        return int(torch.cuda.get_device_properties(device).total_memory)


def _forges_free(memory_required: float, device: Any, keep_loaded: Any = (), free_all: bool = False) -> None:
    """Forge's parameters, where another extension's wrapper hides them."""


def _forges_budget(current_free_mem: float, inference_memory: float) -> None:
    """As above."""


def _all_of_it(model: Any, size_bytes: int) -> contextlib.AbstractContextManager[int]:
    return contextlib.nullcontext(size_bytes)


def _passes(patchers: Sequence[Any]) -> int | None:
    """How often the models run before others want the room; None where that is often, or not known."""
    if len(patchers) != 1:
        return None
    model = patchers[0].model
    if _is_a(model, "backend.patcher.clip", "JointTextEncoder"):
        return TEXT_ENCODER_PASSES
    return VAE_PASSES if _is_a(model, "backend.nn.vae", "IntegratedAutoencoderKL") else None


def _share_of_forges_estimate(patcher: Any) -> float | None:
    """Of what Forge asks for a VAE, how much its decoder was seen to take and hold."""
    if not _is_a(patcher.model, "backend.nn.vae", "IntegratedAutoencoderKL"):
        return None
    return activations.VAE_HOLDS_WHERE_FORGE_HAS


def _tell_or_raise(error: Exception, name: str) -> None:
    """A model that cannot leave for lack of RAM stays; every other error goes on."""
    if not is_out_of_memory(error):
        raise error
    # Python's own MemoryError has no text.
    why = (str(error) or type(error).__name__).splitlines()[0]
    say(log, logging.WARNING, "memory.not_moved", model=name, error=why)


def _is_a(model: object, module: str, name: str) -> bool:
    return any(kind.__module__ == module and kind.__name__ == name for kind in type(model).__mro__)
