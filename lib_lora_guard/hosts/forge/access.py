"""A Forge model as the engine sees it: Forge's layer classes, its dequantisers, its place for on-the-fly patches."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch

from ...memory.probe import BackupBudget, measure_budget
from ...patching.access import Site, find_owner, is_linear, is_plain_convolution
from ...patching.on_the_fly import WeightTerms
from ...weights.bnb4 import from_quant_state
from ...weights.storage import MB, storage_of
from .api import ForgeApi

RAM_FLOOR_BYTES = 2048 * MB
"""Left alone when backups or the host's merge would fill RAM: below this Windows starts to kill and swap."""


STATE = "lora_guard_state"
"""The attribute of a LoraLoader that holds what the guard knows of it."""


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
        if not site.shape:
            return site.parameter.detach().to(torch.float32, copy=True)
        return self.rows(site, 0, site.shape[0], site.parameter.device)

    def rows(self, site: Site, start: int, length: int, device: torch.device) -> torch.Tensor:
        parameter: Any = site.parameter
        if getattr(parameter, "gguf_cls", None) is not None:
            values = _gguf_rows(parameter, start, length, device)
        elif getattr(parameter, "bnb_quantized", False):
            # Not Forge's own function: it moves the whole weight to the GPU, and needs a bitsandbytes that works there.
            decoder, parts = from_quant_state(parameter.data, parameter.quant_state)
            parts = {name: part.to(device) for name, part in parts.items()}
            values = decoder.decode_rows(parts, start, length, torch.float32)
        else:
            values = parameter.data.narrow(0, start, length)
        dense = torch.empty(values.shape, dtype=torch.float32, device=device).copy_(values)
        scale = getattr(site.layer, "scale_weight", None)
        if site.name == "weight" and isinstance(scale, torch.Tensor):
            # As Forge's forward pass does for scaled fp8 checkpoints.
            scale = scale.detach().to(device=device, dtype=torch.float32)
            dense *= scale if scale.numel() == 1 else scale.narrow(0, start, length)
        return dense

    def bias(self, layer: torch.nn.Module) -> torch.Tensor | None:
        bias = getattr(layer, "bias", None)
        if not isinstance(bias, torch.Tensor):
            return None
        if getattr(bias, "gguf_cls", None) is not None:
            return _gguf_rows(bias, 0, 1, bias.device, is_vector=True)
        return bias.data

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

    def backup_budget(self) -> BackupBudget:
        # Forge plans with all VRAM that is free: none of it is spare.
        return replace(measure_budget(self.device(), RAM_FLOOR_BYTES), vram_spare_bytes=0)

    def is_in_force(self) -> bool:
        # A copy of Forge's refresh, in another extension, may run in the middle of a model's forward pass: it writes these
        # attributes anew and patches the weights itself.
        loader: Any = getattr(self._model(), "lora_loader", None)
        published = getattr(getattr(loader, STATE, None), "published", None)
        return published is None or (loader.backup is published[0] and loader.online_backup is published[1])

    def compute_dtype(self) -> torch.dtype:
        dtype = getattr(self.model, "computation_dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float16


def _gguf_rows(parameter: Any, start: int, length: int, device: torch.device, is_vector: bool = False) -> torch.Tensor:
    """Rows of a GGUF parameter as Forge decodes them. Forge keeps the blocks of a tensor as `(blocks, bytes)`, row by row."""
    from backend.operations_gguf import dequantize_tensor

    shape = tuple(int(size) for size in parameter.real_shape)
    rows = 1 if is_vector else shape[0]
    per_row = parameter.data.shape[0] // rows
    part = parameter.copy_with_data(parameter.data.narrow(0, start * per_row, length * per_row).to(device))
    part.real_shape = torch.Size(shape if is_vector else (length, *shape[1:]))
    dense: torch.Tensor = dequantize_tensor(part)
    return dense
