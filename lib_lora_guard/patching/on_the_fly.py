"""On the fly: the delta goes into the temporary weight that a layer makes for its forward pass, never into the parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..adapters import Adapter, Term, apply_terms
from ..weights.storage import shares_storage
from .device_cache import DeviceCache
from .layer_call import naming_the_layer


class WeightTerms:
    """The stack of one weight, ready to be applied to a dequantised or cast copy of it on any device."""

    def __init__(self, key: str, terms: Sequence[Term]) -> None:
        self.key = key
        self.terms = tuple(terms)
        self._adapters: DeviceCache[tuple[Adapter, ...]] = DeviceCache()
        self._copies: DeviceCache[tuple[Term, ...]] = DeviceCache()

    def apply(self, weight: torch.Tensor, parameter: torch.Tensor | None) -> torch.Tensor:
        """The patched weight, in the dtype of `weight`.

        `weight` is written into only when it is proven not to be the memory of `parameter`. Raises LayerError where memory
        ends: some terms may be in `weight` by then, so there is no second attempt.
        """
        with naming_the_layer(self.key):
            terms = self._copies.get(weight.device, weight.dtype, lambda: self._on(weight.device, weight.dtype))
            scratch = weight.clone() if shares_storage(weight, parameter) else weight
            return apply_terms(scratch, terms)

    def exchange(self, terms: Sequence[Term]) -> None:
        """Puts `terms`, which differ from the present ones in strengths alone, in place. The factors on a device stay."""
        self.terms = tuple(terms)
        self._copies.drop()

    def drop_device_copies(self) -> None:
        self._copies.drop()
        self._adapters.drop()

    @property
    def is_resident(self) -> bool:
        return len(self._adapters) > 0

    @property
    def device_bytes(self) -> int:
        return sum(term.adapter.bytes for term in self.terms)

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Term, ...]:
        if device.type == "cpu":
            return self.terms

        def moved() -> tuple[Adapter, ...]:
            # In the file's own dtype: what an adapter must not round (a DoRA's magnitude) only it knows.
            return tuple(t.adapter.map(lambda x: x.to(device)) for t in self.terms)

        adapters = self._adapters.get(device, dtype, moved)
        return tuple(replace(t, adapter=a) for t, a in zip(self.terms, adapters, strict=True))
