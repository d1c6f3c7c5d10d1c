"""Checksums of a tensor's bytes, one for each 256 KB or less, calculated where the tensor lies.

A card does this at a tenth of the time that the bytes take over the link; CRC-32 on the CPU would take several times that.
Each word of 64 bits is multiplied by an odd number of its place, and its halves are mixed before the sum: a word that
changes changes its product for certain, and words that trade places, or lose the same bit, change the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..units import MB

ROW_WORDS = 32 * 1024
"""torch calculates with as many numbers in one thread: sums in RAM are made in several threads already."""
SHORTEST_SHARE = 32
"""A row may be shorter by this factor."""
BLOCK_BYTES = 32 * MB
"""Of the bytes that a card sums at once. Twice as much is needed beside them for a moment."""


def checksums(flat: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Returns the checksums of a flat byte tensor, as int64 on its device.

    Args:
        flat: `(bytes,)`, contiguous.
        factors: From `factors_on` its device, as many as a row has words (`row_words`). A part of a tensor has the sums of the
            whole one if it begins a multiple of ROW_WORDS after its start.
    """
    # In RAM one row at a time, which stays in the core's cache: five times as fast.
    size = ROW_WORDS * 8 if flat.device.type == "cpu" else BLOCK_BYTES
    blocks = [
        _of_block(flat.narrow(0, start, min(size, flat.numel() - start)), factors)
        for start in range(0, flat.numel(), size)
    ]
    if len(blocks) == 1:
        return blocks[0]
    return torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.int64, device=flat.device)


def alike(sizes_bytes: Sequence[int], most_bytes: int) -> list[list[int]]:
    """Puts the places of tensors together that one call of `checksums` can take as one: each call costs the processor as much as
    some megabytes cost a card.

    Returns:
        Groups of places, in the order of their first ones: one, or several of equal sizes without a rest behind their last row, of
        `most_bytes` at most, which is at most BLOCK_BYTES.
    """
    places: dict[int, list[int]] = {}
    for place, size in enumerate(sizes_bytes):
        places.setdefault(size, []).append(place)
    groups = []
    for size, mine in places.items():
        leaves_no_rest = size > 0 and size % (row_words(size) * 8) == 0
        most = max(1, most_bytes // size) if leaves_no_rest else 1
        groups += [mine[first : first + most] for first in range(0, len(mine), most)]
    return sorted(groups)


def row_words(size_bytes: int) -> int:
    """Returns the words of a row for a tensor of a size: fewer than ROW_WORDS where that leaves no rest.

    Then a card takes four kernels instead of nine, for each of the thousand small weights of a model.
    """
    row = math.gcd(-(-size_bytes // 8), ROW_WORDS)
    return ROW_WORDS if row * SHORTEST_SHARE < ROW_WORDS else row


def words_of(flat: torch.Tensor) -> torch.Tensor:
    """Returns bytes as words of 64 bits: the same memory where that is possible, else a copy filled up with zeros."""
    left = -flat.numel() % 8
    if left:
        filled = torch.zeros(flat.numel() + left, dtype=torch.uint8, device=flat.device)
        filled[: flat.numel()].copy_(flat)
        flat = filled
    elif flat.storage_offset() % 8:
        flat = flat.clone()
    return flat.view(torch.int64)


def _of_block(flat: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    words = words_of(flat)
    row = factors.numel()
    whole = words.numel() // row * row
    sums = _mixed(words[:whole].view(-1, row) * factors).sum(1)
    if whole == words.numel():
        return sums
    return torch.cat([sums, _mixed(words[whole:] * factors[: words.numel() - whole]).sum().view(1)])


def _mixed(products: torch.Tensor) -> torch.Tensor:
    return products.bitwise_xor_(products >> 32)


def factors_on(device: torch.device) -> torch.Tensor:
    """Returns an odd number for each place in a row, always the same ones."""
    # SplitMix64, Steele, Lea and Flood 2014. Products wrap as in C.
    z = torch.arange(1, ROW_WORDS + 1, dtype=torch.int64) * -0x61C8864680B583EB
    z = (z ^ _shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return ((z ^ _shifted(z, 31)) | 1).to(device)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts as unsigned numbers."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
