"""From the name of a kind of stored weight to its kernel: which function, which compile-time constants, which tile.

Pure: knows names and numbers, neither Triton nor tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

from .stored import BAKED_BYTES, BLOCKS

BUCKETS = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Joined ranks are filled up to one of these, so that few kernels are compiled, and no product is much larger than it must be."""
OLDEST_TRITON = (3, 2)
"""Triton 3.1 and older cannot compile what decodes GGUF and four bits; what is left of fp8 and int8 was never run with them."""
FIRST_WITH_TUPLES = (3, 3)
"""The first Triton whose kernels can hold tuples of tensors, by which four bits are decoded."""
LARGEST_CHUNK = 64
"""Ranks of one product in a kernel: more of them would not fit into the shared memory of older cards."""


ROW_SCALED = "dora "
"""Before the kind of a stored weight: the kernel for a change that multiplies the weight's rows first. All others do without
that product of each number, and need fewer registers (docs/kernels.md)."""
HADAMARD = "loha "
"""The same, after ROW_SCALED: the kernel for factors that are two pairs."""
KRONECKER = "lokr "
"""The same: the kernel for the sides of a LoKr."""
ONE_TOKEN = "token "
"""The same: the kernels that multiply it by one token (`token_product.py`), for factors that are one pair."""


class KernelKind(NamedTuple):
    """What the name of a kernel's kind says.

    Attributes:
        is_row_scaled: ROW_SCALED stands first.
        form: HADAMARD, KRONECKER or ONE_TOKEN; "" for a weight with factors that are one pair, or none.
        stored: `Stored.kind`.
    """

    is_row_scaled: bool
    form: str
    stored: str


class Tile(NamedTuple):
    """The part of a weight that one program makes at once, and how.

    Attributes:
        rows: Its rows.
        columns: Its columns.
        warps: The warps of a program.
        spans: Tiles of a program, side by side, which share their part of `up`. Above 1 for four bits of bitsandbytes alone.
        stages: Of these, how many have their loads under way at once.
    """

    rows: int
    columns: int
    warps: int
    spans: int = 1
    stages: int = 1


class TokenTile(NamedTuple):
    """The part of a product with one token that one program makes, and how.

    Attributes:
        rows: Rows of the weight.
        words: Words of four bytes of each row at once; and ranks.
        warps: The warps of a program.
        columns: Numbers of a row of `down` at once.
    """

    rows: int = 2
    words: int = 64
    warps: int = 1
    columns: int = 1024


TILES: Mapping[str, tuple[tuple[int, Tile], ...]] = {
    "scaled": ((16, Tile(32, 256, 4)), (256, Tile(128, 64, 4))),
    "bnb4": (
        (0, Tile(32, 128, 4)),
        (16, Tile(32, 256, 8)),
        (64, Tile(64, 64, 4, 8, 3)),
        (96, Tile(64, 64, 4, 8, 2)),
        (128, Tile(64, 64, 4, 4, 2)),
        (256, Tile(64, 64, 4)),
    ),
    "bnb4 of other forms": ((16, Tile(32, 128, 4)), (256, Tile(64, 64, 4))),
    "bnb4 crossing": ((256, Tile(32, 128, 4)),),
    "gguf 32": ((16, Tile(16, 256, 4)), (256, Tile(32, 128, 4))),
    "gguf 256": ((16, Tile(32, 256, 4)), (256, Tile(32, 256, 8))),
}
"""By family of storages: the tile up to a bucket.

Measured on an H200 (docs/kernels.md): fp8 at 16, 64 and 128 ranks, NF4 at 16 to 128, Q8_0 and Q4_K at 16. int8 differs from
fp8, and FP4 and nested scales from NF4, by a few operations of the decoding: they have the same tiles. Other buckets have those of
the next larger measured one, and a DoRA has those of a plain LoRA (at 16 ranks it was measured with 32 x 128). Several tiles a program win for four bits, where they hide the loads behind the decoding; for fp8 one
tile is as fast. Above 128 ranks they would need more than 48 KB of shared memory on small cards. GGUF and blocks that cross rows
were measured with one tile only.
"""

