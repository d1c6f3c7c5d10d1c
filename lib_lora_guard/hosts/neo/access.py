"""A model of Neo's as the engine sees it: its layer classes, its dequantisers, its place for on-the-fly patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ...patching.access import ModuleAccess, Site, find_owner, is_linear, is_plain_convolution
from ...patching.backup import moved
from ...patching.fused import RawWeight
from ...patching.marked_class import Forward, class_of, mark, unmark
from ...patching.on_the_fly import WeightTerms
from ...patching.operators import WEIGHT_PATCH
from ...weights.kitchen import is_quantized, rows_of
from ...weights.storage import storage_of
from ..webui.access import WebuiAccess
from ..webui.raw_weights import is_hosts_own, is_low_bit, streams_of
from .api import FAMILIES, NeoApi
from .raw_weights import NeoQuantized, NeoWeight
from .types import WeightLayer
from .weight_function import WeightFunction

OWN_CLASS = "lora_guard_own_class"
"""The attribute of a layer that holds its class while it has another one."""


class NeoAccess(WebuiAccess):
    """One of Neo's models. It is held weakly: Neo frees models by counting references."""

    def __init__(self, api: NeoApi, model: torch.nn.Module) -> None:
        """
        Args:
            api: Neo's layer classes.
            model: the model.
        """
        super().__init__(model)
        self._api, is_streaming = api, streams_of(api.operations)
        self._raw, self._raw_quantized = NeoWeight(is_streaming), NeoQuantized(is_streaming)

    def site(self, key: str) -> Site | None:
        """Returns the parameter called `key`, or None if the model has none of that name."""
        owner = find_owner(self.model, key)
        if owner is None:
            return None
        layer, name = owner
        is_weight, is_neos = name == "weight", isinstance(layer, self._api.layer_class)
        linear = is_linear(layer) or (is_neos and _is_a(layer, "Linear"))
        convolution = isinstance(layer, torch.nn.modules.conv._ConvNd)
        return Site(
            key=key,
            layer=layer,
            name=name,
            storage=storage_of(getattr(layer, name)),
            can_bypass=is_weight and (linear or is_plain_convolution(layer)),
            # Norms and embeddings ask their functions only under manual cast.
            can_on_the_fly=is_weight and is_neos and (linear or convolution),
        )

    def decoded_rows(self, site: Site, start: int, length: int, device: torch.device) -> torch.Tensor:
        """Returns `length` rows from `start` as plain numbers."""
        parameter = site.parameter
        if is_quantized(parameter):
            return rows_of(parameter, start, length, device)
        return super().decoded_rows(site, start, length, device)

    def set_parameter(self, site: Site, value: torch.nn.Parameter) -> None:
        """Replaces the parameter by `value`. Neo finds the pinned ones by their address, so this one is unpinned first."""
        self._api.memory.unpin_memory(site.parameter)
        super().set_parameter(site, value)

    def _raw_weight(self, layer: torch.nn.Module) -> RawWeight | None:
        kind, weight, families = class_of(layer), layer._parameters.get("weight"), vars(self._api.operations)
        # A layer of `--fast-fp8` has none, and its other class is only for the time of the terms on it.
        if weight is None or not is_hosts_own(kind) or OWN_CLASS in layer.__dict__:
            return None
        if kind in [families[family].Linear for family in FAMILIES if family in families]:
            return self._raw if is_low_bit(weight) else None
        is_mixed = issubclass(kind, self._api.layer_class) and kind.__qualname__.startswith("mixed_precision_ops.")
        return self._raw_quantized if is_mixed and kind.__name__ == "Linear" and is_quantized(weight) else None

    def show_bypass(self, layer: torch.nn.Module, scales_input: bool, call: Forward | None = None) -> None:
        """Lets compiled code see that a bypass is on the layer."""
        mark(layer, (scales_input, call), call=call)

    def hide_bypass(self, layer: torch.nn.Module) -> None:
        """Takes that back."""
        unmark(layer)

    def set_weight_terms(self, site: Site, terms: WeightTerms, call: Forward | None = None) -> None:
        """Makes the layer's forward pass add `terms` to its temporary weight.

        A new list each time: the class's own one is that of every layer. What Neo or an extension has put there stays.
        """
        layer: WeightLayer = site.layer  # type: ignore[assignment]  # `site` lets no other layer come here
        if class_of(site.layer) is self._api.fast_fp8:
            # Its fp8 product would take the patched weight for fp8, fail, and write an error at each call.
            site.layer.__dict__[OWN_CLASS] = self._api.fast_fp8
            site.layer.__class__ = self._api.plain_linear
        site.layer.__dict__[WEIGHT_PATCH] = terms
        mark(site.layer, (WEIGHT_PATCH, call), call=call)
        layer.weight_function = [*_of_others(layer), WeightFunction(terms, site.layer)]

    def take_weight_terms(self, site: Site, terms: WeightTerms) -> None:
        """Takes that back, unless others have taken the place of `terms`."""
        layer: WeightLayer = site.layer  # type: ignore[assignment]  # as above
        mine = [one for one in layer.weight_function if isinstance(one, WeightFunction)]
        if any(one.terms is not terms for one in mine):
            return
        if mine:
            layer.weight_function = _of_others(layer)
        site.layer.__dict__.pop(WEIGHT_PATCH, None)
        unmark(site.layer)
        own_class = site.layer.__dict__.pop(OWN_CLASS, None)
        if own_class is not None:
            site.layer.__class__ = own_class

    def is_in_force(self) -> bool:
        """Returns True: what other extensions add is Neo's to apply, beside the guard's."""
        return True


def _is_a(layer: torch.nn.Module, name: str) -> bool:
    """Returns True if a class of this name is among those of a layer: Neo makes some classes anew for each model."""
    return any(kind.__name__ == name for kind in type(layer).__mro__)


def _of_others(layer: WeightLayer) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    return [one for one in layer.weight_function if not isinstance(one, WeightFunction)]


def back_home(access: ModuleAccess, homes: Iterable[tuple[Site, torch.device]]) -> None:
    """Moves parameters back to the devices that they belong on, as far as Neo has left their layers there.

    Lifting a merge puts the original where its backup lies. Neo moves what leaves, and nothing else.
    """
    for site, device in homes:
        parameter = site.parameter
        if parameter.device != device and getattr(site.layer, "forge_patched_weights", False) is True:
            access.set_parameter(site, moved(parameter, device))


def uses_product(layer: torch.nn.Module) -> bool:
    """Returns True if a layer computes with the product of its quantised format as long as its weight is left alone."""
    has_format = getattr(layer, "layout_type", None) is not None and not getattr(layer, "_full_precision_mm", True)
    return has_format or OWN_CLASS in layer.__dict__
