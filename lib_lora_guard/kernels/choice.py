"""Which kernels this process uses: compiled and probed in the background, refused once and said once."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple, TypeVar

import torch

from ..locks import while_locked
from ..messages import Message, reason, say
from .launch import FRAGMENTS_SWITCH, Kernel, OldTritonError, interprets, load_triton, triton_version
from .probe import probe, probe_token
from .recipes import BUCKETS, OLDEST_TRITON, ONE_TOKEN, bucket_of, recipe_of, split_kind
from .token_product import TokenProduct

log = logging.getLogger(__name__)

K = TypeVar("K")

SWITCH = "LORA_GUARD_KERNELS"
"""The environment variable: "0" keeps plain torch, for bug reports."""
OLDEST_CARD = (7, 5)
"""The compute capability of Turing. For older cards Triton's compiler ends the process, in some of its versions."""
UNTRIED, COMPILING, WORKS, REFUSED = "untried", "compiling", "works", "refused"


class Slot(NamedTuple):
    """What one kernel is compiled for, and with it the one for factors with a strength for each rank."""

    kind: str
    device: torch.device
    dtype: torch.dtype
    bucket: int
    even: bool


class Kernels:
    """The choice of a process. A state by kind of weight: "untried", "compiling", "works" or "refused: WHY"."""

    def __init__(self) -> None:
        self._enabled = os.environ.get(SWITCH, "1") != "0"
        self._kernels: dict[Slot, tuple[Kernel, Kernel]] = {}
        self._products: dict[Slot, tuple[TokenProduct, TokenProduct]] = {}
        self._refused: dict[str, str] = {}
        self._asked: set[Slot] = set()
        self._jobs: deque[Slot] = deque()
        self._worker: threading.Thread | None = None
        self._lock = threading.RLock()

    @property
    def enabled(self) -> bool:
        """False where kernels are switched off: plain torch everywhere."""
        return self._enabled

    def switch(self, on: bool) -> None:
        """Switches kernels on or off, for the settings. The environment's "0" is stronger."""
        self._enabled = on and os.environ.get(SWITCH, "1") != "0"

    def state(self, kind: str) -> str:
        """Returns the state of a kind."""
        if kind in self._refused:
            return f"{REFUSED}: {self._refused[kind]}"

        def present() -> str:
            if any(slot.kind == kind for slot in self._jobs):
                return COMPILING
            return WORKS if any(slot.kind == kind for slot in (*self._kernels, *self._products)) else UNTRIED

        return while_locked(self._lock, present)

    def states(self) -> dict[str, str]:
        """Returns the states of all kinds that were asked for."""
        kinds = while_locked(self._lock, lambda: dict.fromkeys([*self._refused, *(slot.kind for slot in self._asked)]))
        return {kind: self.state(kind) for kind in kinds}

    def ready(self, kind: str, device: torch.device, dtype: torch.dtype, rank: int) -> bool:
        """Returns True where a probed kernel is there for a weight of this kind. Never waits."""
        if not self._enabled:
            return False
        find = self.product if split_kind(kind).form == ONE_TOKEN else self.kernel
        return find(kind, device, dtype, rank, False) is not None

    def kernel(self, kind: str, device: torch.device, dtype: torch.dtype, rank: int, per_rank: bool) -> Kernel | None:
        """Returns the probed kernel; None while there is none, and where kernels are switched off.

        Args:
            kind: `Stored.kind`.
            device: The weight's.
            dtype: The layer's.
            rank: The joined rank, 0 for none.
            per_rank: Whether each rank has a strength of its own.
        """
        return self._of(self._kernels, kind, device, dtype, rank, per_rank)

    def product(
        self, kind: str, device: torch.device, dtype: torch.dtype, rank: int, per_rank: bool
    ) -> TokenProduct | None:
        """Returns the probed product with one token, as `kernel` does a kernel. `kind`: ONE_TOKEN and `Stored.kind`."""
        return self._of(self._products, kind, device, dtype, rank, per_rank)

    def _of(
        self,
        pairs: dict[Slot, tuple[K, K]],
        kind: str,
        device: torch.device,
        dtype: torch.dtype,
        rank: int,
        per_rank: bool,
    ) -> K | None:
        slot = _slot(kind, _with_index(device), dtype, rank)
        if slot is None or not self._enabled:
            return None
        pair = pairs.get(slot)
        return None if pair is None or kind in self._refused else pair[per_rank]

    def prepare(
        self, kinds: Iterable[str], device: torch.device, dtype: torch.dtype, ranks: Iterable[int], soon: bool = False
    ) -> None:
        """Begins to compile and probe in a background thread, each kernel once; returns at once.

        The thread imports Triton first, which slows the others: best called as soon as a model is loaded.

        Args:
            kinds: Of the kernels: all for the same ranks.
            device: Where they lie when they are used.
            dtype: The layers' compute dtype.
            ranks: Their joined ranks; 0 for the dequantisation alone. The first is compiled first.
            soon: Before what waits already. False where no LoRA needs them yet.
        """
        if not self._enabled or dtype not in (torch.float16, torch.bfloat16):
            return
        if device.type != "cuda" and not interprets():
            return
        device = _with_index(device)
        kinds = dict.fromkeys(kinds)
        found = (_slot(kind, device, dtype, rank) for rank in ranks for kind in kinds)
        slots = list(dict.fromkeys(slot for slot in found if slot is not None))
        if not soon:
            # What cannot be had is said when a LoRA could use it.
            slots = [slot for slot in slots if _unsuitable(slot) is None]
        while_locked(self._lock, lambda: self._add(slots, soon))

    def _add(self, slots: list[Slot], soon: bool) -> None:
        new = [slot for slot in slots if slot not in self._asked and slot.kind not in self._refused]
        self._jobs.extend(new)
        # After that: of a slot that was asked for and is no job nothing would come.
        self._asked.update(new)
        if soon:
            # All but the one that is being compiled.
            rest = [self._jobs.pop() for _ in range(len(self._jobs) - 1)][::-1]
            self._jobs.extend(sorted(rest, key=lambda slot: slot not in slots))
        # Jobs without a worker: its start was interrupted.
        if self._jobs and (self._worker is None or not self._worker.is_alive()):
            self._worker = threading.Thread(target=self._work, name="lora-guard-kernels", daemon=True)
            self._worker.start()

    def refuse(self, kind: str, why: str | BaseException) -> None:
        """Gives the kernels of a kind up for this process, and says it once."""
        if kind in self._refused:
            return
        why = reason(why) if isinstance(why, BaseException) else why
        # In one call of C: of two threads one says it.
        if self._refused.setdefault(kind, why) is why:
            say(log, logging.WARNING, "kernels.refused", kind=kind, why=_short(why), switch=SWITCH)

    def wait(self, seconds: float) -> bool:
        """Waits until nothing is being compiled. For tests and benchmarks; returns False when time is up."""
        worker = self._worker
        if worker is not None:
            worker.join(seconds)
        return worker is None or not worker.is_alive()

    def _work(self) -> None:
        begin, done = time.monotonic(), 0
        with contextlib.suppress(Exception):  # said where the first kernel is made
            load_triton()
        while True:
            with self._lock:
                if not self._jobs:
                    self._worker = None
                    break
                slot = self._jobs[0]
            if slot.kind not in self._refused:
                done += self._make(slot)
            with self._lock:
                self._jobs.popleft()
        if done:
            say(log, logging.INFO, "kernels.ready", count=done, seconds=time.monotonic() - begin)

    def _make(self, slot: Slot) -> bool:
        try:
            why = _unsuitable(slot) or _needs_newer_triton(slot.kind)
            if why is not None:
                self.refuse(slot.kind, why)
                return False
            # A rank that is no multiple of 16 leaves part of its bucket empty.
            rank = slot.bucket if slot.even else slot.bucket - 3
            form = split_kind(slot.kind).form
            with _aside(slot.device):
                if form == ONE_TOKEN:
                    one, many = (TokenProduct(slot.kind, slot.dtype, per_rank) for per_rank in (False, True))
                    for product in (one, many):
                        probe_token(product, slot.device)
                    self._products[slot] = one, many
                    return True
                self._kernels[slot] = _probed(slot, rank, 1 if not rank or form else 2)
            return True
        except torch.cuda.OutOfMemoryError:
            with self._lock:
                self._asked.discard(slot)  # the next call of prepare tries again
        except ImportError as error:
            self._no_triton(error)
        except Exception as error:
            self.refuse(slot.kind, f"{type(error).__name__}: {error}")
        return False

    def _no_triton(self, error: ImportError) -> None:
        """Gives all kernels up, with one sentence."""
        sentence = Message("kernels.no_triton", {"error": str(error)})
        if isinstance(error, OldTritonError):
            sentence = Message("kernels.old_triton", {"found": str(error), "oldest": _dotted(OLDEST_TRITON)})
        elif sys.platform == "win32":
            sentence = Message("kernels.install", {"error": str(error)})
        with self._lock:
            first = not any(isinstance(why, Message) and why.key == sentence.key for why in self._refused.values())
            self._refused.update((slot.kind, sentence) for slot in self._asked)
        if first:
            say(log, logging.INFO, sentence.key, **sentence.facts)


