"""Reads Forge's `lora_patches` as requests for the engine."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence

from ...adapters import Adapter, Term
from ...adapters.patch_tuples import AdapterTuple, PatchValue, parse_value, term_of
from ...errors import LoraMismatchError, Message, about, named, reason
from ...memory.out_of_memory import is_out_of_memory
from ...messages import without
from ...patching.lora_request import LoraRequest
from ...runtime.factor_copies import OwnAdapters
from .identifiers import describe
from .types import Identifier, LoraModule, PatchEntry, Patches

log = logging.getLogger(__name__)


class PatchReader:
    """Reads each patch value once for as long as a stack uses it, and those of files that the guard has read never."""

    def __init__(self, lora: LoraModule) -> None:
        """
        Args:
            lora: Forge's `backend.patcher.lora`, which knows the kinds that other extensions have registered.
        """
        self._lora = lora
        self.adapters = OwnAdapters()
        self._counted: dict[int, tuple[PatchValue, Adapter]] = {}
        """Values by id, with what `device_elements` has read of them: for the refresh that follows it."""

    def requests(self, lora_patches: Patches, as_trained: bool = False) -> list[LoraRequest]:
        """Makes one request per LoRA, in the host's order, and waits for the values of files that are still being read.

        A LoRA that cannot be read is returned as refused.

        Args:
            lora_patches: The stack.
            as_trained: DoRA in the meaning of its trainer.

        Raises:
            Exception: Memory has ended.
        """
        try:
            return [
                self._request(origin, identifier, patches, as_trained)
                for origin, (identifier, patches) in enumerate(lora_patches.items())
            ]
        finally:
            self._counted.clear()

    def device_elements(self, lora_patches: Patches, merges_whole_tensors: bool) -> int:
        """Counts the numbers that the factors of a stack will take on a device.

        Merged ones take none. Values that cannot be read take none either.
        """
        total = 0
        for patches in lora_patches.values():
            for entries in patches.values():
                for entry in entries:
                    with contextlib.suppress(Exception):
                        adapter = self._count(entry[1])
                        if not (merges_whole_tensors and adapter.is_whole_tensor):
                            total += adapter.elements
        return total

    def _count(self, value: PatchValue) -> Adapter:
        if isinstance(value, AdapterTuple):
            return value.adapter
        known = self.adapters.known(value) or self.adapters.known(value, as_trained=True)
        if known is not None:
            return known
        adapter = self._read(value)
        self._counted[id(value)] = (value, adapter)
        return adapter

    def _read(self, value: PatchValue) -> Adapter:
        counted = self._counted.get(id(value))
        return parse_value(value, self._lora.extra_weight_calculators) if counted is None else counted[1]

    def _request(
        self, origin: int, identifier: Identifier, patches: Mapping[str, Sequence[PatchEntry]], as_trained: bool
    ) -> LoraRequest:
        label, strength = describe(identifier)
        terms: dict[str, list[Term]] = {}
        key = ""

        def adapter_of(value: PatchValue) -> Adapter:
            return self.adapters.of(value, self._read, as_trained)

        try:
            for key, entries in patches.items():
                terms[key] = [term_of(entry, adapter_of, origin) for entry in entries]
        except LoraMismatchError as error:
            return LoraRequest(label, strength, refused=about(key, reason(error)))
        except Exception as error:
            if is_out_of_memory(error):
                # Nothing is wrong with the file, and the next attempt may find room for it.
                raise
            # Whatever is wrong with one file, the others are applied.
            log.debug("%s: %s", label, key, exc_info=True)
            unreadable = Message("lora.unreadable_key", {"key": key, "error": named(error)})
            return LoraRequest(label, strength, refused=unreadable)
        why = _failure(patches)
        return LoraRequest(label, strength, terms, refused=None if why is None else without(label, why))


def are_there(lora_patches: Patches) -> bool:
    """Returns False if the values of a file never came: it may be there when it is read again. Waits for those that come."""
    return all(_failure(patches) is None for patches in lora_patches.values())


def without_failed(lora_patches: Patches) -> tuple[Patches, dict[str, str]]:
    """Returns a stack without the LoRAs whose values never came, and the reasons by their names."""
    why = {identifier: _failure(patches) for identifier, patches in lora_patches.items()}
    there = {identifier: patches for identifier, patches in lora_patches.items() if why[identifier] is None}
    failed = {describe(identifier)[0]: one for identifier, one in why.items() if one is not None}
    return there, {name: without(name, one) for name, one in failed.items()}


def _failure(patches: Mapping[str, Sequence[PatchEntry]]) -> str | None:
    """Waits for the values of a LoRA; returns why they do not come, else None."""
    # Entries that are none have nothing to wait for; whoever reads them says what is wrong.
    values = [entry[1] for entries in patches.values() for entry in entries if len(entry) > 1]
    for wait in {value.wait for value in values if isinstance(value, AdapterTuple) and value.wait is not None}:
        try:
            wait()
        except Exception as error:
            # Of the file, or of a thread that read it: the other LoRAs are of use all the same.
            log.debug("values never come", exc_info=True)
            why = named(error)
            # It is kept with the patches, and its traceback would keep all who called this: a whole image.
            for one in (error, error.__cause__):
                if one is not None:
                    one.__traceback__ = None
            return why
    return None
