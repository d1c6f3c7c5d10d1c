"""Any `torch.nn.Module` as the engine sees it."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from typing import Any

import torch

from ...adapters.base import Shape
from ...errors import LoraGuardError
from ...memory.probe import BackupBudget, measure_budget
from ...patching.access import ModuleAccess, Site, find_owner, is_linear, is_plain_convolution, plain_bias
from ...patching.on_the_fly import WeightTerms
from ...planning.limits import RAM_FLOOR_BYTES
from ...units import MB
from ...weights.storage import storage_of
from ...weights.stored_linear import StoredLinear

VRAM_RESERVE_BYTES = 2048 * MB
"""VRAM that backups leave to the forward pass."""


class PlainAccess(ModuleAccess):
    """A module whose layers are dense, except those that `load_stored` has replaced by StoredLinear."""

    gone = "the {name} this guard was made for is gone"

    def shapes(self) -> dict[str, Shape]:
        """Returns the real shapes of all parameters by name, without those that hold the scales of a stored weight."""
        shapes: dict[str, Shape] = {}
        for path, layer in self.model.named_modules():
            dot = f"{path}." if path else ""
            if isinstance(layer, StoredLinear):
                shapes[f"{dot}weight"] = layer.storage().shape
                if layer.bias is not None:
                    shapes[f"{dot}bias"] = tuple(layer.bias.shape)
            else:
                shapes |= {f"{dot}{n}": tuple(p.shape) for n, p in layer.named_parameters(recurse=False)}
        return shapes

    def site(self, key: str) -> Site | None:
        """Returns the parameter called `key`, or None if the model has none of that name."""
        owner = find_owner(self.model, key)
        if owner is None:
            return None
        layer, name = owner
        is_weight = name == "weight"
        is_stored, parameter = isinstance(layer, StoredLinear), getattr(layer, name)
        storage = layer.storage() if isinstance(layer, StoredLinear) and is_weight else storage_of(parameter)
        is_convolution = isinstance(layer, torch.nn.modules.conv._ConvNd)
        return Site(
            key=key,
            layer=layer,
            name=name,
            storage=storage,
            can_bypass=is_weight and (is_stored or is_linear(layer) or is_plain_convolution(layer)),
            can_on_the_fly=is_weight and (is_stored or is_linear(layer) or is_convolution),
        )

    def decoded_rows(self, site: Site, start: int, length: int, device: torch.device) -> torch.Tensor:
        """Returns `length` rows from `start` as plain numbers."""
        if isinstance(site.layer, StoredLinear) and site.name == "weight":
            return site.layer.decode_rows(start, length, torch.float32)
        return site.parameter.detach().narrow(0, start, length)

    def bias(self, layer: torch.nn.Module) -> torch.Tensor | None:
        """Returns the bias of a layer; None if it has none."""
        return plain_bias(layer)

    def set_weight_terms(self, site: Site, terms: WeightTerms | None) -> None:
        """Makes the layer's forward pass add `terms` to its weight; None takes that back."""
        layer = site.layer
        if isinstance(layer, StoredLinear):
            layer.weight_terms = terms
        elif terms is not None:
            layer.__dict__["forward"] = _PatchedForward(layer, site.name, terms)
        else:
            layer.__dict__.pop("forward", None)

    def weight_terms(self, site: Site) -> WeightTerms | None:
        """Returns what the layer's forward pass adds to its weight now."""
        if isinstance(site.layer, StoredLinear):
            terms = site.layer.weight_terms
            return terms if isinstance(terms, WeightTerms) else None
        forward = site.layer.__dict__.get("forward")
        return forward.terms if isinstance(forward, _PatchedForward) else None

    def device(self) -> torch.device:
        """Returns the device of the first parameter."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def backup_budget(self) -> BackupBudget:
        """Measures how much memory backups of merged weights may take now."""
        budget = measure_budget(self.device(), RAM_FLOOR_BYTES)
        return replace(budget, vram_spare_bytes=max(0, budget.vram_spare_bytes - VRAM_RESERVE_BYTES))

    def is_in_force(self) -> bool:
        """Returns True: nothing else patches the model."""
        return True

    def compute_dtype(self) -> torch.dtype:
        """Returns the dtype of the first parameter in 16 or 32 bit: that of the activations."""
        wide = (p.dtype for p in self.model.parameters() if p.dtype in (torch.float32, torch.bfloat16, torch.float16))
        return next(wide, torch.float32)


class _PatchedForward:
    """The layer's own forward code, run on a shallow copy of the layer that holds the patched weight."""

    def __init__(self, layer: torch.nn.Module, name: str, terms: WeightTerms) -> None:
        self._layer = weakref.ref(layer)
        self._name = name
        self.terms = terms

    def __reduce__(self) -> str:
        raise LoraGuardError("a LoRA is on this model; take it off (guard.remove()) before copying or saving the model")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer()
        if layer is None:
            raise ReferenceError("the layer is gone")
        parameter = getattr(layer, self._name)
        patched = self.terms.apply(parameter.detach(), parameter)
        shadow = copy.copy(layer)
        shadow.__dict__ = {
            **layer.__dict__,
            "_parameters": {**layer._parameters, self._name: torch.nn.Parameter(patched, requires_grad=False)},
        }
        return type(layer).forward(shadow, *args, **kwargs)
