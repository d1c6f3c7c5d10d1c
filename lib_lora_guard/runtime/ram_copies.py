"""Keeps copies in RAM of layers that run swapped, or that leave the card and return.

From ordinary RAM a weight goes to the card through a small pinned buffer of the driver (measured: 6 to 9 GB/s, docs/gpu.md);
from pinned RAM the card reads it itself, several times as fast. And a layer whose copy is still there leaves for nothing, where
RAM would have to be allocated for it (1.3 to 1.6 GB/s). Pinned RAM cannot be paged out, and a copy beside the card is RAM that
others lack: there are none on machines with less than 32 GB, and at most an eighth of RAM is pinned.
Every layer is copied and registered by itself: torch's own pinned memory comes in powers of two, and is not given back.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import psutil
import torch

from .. import large_pages
from ..messages import say
from ..patching.parameters import own_parameters
from ..patching.staging import has_ram_for_pinned
from ..units import GB, MB

log = logging.getLogger(__name__)

SMALLEST_BYTES = 1 * MB
"""Smaller weights, such as biases, stay where they are: for them a copy's latency is all."""
SHARE_OF_RAM = 1 / 8
LEAST_LEFT_BYTES = 4 * GB
"""Of RAM that is available: the system and other programs go on."""
WORTH_A_LINE_BYTES = 512 * MB
"""Of the log: less is a usual change from one image to the next."""
REGISTER = 0
"""The usual kind of page-locked memory, in CUDA's words."""
ERRORS_OF_CUDA = (RuntimeError, AssertionError)
"""An AssertionError: torch is not built for CUDA."""
NO_MEMORY = (RuntimeError, MemoryError)
"""Raised where memory ends, by torch on either side and by Python."""


class QuantState(Protocol):
    """What bitsandbytes' 4-bit weights have beside their values."""

    absmax: torch.Tensor
    code: torch.Tensor
    offset: torch.Tensor | None
    nested: bool
    state2: QuantState


class Driver:
    """The part of CUDA's runtime that locks pages of RAM."""

    def register(self, tensor: torch.Tensor) -> bool:
        """Locks the pages of a tensor in RAM; returns False if the driver refuses."""
        return _succeeds(lambda cuda: cuda.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, REGISTER))

    def release(self, tensor: torch.Tensor) -> None:
        """Unlocks the pages, when no copy reads them any more. Pages that were never locked stay as they are."""
        with contextlib.suppress(*ERRORS_OF_CUDA):
            torch.cuda.synchronize()
        _succeeds(lambda cuda: cuda.cudaHostUnregister(tensor.data_ptr()))


class Kept(NamedTuple):
    """A parameter as it lay in RAM before its layer went to the card.

    Attributes:
        parameter: The object. Moving may replace it (bitsandbytes), or its data alone.
        data: Its values in RAM.
        checksum: Of the values on the card, which are the same; None for a small one, whose values are compared.
    """

    parameter: torch.nn.Parameter
    data: torch.Tensor
    checksum: torch.Tensor | None


class _Pinned:
    """The pinned memory of one layer. It is given back with the layer."""

    def __init__(self, layer: torch.nn.Module, driver: Driver) -> None:
        self.tensors: list[torch.Tensor] = []
        self.bytes = 0
        self._driver = driver
        weakref.finalize(layer, self.release).atexit = False

    def add(self, memory: torch.Tensor) -> bool:
        """Locks memory; returns False if the driver refuses."""
        # Held before it is locked: after an interrupt in between, it is found and given back all the same.
        self.tensors.append(memory)
        self.bytes += memory.nbytes
        if self._driver.register(memory):
            return True
        self._drop(memory)
        return False

    def holds(self, data: torch.Tensor) -> bool:
        return data.untyped_storage().data_ptr() in [memory.data_ptr() for memory in self.tensors]

    def retain(self, places: Collection[int]) -> None:
        """Gives back all but the memory that begins at one of `places`."""
        for memory in [one for one in self.tensors if one.data_ptr() not in places]:
            self._driver.release(memory)
            self._drop(memory)

    def release(self) -> None:
        self.retain(())

    def _drop(self, memory: torch.Tensor) -> None:
        self.tensors = [one for one in self.tensors if one is not memory]
        self.bytes = sum(one.nbytes for one in self.tensors)


