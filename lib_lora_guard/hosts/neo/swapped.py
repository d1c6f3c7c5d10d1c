"""Keeps copies in pinned RAM of what Neo copies in each step, and of what leaves the card for a decode and returns.

Where a layer lies stays Neo's own choice; the copies make its moves short. Neo's own `--pin-shared-memory` comes first: what
it has pinned is left alone. Source: Neo's `backend/patcher/base.py` (`load`, `partially_unload`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch

from ...messages import say
from ...runtime.ram_copies import WORTH_A_LINE_BYTES, RamCopies
from ...units import MB
from ..webui.models import is_a, is_denoiser
from .types import Patcher

log = logging.getLogger(__name__)

CAST = "parameters_manual_cast"
"""Neo's mark of a layer whose weight can be copied to the card in each call."""


TEXT_ENCODER = ("backend.patcher.clip", "JointTextEncoder")
"""Neo loads the text encoders of a checkpoint as one model. It leaves the card as a whole for the denoiser."""


class Swapped:
    def __init__(self, copies: RamCopies) -> None:
        """
        Args:
            copies: keeps them.
        """
        self._copies = copies
        self._comes_text_encoder = False

    @contextlib.contextmanager
    def coming(self, patchers: Sequence[Patcher]) -> Iterator[None]:
        """Wraps a load. What leaves for a text encoder keeps no copy when it is back: the text encoder lies in RAM by then,
        and more would be in RAM at once than without the guard."""
        before = self._comes_text_encoder
        self._comes_text_encoder = any(is_a(one.model, *TEXT_ENCODER) for one in patchers)
        try:
            yield
        finally:
            self._comes_text_encoder = before

    @contextlib.contextmanager
    def moving(self, patcher: Patcher) -> Iterator[None]:
        """Wraps Neo's moves of a model's layers. What lies in RAM afterwards is pinned, if the model is called many times."""
        layers = list(_layers(patcher.model))
        is_called_often = patcher.load_device.type == "cuda" and is_denoiser(patcher.model)
        if self._comes_text_encoder or not is_called_often:
            with self._copies.moving(layers):
                yield
            return
        before = self._copies.bytes
        with self._copies.moving(layers), self._copies.pinning():
            yield
        self._copies.pin(layers)
        size = self._copies.bytes - before
        if size > 0:
            name, total_mb = type(patcher.model).__name__, self._copies.bytes / MB
            level = logging.INFO if size >= WORTH_A_LINE_BYTES else logging.DEBUG
            say(log, level, "memory.pinned", model=name, size_mb=size / MB, total_mb=total_mb)

    def to_ram(self, patcher: Patcher) -> None:
        """Takes the layers off the card by the short way, before Neo moves all of the model."""
        for layer in _layers(patcher.model):
            self._copies.to_ram(layer)

    def forget(self, model: torch.nn.Module) -> None:
        """Called before other weights are read into a model."""
        self._copies.forget(_layers(model))


def _layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (layer for layer in model.modules() if hasattr(layer, CAST) and next(layer.children(), None) is None)
