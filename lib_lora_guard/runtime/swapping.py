"""Says how much VRAM a model's swapped layers need while it runs."""

from __future__ import annotations

import logging
import math
import weakref

import torch

from ..memory.step_times import driver_spills
from ..planning import on_card
from ..weights.storage import shape_of
from .host import ModelFormats

log = logging.getLogger(__name__)

MANY_CONVOLUTIONS = 8
"""A transformer has a few, which make patches of a picture."""


class SwappingRoom:
    """Looks at the weights of each model once."""

    def __init__(self, formats: ModelFormats) -> None:
        """
        Args:
            formats: says how the host computes a model.
        """
        self._formats, self._spills = formats, driver_spills()
        self._known: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()

    def bytes(self, model: torch.nn.Module) -> int:
        """Returns the VRAM to leave for swapping; see `on_card.swapping_bytes`."""
        if model not in self._known:
            try:
                self._known[model] = self._bytes(model)
            except Exception:
                # Another extension's model, of unknown parameters.
                log.debug("the layers of %s are not known", type(model).__name__, exc_info=True)
                self._known[model] = on_card.SWAPPING_BYTES
        return self._known[model]

    def _bytes(self, model: torch.nn.Module) -> int:
        shapes = [shape_of(parameter) for parameter in model.parameters()]
        value_bytes = torch.empty(0, dtype=self._formats.compute_dtype(model)).element_size()
        largest = max((math.prod(shape) for shape in shapes), default=0) * value_bytes
        is_unet = sum(len(shape) == 4 for shape in shapes) > MANY_CONVOLUTIONS
        return on_card.swapping_bytes(largest, is_unet, self._spills)
