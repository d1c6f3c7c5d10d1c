"""What a measurement says about the kernels: where one is faster than the host's way with a bypass, or than the host's cast.

Measured on an H200, all linear layers of a Flux step (`benchmarks/kernels_gpu.py`). Pure: knows names and numbers.
"""

from __future__ import annotations

from ..kernels.recipes import HADAMARD, split_kind

LARGEST_RANKS = {"nf4": 128, "fp4": 128, "fp8": 128}
"""By form: joined ranks above have the faster bypass. fp8 with a scale, int8 and GGUF have the slower host's cast, and the faster
kernel at all ranks."""

FASTER_CASTS = frozenset({"fp8", "int8", "nf4", "fp4", "Q8_0", "Q4_0", "Q4_K", "Q5_0", "Q5_K", "Q6_K"})
"""The forms whose kernel without a LoRA is faster than the host's cast."""
UNMEASURED = frozenset({"odd", "crossing"})
FEWEST_VALUES = 1 << 24
"""The host's cast of plain fp8 is one launch: for weights of less than this it is faster."""


def beats_bypass(kind: str, rank: int) -> bool:
    """Returns True if the pass is faster than the host's way and a bypass.

    Args:
        kind: Of the kernel. A LoHa's two products, not measured, are taken as one of twice the rank. A LoKr has no product: the
            host's way is that of its call or of a bypass. Rows that are scaled first change nothing here.
        rank: Of all LoRAs on the weight together.
    """
    _, shape, stored = split_kind(kind)
    rank *= 2 if shape == HADAMARD else 1
    form, *rest = stored.split()
    return "scaled" in rest or form not in LARGEST_RANKS or rank <= LARGEST_RANKS[form]


def beats_host_cast(kind: str, values: int) -> bool:
    """Returns True if the pass without a LoRA is faster than the host's cast.

    Args:
        kind: `Stored.kind`.
        values: The numbers in the weight.
    """
    form, *rest = kind.split()
    if form not in FASTER_CASTS or not UNMEASURED.isdisjoint(rest):
        return False
    return form != "fp8" or "scaled" in rest or values >= FEWEST_VALUES
