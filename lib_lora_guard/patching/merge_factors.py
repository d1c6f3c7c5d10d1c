"""Brings the factors of merges to the card ahead, some megabytes at a time.

A factor that a merge sends by itself is converted to fp32 in RAM first, by all cores at once, and its copy waits for the card.
Beside threads that read a file that takes milliseconds instead of microseconds: the conversion ends when the last of its
threads has had a core. Here one thread puts the factors of many merges together as they are stored, they go over the link in
one copy, and the card converts them. The values are the same: wider floats have every number of narrower ones, and fp64 is
rounded alike everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from ..adapters import Term
from ..inference_mode import outside_inference
from ..memory.out_of_memory import is_out_of_memory
from ..units import MB
from .staging import SLACK_BYTES, Ring, aligned

PIECE_BYTES = 8 * MB - SLACK_BYTES
"""Of factors on the card at a time. Two buffers are pinned, of 8 MB each: torch rounds up to a power of two."""

Terms: TypeAlias = tuple[Term, ...]


class FactorsAhead:
    """The factors of stacks that are merged one after the other.

    Args:
        stacks: In the order in which they are asked for.
        device: The device that the merges are computed on.
    """

    def __init__(self, stacks: Sequence[Terms], device: torch.device) -> None:
        self._stacks = stacks
        self._places = {id(terms): place for place, terms in enumerate(stacks)} if is_card(device) else {}
        self._there: dict[int, Terms] = {}
        """The stacks with factors on the card, by place: those of the last copy that were not asked for yet."""
        self._device = device
        self._ring: Ring | None = None

    def of(self, terms: Terms) -> Terms:
        """Returns a stack with its factors on the card; as it is where they stay in RAM."""
        place = self._places.get(id(terms))
        if place is None:
            return terms
        if place not in self._there:
            try:
                self._bring(place)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # Each merge goes on by itself, in slices as small as it takes.
                self._places, self._there = {}, {}
        return self._there.pop(place, terms)

    @outside_inference
    def _bring(self, start: int) -> None:
        # What was not asked for makes room.
        self._there = {}
        taken: dict[int, torch.Tensor] = {}
        size, group = 0, list[list[list[torch.Tensor]]]()
        for terms in self._stacks[start:]:
            sent = [_sent(term) for term in terms]
            new = {id(one): one for tensors in sent for one in tensors if id(one) not in taken}
            own = sum(aligned(one.nbytes) for one in new.values())
            if group and size + own > PIECE_BYTES:
                break
            taken |= new
            size += own
            group.append(sent)
        if self._ring is None:
            self._ring = Ring(self._device, piece_bytes=PIECE_BYTES, by_one_thread=True)
        there = dict(zip(taken, self._ring.send(list(taken.values())), strict=True))
        self._there = {
            place: tuple(
                _moved(term, there) if tensors else term
                for term, tensors in zip(self._stacks[place], sent, strict=True)
            )
            for place, sent in enumerate(group, start)
        }


def is_card(device: torch.device) -> bool:
    """Returns True for a device with memory of its own."""
    return device.type not in ("cpu", "meta")


def _sent(term: Term) -> list[torch.Tensor]:
    """Returns the tensors of a term that go with others. One as large as its weight goes by itself, a slice at a time."""
    tensors = list(term.adapter.tensors())
    if term.adapter.is_whole_tensor or sum(one.nbytes for one in tensors) > PIECE_BYTES:
        return []
    return [one for one in tensors if one.device.type == "cpu"]


def _moved(term: Term, there: dict[int, torch.Tensor]) -> Term:
    adapter = term.adapter.moved(lambda one: there.get(id(one), one))
    # dataclasses.replace would take as long as starting a kernel.
    return Term(adapter, term.strength, term.strength_model, term.part, term.function, term.origin)
