"""Measures how much of the LoRAs' change is present in the written file."""

from __future__ import annotations

import math
from collections import defaultdict

import torch

SLICE_VALUES = 1 << 18
"""Six fp64 tensors of so many values exist at once: 12 MB."""


class Effect:
    """The cosine between the true change of all touched weights, as one vector, and the change left after rounding.

    Also kept by dtype, so that a loss in one dtype is not hidden by large changes in another.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def add(self, form: str, base: torch.Tensor, merged: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
        """Adds one weight.

        Args:
            form: The dtype's name in the new file.
            base: The exact weight without the LoRAs.
            merged: The exact weight with the LoRAs.
            old: `base` as the new file stores it.
            new: `merged` as the new file stores it.
        """
        flat = [tensor.reshape(-1) for tensor in (base, merged, old, new)]
        sums = self._sums[form]
        for start in range(0, flat[0].numel(), SLICE_VALUES):
            b, m, o, n = (tensor[start : start + SLICE_VALUES].to(torch.float64) for tensor in flat)
            true, present = m - b, n - o
            for place, product in enumerate((true @ present, true @ true, present @ present)):
                sums[place] += float(product)

    @property
    def cosine(self) -> float | None:
        """The cosine over all weights. 1: fully present. 0: noise, or nothing left. None if the LoRAs change nothing."""
        return _cosine([sum(column) for column in zip(*self._sums.values(), strict=True)] or [0.0, 0.0, 0.0])

    @property
    def cosines(self) -> dict[str, float]:
        """The same by dtype, for dtypes with a change."""
        return {form: cosine for form, sums in self._sums.items() if (cosine := _cosine(sums)) is not None}


def _cosine(sums: list[float]) -> float | None:
    product, true, present = sums
    if not true:
        return None
    return product / math.sqrt(true * present) if present else 0.0
