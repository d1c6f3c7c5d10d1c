"""Stands in place of Forge's functions that make room for models and decide how much of a large one is placed.

Forge plans with two numbers: it evicts for 1.3 times the weights and a model's own estimate, and places by the "GPU Weights"
slider alone. Both come from `runtime.needs` here. Room is made before Forge loads a model; what Forge asks for itself then is
there already. Source: Forge's `backend/memory_management.py` (`free_memory`, `compute_model_gpu_memory_when_using_cpu_swap`).
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import math
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from ...memory import rules
from ...planning.eviction import Coming
from ...planning.host_memory import swap_budget_bytes
from ...planning.on_card import one_of_several_bytes, weights_on_card_bytes
from ...runtime.hooks import P, R, signature_of
from ...runtime.room import Room
from ...runtime.rule_log import RuleLog
from .memory import ForgeMemory
from .types import LoadedModel


class _Planned(threading.local):
    """The load that a thread is in."""

    depth = 0
    """Above 0 if room has been made already."""
    places = 0
    """The number of models that Forge has to place in it."""
    surplus_bytes: Callable[[], int] | None = None
    """Of several models: returns what Forge keeps free beyond what the model needs that it is about to place."""
    swapping_bytes: int | None = None
    """To leave for swapped layers; None if the layers are not known."""
    stays_out = False
    """True if the model runs from RAM although there is some room."""


class ForgeEviction:
    """Makes room by the guard's numbers. Two of its methods stand in place of functions of Forge."""

    def __init__(self, memory: ForgeMemory, room: Room, rule_log: RuleLog) -> None:
        """
        Args:
            memory: Forge's, before its functions are replaced.
            room: evicts.
            rule_log: gets what the rules change.
        """
        self._memory, self._room, self._rule_log = memory, room, rule_log
        self._free_signature = signature_of(memory.forges.free_memory, _forges_free)
        budget = getattr(memory.forges, "compute_model_gpu_memory_when_using_cpu_swap", _forges_budget)
        self._budget_signature = signature_of(budget, _forges_budget)
        self._planned = _Planned()

    def free_memory(self, original: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Stands in place of `free_memory`: frees as much as was requested, out of as little as possible."""
        bound = self._free_signature.bind(*args, **kwargs)
        bound.apply_defaults()
        requested, device = bound.arguments["memory_required"], bound.arguments["device"]
        if self._planned.depth:
            return None
        if not self._memory.plans_for(device):
            return original(*bound.args, **bound.kwargs)
        if bound.arguments.get("free_all"):
            return self._free_all(original, bound, device)
        wanted, finding = rules.request_bytes(float(requested), self._memory.total_bytes(device))
        self._rule_log.tell(finding)
        if math.isinf(wanted):
            return self._free_all(original, bound, device)
        self._memory.drop_abandoned()
        staying = [one.model for one in bound.arguments["keep_loaded"]]
        self._room.make_room(device, Coming(0, 0, None), int(wanted), staying)
        return None

    def weights_on_card(self, original: Callable[P, float], *args: P.args, **kwargs: P.kwargs) -> int:
        """Stands in place of `compute_model_gpu_memory_when_using_cpu_swap`: the bytes to place of a model that does not fit."""
        by_host, planned = int(original(*args, **kwargs)), self._planned
        surplus = planned.surplus_bytes if planned.places > 1 else None
        if (planned.places != 1 and surplus is None) or not self._memory.knows_swapping():
            # The guard does not plan this load, or several models each go into what the ones before have left.
            return by_host
        bound = self._budget_signature.bind(*args, **kwargs)
        free, need = list(bound.arguments.values())[:2]
        if by_host != swap_budget_bytes(free, need):
            # Another extension's rule, or a fork's.
            return by_host
        if surplus is not None and planned.swapping_bytes is not None:
            return one_of_several_bytes(free, need - surplus(), planned.swapping_bytes)
        return 0 if planned.stays_out else weights_on_card_bytes(free, need, planned.swapping_bytes)

    @contextlib.contextmanager
    def planned(
        self,
        places: int = 1,
        swapping_bytes: int | None = None,
        stays_out: bool = False,
        surplus_bytes: Callable[[], int] | None = None,
    ) -> Iterator[None]:
        """Wraps a load that room has been made for.

        Args:
            places: how many models Forge has to place in it.
            swapping_bytes: to leave for swapped layers.
            stays_out: let a model that does not fit run from RAM, whatever room there is.
            surplus_bytes: of several models, returns what Forge keeps free beyond what the next one needs; None: it places
                them by its own rule.
        """
        now = self._planned
        before = now.depth, now.places, now.swapping_bytes, now.stays_out, now.surplus_bytes
        now.depth, now.places, now.swapping_bytes = before[0] + 1, places, swapping_bytes
        now.stays_out, now.surplus_bytes = stays_out, surplus_bytes
        try:
            yield
        finally:
            now.depth, now.places, now.swapping_bytes, now.stays_out, now.surplus_bytes = before

    def _free_all(self, original: Callable[P, R], bound: inspect.BoundArguments, device: torch.device) -> R:
        # A model that nothing refers to any more, as after another checkpoint was chosen, is freed where it lies.
        gc.collect()
        self._room.note_unloaded()
        # Held meanwhile, or Forge would forget them again.
        held = self._memory.take_back(device)
        try:
            return original(*bound.args, **bound.kwargs)
        finally:
            del held


def _forges_free(
    memory_required: float, device: torch.device, keep_loaded: Sequence[LoadedModel] = (), free_all: bool = False
) -> None:
    """Has Forge's parameters, for when another extension's wrapper hides them."""


def _forges_budget(current_free_mem: float, inference_memory: float) -> None:
    """As above."""
