"""Adds LoRAs to patchers that keep them as Forge's patch tuples.

Source: Forge's `backend/patcher/base.py` (`ModelPatcher.add_patches`, `lora_patches`).
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ...adapters import Term
from ...adapters.patch_tuples import PatchValue, Wait, value_of
from ...messages import Message
from ...models.fit import Fit
from ...runtime.host import Entries, FittedLora, PatcherObject

if TYPE_CHECKING:
    from .types import Patched


class TuplePatchers:
    """The patchers of a host that keeps the stack in `lora_patches`."""

    counts_once = True

    def __init__(self) -> None:
        self._written: weakref.WeakKeyDictionary[Fit, dict[Hashable, PatchValue]] = weakref.WeakKeyDictionary()
        """The patches of what fits a model of a file, for as long as that is known: nothing in them depends on a strength."""

    def has_loras(self, patcher: PatcherObject) -> bool:
        """Returns True if a patcher has LoRAs already."""
        return bool(getattr(patcher, "lora_patches", None))

    def with_lora(self, patcher: PatcherObject, lora: FittedLora) -> PatcherObject:
        """Returns a clone of a patcher that has one LoRA more."""
        clone = patcher.clone()
        clone.add_patches(
            filename=lora.filename,
            patches=self._patches(lora),
            strength_patch=lora.strength,
            online_mode=lora.is_online,
        )
        return clone

    def _patches(self, lora: FittedLora) -> dict[Hashable, PatchValue]:
        # Other extensions may read the tuples, and wait then.
        wait = None if lora.file is None else lora.file.waiting()
        if lora.fit is None:
            return _patches(lora.terms, wait)
        written = self._written.get(lora.fit)
        if written is None:
            written = self._written[lora.fit] = _patches(lora.terms, wait)
        # The values are tuples, but the dictionary is another extension's to change.
        return dict(written)

    def entries(self, patcher: Patched) -> Iterable[tuple[str, Entries]]:
        """Returns the patches that a patcher asks for, by the name of each LoRA."""
        return [(str(identifier), on_keys) for identifier, on_keys in patcher.lora_patches.items()]

    def not_patchable(self, patcher: PatcherObject) -> Message | None:
        """Returns None: the guard can patch every model of the host."""
        return None


def _patches(terms: Mapping[str, Sequence[Term]], wait: Wait | None) -> dict[Hashable, PatchValue]:
    patches: dict[Hashable, PatchValue] = {}
    for key, on_key in terms.items():
        for term in on_key:
            part = term.part
            address = key if part is None else (key, (part.dim, part.start, part.length))
            patches[address] = value_of(term.adapter, wait)
    return patches