FRAGMENTS = Tile(512, 64, 2)
"""Of the kernel that decodes four bits in the places of the product (`fragment_kernels.py`): its rows are as many turns of 32."""
FRAGMENTS_RANK = 16
"""The ranks that it is for. It was tried with 48, 64 and 96 too, and is no faster with them (docs/kernels.md)."""


@dataclass(frozen=True)
class Recipe:
    """How weights of a kind are read.

    Attributes:
        function: The kernel's name in `triton_kernels`.
        constants: Its own compile-time constants.
        values: The short name of the dtype in which the host calculates; "" for the layer's.
        form: As `KernelKind` has it.
        is_row_scaled: The same.
    """

    function: str
    constants: Mapping[str, str | int | bool]
    values: str
    form: str = ""
    is_row_scaled: bool = False

    @property
    def oldest_triton(self) -> tuple[int, int]:
        """The first version of Triton that compiles it (`benchmarks/compile_kernels.py`)."""
        return FIRST_WITH_TUPLES if self.constants.get("CROSSING") is False else OLDEST_TRITON


@cache
def recipe_of(kind: str) -> Recipe | None:
    """Returns the recipe of a kind, `Stored.kind` with what stands before it; None for one that has no kernel."""
    is_row_scaled, form, stored = split_kind(kind)
    if stored != kind:
        plain = recipe_of(stored)
        if plain is None or (form == ONE_TOKEN and (is_row_scaled or not _has_token_kernel(plain))):
            return None
        return replace(plain, form=form, is_row_scaled=is_row_scaled)
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


def split_kind(kind: str) -> KernelKind:
    """Takes the name of a kernel's kind apart."""
    rest = kind.removeprefix(ROW_SCALED)
    form = next((form for form in (HADAMARD, KRONECKER, ONE_TOKEN) if rest.startswith(form)), "")
    return KernelKind(rest != kind, form, rest.removeprefix(form))


def rank_of_sides(columns: int) -> int:
    """Returns what stands in the place of a LoKr's rank, which it has not: 16 where its right side has a multiple of 8 columns,
    whose rows are read 16 bytes at once, else 1.
    """
    return BUCKETS[0] if columns % 8 == 0 else 1


def bucket_of(rank: int) -> int | None:
    """Returns the ranks that a kernel for `rank` counts with; 0 for none, None above the largest."""
    return 0 if rank == 0 else next((bucket for bucket in BUCKETS if rank <= bucket), None)


def chunk_of(bucket: int) -> int:
    """Returns the ranks of one product, a power of two that divides the bucket."""
    return min(bucket & -bucket, LARGEST_CHUNK)


def tile_of(recipe: Recipe, bucket: int) -> Tile:
    """Returns the tile of a kernel, from TILES."""
    return next(tile for largest, tile in TILES[_family(recipe)] if bucket <= largest)


def takes_fragments(recipe: Recipe, layer: str, bucket: int, even_rank: bool) -> bool:
    """Returns True for what the kernel in `fragment_kernels.py` makes: whole blocks of 64 and more of four bits, a plain pair of factors
    of FRAGMENTS_RANK ranks.

    Args:
        recipe: Of the kind.
        layer: The short name of the layer's dtype.
        bucket: The ranks that a kernel counts with.
        even_rank: The rank is a multiple of 16.
    """
    return bucket == FRAGMENTS_RANK and even_rank and recipe.values in ("", layer) and _has_token_kernel(recipe)


def _has_token_kernel(recipe: Recipe) -> bool:
    """Returns True for four bits in whole blocks of 64 and more: bitsandbytes multiplies them with one token, the host none else."""
    if recipe.function != "bnb4" or recipe.form or recipe.is_row_scaled:
        return False
    return not recipe.constants["CROSSING"] and int(recipe.constants["BLOCK"]) % 64 == 0


def _family(recipe: Recipe) -> str:
    if recipe.function == "bnb4":
        if recipe.constants["CROSSING"]:
            return "bnb4 crossing"
        return "bnb4 of other forms" if recipe.form else "bnb4"
    if recipe.function == "gguf":
        return "gguf 256" if recipe.constants["BLOCK"] == 256 else "gguf 32"
    return recipe.function


def _recipe(function: str, values: str, **constants: str | int | bool) -> Recipe:
    return Recipe(function, MappingProxyType(constants), values)
