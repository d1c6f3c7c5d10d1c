"""Neo's own two ways of applying LoRAs, after the guard's has failed: in each forward pass, or merged.

The patches are values of Neo's own kind, whose change the guard calculates: so Neo knows every kind of LoRA.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence

import torch

from ...adapters import Term
from ...adapters.patch_tuples import PatchValue
from ...memory.snapshot import available_ram_bytes
from ...messages import Message
from ...patching.access import ModelAccess, Site
from ...patching.engine import LoraRequest
from ...planning.limits import RAM_FLOOR_BYTES
from .api import NeoApi
from .types import HostPatch, Patcher

GIVEN = "lora_guard_term"
"""The attribute of a patch value that the guard has given to Neo."""


class HostPatches:
    """Gives LoRAs to Neo, and takes them back."""

    def __init__(self, api: NeoApi) -> None:
        """
        Args:
            api: Neo.
        """
        self._value_class = _value_class(api.adapter_class)

    def give(self, patcher: Patcher, access: ModelAccess, requests: Iterable[LoraRequest]) -> Message | None:
        """Adds a stack to a patcher's patches, so that the next load applies it: low-bit weights in each forward pass,
        others merged.

        Args:
            patcher: of the model.
            access: the model.
            requests: the stack.

        Returns:
            What was chosen; None if Neo's own ways cannot carry all of it, and then nothing is added.
        """
        terms = [(key, term) for request in requests for key, on_key in request.terms.items() for term in on_key]
        sites = {key: site for key, _ in terms if (site := access.site(key)) is not None}
        merged = [site for site in sites.values() if site.storage.wide]
        online = [site for site in sites.values() if not site.storage.wide]
        if not terms or not all(site.can_on_the_fly for site in online) or not _has_room(merged):
            return None
        for key, term in terms:
            if key in sites:
                patches = patcher.patches.get(key, [])
                # A list of its own: clones share none, but a clone's list may be in the middle of a merge.
                patcher.patches[key] = [*patches, self._patch(term, online=not sites[key].storage.wide)]
        patcher.patches_uuid = uuid.uuid4()
        return Message("neo.both_ways" if online and merged else "neo.on_the_fly" if online else "host.merge_path")

    def take_back(self, patcher: Patcher) -> bool:
        """Takes what the guard has given off a patcher; the next load then undoes it on the model. False if there was none."""
        patches = patcher.patches
        given = {key for key, on_key in patches.items() if any(_is_given(one) for one in on_key)}
        for key in given:
            patches[key] = [one for one in patches[key] if not _is_given(one)]
            if not patches[key]:
                del patches[key]
        if given:
            patcher.patches_uuid = uuid.uuid4()
        return bool(given)

    def _patch(self, term: Term, online: bool) -> HostPatch:
        part = term.part
        offset = None if part is None else (part.dim, part.start, part.length)
        return term.strength, self._value_class(term), term.strength_model, offset, None, online


def _is_given(patch: HostPatch) -> bool:
    return hasattr(patch[1], GIVEN)


def _has_room(merged: Sequence[Site]) -> bool:
    """True if RAM has room for the weights that Neo keeps of those it merges into."""
    return not merged or sum(site.storage.bytes for site in merged) + RAM_FLOOR_BYTES < available_ram_bytes()


def _value_class(adapter_class: type) -> Callable[[Term], PatchValue]:
    """Makes a class of values that Neo's own merge takes: it calls `calculate_weight` for them."""

    class GuardValue(adapter_class):  # type: ignore[misc]  # Neo's class is known when it runs
        name = "lora_guard"

        def __init__(self, term: Term) -> None:
            self.lora_guard_term = term
            self.loaded_keys: set[str] = set()
            # Neo counts what the factors of a stack take.
            self.weights = tuple(term.adapter.tensors())

        def calculate_weight(
            self, weight: torch.Tensor, key: str, strength: float, *_: PatchValue, **__: PatchValue
        ) -> torch.Tensor:
            return self.lora_guard_term.adapter.patch(weight, strength, self.lora_guard_term.function)

    return GuardValue
