"""Brings the factors of a stack to the card before the first call, many in one copy.

Made one by one at the first call, the thousands of factors of three LoRAs are as many copies, each of which waits for the
card, and the CPU converts each to the dtype of the model before. Here they are put together in RAM as they are stored, go to
the card in pieces of 16 MB, and are joined and converted there. Two pinned buffers of that size make a ring: one is filled
while the card reads the other. Where RAM is scarce they are ordinary memory, and one is enough.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import psutil
import torch

from ..inference_mode import outside_inference
from ..units import GB, MB
from .low_rank import JoinedLowRank

PIECE_BYTES = 16 * MB
PINNED_PIECES = 2
LEAST_RAM_FOR_PINNED_BYTES = 32 * GB
"""Pinned memory cannot be paged out: on small machines it is missing elsewhere. Of 32 GB, some megabytes are reserved."""
RESERVED_SHARE = 0.05
ALIGNMENT = 256
"""Bytes: a view of any dtype may begin there."""
MOST_GAP_BYTES = 64
"""What may lie between two tensors of one copy: an alpha of a few bytes."""
SLACK_BYTES = 1 << 16
"""Of a buffer beyond `PIECE_BYTES`, for such gaps."""


@outside_inference
def bring(terms: Sequence[JoinedLowRank], device: torch.device, dtype: torch.dtype) -> int:
    """Makes the device copies of low-rank terms, and what their strengths are there.

    Args:
        terms: From `waiting_factors.waiting`.
        device: Where the model runs. Nothing is done on the CPU, where no copies are kept.
        dtype: Of the model's activations.

    Returns:
        The bytes that went to the device.

    Raises:
        torch.cuda.OutOfMemoryError: The rest is made at the first call, as it would have been.
    """
    if device.type == "cpu":
        return 0
    ring, brought = Ring(device), 0
    for group in _pieces([joined for joined in terms if not joined.is_resident]):
        tensors = {id(tensor): tensor for joined in group for tensor in joined.factor_tensors()}
        there = dict(zip(tensors, ring.send(list(tensors.values())), strict=True))
        for joined in group:
            joined.make(device, dtype, there)
        brought += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    ring.settle()
    for joined in terms:
        joined.make_scales(device, dtype)
    return brought


class Ring:
    """Buffers in RAM through which tensors go to a device."""

    def __init__(
        self,
        device: torch.device,
        pinned: bool | None = None,
        piece_bytes: int | None = None,
        by_one_thread: bool = False,
    ) -> None:
        """
        Args:
            device: Gets the tensors.
            pinned: Use pinned buffers; None: on CUDA, where there is RAM for it.
            piece_bytes: Of one buffer; None: PIECE_BYTES.
            by_one_thread: Fill the buffers by the caller's thread alone, where others need the cores. torch copies with all
                cores, and the caller then waits until the last of its threads has had a turn.
        """
        self._device, self._by_one_thread = device, by_one_thread
        self._buffer_bytes = (PIECE_BYTES if piece_bytes is None else piece_bytes) + SLACK_BYTES
        self._pinned = device.type == "cuda" and has_ram_for_pinned() if pinned is None else pinned
        self._buffers: list[torch.Tensor] = []
        self._read: list[torch.cuda.Event | None] = []
        self._next = 0

    def send(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns `tensors`, which lie in RAM, on the device. They are views of one piece of memory there; tensors that lie
        elsewhere are returned as they are."""
        runs = _runs([tensor for tensor in tensors if tensor.device.type == "cpu"])
        size = sum(aligned(run.size) for run in runs)
        # One term of a size that no usual LoRA has goes through ordinary memory.
        is_large = size > self._buffer_bytes
        buffer = _in_ram(size) if is_large else self._buffer()
        place, places = 0, dict[int, int]()
        for run in runs:
            if not run.size:
                pass
            elif run.is_contiguous:
                self._fill(buffer, place, run)
            else:
                _view(buffer, place, run.tensors[0]).copy_(run.tensors[0])
            places.update((id(tensor), place + run.offset_of(tensor)) for tensor in run.tensors)
            place += aligned(run.size)
        piece = torch.empty(size, dtype=torch.uint8, device=self._device)
        is_pinned = self._pinned and not is_large
        piece.copy_(buffer[:size], non_blocking=is_pinned)
        if is_pinned:
            event = self._read[self._next] = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
            event.record(torch.cuda.current_stream(self._device))
            self._next = (self._next + 1) % PINNED_PIECES
        of_dtypes: dict[torch.dtype, torch.Tensor] = {}
        return [_there(piece, of_dtypes, places[id(one)], one) if id(one) in places else one for one in tensors]

    def _fill(self, buffer: torch.Tensor, place: int, run: _Run) -> None:
        if self._by_one_thread:
            # Lets other threads of Python run meanwhile.
            ctypes.memmove(buffer.data_ptr() + place, run.start, run.size)
        else:
            buffer[place : place + run.size].copy_(run.raw())

    def settle(self) -> None:
        """Waits until the device has read the buffers."""
        for event in self._read:
            if event is not None:
                event.synchronize()

    def _buffer(self) -> torch.Tensor:
        """Returns a buffer that the device does not read any more."""
        while len(self._buffers) <= self._next:
            self._buffers.append(_in_ram(self._buffer_bytes, self._pinned))
            self._read.append(None)
        event = self._read[self._next]
        if event is not None:
            event.synchronize()
        return self._buffers[self._next]


