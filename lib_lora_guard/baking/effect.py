"""How much of the LoRAs is in what was written."""

from __future__ import annotations

import math
from collections import defaultdict

import torch

SLICE_VALUES = 1 << 18
"""Six fp64 tensors of so many values are at work at once: 12 MB."""


class Effect:
    """The angle between two changes of all touched weights, seen as one long vector: the true one, and the one that is
    left after rounding. Weights in dtypes of their own are also counted apart: what is lost in one must not hide behind
    large changes in another."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def add(self, form: str, base: torch.Tensor, merged: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
        """One weight: `base` and `merged` exactly, `old` and `new` the same two as the new file's `form` has them."""
        flat = [tensor.reshape(-1) for tensor in (base, merged, old, new)]
        sums = self._sums[form]
        for start in range(0, flat[0].numel(), SLICE_VALUES):
            b, m, o, n = (tensor[start : start + SLICE_VALUES].to(torch.float64) for tensor in flat)
            true, present = m - b, n - o
            for place, product in enumerate((true @ present, true @ true, present @ present)):
                sums[place] += float(product)

    @property
    def cosine(self) -> float | None:
        """Of all weights. 1: all there. 0: noise, or nothing left. None where the LoRAs change nothing."""
        return _cosine([sum(column) for column in zip(*self._sums.values(), strict=True)] or [0.0, 0.0, 0.0])

    @property
    def cosines(self) -> dict[str, float]:
        """The same by dtype, for those that something is changed in."""
        return {form: cosine for form, sums in self._sums.items() if (cosine := _cosine(sums)) is not None}


def _cosine(sums: list[float]) -> float | None:
    product, true, present = sums
    if not true:
        return None
    return product / math.sqrt(true * present) if present else 0.0
