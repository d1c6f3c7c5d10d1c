"""Sizes of GGUF weights after Forge's "baking" at the first load of a model. Pure, without torch.

Forge places a model by the sizes in the file and moves it. Only then it bakes every weight, on the card or in RAM
(`backend/memory_management.py`: `model_load`, `bake_gguf_model`). Most types are only reordered. Q4_K alone grows, by a
ninth: its eight scales and eight minima of 6 bits become two fp16 numbers each (`packages_3rdparty/gguf/quants.py`). A
baked weight is moved and offloaded as it is, and never baked again. tests/contract/test_baking.py compares this with
Forge's own functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Blocks(NamedTuple):
    """A type's block: its values, its bytes in the file and its bytes after baking."""

    values: int
    stored_bytes: int
    baked_bytes: int


FORGE_BLOCKS: Mapping[str, Blocks] = MappingProxyType({
    "Q4_0": Blocks(32, 18, 18), "Q4_1": Blocks(32, 20, 20), "Q5_0": Blocks(32, 22, 22), "Q5_1": Blocks(32, 24, 24),
    "Q8_0": Blocks(32, 34, 34),
    "Q2_K": Blocks(256, 84, 84), "Q3_K": Blocks(256, 110, 110), "Q4_K": Blocks(256, 144, 160),
    "Q5_K": Blocks(256, 176, 176), "Q6_K": Blocks(256, 210, 210),
    "BF16": Blocks(1, 2, 2),
})  # fmt: skip
"""By name, all types that Forge bakes (`quants_mapping` in `backend/operations_gguf.py`). F32 and F16 are plain
tensors; Forge treats other types as plain bytes.
"""


def baked_bytes(form: str, stored_bytes: int) -> int:
    """Returns the size of `stored_bytes` of the GGUF type `form` after baking."""
    blocks = FORGE_BLOCKS.get(form)
    return stored_bytes if blocks is None else stored_bytes * blocks.baked_bytes // blocks.stored_bytes


def growth_bytes(form: str, stored_bytes: int) -> int:
    """Returns the growth by baking."""
    return baked_bytes(form, stored_bytes) - stored_bytes


def value_bytes(form: str) -> float:
    """Returns the bytes per value after baking.

    Raises:
        KeyError: Forge does not bake this type.
    """
    blocks = FORGE_BLOCKS[form]
    return blocks.baked_bytes / blocks.values