class _Run:
    """Tensors that lie side by side in RAM, as those of a file do that was read in one piece; or one that has gaps in it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensors, self.is_contiguous = [tensor], tensor.is_contiguous()
        self.start, self.size = tensor.data_ptr(), tensor.nbytes

    def take(self, tensor: torch.Tensor) -> bool:
        """Adds a tensor if it begins where the last one ends, or a few bytes behind."""
        gap = tensor.data_ptr() - self.start - self.size
        is_near = self.is_contiguous and tensor.is_contiguous() and -self.size <= gap <= MOST_GAP_BYTES
        same = tensor.untyped_storage().data_ptr() == self.tensors[0].untyped_storage().data_ptr()
        if not is_near or not same or self.offset_of(tensor) % tensor.element_size():
            return False
        self.tensors.append(tensor)
        self.size = max(self.size, self.offset_of(tensor) + tensor.nbytes)
        return True

    def offset_of(self, tensor: torch.Tensor) -> int:
        return tensor.data_ptr() - self.start

    def raw(self) -> torch.Tensor:
        """Returns the bytes, `(size,)`."""
        storage = self.tensors[0].untyped_storage()
        return _in_ram(0).set_(storage, self.start - storage.data_ptr(), (self.size,), (1,))


def _runs(tensors: Sequence[torch.Tensor]) -> list[_Run]:
    """Puts tensors in RAM together that one copy can take: a copy each takes longer than the bytes of most."""
    runs: list[_Run] = []
    for tensor in sorted({id(one): one for one in tensors}.values(), key=lambda one: one.data_ptr()):
        if not runs or not runs[-1].take(tensor):
            runs.append(_Run(tensor))
    return runs


def _in_ram(size_bytes: int, pinned: bool = False) -> torch.Tensor:
    """Returns bytes in RAM, `(size,)`, whatever torch's default device is."""
    return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)


def aligned(size_bytes: int) -> int:
    """Returns the bytes that a tensor takes in a piece."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def has_ram_for_pinned() -> bool:
    """Returns True on machines with 32 GB of RAM or more."""
    return bool(psutil.virtual_memory().total >= LEAST_RAM_FOR_PINNED_BYTES * (1 - RESERVED_SHARE))


def _pieces(terms: Sequence[JoinedLowRank]) -> Iterator[list[JoinedLowRank]]:
    """Yields the terms in groups that fill a piece each. Terms that are larger go alone."""
    group: list[JoinedLowRank] = []
    size = 0
    for joined in terms:
        own = sum(aligned(tensor.nbytes) for tensor in joined.factor_tensors())
        if group and size + own > PIECE_BYTES:
            yield group
            group, size = [], 0
        group.append(joined)
        size += own
    if group:
        yield group


def _view(memory: torch.Tensor, place: int, like: torch.Tensor) -> torch.Tensor:
    return memory[place : place + like.nbytes].view(like.dtype).view(like.shape)


def _there(
    piece: torch.Tensor, of_dtypes: dict[torch.dtype, torch.Tensor], place: int, like: torch.Tensor
) -> torch.Tensor:
    """Returns the view of a piece, in one call of torch for most of the thousands of them. `of_dtypes`: the piece in each dtype."""
    size = like.element_size()
    if place % size or piece.numel() % size or not like.is_contiguous():
        return _view(piece, place, like)
    numbers = of_dtypes.get(like.dtype)
    if numbers is None:
        numbers = of_dtypes[like.dtype] = piece.view(like.dtype)
    return numbers.as_strided(like.shape, like.stride(), place // size)