KERNELS = Kernels()
"""The choice of this process."""


def _probed(slot: Slot, rank: int, count: int) -> tuple[Kernel, Kernel]:
    """Returns a slot's two kernels, of which `count` are probed at a rank.

    Raises:
        Exception: What the compiler or the probe says. Not of kernels in the places of the product: then the ordinary ones are taken.
    """
    for fragments in (None, False):
        pair = tuple(
            Kernel(slot.kind, slot.dtype, slot.bucket, slot.even, per_rank, fragments=fragments)
            for per_rank in (False, True)
        )
        try:
            for kernel in pair[:count]:
                probe(kernel, rank, slot.device)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if not pair[0].has_fragments:
                raise
            why = f"{type(error).__name__}: {error}"
            say(log, logging.INFO, "kernels.other_kernel", kind=slot.kind, why=_short(why), switch=FRAGMENTS_SWITCH)
        else:
            return pair[0], pair[1]
    raise AssertionError("the ordinary kernels were probed")


def _unsuitable(slot: Slot) -> str | None:
    if recipe_of(slot.kind) is None:
        return Message("kernels.no_kernel")
    if slot.device.type == "cuda":
        if getattr(torch.version, "hip", None) is not None:
            return Message("kernels.only_nvidia")
        capability = torch.cuda.get_device_capability(slot.device)
        if capability < OLDEST_CARD:
            return Message("kernels.old_card", {"found": _dotted(capability), "oldest": _dotted(OLDEST_CARD)})
        if slot.dtype == torch.bfloat16 and capability < (8, 0):
            return Message("kernels.no_bf16")
    return None


