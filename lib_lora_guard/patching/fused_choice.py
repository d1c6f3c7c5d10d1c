"""Which kernels are taken: the answer for an image is that of its first step, and holds to its end.

Kernels are compiled while images are made. An image that begins on the long way ends on it: no picture is made of both, and two
pictures of one seed in a session differ, by roundings, only where the kernels came between them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

from ..kernels.choice import KERNELS, REFUSED, SWITCH, WORKS
from ..kernels.recipes import bucket_of, recipe_of
from ..messages import say

log = logging.getLogger(__name__)


class Key(NamedTuple):
    """The kernel that a layer needs: `kind` is that of the stored weight, `rank` that of all LoRAs on it together."""

    kind: str
    device: torch.device
    dtype: torch.dtype
    rank: int


class Compiler(Protocol):
    """The kernels of a process (`kernels.choice.Kernels`)."""

    def ready(self, kind: str, device: torch.device, dtype: torch.dtype, rank: int) -> bool:
        """Returns True if there is a kernel. Never waits."""

    def prepare(self, kinds: Iterable[str], device: torch.device, dtype: torch.dtype, ranks: Iterable[int]) -> None:
        """Begins to compile in the background."""

    def state(self, kind: str) -> str:
        """Returns whether kernels for a kind are there, coming, or refused."""


def always() -> bool:
    """Returns True."""
    return True


def never() -> bool:
    """Returns False."""
    return False


class FusedChoice:
    """The answers of the present image."""

    def __init__(self, compiler: Compiler) -> None:
        """
        Args:
            compiler: Has the kernels.
        """
        self.compiler = compiler
        self.is_on: Callable[[], bool] = always
        """False if the user has switched the kernels off. Asked for each kernel once an image."""
        self.casts_too: Callable[[], bool] = never
        """True if layers without LoRAs get the short way too. Asked at each change of a stack."""
        self.held: dict[Key, bool] = {}
        """The present answers. Another dictionary each time that they may change."""
        self._failed: set[Key] = set()
        self._images = 0

    @contextmanager
    def image(self) -> Iterator[None]:
        """Wraps the making of an image. One inside another, a detailer's, has the answers of that."""
        if self._images == 0:
            self.held = {}
        self._images += 1
        try:
            yield
        finally:
            self._images -= 1

    def takes(self, key: Key) -> bool:
        """Returns True if the present image is made with this kernel. Outside an image only a yes is held."""
        held = self.held
        found = held.get(key)
        if found is None:
            found = key not in self._failed and self.is_on() and self.compiler.ready(*key)
            if found or self._images:
                held[key] = found
                way = "fused" if found else "not fused"
                log.debug("%s, rank %d, %s on %s: %s", key.kind, key.rank, key.dtype, key.device, way)
        return found

    def may_take(self, key: Key) -> bool:
        """Returns True if an image may be made with this kernel, now or once it is compiled."""
        if key in self._failed or not self.is_on() or recipe_of(key.kind) is None or bucket_of(key.rank) is None:
            return False
        state = self.compiler.state(key.kind)
        return state == WORKS or (key.device.type == "cuda" and not state.startswith(REFUSED))

    def failed(self, key: Key, error: Exception) -> None:
        """Notes that a kernel has failed, and says so once: it is not taken again."""
        if key in self._failed:
            return
        self._failed.add(key)
        self.held = {**self.held, key: False}
        say(log, logging.WARNING, "mode.kernel_failed", kind=key.kind, error=f"{type(error).__name__}: {error}")

    def prepare(self, keys: Iterable[Key]) -> None:
        """Has kernels compiled in the background. Between images the next call of a layer asks anew."""
        if self._images == 0:
            self.held = {}
        groups: dict[tuple[torch.device, torch.dtype], list[Key]] = {}
        for key in keys:
            groups.setdefault((key.device, key.dtype), []).append(key)
        for (device, dtype), mine in groups.items():
            kinds, ranks = sorted({key.kind for key in mine}), sorted({key.rank for key in mine})
            self.compiler.prepare(kinds, device, dtype, ranks)


class Twin:
    """Plain torch in the place of the kernels: slow, and there at once. For tests."""

    def ready(self, kind: str, device: torch.device, dtype: torch.dtype, rank: int) -> bool:
        return True

    def prepare(self, kinds: Iterable[str], device: torch.device, dtype: torch.dtype, ranks: Iterable[int]) -> None:
        pass

    def state(self, kind: str) -> str:
        return WORKS


CHOICE = FusedChoice(Twin() if os.environ.get(SWITCH) == "twin" else KERNELS)
"""Of the process, as the kernels are. `LORA_GUARD_KERNELS=twin` in the environment has plain torch do the kernels' work."""
