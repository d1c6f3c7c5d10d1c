"""From the name of a kind of stored weight to its kernel: which function, which compile-time constants, which tile.

Pure: knows names and numbers, neither Triton nor tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

from .stored import BAKED_BYTES, BLOCKS

BUCKETS = (16, 32, 64, 128, 256)
"""Joined ranks are filled up to one of these, so that few kernels are compiled."""
LARGEST_CHUNK = 64
"""Ranks of one product in a kernel: more of them would not fit into the shared memory of older cards."""


class Tile(NamedTuple):
    """The part of a weight that one program makes, and the warps it takes."""

    rows: int
    columns: int
    warps: int


@dataclass(frozen=True)
class Recipe:
    """How weights of a kind are read.

    Attributes:
        function: The kernel's name in `triton_kernels`.
        constants: Its own compile-time constants.
        values: The short name of the dtype in which the host calculates; "" for the layer's.
    """

    function: str
    constants: Mapping[str, str | int | bool]
    values: str


@cache
def recipe_of(kind: str) -> Recipe | None:
    """Returns the recipe of `Stored.kind`; None for a kind that has no kernel."""
    words, _, values = kind.partition(" by ")
    form, *rest = words.split()
    if form == "fp8" and rest[0] in ("e4m3", "e5m2"):
        return _recipe("scaled", values, FORM=rest[0], SCALED="scaled" in rest, EVEN="odd" not in rest)
    if form == "int8":
        return _recipe("scaled", values, FORM="int8", SCALED="scaled" in rest, EVEN="odd" not in rest)
    if form in ("nf4", "fp4"):
        nested = [int(word.removeprefix("nested")) for word in rest if word.startswith("nested")]
        block, crossing = int(rest[0]), "crossing" in rest
        if block & (block - 1) and not crossing:
            return None
        return _recipe("bnb4", values, FORM=form, BLOCK=block, NESTED=nested[0] if nested else 0, CROSSING=crossing)
    if form in BLOCKS:
        baked = "baked" in rest
        block, size = BLOCKS[form]
        size = BAKED_BYTES.get(form, size) if baked else size
        return _recipe("gguf", values or "fp32", FORM=form, BAKED=baked, BLOCK=block, BLOCK_BYTES=size)
    return None


def bucket_of(rank: int) -> int | None:
    """Returns the ranks that a kernel for `rank` counts with; 0 for none, None above the largest."""
    return 0 if rank == 0 else next((bucket for bucket in BUCKETS if rank <= bucket), None)


def tile_of(recipe: Recipe, bucket: int) -> Tile:
    """Returns the tile of a kernel. Measured on an H200 (benchmarks/kernels_gpu.py --tiles)."""
    if recipe.function == "scaled":
        return Tile(64, 128, 8) if bucket <= LARGEST_CHUNK else Tile(64, 64, 8)
    if recipe.function == "bnb4":
        return Tile(32, 128, 4) if recipe.constants["CROSSING"] else Tile(32, 256, 8)
    return Tile(32, 256, 8) if recipe.constants["BLOCK"] == 256 else Tile(32, 128, 4)


def _recipe(function: str, values: str, **constants: str | int | bool) -> Recipe:
    return Recipe(function, MappingProxyType(constants), values)
