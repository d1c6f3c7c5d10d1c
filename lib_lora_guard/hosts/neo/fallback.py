"""Neo's own two ways of applying LoRAs, after the guard's has failed: in each forward pass, or merged.

The patches are values of Neo's own kind, whose change the guard calculates: so Neo knows every kind of LoRA.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from ...adapters import Term
from ...adapters.patch_tuples import PatchValue
from ...memory.snapshot import available_ram_bytes
from ...messages import Message
from ...patching.access import ModelAccess, Site
from ...patching.lora_request import LoraRequest
from ...planning.limits import RAM_FLOOR_BYTES
from .api import NeoApi
from .types import HostPatch, Patcher, WeightChange

EntryT = TypeVar("EntryT")

GIVEN = "lora_guard_term"
"""The attribute of a patch value that the guard has given to Neo."""


class OnTheFly:
    """A patch as a function of the weight, for patchers that keep LoRAs on the fly as functions."""

    def __init__(self, merge: Callable[..., torch.Tensor], key: str, patch: HostPatch) -> None:
        """
        Args:
            merge: Neo's `merge_lora_to_weight`.
            key: of the weight.
            patch: what the function adds.
        """
        self.patch, self._merge, self._key = patch, merge, key

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight with the patch in it, as Neo's own functions do."""
        return self._merge([self.patch], weight, self._key, computation_dtype=weight.dtype)


class HostPatches:
    """Gives LoRAs to Neo, and takes them back."""

    def __init__(self, api: NeoApi) -> None:
        """
        Args:
            api: Neo.
        """
        self._value_class, self._merge = _value_class(api.adapter_class), api.lora.merge_lora_to_weight
        self._online_as_functions = api.online_as_functions

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
                self._add(patcher, key, self._patch(term, online=not sites[key].storage.wide))
        patcher.patches_uuid = uuid.uuid4()
        return Message("neo.both_ways" if online and merged else "neo.on_the_fly" if online else "host.merge_path")

    def take_back(self, patcher: Patcher) -> bool:
        """Takes what the guard has given off a patcher; the next load then undoes it on the model. False if there was none."""
        given = [_take_out(patcher.patches, _is_given), _take_out(patcher.weight_wrapper_patches, _is_given_function)]
        if any(given):
            patcher.patches_uuid = uuid.uuid4()
        return any(given)

    def _add(self, patcher: Patcher, key: str, patch: HostPatch) -> None:
        # Lists of their own: clones share those of functions, and another list may be in the middle of a merge.
        if patch[-1] and self._online_as_functions:
            functions = patcher.weight_wrapper_patches.get(key, [])
            patcher.weight_wrapper_patches[key] = [*functions, OnTheFly(self._merge, key, patch)]
        else:
            patcher.patches[key] = [*patcher.patches.get(key, []), patch]

    def _patch(self, term: Term, online: bool) -> HostPatch:
        part = term.part
        offset = None if part is None else (part.dim, part.start, part.length)
        return term.strength, self._value_class(term), term.strength_model, offset, None, online


def _is_given(patch: HostPatch) -> bool:
    return hasattr(patch[1], GIVEN)


def _is_given_function(function: WeightChange) -> bool:
    return isinstance(function, OnTheFly)


def _take_out(entries: dict[str, list[EntryT]], is_given: Callable[[EntryT], bool]) -> bool:
    """Leaves in each list what is not given, and no empty list; returns True if there was something."""
    found = {key: on_key for key, on_key in entries.items() if any(map(is_given, on_key))}
    for key, on_key in found.items():
        entries[key] = [one for one in on_key if not is_given(one)]
        if not entries[key]:
            del entries[key]
    return bool(found)


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
