"""Remembers the sizes that the log has named of each model, so that an image like the last one adds no line."""

from __future__ import annotations

import logging
import weakref

import torch

from ..units import MB

NOTICEABLE_BYTES = 64 * MB
"""Less than this more or less is no other situation: it is a layer or two, or another program's window."""
NOTICEABLE_SHARE = 0.1
"""Of the size that was named before; as much of a large one is rounding in the placement."""


class ToldSizes:
    """Keeps the sizes beside the models themselves: another checkpoint begins anew, though its class has the same name."""

    def __init__(self) -> None:
        self._told: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, list[int]]] = weakref.WeakKeyDictionary()

    def level(self, model: torch.nn.Module, key: str, size_bytes: int) -> int:
        """Returns the level for a line that is about to be logged: information if it tells a new situation, else debug.

        Args:
            model: the line is about it.
            key: of the line in the catalogue.
            size_bytes: named in the line. Every size like one that was named before is known, so that an image in two
                passes with a size each is like the last one too.
        """
        # Nothing moved is known of every model: a small size is like that.
        told = self._told.setdefault(model, {}).setdefault(key, [0])
        if any(is_like(before, size_bytes) for before in told):
            return logging.DEBUG
        told.append(size_bytes)
        return logging.INFO


def is_like(before_bytes: int, now_bytes: int) -> bool:
    """Returns True if a size says no more than one named before."""
    return abs(now_bytes - before_bytes) <= max(NOTICEABLE_BYTES, NOTICEABLE_SHARE * before_bytes)
