"""Other strengths for the LoRAs of one of Neo's models, between two steps of an image."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping

import torch

from ...messages import say
from ...patching.strengths import set_strengths
from .patchers import loras_of
from .stacks import NeoStacks
from .types import Patcher

log = logging.getLogger(__name__)


class NeoStepStrengths:
    """Sets strengths in place, on models that the guard has patched. What Neo applies itself keeps the strengths of the start."""

    def __init__(self, stacks: NeoStacks) -> None:
        """
        Args:
            stacks: of all models.
        """
        self._stacks = stacks
        self._changed: weakref.WeakKeyDictionary[torch.nn.Module, Callable[[], Patcher | None]] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def are_changed(self) -> bool:
        """True if the LoRAs of a model may have other strengths than their patcher asks for."""
        return bool(self._changed)

    def loras(self, patcher: Patcher) -> list[tuple[str, float] | None]:
        """Returns the file and the strength of each LoRA in a patcher's stack."""
        return [(lora.filename, lora.strength) for lora in loras_of(patcher)]

    def set(self, patcher: Patcher, strengths: Mapping[int, float]) -> None:
        """Gives LoRAs of a patcher's stack other strengths.

        Args:
            patcher: its model is loaded.
            strengths: by place in the stack. The other LoRAs get the strengths that the patcher asks for.
        """
        stack = self._stacks.known(patcher.model)
        if stack is None or stack.left_to_host or not self._stacks.is_current(patcher):
            return
        wanted = {place: lora.asked_strength(strengths.get(place)) for place, lora in enumerate(loras_of(patcher))}
        if not strengths and patcher.model not in self._changed:
            return
        self._changed[patcher.model] = weakref.ref(patcher)
        try:
            with torch.inference_mode(False), torch.no_grad():
                set_strengths(stack.engine, wanted)
        except Exception:
            # The next load applies the whole stack.
            stack.applied = None
            say(log, logging.WARNING, "schedules.whole_refresh", exc_info=True)

    def restore(self) -> None:
        """Gives every LoRA the strength that its patcher asks for."""
        for model, get in list(self._changed.items()):
            patcher, stack = get(), self._stacks.known(model)
            if patcher is not None:
                self.set(patcher, {})
            elif stack is not None:
                # The next load applies the whole stack.
                stack.applied = None
        self._changed.clear()
