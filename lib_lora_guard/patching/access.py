"""What the engine needs to know of a model, and what it may do to it. Hosts implement `ModelAccess`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..adapters.base import Shape
from ..memory.probe import BackupBudget
from ..weights.storage import Storage
from .on_the_fly import WeightTerms


@dataclass(frozen=True, eq=False)
class Site:
    """One parameter in its place. `layer` is the module that owns it under `name`."""

    key: str
    layer: torch.nn.Module
    name: str
    storage: Storage
    can_bypass: bool
    can_on_the_fly: bool

    @property
    def shape(self) -> Shape:
        return self.storage.shape

    @property
    def parameter(self) -> torch.nn.Parameter:
        """The parameter that is there now: hosts replace Parameter objects, so none is kept."""
        value = getattr(self.layer, self.name)
        if not isinstance(value, torch.nn.Parameter):
            raise TypeError(f"{self.key} is a {type(value).__name__}, not a parameter")
        return value


class ModelAccess(Protocol):
    """A model as one host holds it."""

    name: str

    def site(self, key: str) -> Site | None:
        """The parameter called `key`, or None where the model has none of that name."""

    def dense(self, site: Site) -> torch.Tensor:
        """A new fp32 tensor with the dequantised values of the parameter, where the parameter lies."""

    def rows(self, site: Site, start: int, length: int, device: torch.device) -> torch.Tensor:
        """New fp32 tensor with the dequantised values of `length` rows from `start`, on `device`; no other row is made
        dense."""

    def bias(self, layer: torch.nn.Module) -> torch.Tensor | None:
        """The values of a layer's bias as its forward pass adds them, wherever they lie; None where there is none."""

    def set_parameter(self, site: Site, value: torch.nn.Parameter) -> None:
        """Puts `value` in the place of the parameter."""

    def set_weight_terms(self, site: Site, terms: WeightTerms | None) -> None:
        """Lets the layer's forward pass add `terms` to its temporary weight; None takes that back. Idempotent."""

    def device(self) -> torch.device:
        """The device the model computes on."""

    def backup_budget(self) -> BackupBudget:
        """What backups of merged weights may take at this moment."""

    def is_in_force(self) -> bool:
        """False while someone else has taken the patching of this model over. Asked at every call of a layer."""

    def compute_dtype(self) -> torch.dtype:
        """The dtype activations have in this model, for byte counts before the first forward pass."""


def find_owner(model: torch.nn.Module, key: str) -> tuple[torch.nn.Module, str] | None:
    """The module that owns parameter `key` and the parameter's name in it; None where there is none."""
    path, _, name = key.rpartition(".")
    owner: object = model
    for part in path.split(".") if path else ():
        owner = getattr(owner, part, None)
    if isinstance(owner, torch.nn.Module) and isinstance(getattr(owner, name, None), torch.nn.Parameter):
        return owner, name
    return None


def is_linear(layer: torch.nn.Module) -> bool:
    """True for torch's Linear; hosts add their own classes. Not for `MultiheadAttention.out_proj`, which is never called:
    the attention reads its weight."""
    return isinstance(layer, torch.nn.Linear) and not isinstance(layer, NonDynamicallyQuantizableLinear)


def is_plain_convolution(layer: torch.nn.Module) -> bool:
    """True for a convolution whose cheap forward is exact: one group, not transposed."""
    return isinstance(layer, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)) and layer.groups == 1


def plain_bias(layer: torch.nn.Module) -> torch.Tensor | None:
    """The bias of a layer that stores it as plain numbers."""
    bias = getattr(layer, "bias", None)
    return bias.detach() if isinstance(bias, torch.Tensor) else None
