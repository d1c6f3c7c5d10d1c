"""Keeps the factors of a host's LoRAs in RAM of the guard's own, and reads no patch value twice while a stack uses it.

The host's tensors are mapped from the LoRA file: a trainer that overwrites the file would change them, one that truncates it
would kill the process. Hosts keep several files mapped after they are taken off. So a copy does not live as long as the
tensor that it was made from, but as long as a stack uses it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, MutableMapping
from typing import TypeAlias

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..adapters import Adapter, ForeignAdapter
from ..adapters.base import own_copy
from ..adapters.patch_tuples import AdapterTuple, PatchValue, Read

Part: TypeAlias = str | float | tuple[int] | None
"""A name or a number of a patch value, or the id of a tensor's copy."""

Key: TypeAlias = tuple[Part, ...]

OWN_TENSORS: MutableMapping[torch.Tensor, bool] = WeakIdKeyDictionary()
"""Tensors that the guard has read itself: they lie in RAM, their values are checked, and nothing else writes to them."""


def own(tensors: Iterable[torch.Tensor]) -> None:
    """Marks tensors as the guard's own, so that they are never copied."""
    OWN_TENSORS.update(dict.fromkeys(tensors, True))


class FactorCopies:
    """One copy of each factor, for as long as something uses the copy."""

    def __init__(self) -> None:
        self._copies: MutableMapping[torch.Tensor, weakref.ref[torch.Tensor]] = WeakIdKeyDictionary()

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the copy of a tensor; the tensor itself if it is the guard's own.

        Raises:
            LoraMismatchError: The values are not finite.
        """
        copy = self.known(tensor)
        if copy is None:
            copy = own_copy(tensor)
            self._copies[tensor] = weakref.ref(copy)
        return copy

    def known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Returns the copy if there is one. Copies nothing."""
        if tensor in OWN_TENSORS:
            return tensor
        copy = self._copies.get(tensor)
        return None if copy is None else copy()


class OwnAdapters:
    """The adapters of patch values, with factors that are the guard's own.

    The same value gives the same adapter object for as long as a stack uses it. Two values are the same if they have the same
    tensors and numbers.
    """

    def __init__(self) -> None:
        self.copies = FactorCopies()
        self._adapters: weakref.WeakValueDictionary[Key, Adapter] = weakref.WeakValueDictionary()

    def of(self, value: PatchValue, read: Read, as_trained: bool = False) -> Adapter:
        """Returns the adapter of a patch value.

        Args:
            value: Of the host, of another extension, or made by the guard from an adapter of its own.
            read: Reads a value that is not known yet.
            as_trained: DoRA in the meaning of its trainer.

        Raises:
            LoraMismatchError: The value has an unknown form, or its numbers are not finite.
        """
        made_from = value.adapter if isinstance(value, AdapterTuple) else None
        if made_from is not None and (not as_trained or made_from.with_dora_as_trained() is made_from):
            return made_from
        known = self.known(value, as_trained)
        if known is not None:
            return known
        adapter = (made_from or read(value)).map(self.copies)
        if as_trained:
            adapter = adapter.with_dora_as_trained()
        key = None if isinstance(adapter, ForeignAdapter) else self._key(value, as_trained)
        if key is not None:
            self._adapters[key] = adapter
        return adapter

    def known(self, value: PatchValue, as_trained: bool = False) -> Adapter | None:
        """Returns the adapter of a value that has been read and is still in use. Reads and copies nothing."""
        key = self._key(value, as_trained)
        return None if key is None else self._adapters.get(key)

    def _key(self, value: PatchValue, as_trained: bool) -> Key | None:
        """Names a value by its copies and numbers; None if it has others or cannot be compared in this way.

        An adapter holds the copies of all its tensors, so their ids stay their own for as long as its entry lives.
        """
        if not isinstance(value, tuple) or len(value) not in (1, 2):
            return None
        kind, content = ("diff", value) if len(value) == 1 else value
        if not isinstance(kind, str) or not isinstance(content, (tuple, list)):
            return None
        parts: list[Part] = [kind, as_trained]
        for part in content:
            if isinstance(part, torch.Tensor):
                copy = self.copies.known(part)
                if copy is None:
                    return None
                parts.append((id(copy),))
            elif part is None or isinstance(part, (int, float)):
                parts.append(part)
            else:
                return None
        return tuple(parts)
