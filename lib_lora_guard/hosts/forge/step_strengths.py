"""Other strengths for the LoRAs of one of Forge's models, between two steps of an image."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...messages import say
from ...patching.strengths import set_strengths
from .identifiers import parse, stack_name, with_strength
from .lora_loader_state import AppliedStack, state_of
from .patches import are_there
from .stacks import ForgeStacks
from .types import Identifier, LoraLoader, PatchEntry, Patcher, Patches

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Changed:
    """A stack that was put on a loader in place of the one that its patcher asks for.

    Attributes:
        start: Forge's name for the patcher's stack.
        identifiers: The stack that was put there.
        patcher: Returns the patcher as long as it lives.
    """

    start: str
    identifiers: Sequence[Identifier]
    patcher: Callable[[], Patcher | None]


class ForgeStepStrengths:
    """Sets strengths in place if the guard has applied the stack; else it applies the whole stack anew."""

    def __init__(self, stacks: ForgeStacks) -> None:
        """
        Args:
            stacks: Of all models.
        """
        self._stacks = stacks
        self._changed: weakref.WeakKeyDictionary[LoraLoader, Changed] = weakref.WeakKeyDictionary()

    @property
    def are_changed(self) -> bool:
        """True if the LoRAs of a model may have other strengths than their patcher asks for."""
        return bool(self._changed)

    def loras(self, patcher: Patcher) -> list[tuple[str, float] | None]:
        """Returns the file and the strength of each LoRA in a patcher's stack; None for keys of other extensions."""
        return [None if one is None else (one.filename, one.strength) for one in map(parse, patcher.lora_patches)]

    def set(self, patcher: Patcher, strengths: Mapping[int, float]) -> None:
        """Gives LoRAs of a patcher's stack other strengths.

        Args:
            patcher: Its model is loaded.
            strengths: By place in the stack. The other LoRAs get the strengths that the patcher asks for.
        """
        loader, start = patcher.lora_loader, list(patcher.lora_patches)
        applied = AppliedStack(loader)
        wanted = [with_strength(one, strengths[n]) if n in strengths else one for n, one in enumerate(start)]
        if applied.is_current(wanted):
            return
        changed = self._changed.get(loader)
        present: Sequence[Identifier] = start
        if changed is not None and changed.start == stack_name(start) and applied.is_current(changed.identifiers):
            present = changed.identifiers
        elif not applied.is_current(start):
            patcher.refresh_loras()
            if not applied.is_current(start) and not self._lacks_only_files(patcher):
                # The stack itself could not be applied; that has been said.
                return
        # Until all is done the recorded state is one that no stack has, as in a refresh.
        applied.invalidate()
        differing = {n: parse(new) for n, (new, old) in enumerate(zip(wanted, present, strict=True)) if new is not old}
        if not self._set_in_place(loader, {n: one.strength for n, one in differing.items() if one is not None}):
            patches = _patches_at(patcher.lora_patches, wanted)
            loader.refresh(patches, patcher.offload_device)
            if not applied.is_current(patches):
                return
        applied.record(wanted)
        self._changed[loader] = Changed(stack_name(start), wanted, weakref.ref(patcher))

    def restore(self) -> None:
        """Gives every LoRA the strength that its patcher asks for."""
        for loader, changed in list(self._changed.items()):
            patcher = changed.patcher()
            if patcher is not None and AppliedStack(loader).is_current(changed.identifiers):
                self.set(patcher, {})
                if not are_there(patcher.lora_patches):
                    AppliedStack(loader).invalidate()
        # Other models were refreshed in the meantime: the stack on them is not the one that was put there.
        self._changed.clear()

    def _lacks_only_files(self, patcher: Patcher) -> bool:
        """Returns True if the guard has applied all of a stack but the LoRAs whose values never came."""
        is_applied = self._stacks.is_reported(patcher) and self._stacks.report_for(patcher) is not None
        return is_applied and not are_there(patcher.lora_patches)

    def _set_in_place(self, loader: LoraLoader, strengths: Mapping[int, float]) -> bool:
        """Returns False if the guard has not applied the stack, or the change has failed."""
        state = state_of(loader)
        if state is None or self._stacks.was_left_to_host(loader):
            return False
        try:
            with torch.inference_mode(False), torch.no_grad():
                set_strengths(state.engine, strengths)
        except Exception:
            say(log, logging.WARNING, "schedules.whole_refresh", exc_info=True)
            return False
        return True


def _patches_at(lora_patches: Patches, identifiers: Sequence[Identifier]) -> Patches:
    """Returns the same patches under these identifiers. Two of one file that meet in one strength become one entry."""
    result: dict[Identifier, dict[str, list[PatchEntry]]] = {}
    for new, (old, patches) in zip(identifiers, lora_patches.items(), strict=True):
        entry = result.setdefault(new, {})
        fields = None if new is old else parse(new)
        for key, terms in patches.items():
            changed = terms if fields is None else [[fields.strength, *term[1:]] for term in terms]
            entry[key] = [*entry.get(key, []), *changed]
    return result
