"""A merging patcher, for comparison: decodes, adds the delta in fp32, encodes again and keeps a backup.

This is the usual way (Forge's "Automatic", for one). The demo measures its costs and its losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..adapters import Adapter, Term, apply_terms
from ..adapters.files import read_lora_file
from ..models.names import NameMap
from ..weights.stored_linear import StoredLinear


class MergingPatcher:
    """Merges LoRA files into the StoredLinear layers of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, StoredLinear)}
        self._backup: dict[str, dict[str, torch.Tensor]] = {}

    def apply(self, path: Path, strength: float) -> None:
        """Restores the weights of an earlier merge, then merges the file at `strength`."""
        self.remove()
        names = NameMap({f"{name}.weight": layer.storage().shape for name, layer in self._layers.items()})
        adapters: Mapping[tuple[str, str], Adapter] = read_lora_file(path).adapters
        for (module, _), adapter in adapters.items():
            routes = names.routes(module)
            if not routes:
                continue
            name = routes[0].module
            layer = self._layers[name]
            self._backup[name] = {key: value.clone() for key, value in layer.parts().items()}
            layer.store(apply_terms(layer.decode(torch.float32).clone(), [Term(adapter, strength)]))

    def remove(self) -> None:
        """Restores the weights from the backup."""
        for name, parts in self._backup.items():
            self._layers[name].put(parts)
        self._backup = {}
