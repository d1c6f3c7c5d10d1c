"""Brings the factors of a stack to the card before the first call, many in one copy.

Made one by one at the first call, the thousands of factors of three LoRAs are as many copies, each of which waits for the
card, and the CPU converts each to the dtype of the model before. Here they are put together in RAM as they are stored, go to
the card in pieces of 16 MB, and are converted and joined there. Two pinned buffers of that size make a ring: one is filled
while the card reads the other. Where RAM is scarce they are ordinary memory, and one is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import psutil
import torch

from ..inference_mode import outside_inference
from ..units import GB, MB
from .attachments import Attachment, BypassAttachment
from .forward_steps import LowRankStep
from .low_rank import JoinedLowRank

PIECE_BYTES = 16 * MB
PINNED_PIECES = 2
LEAST_RAM_FOR_PINNED_BYTES = 32 * GB
"""Pinned memory cannot be paged out: on small machines it is missing elsewhere. Of 32 GB, some megabytes are reserved."""
RESERVED_SHARE = 0.05
ALIGNMENT = 256
"""Bytes: a view of any dtype may begin there."""


def waiting(attachments: Iterable[Attachment]) -> list[JoinedLowRank]:
    """Returns the low-rank terms of a stack that have no copies on a device yet."""
    return [joined for joined in _low_rank(attachments) if not joined.is_resident]


@outside_inference
def bring(terms: Sequence[JoinedLowRank], device: torch.device, dtype: torch.dtype) -> int:
    """Makes the device copies of low-rank terms.

    Args:
        terms: From `waiting`.
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
    for group in _pieces(terms):
        tensors = {id(tensor): tensor for joined in group for tensor in joined.factor_tensors()}
        there = dict(zip(tensors, ring.send(list(tensors.values())), strict=True))
        for joined in group:
            joined.make(device, dtype, there)
        brought += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    ring.settle()
    return brought


class Ring:
    """Buffers in RAM through which tensors go to a device."""

    def __init__(self, device: torch.device, pinned: bool | None = None) -> None:
        """
        Args:
            device: Gets the tensors.
            pinned: Use pinned buffers; None: on CUDA, where there is RAM for it.
        """
        self._device = device
        self._pinned = device.type == "cuda" and has_ram_for_pinned() if pinned is None else pinned
        self._buffers: list[torch.Tensor] = []
        self._read: list[torch.cuda.Event | None] = []
        self._next = 0

    def send(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns `tensors`, which lie in RAM, on the device. They are views of one piece of memory there; tensors that lie
        elsewhere are returned as they are."""
        places, size = [], 0
        for tensor in tensors:
            places.append(size)
            if tensor.device.type == "cpu":
                size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        buffer = self._buffer(size)
        for tensor, place in zip(tensors, places, strict=True):
            if tensor.device.type == "cpu":
                _view(buffer, place, tensor).copy_(tensor)
        piece = torch.empty(size, dtype=torch.uint8, device=self._device)
        piece.copy_(buffer[:size], non_blocking=self._pinned)
        if self._pinned:
            event = self._read[self._next] = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
            event.record(torch.cuda.current_stream(self._device))
            self._next = (self._next + 1) % PINNED_PIECES
        return [
            _view(piece, place, tensor) if tensor.device.type == "cpu" else tensor
            for tensor, place in zip(tensors, places, strict=True)
        ]

    def settle(self) -> None:
        """Waits until the device has read the buffers."""
        for event in self._read:
            if event is not None:
                event.synchronize()

    def _buffer(self, size: int) -> torch.Tensor:
        """Returns a buffer that the device does not read any more."""
        if size > PIECE_BYTES:
            # One tensor of a size that no usual LoRA has.
            return torch.empty(size, dtype=torch.uint8)
        while len(self._buffers) <= self._next:
            self._buffers.append(torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=self._pinned))
            self._read.append(None)
        event = self._read[self._next]
        if event is not None:
            event.synchronize()
        return self._buffers[self._next]


def has_ram_for_pinned() -> bool:
    """Returns True on machines with 32 GB of RAM or more."""
    return bool(psutil.virtual_memory().total >= LEAST_RAM_FOR_PINNED_BYTES * (1 - RESERVED_SHARE))


def _low_rank(attachments: Iterable[Attachment]) -> Iterator[JoinedLowRank]:
    for attachment in attachments:
        if isinstance(attachment, BypassAttachment):
            yield from (step.joined for step in attachment.hook.program.steps if isinstance(step, LowRankStep))


def _pieces(terms: Sequence[JoinedLowRank]) -> Iterator[list[JoinedLowRank]]:
    """Yields the terms in groups that fill a piece each. Terms that are larger go alone."""
    group: list[JoinedLowRank] = []
    size = 0
    for joined in terms:
        own = sum(-(-t.numel() * t.element_size() // ALIGNMENT) * ALIGNMENT for t in joined.factor_tensors())
        if group and size + own > PIECE_BYTES:
            yield group
            group, size = [], 0
        group.append(joined)
        size += own
    if group:
        yield group


def _view(memory: torch.Tensor, place: int, like: torch.Tensor) -> torch.Tensor:
    size = like.numel() * like.element_size()
    return memory[place : place + size].view(like.dtype).view(like.shape)
