"""A Forge model as the engine sees it: Forge's layer classes, its dequantisers, its place for on-the-fly patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Concatenate

import torch

from ...patching.access import Site, find_owner, is_linear, is_plain_convolution
from ...patching.fused import RawWeight
from ...patching.marked_class import Forward, class_of
from ...patching.on_the_fly import WeightTerms
from ...patching.operators import WEIGHT_PATCH
from ...runtime.hooks import P
from ...weights.storage import storage_of
from ..webui.access import WebuiAccess
from ..webui.raw_weights import is_hosts_own, is_low_bit, streams_of
from .api import ForgeApi
from .facts import loader_of_model
from .guard_patches import GuardPatches
from .lora_loader_state import state_of
from .raw_weights import ForgeWeight
from .types import PatchEntry


def merge_lora_to_weight(
    original: Callable[Concatenate[Sequence[PatchEntry], torch.Tensor, P], torch.Tensor],
    patches: Sequence[PatchEntry],
    weight: torch.Tensor,
    *args: P.args,
    **kwargs: P.kwargs,
) -> torch.Tensor:
    """Stands in place of Forge's function of that name, which its layers call in each forward pass."""
    if isinstance(patches, GuardPatches):
        return patches.apply(weight)
    return original(patches, weight, *args, **kwargs)


class ForgeAccess(WebuiAccess):
    """One of Forge's models. It is held weakly: Forge frees models by counting references."""

    def __init__(self, api: ForgeApi, model: torch.nn.Module) -> None:
        """
        Args:
            api: Forge's layer classes.
            model: The model.
        """
        super().__init__(model)
        self._api, self._raw = api, ForgeWeight(streams_of(api.operations))

    def site(self, key: str) -> Site | None:
        """Returns the parameter called `key`, or None if the model has none of that name."""
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

    def rows(self, site: Site, start: int, length: int, device: torch.device) -> torch.Tensor:
        """Returns `length` dequantised rows from `start` as a new fp32 tensor on `device`."""
        dense = super().rows(site, start, length, device)
        scale = getattr(site.layer, "scale_weight", None)
        if site.name == "weight" and isinstance(scale, torch.Tensor):
            # As Forge's forward pass does for scaled fp8 checkpoints.
            scale = scale.detach().to(device=device, dtype=torch.float32)
            dense *= scale if scale.numel() == 1 else scale.narrow(0, start, length)
        return dense

    def _raw_weight(self, layer: torch.nn.Module) -> RawWeight | None:
        kind, weight = class_of(layer), layer._parameters.get("weight")
        if weight is None or kind not in self._api.linear_classes or not is_hosts_own(kind):
            return None
        return self._raw if is_low_bit(weight) else None

    def set_weight_terms(self, site: Site, terms: WeightTerms, call: Forward | None = None) -> None:
        """Makes the layer's forward pass add `terms` to its temporary weight."""
        attributes = site.layer.__dict__
        attributes[WEIGHT_PATCH] = terms
        attributes["forge_online_loras"] = {site.name: GuardPatches(terms, site.layer)}
        self.show_bypass(site.layer, False, call)

    def take_weight_terms(self, site: Site, terms: WeightTerms) -> None:
        """Takes that back, unless others have taken the place of `terms`."""
        attributes = site.layer.__dict__
        patches = (attributes.get("forge_online_loras") or {}).get(site.name)
        if isinstance(patches, GuardPatches) and patches.terms is terms:
            # Its mere presence makes Forge's bnb layers dequantise the whole weight.
            attributes.pop("forge_online_loras", None)
        if attributes.get(WEIGHT_PATCH) is terms:
            self.hide_bypass(site.layer)
            # Last: as long as it is there, an interrupted removal is found and finished.
            attributes.pop(WEIGHT_PATCH, None)

    def is_in_force(self) -> bool:
        """Returns False while another extension patches this model itself. Asked at every call of a layer."""
        # A copy of Forge's refresh, in another extension, may run in the middle of a model's forward pass. It replaces the
        # loader's attributes and patches the weights itself.
        loader = loader_of_model(self._model())
        state = state_of(loader)
        if loader is None or state is None or state.published is None:
            return True
        return not state.is_patched_by_other(loader)
