"""Remembers encoded prompts, so that a prompt of before is not encoded again."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from ..units import MB

log = logging.getLogger(__name__)

REMEMBERED_BYTES = 128 * MB
"""RAM for encoded prompts: some 30 of Flux (4 MB each), 200 of SDXL."""


Key: TypeAlias = tuple[Any, ...]
"""Holds lists and settings of the host, which cannot be hashed: keys are compared."""
Infotext: TypeAlias = Mapping[str, str] | None
Conds: TypeAlias = Any
"""Tensors in the host's own containers."""


def without_blanks(texts: Sequence[str]) -> list[str]:
    """Returns the texts without spaces and line ends. Texts for which this is the same differ in blanks alone.

    A prompt whose `<lora:...>` was taken out has a blank more than the prompt that never had one.
    """
    return ["".join(text.split()) for text in texts]


class Spelling(NamedTuple):
    """How the prompts of a conditioning were written."""

    blankless: Key
    """The conditioning's key, made of the prompts `without_blanks`."""
    texts: Sequence[str]
    """The prompts."""


class Model(Protocol):
    """The host's entry for a checkpoint, which outlives a model that is given up and read again; or the loaded model."""


class PromptCache:
    """The encoded prompts of every model that lives."""

    def __init__(self, limit_bytes: int = REMEMBERED_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._memories: weakref.WeakKeyDictionary[Model, PromptMemory] = weakref.WeakKeyDictionary()

    def of(self, model: Model) -> PromptMemory:
        """Returns the prompts of one model; those of others give way to it, those asked for longest ago first.

        Models are compared by identity and held weakly.
        """
        memory = self._memories.pop(model, None)
        if memory is None:
            memory = PromptMemory(self._limit_bytes)
        total_bytes = memory.bytes + sum(other.bytes for other in self._memories.values())
        for other in list(self._memories.values()):
            if total_bytes > self._limit_bytes:
                total_bytes -= other.bytes
                other.clear()
        self._memories[model] = memory
        return memory

    def forget(self) -> int:
        """Gives back everything; returns the bytes."""
        memories = list(self._memories.values())
        size = sum(memory.bytes for memory in memories)
        for memory in memories:
            memory.clear()
        return size


class PromptMemory:
    """The encoded prompts of one model, in RAM wherever they were made. Those used longest ago leave first."""

    def __init__(self, limit_bytes: int = REMEMBERED_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._known: list[tuple[Key, _Kept]] = []

    def find(self, key: Key) -> tuple[Conds, Infotext] | None:
        """Returns the conditioning and its infotext entries as they were made, on the same devices."""
        for place, (known, kept) in enumerate(self._known):
            if known == key:
                self._known.append(self._known.pop(place))
                return kept.restored(), copy.copy(kept.infotext)
        return None

    def find_respelled(
        self, spelling: Spelling, is_same: Callable[[Sequence[str]], bool]
    ) -> tuple[Conds, Infotext] | None:
        """Returns the conditioning of the same prompts with other blanks, as `find` does.

        Args:
            spelling: of the prompts that are asked for.
            is_same: returns True of earlier prompts that give the encoder the same tokens. Asked of those alone that differ
                in blanks and in nothing else.
        """
        for key, kept in reversed(self._known):
            if kept.spelling and kept.spelling.blankless == spelling.blankless and is_same(kept.spelling.texts):
                return self.find(key)
        return None

    def keep(self, key: Key, conds: Conds, infotext: Infotext, spelling: Spelling | None = None) -> None:
        """Keeps a conditioning, and forgets what no longer fits. One that is not built of known parts is not kept.

        Args:
            key: everything that decides the conditioning.
            conds: the conditioning.
            infotext: its entries.
            spelling: of its prompts; None: it is found by `key` alone.
        """
        try:
            kept = _Kept(conds, infotext, spelling)
        except _UnknownPartError as error:
            log.debug("conditioning is not remembered: %s", error)
            return
        self._known = [(known, one) for known, one in self._known if known != key]
        if kept.bytes > self._limit_bytes:
            return
        self._known.append((key, kept))
        while sum(one.bytes for _, one in self._known) > self._limit_bytes:
            self._known.pop(0)

    def clear(self) -> None:
        """Forgets everything."""
        self._known.clear()

    @property
    def bytes(self) -> int:
        """RAM that the prompts take."""
        return sum(kept.bytes for _, kept in self._known)

    def __len__(self) -> int:
        return len(self._known)


class _UnknownPartError(TypeError):
    """Something in a conditioning that is neither a tensor nor built of what Forge builds one of."""


class _Kept:
    def __init__(self, conds: Conds, infotext: Infotext, spelling: Spelling | None) -> None:
        self.bytes, self.spelling = 0, spelling
        self._devices: dict[int, torch.device] = {}
        self._conds = _mapped(conds, self._to_ram, {})
        self.infotext = copy.copy(infotext)

    def restored(self) -> Conds:
        # A copy each time: samplers may write into a conditioning.
        return _mapped(self._conds, lambda t: t.to(self._devices[id(t)], copy=True), {})

    def _to_ram(self, tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.detach().to("cpu", copy=True)
        self._devices[id(kept)] = tensor.device
        self.bytes += kept.numel() * kept.element_size()
        return kept


def _mapped(value: Conds, change: Callable[[torch.Tensor], torch.Tensor], done: dict[int, Conds]) -> Conds:
    """Returns `value` with every tensor changed. What occurs twice (the images of a batch) stays one object."""
    if id(value) in done:
        return done[id(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    new: Conds
    if isinstance(value, torch.Tensor):
        new = change(value)
    elif isinstance(value, dict):
        new = copy.copy(value)
        new.update({k: _mapped(v, change, done) for k, v in value.items()})
    elif isinstance(value, tuple):
        parts = [_mapped(v, change, done) for v in value]
        new = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    elif type(value) is list:
        new = [_mapped(v, change, done) for v in value]
    elif type(value).__module__.endswith("prompt_parser"):
        new = copy.copy(value)
        new.__dict__.update({k: _mapped(v, change, done) for k, v in vars(value).items()})
    else:
        raise _UnknownPartError(f"{type(value).__module__}.{type(value).__name__}")
    done[id(value)] = new
    return new
