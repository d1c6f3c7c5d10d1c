"""Brings swapped weights to the card ahead, on a stream of its own, while the card computes the layers between.

A layer that runs swapped copies its weight when it is called, and the card waits for the link. The order of the layers is that of
the step before, so the next ones are known: the first one's copy begins with the step, a further one's when a layer before it is
called, and it finds its weight there. Two on their way keep a slow link busy while the card is a little early or late.

The memory is taken on the stream of the forward pass, so that it is given back as any other. The room for swapping is planned for
two copies of the largest layer, in the type that the card computes in (`planning/on_card.py`): the second one is begun only where
what lies on the card as it is stored leaves room for it there. Nothing is begun across the end of a step, whose memory others want.

Only what lies in pinned RAM: from ordinary RAM the processor copies, and would be busy with it in any case.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch

from ..memory.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)

SWITCH = "LORA_GUARD_SWAP_AHEAD"
"""0 in the environment: each layer copies its own weight when it is called."""

MOST_AHEAD = 2
"""Layers whose copies are on their way at the same time."""
MOST_PLACES = 4096
"""In RAM, of which it is kept that they are pinned."""

Tensors: TypeAlias = tuple[torch.Tensor, ...]


class Layer(Protocol):
    """A layer that runs swapped. One object for each, which can be referred to weakly."""

    spare_bytes: int
    """What its weight takes on the card as values, less what its copy takes as it is stored."""

    def in_ram(self) -> Tensors | None:
        """Returns what it copies to the card, where that lies in RAM; None where it does not."""
        ...


class Link(Protocol):
    """Copies to a card."""

    def copy(self, tensors: Tensors, device: torch.device) -> Tensors:
        """Returns copies for the forward pass, made in it. What lies on the card already is returned as it is."""
        ...

    def begin(self, tensors: Tensors, device: torch.device) -> tuple[Tensors, object]:
        """Begins to copy beside the forward pass; returns the copies, and what `wait` needs."""
        ...

    def wait(self, begun: object, device: torch.device) -> bool:
        """Makes the forward pass that the copies were begun for wait, at the place where it is now. The processor goes on.

        Returns:
            False if the present one is on another stream: their memory is not its own.
        """
        ...

    def is_fast(self, tensors: Tensors) -> bool:
        """Returns True if the card copies all of them by itself."""
        ...


class _Begun(NamedTuple):
    done: torch.cuda.Event
    main: torch.cuda.Stream
    """On which the memory was taken, and goes back to."""


_RAW_STREAM: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""The address of the current stream of a card. torch without CUDA has no such function."""


def _is_current(stream: torch.cuda.Stream, device: torch.device) -> bool:
    if _RAW_STREAM is None or device.index is None:
        return torch.cuda.current_stream(device) == stream
    # In every swapped layer, and a twentieth of the time that an object for the stream takes.
    return _RAW_STREAM(device.index) == stream.cuda_stream


