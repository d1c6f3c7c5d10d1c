"""The GGUF tensor types by their number: name, values in a block, bytes of a block.

Source: the GGUF description (github.com/ggml-org/ggml, docs/gguf.md) and the block structs of ggml-common.h. Numbers
that the format took back (4, 5, 31 to 33, 36 to 38) are missing on purpose. Types without a decoder here are listed
too: the header of such a file can still be shown.
"""

from __future__ import annotations

from typing import NamedTuple


class GgufType(NamedTuple):
    """One type: its name, the values in a block, and the bytes of a block."""

    name: str
    block: int
    block_bytes: int


GGUF_TYPES: dict[int, GgufType] = {
    number: GgufType(*facts)
    for number, facts in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
        24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
        2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
        10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
        29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    }.items()
}  # fmt: skip

PLAIN = frozenset({"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"})
"""Types without blocks: torch has a dtype for each."""
