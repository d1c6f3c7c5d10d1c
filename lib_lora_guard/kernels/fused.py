"""The temporary weight of a layer in one pass: dequantised, with the joined low-rank LoRAs in it."""

from __future__ import annotations

import torch

from .choice import KERNELS, Kernels
from .factors import Factors
from .recipes import HADAMARD
from .stored import Stored
from .twin import dequantised, with_factors

__all__ = ["KERNELS", "Factors", "Kernels", "fused_weight"]


def fused_weight(stored: Stored, factors: Factors | None, dtype: torch.dtype) -> torch.Tensor:
    """Returns a new weight `(out, in)` in `dtype`: `dequantised * row_scale + (up * per_rank) @ down * alpha`, rounded once more.

    Without factors it is bit for bit the host's dequantisation. A kernel makes it where one has been chosen, else plain torch.

    Args:
        stored: The weight as it is stored.
        factors: The LoRAs; None for none.
        dtype: The layer's compute dtype, and the factors'.

    Raises:
        Exception: A kernel's. Its kind has been given up then: the next call makes the weight in plain torch. Out of memory changes
            nothing.
    """
    rank, per_rank = (0, False) if factors is None else (factors.down.shape[0], factors.per_rank is not None)
    kind = stored.kind if factors is None or factors.times is None else HADAMARD + stored.kind
    kernel = KERNELS.kernel(kind, stored.data.device, dtype, rank, per_rank)
    if kernel is not None:
        try:
            made = kernel(stored, factors)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            KERNELS.refuse(kind, error)
            raise
        if made is not None:
            return made
    weight = dequantised(stored, dtype)
    return weight if factors is None else with_factors(weight, factors)