class _ShortWay(functools.partial[torch.nn.Module]):
    """Stands in place of a layer's `to`. A class of its own, so that it is known wherever an interrupt has left it."""


class RamCopies:
    """Belongs to one takeover. Not for several threads at once: hosts place models in one."""

    def __init__(self, is_on: Callable[[], bool], driver: Driver | None = None) -> None:
        """
        Args:
            is_on: False if the user has switched it off.
            driver: locks pages; None: CUDA's.
        """
        self._is_on, self._driver = is_on, driver or Driver()
        self._pinned: weakref.WeakKeyDictionary[torch.nn.Module, _Pinned] = weakref.WeakKeyDictionary()
        self._kept: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, Kept]] = weakref.WeakKeyDictionary()
        self._short: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        """The layers that may have the short way in place of their `to`."""
        self._refused = False
        self._room_for_leaving_bytes = 0
        """What may be pinned of weights that leave the card, inside `pinning`."""

    @property
    def works(self) -> bool:
        """True where layers are pinned: there is RAM for it, the driver takes part, and the user has not switched it off."""
        return not self._refused and self._is_on() and has_ram_for_pinned()

    @property
    def bytes(self) -> int:
        """The RAM that is pinned now."""
        return sum(one.bytes for one in self._pinned.values())

    @property
    def are_unwanted(self) -> bool:
        """True if there are copies that the user has switched off meanwhile."""
        return not self._is_on() and bool(self.bytes or self._kept)

    def pin(self, layers: Iterable[torch.nn.Module]) -> int:
        """Copies the large weights of layers that lie in RAM to pinned memory, which takes their place.

        Returns:
            The bytes that were pinned. It ends where RAM or the driver has no more room; the rest stays as it is.
        """
        # Once refused there are no new ones; those before are given back all the same.
        self._prune()
        if not self.works:
            return 0
        room, done = self._room_bytes(), 0
        for layer in layers:
            for parameter in list(layer.parameters(recurse=False)):
                size = parameter.data.nbytes
                if not self._is_pinnable(layer, parameter):
                    continue
                if size > room:
                    return done
                if not self._pin(layer, parameter):
                    return done
                room, done = room - size, done + size
        return done

    @contextlib.contextmanager
    def pinning(self) -> Iterator[None]:
        """Inside, large weights go from the card to pinned RAM at once; `pin` afterwards would copy them a second time."""
        before, self._room_for_leaving_bytes = self._room_for_leaving_bytes, self._room_bytes() if self.works else 0
        try:
            yield
        finally:
            self._room_for_leaving_bytes = before

    def keeps_all(self) -> bool:
        """Returns True if there is RAM for copies that are not pinned, and others have enough. Asked once for a model."""
        return self.works and _has_ram_for_copies()

    def before_card(self, layer: torch.nn.Module, returns: bool = False) -> dict[str, Kept]:
        """Returns what `on_card` needs of a layer that is about to go to the card; empty if no copy of it is to be kept. Only
        where this `works`: that is asked once for all layers, as it reads the system's numbers.

        Args:
            layer: In RAM.
            returns: Keep its copy in ordinary RAM too (`keeps_all`): its model leaves the card for others, again and again.
        """
        if not (returns or layer in self._pinned):
            return {}
        if next(layer.buffers(recurse=False), None) is not None:
            return {}
        found = dict(layer.named_parameters(recurse=False))
        if any(p.device.type != "cpu" or type(p.data) is not torch.Tensor for p in found.values()):
            return {}
        return {name: Kept(p, p.data, None) for name, p in found.items()}

    def on_card(self, layer: torch.nn.Module, before: dict[str, Kept]) -> None:
        """Keeps the copies in RAM of a layer that is on the card now."""
        now = dict(layer.named_parameters(recurse=False))
        if not before or now.keys() != before.keys():
            return
        try:
            kept = {name: one._replace(checksum=checksum(now[name].data)) for name, one in before.items()}
        except NO_MEMORY as error:
            # The card may be full to the last byte. A copy that cannot be compared is of no use.
            log.debug("no copy of a layer is kept: %s", error)
            return
        self._kept[layer] = kept

    def kept_bytes(self, layers: Iterable[torch.nn.Module]) -> int:
        """Returns the bytes of layers on the card that have their copy in RAM."""
        if not self._kept:
            return 0
        return sum(one.data.nbytes for layer in layers for one in self._kept.get(layer, {}).values())

    def pinned_bytes(self, layers: Iterable[torch.nn.Module]) -> int:
        """Returns the bytes of layers in pinned RAM, which keep that as their copy when they go to the card."""
        if not self.works:
            return 0
        return sum(
            one.data.nbytes
            for layer in layers
            for one in self.before_card(layer).values()
            if self._pinned[layer].holds(one.data)
        )

    def leave(self, layer: torch.nn.Module) -> bool:
        """Puts a layer's copies in RAM in the place of its weights on the card, which are freed.

        Returns:
            False if it has none, or if its weights have become others since; it has to be copied then.
        """
        kept = self._kept.pop(layer, None)
        if not kept:
            return False
        now = dict(layer.named_parameters(recurse=False))
        try:
            is_same = now.keys() == kept.keys() and all(_is_same(now[name], one) for name, one in kept.items())
        except NO_MEMORY as error:
            log.debug("a layer could not be compared with its copy: %s", error)
            return False
        if not is_same:
            return False
        for name, one in kept.items():
            if now[name] is one.parameter:
                one.parameter.data = one.data
            else:
                layer._parameters[name] = one.parameter
        return True

    def to_ram(self, layer: torch.nn.Module) -> bool:
        """Takes a layer off the card: by its copy in RAM, else its large weights are copied into RAM that is zeroed before.

        Returns:
            False if something of the layer is still on the card, and has to be moved by its own `to`: small weights, or all that
            RAM had no room for in this way.
        """
        if self.leave(layer):
            return True
        if not self._is_on():
            return False
        for parameter in list(layer.parameters(recurse=False)):
            data = parameter.data
            if _lies_on_card(data) and data.nbytes >= SMALLEST_BYTES and _is_plain(parameter):
                if data.nbytes <= self._room_for_leaving_bytes:
                    if self._pin(layer, parameter):
                        self._room_for_leaving_bytes -= data.nbytes
                        continue
                    # The others need not try: each would be zeroed twice.
                    self._room_for_leaving_bytes = 0
                with torch.inference_mode(data.is_inference()), torch.no_grad():
                    memory = _zeroed(data.nbytes)
                    if memory is None:
                        return False
                    try:
                        scales = [(state, name, scale.to("cpu")) for state, name, scale in _scales(parameter)]
                    except NO_MEMORY as error:
                        log.debug("RAM has no room for the scales of a weight: %s", error)
                        return False
                    parameter.data = _copied(data, memory)
                    for state, name, scale in scales:
                        setattr(state, name, scale)
        return not layer._buffers and not any(_lies_on_card(p.data) for p in layer.parameters(recurse=False))

    @contextlib.contextmanager
    def moving(self, layers: Iterable[torch.nn.Module], return_all: bool = False) -> Iterator[None]:
        """Wraps the host's own moves of a model: copies in RAM are kept and used.

        Args:
            layers: Of the model.
            return_all: Keep ordinary copies too; see `before_card`.
        """
        changed, before = [], {}
        is_on, works = self._is_on(), self.works
        returns = return_all and self.keeps_all()
        try:
            for layer in layers:
                # Left by a move that was interrupted while it ended, or that of a move around this one, which is slower then.
                self._own_way(layer)
                if is_on and "to" not in layer.__dict__ and self._is_on_card(layer):
                    changed.append(layer)
                    self._short.add(layer)
                    layer.__dict__["to"] = _ShortWay(self._to, layer)
                elif works and (found := self.before_card(layer, returns)):
                    before[layer] = found
            yield
        finally:
            for layer in changed:
                self._own_way(layer)
        for layer, found in before.items():
            if self._is_on_card(layer):
                self.on_card(layer, found)

    def _to(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Stands in place of the `to` of a layer on the card, for a while."""
        parsed: Sequence[Any] = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = parsed[:2]
        if device is not None and device.type == "cpu" and dtype is None and self.to_ram(layer):
            return layer
        return torch.nn.Module.to(layer, *args, **kwargs)

    def _own_way(self, layer: torch.nn.Module) -> None:
        """Gives a layer its own `to` back. Another extension's stays."""
        if isinstance(layer.__dict__.get("to"), _ShortWay):
            del layer.__dict__["to"]
        self._short.discard(layer)

    def forget(self, layers: Iterable[torch.nn.Module]) -> None:
        """Drops the copies of layers whose weights are about to become others."""
        for layer in layers:
            self._kept.pop(layer, None)

    def drop_unused(self) -> int:
        """Gives back the copies of layers that are on the card; returns the bytes."""
        dropped = 0
        for layer, kept in list(self._kept.items()):
            dropped += sum(one.data.nbytes for one in kept.values())
            self._kept.pop(layer, None)
            pinned = self._pinned.get(layer)
            if pinned is not None:
                pinned.release()
                del self._pinned[layer]
        return dropped

    def give_back(self) -> None:
        """Gives everything back: copies beside the card, and the lock of pinned RAM, in which swapped weights stay.

        Not while an image is made: the card may read that RAM.
        """
        size = self.bytes
        for layer in list(self._short):
            self._own_way(layer)
        self._kept.clear()
        for layer, pinned in list(self._pinned.items()):
            pinned.release()
            del self._pinned[layer]
        if size:
            level = logging.INFO if size >= WORTH_A_LINE_BYTES else logging.DEBUG
            say(log, level, "memory.unpinned", size_mb=size / MB)

    def _prune(self) -> None:
        """Gives back what no layer refers to any more, after the host has moved it by its own way."""
        for layer, pinned in list(self._pinned.items()):
            datas = [p.data for p in layer.parameters(recurse=False)]
            datas += [one.data for one in self._kept.get(layer, {}).values()]
            pinned.retain({data.untyped_storage().data_ptr() for data in datas if data.device.type == "cpu"})

    @staticmethod
    def _is_on_card(layer: torch.nn.Module) -> bool:
        return all(map(_lies_on_card, own_parameters(layer)))

    def _room_bytes(self) -> int:
        memory = psutil.virtual_memory()
        return int(min(memory.total * SHARE_OF_RAM - self.bytes, memory.available - LEAST_LEFT_BYTES))

    def _is_pinnable(self, layer: torch.nn.Module, parameter: torch.nn.Parameter) -> bool:
        data = parameter.data
        if data.device.type != "cpu" or data.nbytes < SMALLEST_BYTES or type(data) is not torch.Tensor:
            return False
        if not data.is_contiguous():
            return False
        pinned = self._pinned.get(layer)
        return (pinned is None or not pinned.holds(data)) and not data.is_pinned()

    def _pin(self, layer: torch.nn.Module, parameter: torch.nn.Parameter) -> bool:
        """Copies a weight to pinned RAM, from where it lies.

        Returns:
            False if RAM has no room, or if the driver has refused, once and for all.
        """
        data = parameter.data
        where = _lies_on_card(data)
        scales = [(state, name, scale) for state, name, scale in _scales(parameter) if _lies_on_card(scale) is where]
        # Parameters that were made in inference mode stay such, as when torch moves them.
        with torch.inference_mode(data.is_inference()), torch.no_grad():
            # One piece for all: the system locks whole pages, and none of them twice.
            size = sum(_aligned(one.nbytes) for one in (data, *(scale for _, _, scale in scales)))
            memory = _zeroed(size)
            if memory is None:
                log.info("RAM has no room to pin %.0f MB more: swapped weights stay in ordinary RAM", size / MB)
                return False
            pinned = self._pinned.get(layer)
            if pinned is None:
                pinned = self._pinned[layer] = _Pinned(layer, self._driver)
            if not pinned.add(memory):
                self._refused = True
                log.info("the driver locks no more RAM: swapped weights stay in ordinary RAM")
                return False
            start = _aligned(data.nbytes)
            for state, name, scale in scales:
                setattr(state, name, _copied(scale, memory[start : start + scale.nbytes]))
                start += _aligned(scale.nbytes)
            parameter.data = _copied(data, memory[: data.nbytes])
        return True


def _scales(parameter: torch.nn.Parameter) -> list[tuple[QuantState, str, torch.Tensor]]:
    """Returns the scales of a 4-bit weight, each with the object that has it and its name there; of any other weight, nothing.

    They are an eighth of the weight's bytes, and go to the card with it in each call.
    """
    state: QuantState | None = vars(parameter).get("quant_state")
    states = [] if state is None else [state, *([state.state2] if state.nested else [])]
    found = [(one, name, getattr(one, name, None)) for one in states for name in ("absmax", "code", "offset")]
    return [(one, name, scale) for one, name, scale in found if scale is not None]


def _copied(values: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    there = memory.view(values.dtype).view(values.shape)
    there.copy_(values)
    return there


def _aligned(size_bytes: int) -> int:
    """Returns the bytes from one tensor's start to the next one's: a multiple of 64, as torch lays them."""
    return -(-size_bytes // 64) * 64


def _succeeds(call: Callable[[Any], int]) -> bool:
    """Calls a function of CUDA's runtime; returns False if it reports an error."""
    try:
        is_done = not int(call(torch.cuda.cudart()))  # type: ignore[no-untyped-call]  # torch's own
    except ERRORS_OF_CUDA:
        is_done = False
    if not is_done:
        # CUDA reports an error again at the next call of any program part: this one takes it.
        with contextlib.suppress(*ERRORS_OF_CUDA):
            torch.zeros(1, device="cuda").add_(1)
    return is_done


def _has_ram_for_copies() -> bool:
    """Returns True if copies in ordinary RAM beside the card leave enough of it."""
    return bool(psutil.virtual_memory().available > LEAST_LEFT_BYTES)


def _zeroed(size: int) -> torch.Tensor | None:
    """Returns bytes of RAM that exist, `(size,)`; None if there is no room for them.

    Zeroing takes all cores, and is what makes RAM exist; a copy into RAM that does not exist yet does that with one core
    (measured on 16 cores: 6.5 GB/s against 1.4, docs/gpu.md).
    """
    try:
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        large_pages.ask(memory.data_ptr(), size)
        return memory.zero_()
    except NO_MEMORY as error:
        log.debug("RAM has no room for the copy of a weight: %s", error)
        return None


def checksum(values: torch.Tensor) -> torch.Tensor | None:
    """Returns a sum over all bytes of a tensor, where it lies; None for a small one."""
    if values.nbytes < SMALLEST_BYTES or not values.is_contiguous():
        return None
    raw = _bytes_of(values)
    whole = raw.numel() // 8 * 8
    return raw[:whole].view(torch.int64).sum() + raw[whole:].sum(dtype=torch.int64)


def _lies_on_card(values: torch.Tensor) -> bool:
    return values.device.type != "cpu"


def _bytes_of(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1).view(torch.uint8)


def _is_plain(parameter: torch.nn.Parameter) -> bool:
    """False for a library's own kind of parameter, of which parts lie elsewhere."""
    data, state = parameter.data, vars(parameter).get("quant_state")
    return type(data) is torch.Tensor and data.is_contiguous() and (state is None or "absmax" in dir(state))


def _is_same(now: torch.nn.Parameter, kept: Kept) -> bool:
    """True if a parameter on the card has the values that it came with."""
    if type(now) is not type(kept.parameter) or now.data.shape != kept.data.shape or now.data.dtype != kept.data.dtype:
        return False
    if kept.checksum is None:
        return torch.equal(now.data.cpu().view(-1).view(torch.uint8), kept.data.reshape(-1).view(torch.uint8))
    found = checksum(now.data)
    return found is not None and bool(found == kept.checksum)