class CudaLink:
    """The link of a CUDA card: a stream for each card.

    Events are used again, and where memory is pinned is asked once: both are questions to the driver, in every swapped layer.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._events: dict[torch.device, list[torch.cuda.Event]] = {}
        """Those that nothing will be asked to wait for. An interrupt may leave one in here twice: the streams then wait a little longer."""
        self._pinned: set[tuple[int, int]] = set()
        """Addresses and sizes. What lies there by now may be another tensor, whose copy keeps the processor busy then."""

    def copy(self, tensors: Tensors, device: torch.device) -> Tensors:
        return tuple(one if one.device == device else one.to(device, non_blocking=True) for one in tensors)

    def begin(self, tensors: Tensors, device: torch.device) -> tuple[Tensors, object]:
        side = self._streams.get(device)
        if side is None:
            side = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own
        main = torch.cuda.current_stream(device)
        there = tuple(torch.empty(one.shape, dtype=one.dtype, device=device) for one in tensors)
        done, here = self._event(device), torch.cuda.current_device()
        try:
            # The memory may be in use until here.
            done.record(main)
            side.wait_event(done)
            # Not by torch's context manager, which asks three times for the stream that is left.
            try:
                torch.cuda.set_stream(side)
                for one, copy in zip(tensors, there, strict=True):
                    copy.copy_(one, non_blocking=True)
            finally:
                torch.cuda.set_stream(main)
                if here != main.device_index:
                    # A stream brings its card with it.
                    torch.cuda.set_device(here)
            done.record(side)
        except BaseException:
            # An interrupt may have come before the stream was left.
            torch.cuda.set_stream(main)
            # What was begun goes on, and the memory is about to be given back.
            main.wait_stream(side)
            raise
        return there, _Begun(done, main)

    def wait(self, begun: object, device: torch.device) -> bool:
        assert isinstance(begun, _Begun)
        begun.main.wait_event(begun.done)
        self._events.setdefault(device, []).append(begun.done)
        return _is_current(begun.main, device)

    def is_fast(self, tensors: Tensors) -> bool:
        return all(self._is_pinned(one) for one in tensors)

    def _event(self, device: torch.device) -> torch.cuda.Event:
        free = self._events.get(device)
        return free.pop() if free else torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        place = tensor.data_ptr(), tensor.nbytes
        if place in self._pinned:
            return True
        if not tensor.is_pinned():
            return False
        if len(self._pinned) >= MOST_PLACES:
            self._pinned.clear()
        self._pinned.add(place)
        return True


class _Upcoming(NamedTuple):
    layer: weakref.ref[Layer]
    device: torch.device
    tensors: Tensors
    """In RAM: held as long as the card reads them."""
    there: Tensors
    begun: object


class _First(NamedTuple):
    layer: weakref.ref[Layer]
    device: torch.device


class SwappedAhead:
    """The swapped layers of the model that a thread is running."""

    def __init__(self, link: Link | None = None) -> None:
        """
        Args:
            link: None for a CUDA card's.
        """
        self._link: Link = link or CudaLink()
        self._after: weakref.WeakKeyDictionary[Layer, weakref.ref[Layer]] = weakref.WeakKeyDictionary()
        """What came after each layer in the last step."""
        self._firsts: weakref.WeakKeyDictionary[object, _First] = weakref.WeakKeyDictionary()
        """What came first in the last step of each model."""
        self._called: weakref.WeakSet[Layer] = weakref.WeakSet()
        """In this step."""
        self._model: weakref.ref[object] | None = None
        """Whose step has begun, until its first layer is called."""
        self._last: weakref.ref[Layer] | None = None
        self._upcoming: deque[_Upcoming] = deque()
        """In the order in which they will be called."""
        self._spare_bytes = 0
        """Of the layer that leaves most beside its copy in the room that is planned."""
        self._thread = 0
        self._is_full = False
        """True after memory has ended in this image: torch empties its cache each time."""
        self._is_refused = os.environ.get(SWITCH) == "0"

    def step_begins(self, model: object) -> None:
        """Begins with the first layers of a step, before it has any.

        Args:
            model: The one whose step it is.
        """
        if self._is_refused:
            return
        self._go_with_thread()
        self._leave_begun()
        self._called.clear()
        self._last, self._model = None, weakref.ref(model)
        first = self._firsts.get(model)
        if first is not None:
            self._begin_from(first.layer, first.device)

    def step_ends(self) -> None:
        """Gives back what was begun and is not needed at the end of a step, and takes nothing that comes now for a part of it."""
        if self._thread != threading.get_ident():
            return
        reference, self._model = self._model, None
        if reference is not None and (model := reference()) is not None:
            # None of its layers was called: what came with the step was for nothing, and would be in each.
            self._firsts.pop(model, None)
        self._last = None
        self._leave_begun()

    def bring(self, layer: Layer, tensors: Sequence[torch.Tensor], device: torch.device) -> Tensors:
        """Returns copies on a card of what a layer has in RAM. What lies there already is returned as it is.

        Args:
            layer: The layer that is called.
            tensors: Its tensors now.
            device: Where its input lies.

        Raises:
            torch.cuda.OutOfMemoryError: There is no room.
        """
        mine = tuple(tensors)
        if self._is_refused or device.type != "cuda":
            return self._link.copy(mine, device)
        self._go_with_thread()
        there = self._taken(layer, mine, device)
        if there is None:
            there = self._link.copy(mine, device)
        self._note(layer, device)
        self._spare_bytes = max(self._spare_bytes, layer.spare_bytes)
        before = self._upcoming[-1].layer() if self._upcoming else layer
        if before is not None:
            self._begin_from(self._after.get(before), device)
        return there

    def drop(self) -> None:
        """Gives back what was begun and is not needed, at the end of an image or after an error."""
        self._leave_begun()
        self._last, self._model, self._is_full = None, None, False
        self._called.clear()

    def give_way(self) -> None:
        """Gives back what was begun, and begins nothing more in this image: memory has ended in a layer."""
        self.drop()
        self._is_full = True

    def _go_with_thread(self) -> None:
        if self._thread != threading.get_ident():
            # Another one runs another model, or this one is new.
            self.drop()
            self._thread = threading.get_ident()

    def _leave_begun(self) -> None:
        while self._upcoming:
            upcoming = self._upcoming[0]
            # Its memory goes back to the forward pass, which must not write there before. In this order: an interrupt in between
            # leaves it here.
            self._link.wait(upcoming.begun, upcoming.device)
            self._upcoming.popleft()

    def _taken(self, layer: Layer, tensors: Tensors, device: torch.device) -> Tensors | None:
        if not self._upcoming:
            return None
        upcoming = self._upcoming[0]
        is_here = self._link.wait(upcoming.begun, upcoming.device) and upcoming.device == device
        self._upcoming.popleft()
        if is_here and upcoming.layer() is layer and _are_same(upcoming.tensors, tensors):
            return upcoming.there
        self._leave_begun()
        before = None if self._last is None else self._last()
        if before is not None:
            # It was for nothing, and would be in each step: what came after the end of one was learnt as if it were a part of it.
            self._after.pop(before, None)
        return None

    def _note(self, layer: Layer, device: torch.device) -> None:
        if layer in self._called:
            # The next step.
            self._called.clear()
            self._last = None
        before = None if self._last is None else self._last()
        if before is not None:
            self._after[before] = weakref.ref(layer)
        model, self._model = None if self._model is None else self._model(), None
        if model is not None:
            self._firsts[model] = _First(weakref.ref(layer), device)
        self._last = weakref.ref(layer)
        self._called.add(layer)

    def _begin_from(self, reference: weakref.ref[Layer] | None, device: torch.device) -> None:
        """Begins with a layer, and with those that come after it."""
        while reference is not None and len(self._upcoming) < MOST_AHEAD and self._begin(reference, device):
            coming = reference()
            reference = None if coming is None else self._after.get(coming)

    def _begin(self, reference: weakref.ref[Layer], device: torch.device) -> bool:
        """Begins with a layer; False where it needs nothing, or has no room."""
        coming = reference()
        if self._is_full or self._is_refused or coming is None or coming in self._called:
            return False
        for one in self._upcoming:
            if one.layer() is coming:
                return False
        try:
            tensors = coming.in_ram()
            if tensors is None or not self._link.is_fast(tensors):
                return False
            ahead = sum(_bytes(one.tensors) for one in self._upcoming)
            if ahead and ahead + _bytes(tensors) > self._spare_bytes:
                return False
            self._upcoming.append(_Upcoming(reference, device, tensors, *self._link.begin(tensors, device)))
        except Exception as error:
            self._is_full = is_out_of_memory(error)
            # A driver that refuses a stream would refuse it in each layer of each step.
            self._is_refused = not self._is_full
            log.debug("swapped weights are not copied ahead", exc_info=True)
            return False
        return True


def _bytes(tensors: Tensors) -> int:
    return sum(one.nbytes for one in tensors)


def _are_same(ahead: Tensors, now: Tensors) -> bool:
    if len(ahead) != len(now):
        return False
    for a, b in zip(ahead, now, strict=True):
        if a.data_ptr() != b.data_ptr() or a.dtype is not b.dtype or a.shape != b.shape:
            return False
    return True


AHEAD = SwappedAhead()
"""Of the process."""
