"""Engines whose models may have layers in common, as guards on a model and on a part of it have.

Two engines on one weight would each take what the other has made of it for the original. So the second one is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Protocol, TypeAlias

Place: TypeAlias = tuple[int, str]
"""A parameter: the id of the layer that owns it, and its name there."""


class Neighbour(Protocol):
    """An engine, as the others see it."""

    name: str

    def places(self) -> Collection[Place]:
        """Returns the parameters that have a LoRA, or may get one by the change that is under way."""


class Neighbours:
    """All engines of one host. They are held weakly.

    Needs no lock: an engine notes its change before it looks at the others. So of two that change at the same time at
    least one sees the other.
    """

    def __init__(self) -> None:
        self._engines: set[weakref.ref[Neighbour]] = set()

    def add(self, engine: Neighbour) -> None:
        """Adds an engine."""
        self._engines.add(weakref.ref(engine, self._engines.discard))

    def in_the_way(self, engine: Neighbour, wanted: Collection[Place]) -> tuple[str, set[Place]] | None:
        """Returns the name of another engine that has LoRAs on parameters in `wanted`, with these; None if none has."""
        for reference in tuple(self._engines):
            other = reference()
            if other is None or other is engine:
                continue
            shared = {place for place in other.places() if place in wanted}
            if shared:
                return other.name, shared
        return None
