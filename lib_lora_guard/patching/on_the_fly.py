"""On the fly: the stack is applied to the temporary weight of a layer's forward pass, never to the parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..adapters import Adapter, LokrAdapter, Term, apply_terms
from ..weights.storage import shares_storage
from .device_cache import DeviceCache
from .fused import Fused
from .layer_call import naming_the_layer
from .operators import WeightPatch


class WeightTerms(WeightPatch):
    """The stack of one weight, for a dequantised or cast copy of it on any device.

    Args:
        key: The name of the weight, for errors.
        terms: The stack, in order.
    """

    def __init__(self, key: str, terms: Sequence[Term]) -> None:
        self.key = key
        self.terms = tuple(terms)
        self._adapters: DeviceCache[tuple[Adapter, ...]] = DeviceCache()
        self._copies: DeviceCache[tuple[Term, ...]] = DeviceCache()
        self.fused: Fused | None = None
        """The short way of the layer, where there is one. The attachment sets it, before the terms are on the layer."""

    def apply(self, weight: torch.Tensor, parameter: torch.Tensor | None) -> torch.Tensor:
        """Returns the patched weight, in the dtype of `weight`.

        Args:
            weight: The temporary weight. It is changed in place, unless it shares the memory of `parameter`.
            parameter: The layer's own parameter.

        Raises:
            LayerError: Out of memory. Some terms may be in `weight` by then, so there is no second attempt.
        """
        with naming_the_layer(self.key):
            terms = self._terms_on(weight.device, weight.dtype)
            scratch = weight.clone() if shares_storage(weight, parameter) else weight
            return apply_terms(scratch, terms)

    def sides_on(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Returns the left and the right side of the only term, a LoKr, on `device` and in `dtype`, and the factor on their product.

        They are those of `apply`, so that a device has one copy whatever way the layer goes.
        """
        (term,) = self._terms_on(device, dtype)
        adapter = term.adapter
        assert isinstance(adapter, LokrAdapter)
        left, right = adapter.sides(device, dtype)
        return left, right.flatten(1), adapter.scale * term.strength

    def exchange(self, terms: Sequence[Term]) -> None:
        """Replaces the terms by `terms`, which differ from them in strengths alone. The factors on a device stay."""
        self.terms = tuple(terms)
        # Another one, after that: a call in another thread may be about to keep the old ones in the present one.
        self._copies = DeviceCache()

    def drop_device_copies(self) -> None:
        """Frees the factors' copies on devices; the next forward pass makes them again."""
        self._copies.drop()
        self._adapters.drop()
        if self.fused is not None:
            self.fused.drop_device_copies()

    @property
    def is_resident(self) -> bool:
        """True while copies on a device exist."""
        return len(self._adapters) > 0

    @property
    def device_bytes(self) -> int:
        """Bytes of the factors on a device while sampling."""
        return sum(term.adapter.bytes for term in self.terms)

    def _terms_on(self, device: torch.device, dtype: torch.dtype) -> tuple[Term, ...]:
        return self._copies.get(device, dtype, lambda: self._on(device, dtype))

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Term, ...]:
        if device.type == "cpu":
            return self.terms

        def moved() -> tuple[Adapter, ...]:
            # In the file's own dtype: only the adapter knows what must not be rounded (a DoRA's magnitude).
            return tuple(t.adapter.map(lambda x: x.to(device)) for t in self.terms)

        adapters = self._adapters.get(device, dtype, moved)
        return tuple(replace(t, adapter=a) for t, a in zip(self.terms, adapters, strict=True))
