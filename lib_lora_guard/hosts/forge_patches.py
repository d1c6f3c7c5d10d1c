"""From Forge's `lora_patches` to requests for the engine, with the factors copied out of the files they lie in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PureWindowsPath
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..adapters import Term
from ..adapters.patch_tuples import Calculators, parse_term
from ..errors import LoraMismatchError
from ..patching.engine import LoraRequest

Patches = Mapping[Any, Mapping[str, list[list[Any]]]]


class FactorCopies:
    """Our own copy of every factor, in RAM, made once for as long as the host keeps the tensor it came from.

    The host's tensors are mapped from the LoRA file: a trainer that overwrites the file would change or kill them.
    """

    def __init__(self) -> None:
        self._copies: Any = WeakIdKeyDictionary()

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        copy: torch.Tensor | None = self._copies.get(tensor)
        if copy is None:
            with torch.inference_mode(False), torch.no_grad():
                copy = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
            if copy.is_floating_point() and not _all_finite(copy):
                raise LoraMismatchError(
                    "the file holds values that are not finite numbers (NaN or Inf); download or train it again"
                )
            self._copies[tensor] = copy
        return copy


def requests_from(lora_patches: Patches, calculators: Calculators, copies: FactorCopies) -> list[LoraRequest]:
    """One request per LoRA, in the host's order. A LoRA that cannot be read is returned as refused."""
    requests = []
    for origin, (identifier, patches) in enumerate(lora_patches.items()):
        label, strength = describe(identifier)
        terms = {}
        try:
            for key, entries in patches.items():
                parsed = [parse_term(entry, calculators, origin) for entry in entries]
                for term in parsed:
                    if not math.isfinite(term.strength) or not math.isfinite(term.strength_model):
                        raise LoraMismatchError(f"strength {term.strength:g} is not a finite number")
                terms[key] = [_copied(term, copies) for term in parsed]
        except LoraMismatchError as error:
            requests.append(LoraRequest(label, strength, refused=f"{key}: {error}"))
            continue
        requests.append(LoraRequest(label, strength, terms))
    return requests


def describe(identifier: Any) -> tuple[str, float]:
    """File name and strength from the host's `(filename, strength_patch, strength_model, online_mode)`."""
    if isinstance(identifier, tuple) and len(identifier) >= 2 and isinstance(identifier[1], (int, float)):
        # PureWindowsPath splits at both kinds of slashes.
        return PureWindowsPath(str(identifier[0])).name or str(identifier[0]), float(identifier[1])
    return str(identifier), 1.0


def factor_elements(lora_patches: Patches) -> int:
    """Numbers in all tensors of the patches; what the factors take on a device is this times the element size."""

    def count(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel()
        if isinstance(value, (list, tuple)):
            return sum(count(item) for item in value)
        return 0

    return sum(count(entries) for patches in lora_patches.values() for entries in patches.values())


def _copied(term: Term, copies: FactorCopies) -> Term:
    return replace(term, adapter=term.adapter.map(copies))


def _all_finite(tensor: torch.Tensor) -> bool:
    # NaN and Inf survive a sum, and a sum is one pass without a mask of the tensor's size. fp8 has no sum.
    wide = tensor if tensor.element_size() > 1 else tensor.float()
    return math.isfinite(float(wide.sum(dtype=torch.float64)))