def _needs_newer_triton(kind: str) -> str | None:
    """Returns why a Triton that is new enough for other kinds is not for this one; None where it is. Imports Triton."""
    recipe, found = recipe_of(kind), triton_version()
    if recipe is None or not OLDEST_TRITON <= found < recipe.oldest_triton:
        return None
    return Message("kernels.newer_triton", {"found": _dotted(found), "oldest": _dotted(recipe.oldest_triton)})


def _dotted(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)


@cache
def _slot(kind: str, device: torch.device, dtype: torch.dtype, rank: int) -> Slot | None:
    """Returns what the kernel for a rank is compiled for; None for a rank that none is for."""
    bucket = bucket_of(rank)
    if split_kind(kind).form == ONE_TOKEN:
        # One for all ranks that others have kernels for, and none without a LoRA.
        return Slot(kind, device, dtype, BUCKETS[0], True) if bucket else None
    return None if bucket is None else Slot(kind, device, dtype, bucket, rank % 16 == 0)


def _with_index(device: torch.device) -> torch.device:
    index: int | None = device.index
    if index is None and device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Works on a stream of its own, so that no layer's work waits for a probe."""
    with torch.no_grad():
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device), torch.cuda.stream(_stream(device)):
            yield


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all probes: PyTorch keeps memory for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's


def _short(why: str) -> str:
    """The compiler's errors quote whole programs: keeps the first line."""
    line = next((line for line in why.splitlines() if line.strip()), "")
    return why if line == why and len(line) <= 200 else f"{line[:200]}…"
