"""A Forge model as the engine sees it: Forge's layer classes, its dequantisers, its place for on-the-fly patches."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..patching.access import Site, find_owner, is_linear, is_plain_convolution
from ..patching.on_the_fly import WeightTerms
from ..weights.storage import storage_of
from .forge_probe import ForgeApi


class GuardPatches(list[object]):
    """What the guard leaves in `layer.forge_online_loras`: Forge's forward passes hand it to `merge_lora_to_weight`,
    where our hook knows it. As a list it is empty, so that Forge's own function would simply add nothing."""

    def __init__(self, terms: WeightTerms, layer: torch.nn.Module) -> None:
        super().__init__()
        self.terms = terms
        self._layer = weakref.ref(layer)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        layer = self._layer()
        return self.terms.apply(weight, None if layer is None else getattr(layer, "weight", None))


class ForgeAccess:
    """Holds the model by weak reference: Forge frees models by counting references."""

    def __init__(self, api: ForgeApi, model: torch.nn.Module) -> None:
        self._api = api
        self._model = weakref.ref(model)
        self.name = type(model).__name__

    @property
    def model(self) -> torch.nn.Module:
        model = self._model()
        if model is None:
            raise ReferenceError(f"{self.name} has been unloaded")
        return model

    def site(self, key: str) -> Site | None:
        owner = find_owner(self.model, key)
        if owner is None:
            return None
        layer, name = owner
        is_weight = name == "weight"
        linear = is_linear(layer) or isinstance(layer, self._api.linear_classes)
        return Site(
            key=key,
            layer=layer,
            name=name,
            storage=storage_of(getattr(layer, name)),
            can_bypass=is_weight and (linear or is_plain_convolution(layer)),
            can_on_the_fly=is_weight and isinstance(layer, self._api.weight_classes),
        )

    def dense(self, site: Site) -> torch.Tensor:
        parameter: Any = site.parameter
        if getattr(parameter, "gguf_cls", None) is not None:
            from backend.operations_gguf import dequantize_tensor

            parameter = dequantize_tensor(parameter)
        elif getattr(parameter, "bnb_quantized", False):
            from backend.operations_bnb import functional_dequantize_4bit

            parameter = functional_dequantize_4bit(parameter)
        return torch.empty(site.shape, dtype=torch.float32, device=parameter.device).copy_(parameter.data)

    def set_parameter(self, site: Site, value: torch.nn.Parameter) -> None:
        setattr(site.layer, site.name, value)

    def set_weight_terms(self, site: Site, terms: WeightTerms | None) -> None:
        layer: Any = site.layer
        if terms is not None:
            layer.forge_online_loras = {site.name: GuardPatches(terms, layer)}
        elif hasattr(layer, "forge_online_loras"):
            # Its mere presence makes Forge's bnb layers dequantise the whole weight.
            del layer.forge_online_loras

    def device(self) -> torch.device:
        devices = {parameter.device for parameter in self.model.parameters()}
        return next((d for d in sorted(devices, key=str) if d.type not in ("cpu", "meta")), torch.device("cpu"))

    def compute_dtype(self) -> torch.dtype:
        dtype = getattr(self.model, "computation_dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float16
