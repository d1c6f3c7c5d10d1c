"""Which kernels are taken: the answer for an image is that of its first step, and holds to its end.

Kernels are compiled while models are loaded and images are made. An image that begins on the long way ends on it, and so do all
with the same files: the two ways differ by roundings, and the same prompt gives the same picture.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

from ..kernels.choice import COMPILING, KERNELS, REFUSED, SWITCH, WORKS
from ..kernels.recipes import ONE_TOKEN, bucket_of, recipe_of, split_kind
from ..messages import say
from .fused_measured import beats_bypass
from .swapped_ahead import AHEAD

log = logging.getLogger(__name__)

TOKEN_SWITCH = "LORA_GUARD_TOKEN_PRODUCT"
"""0 in the environment, for bug reports: layers of four bits that see one token keep the host's product and a bypass."""
WAIT_SECONDS = 3.0
"""The longest time that the steps of an image wait for kernels, all together. One is compiled in one or two seconds."""
_LOOK_SECONDS = 0.01

USUAL_RANKS = (16, 8, 32, 64, 48, 128, 96)
"""Of LoRAs and small stacks; 8 stands for all below 16. 48 and 96 are two and three LoRAs together."""


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

    def prepare(
        self, kinds: Iterable[str], device: torch.device, dtype: torch.dtype, ranks: Iterable[int], soon: bool = False
    ) -> None:
        """Begins to compile in the background; `soon`: before what waits already."""

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
        self.multiplies_tokens = os.environ.get(TOKEN_SWITCH) != "0"
        """True if products with one token have kernels."""
        self.held: dict[Key, bool] = {}
        """The present answers. Another dictionary each time that they may change."""
        self._failed: set[Key] = set()
        self._late: set[Key] = set()
        """Those that were not there for an image with the present files: it would look different with them."""
        self._patience_seconds = WAIT_SECONDS
        self._images = 0

    @contextmanager
    def image(self) -> Iterator[None]:
        """Wraps the making of an image. One inside another, a detailer's, has the answers of that."""
        if self._images == 0:
            self.held, self._patience_seconds = {}, WAIT_SECONDS
        self._images += 1
        try:
            yield
        finally:
            self._images -= 1
            if self._images == 0:
                AHEAD.drop()

    def takes(self, key: Key) -> bool:
        """Returns True if the present image is made with this kernel. Outside an image only a yes is held.

        Waits a moment for a kernel that is being compiled, in an image alone.
        """
        held = self.held
        found = held.get(key)
        if found is None:
            is_wanted = key not in self._failed and key not in self._late and self.is_on() and self._is_faster(key)
            found = is_wanted and (self.compiler.ready(*key) or self._comes(key))
            if is_wanted and not found and self._images:
                self._too_late(key)
            if found or self._images:
                held[key] = found
                way = "fused" if found else "not fused"
                log.debug("%s, rank %d, %s on %s: %s", key.kind, key.rank, key.dtype, key.device, way)
        return found

    def may_take(self, key: Key) -> bool:
        """Returns True if an image may be made with this kernel, now or once it is compiled."""
        if key in self._failed or not self.is_on() or recipe_of(key.kind) is None or bucket_of(key.rank) is None:
            return False
        if not self._is_faster(key):
            return False
        state = self.compiler.state(key.kind)
        return state == WORKS or (key.device.type == "cuda" and not state.startswith(REFUSED))

    def failed(self, key: Key, error: Exception) -> None:
        """Notes that a kernel has failed, and says so once: it is not taken again, and the others of its kind not in this image."""
        if key in self._failed:
            return
        self._failed.add(key)
        self.held = {held: taken and held.kind != key.kind for held, taken in self.held.items()} | {key: False}
        if not self.compiler.state(key.kind).startswith(REFUSED):
            # That was said.
            say(log, logging.WARNING, "mode.kernel_failed", kind=key.kind, error=f"{type(error).__name__}: {error}")

    def expect(self, kinds: Collection[str], device: torch.device, dtype: torch.dtype) -> None:
        """Has the kernels for usual LoRAs compiled in the background, for a model that has none yet.

        Args:
            kinds: `Stored.kind` of its weights.
            device: Where it will run.
            dtype: Of its activations.
        """
        if kinds and self.is_on():
            usual = (*([0] if self.casts_too() else []), *USUAL_RANKS)
            for rank in usual:
                if faster := [kind for kind in kinds if beats_bypass(kind, rank)]:
                    self.compiler.prepare(faster, device, dtype, [rank])
            if products := self._products(kinds):
                self.compiler.prepare(products, device, dtype, USUAL_RANKS[:1])

    def prepare(self, keys: Iterable[Key], are_new_files: bool = False) -> None:
        """Has kernels compiled in the background. Between images the next call of a layer asks anew.

        Args:
            keys: For the layers of a model, after a change of its stack.
            are_new_files: True if other LoRAs have come, and not the same ones with other strengths.
        """
        if self._images == 0:
            self.held = {}
        if are_new_files:
            # The present image ends as it has begun.
            self._late = {key for key, taken in self.held.items() if not taken}
        ranks: dict[tuple[str, torch.device, torch.dtype], set[int]] = {}
        for key in keys:
            ranks.setdefault((key.kind, key.device, key.dtype), set()).add(key.rank)
        # Kinds with the same ranks together: a DoRA's or a LoHa's rank beside LoRAs is none of theirs.
        groups: dict[tuple[torch.device, torch.dtype, tuple[int, ...]], list[str]] = {}
        for (kind, device, dtype), mine in ranks.items():
            groups.setdefault((device, dtype, tuple(sorted(mine))), []).append(kind)
        for (device, dtype, same), kinds in groups.items():
            self.compiler.prepare(sorted([*kinds, *self._products(kinds)]), device, dtype, same, soon=True)

    def _is_faster(self, key: Key) -> bool:
        if split_kind(key.kind).form == ONE_TOKEN:
            return self.multiplies_tokens
        return beats_bypass(key.kind, key.rank)

    def _products(self, kinds: Iterable[str]) -> list[str]:
        """Returns the kernels for one token: which layers see one is found out when they are called."""
        if not self.multiplies_tokens:
            return []
        return [ONE_TOKEN + kind for kind in kinds if recipe_of(ONE_TOKEN + kind) is not None]

    def _too_late(self, key: Key) -> None:
        self._late.add(key)
        if self.compiler.state(key.kind) == COMPILING:
            say(log, logging.INFO, "mode.kernel_late", kind=key.kind, rank=key.rank, seconds=WAIT_SECONDS)

    def _comes(self, key: Key) -> bool:
        """Waits for a kernel that is being compiled; returns False if it is not there when the image's patience ends."""
        while self._images and self._patience_seconds > 0 and self.compiler.state(key.kind) == COMPILING:
            begin = time.monotonic()
            time.sleep(_LOOK_SECONDS)
            self._patience_seconds -= time.monotonic() - begin
            if self.compiler.ready(*key):
                return True
        return False


class Twin:
    """Plain torch in the place of the kernels: slow, and there at once. For tests."""

    def ready(self, kind: str, device: torch.device, dtype: torch.dtype, rank: int) -> bool:
        return True

    def prepare(
        self, kinds: Iterable[str], device: torch.device, dtype: torch.dtype, ranks: Iterable[int], soon: bool = False
    ) -> None:
        pass

    def state(self, kind: str) -> str:
        return WORKS


CHOICE = FusedChoice(Twin() if os.environ.get(SWITCH) == "twin" else KERNELS)
"""Of the process, as the kernels are. `LORA_GUARD_KERNELS=twin` in the environment has plain torch do the kernels' work."""
