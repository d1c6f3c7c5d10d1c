"""Looks for values that are not finite in many tensors at once, on one core.

torch takes all cores for such a question, and one call a tensor. Threads that read a file would wait for the cores and for the
interpreter, both of which are another thread's meanwhile. In two's complement, Inf and NaN are the largest patterns of bits
of either sign: two passes for the largest number tell.
"""

from __future__ import annotations

from ..files import memory_of
from ..lazy_torch import torch

PATTERNS = {"F16": (16, 0x7C00), "BF16": (16, 0x7F80), "F32": (32, 0x7F80_0000)}
"""By a format's name in safetensors: its bits, and the pattern of +Inf, which is the smallest of those that are not finite."""


def may_not_be_finite(raw: torch.Tensor, form: str) -> bool:
    """Returns False if all values are finite. True may be of what lies between the tensors.

    Args:
        raw: Bytes of neighbouring tensors and of what lies between them, `(size,)`, uint8 in RAM.
        form: The format of the tensors, one of `PATTERNS`. All begin a whole number of values after the first one.
    """
    # Commands that read headers alone do without it.
    import numpy

    bits, infinite = PATTERNS[form]
    size = bits // 8
    words = memory_of(raw[: raw.numel() // size * size])
    if not words:
        return False
    # Not by `Tensor.numpy`: an older torch has none where numpy is a newer one.
    positive = int(numpy.frombuffer(words, f"i{size}").max()) >= infinite
    return positive or int(numpy.frombuffer(words, f"u{size}").max()) >= infinite + (1 << (bits - 1))
