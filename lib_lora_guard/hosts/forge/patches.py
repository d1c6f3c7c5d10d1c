"""From Forge's `lora_patches` to requests for the engine, with the factors copied out of the files they lie in."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PureWindowsPath
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ...adapters import Term
from ...adapters.base import own_copy
from ...adapters.patch_tuples import Calculators, parse_term, parse_value
from ...errors import LoraMismatchError, Message, about, named, reason
from ...memory.out_of_memory import is_out_of_memory
from ...patching.engine import LoraRequest
from . import types

log = logging.getLogger(__name__)

Patches = Mapping[Any, Mapping[str, list[list[Any]]]]


OWN_TENSORS: Any = WeakIdKeyDictionary()
"""Tensors that the guard has read itself (`forge_files`): already in RAM, checked, and nobody else's."""


class FactorCopies:
    """Our own copy of every factor, in RAM, for as long as some stack uses it.

    The host's tensors are mapped from the LoRA file: a trainer that overwrites the file would change or kill them. The
    host keeps several files mapped after they are taken off, so a copy must not live as long as what it came from.
    """

    def __init__(self) -> None:
        self._copies: Any = WeakIdKeyDictionary()

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor in OWN_TENSORS:
            return tensor
        known = self._copies.get(tensor)
        copy: torch.Tensor | None = None if known is None else known()
        if copy is None:
            copy = own_copy(tensor)
            self._copies[tensor] = weakref.ref(copy)
        return copy


def requests_from(
    lora_patches: Patches, calculators: Calculators, copies: FactorCopies, as_trained: bool = False
) -> list[LoraRequest]:
    """One request per LoRA, in the host's order. A LoRA that cannot be read is returned as refused. `as_trained`: DoRA in
    the meaning of its trainer."""
    return [
        _request(origin, identifier, patches, calculators, copies, as_trained)
        for origin, (identifier, patches) in enumerate(lora_patches.items())
    ]


def _request(
    origin: int,
    identifier: Any,
    patches: Mapping[str, list[list[Any]]],
    calculators: Calculators,
    copies: FactorCopies,
    as_trained: bool,
) -> LoraRequest:
    label, strength = describe(identifier)
    terms: dict[str, list[Term]] = {}
    key = ""
    try:
        for key, entries in patches.items():
            terms[key] = [_readable_term(entry, calculators, origin, copies, as_trained) for entry in entries]
    except LoraMismatchError as error:
        return LoraRequest(label, strength, refused=about(key, reason(error)))
    except Exception as error:
        if is_out_of_memory(error):
            # Nothing is wrong with the file, and the next attempt may find room for it.
            raise
        # Whatever is wrong with one file, the others are applied.
        log.debug("%s: %s", label, key, exc_info=True)
        return LoraRequest(label, strength, refused=Message("lora.unreadable_key", {"key": key, "error": named(error)}))
    return LoraRequest(label, strength, terms)


def _readable_term(
    entry: list[Any], calculators: Calculators, origin: int, copies: FactorCopies, as_trained: bool
) -> Term:
    term = parse_term(entry, calculators, origin)
    adapter = term.adapter.map(copies)
    return replace(term, adapter=adapter.with_dora_as_trained() if as_trained else adapter)


def describe(identifier: Any) -> tuple[str, float]:
    """File name and strength from the host's `(filename, strength_patch, strength_model, online_mode)`."""
    if isinstance(identifier, tuple) and len(identifier) >= 2 and isinstance(identifier[1], (int, float)):
        # PureWindowsPath splits at both kinds of slashes.
        return PureWindowsPath(str(identifier[0])).name or str(identifier[0]), float(identifier[1])
    return str(identifier), 1.0


def device_elements(lora_patches: types.Patches, calculators: Calculators, merges_whole_tensors: bool) -> int:
    """Numbers that the factors will take on a device. Merged ones take none; what cannot be read takes none either."""
    total = 0
    for patches in lora_patches.values():
        for entries in patches.values():
            for entry in entries:
                with contextlib.suppress(Exception):
                    adapter = parse_value(entry[1], calculators)
                    if not (merges_whole_tensors and adapter.is_whole_tensor):
                        total += sum(tensor.numel() for tensor in adapter.tensors())
    return total
