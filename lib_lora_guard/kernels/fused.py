"""The temporary weight of a layer in one pass: dequantised, with the joined low-rank LoRAs in it."""

from __future__ import annotations

import torch

from .choice import KERNELS, Kernels
from .factors import Change, Factors, Sides
from .recipes import ONE_TOKEN
from .stored import Stored
from .twin import dequantised, with_factors

__all__ = ["KERNELS", "Change", "Factors", "Kernels", "Sides", "fused_weight", "token_output"]


def fused_weight(stored: Stored, factors: Change | None, dtype: torch.dtype) -> torch.Tensor:
    """Returns a new weight `(out, in)` in `dtype`: `dequantised * row_scale + (up * per_rank) @ down * alpha`, rounded once more;
    for a LoKr with what its sides add in the place of the product.

    Without factors it is bit for bit the host's dequantisation. A kernel makes it where one has been chosen, else plain torch.

    Args:
        stored: The weight as it is stored.
        factors: The LoRAs; None for none.
        dtype: The layer's compute dtype, and the factors'.

    Raises:
        Exception: A kernel's. Its kind has been given up then: the next call makes the weight in plain torch. Out of memory changes
            nothing.
    """
    rank, form = (0, "") if factors is None else (factors.rank, factors.form)
    per_rank, kind = isinstance(factors, Factors) and factors.per_rank is not None, form + stored.kind
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


def token_output(
    stored: Stored, factors: Factors, token: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Returns a layer's output `(..., out)` for one token: `weight @ token + (up * per_rank) @ (down @ token) * alpha + bias`, rounded
    once; None, with nothing done, where no kernel has been chosen.

    Args:
        stored: The weight as it is stored.
        factors: The LoRAs.
        token: `(..., in)`, all other sizes 1.
        bias: `(out,)`; None for none.

    Raises:
        Exception: As `fused_weight` says.
    """
    kind = ONE_TOKEN + stored.kind
    product = KERNELS.product(kind, token.device, token.dtype, factors.rank, factors.per_rank is not None)
    if product is None:
        return None
    try:
        return product(stored, factors, token, bias)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        KERNELS.refuse(kind, error)
        raise
