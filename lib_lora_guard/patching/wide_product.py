"""LoRAs of 16-bit factors into the rows of a 16-bit weight on a card: their products in fp32, added to the weight and rounded once.

What `merging.py` does in fp32 takes five kernels for one of them, the most usual of merges: factors and rows are converted, multiplied
and added, converted back. cuBLAS multiplies 16-bit numbers exactly and sums in fp32, and torch (2.8 and newer) can return these sums as they
are; torch's sum of two dtypes is made in the wider one and rounded when it is stored. So two kernels do it, with 12 bytes a
number for 20, and none of the fp32 copies of the factors.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ..adapters import Term
from ..adapters.base import product_of
from ..adapters.lora import LoraAdapter
from ..memory.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)

SWITCH = "LORA_GUARD_WIDE_PRODUCT"
"""0 in the environment: every merge converts what it computes with."""
_DTYPES = (torch.float16, torch.bfloat16)


class WideMm(Protocol):
    """`torch.mm` of two matrices of 16-bit numbers with sums in `out_dtype`."""

    def __call__(self, up: torch.Tensor, down: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        """Returns the product."""


class WideProduct:
    """What is known of this torch and its cards.

    Args:
        mm: None for torch's.
        devices: The types of devices that have it.
    """

    def __init__(self, mm: WideMm | None = None, devices: Sequence[str] = ("cuda",)) -> None:
        any_mm: Any = torch.mm
        self._mm: WideMm = any_mm if mm is None else mm
        self._devices = devices
        is_on = os.environ.get(SWITCH) != "0" and torch.version.hip is None
        self._left = set(_DTYPES if is_on else ())
        """Dtypes of factors. One goes when a product of it has failed: torch is older, or the card has none of bf16. None on AMD's
        cards, where nothing of this was run."""

    def merged(
        self, rows: torch.Tensor, terms: Sequence[Term], into: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Returns rows with their LoRAs in them.

        Args:
            rows: `(out, in, ...)`; only read.
            terms: The stack on these rows. Each has passed `Term.check`.
            into: Where to write them: contiguous, of their shape. None: to a new tensor of their dtype.

        Returns:
            None where another way has to go: other terms or storages, no memory, another kind of card. `into` may hold anything then.
        """
        if not self._takes(rows, terms):
            return None
        if into is not None and (into.dtype is not rows.dtype or into.device != rows.device):
            return None
        total, last, dtype = _rows_of(rows), len(terms) - 1, rows.dtype
        try:
            for place, term in enumerate(terms):
                adapter = term.adapter
                assert isinstance(adapter, LoraAdapter)
                dtype = adapter.up.dtype
                up, down = _as_matrix(adapter.up).to(rows.device), _as_matrix(adapter.down).to(rows.device)
                change, alpha = self._mm(up, down, out_dtype=torch.float32), term.strength * adapter.scale
                if place < last:
                    # In the first product's memory: two slices in fp32 at once, however many LoRAs there are.
                    total = torch.add(total, change, alpha=alpha, out=total if place else change)
                    del change
            result = torch.empty_like(rows) if into is None else into
            torch.add(total, change, alpha=alpha, out=_rows_of(result))
        except Exception as error:
            if not is_out_of_memory(error):
                self._left.discard(dtype)
                # Not the error itself, by which a log that keeps records would keep the card's memory.
                log.debug("merges of %s are computed in fp32: %s: %s", dtype, type(error).__name__, str(error))
            return None
        return result

    def _takes(self, rows: torch.Tensor, terms: Sequence[Term]) -> bool:
        # What is more than a tensor stays so in its own calls.
        if not terms or type(rows) is not torch.Tensor or rows.device.type not in self._devices:
            return False
        if rows.dtype not in _DTYPES:
            return False
        return rows.dim() >= 2 and rows.is_contiguous() and all(self._takes_one(term, rows) for term in terms)

    def _takes_one(self, term: Term, rows: torch.Tensor) -> bool:
        """Returns True for a LoRA of two factors of one 16-bit dtype that changes all of the rows, and them alone."""
        adapter = term.adapter
        if type(adapter) is not LoraAdapter or adapter.mid is not None or adapter.magnitude is not None:
            return False
        if term.part is not None or term.function is not None or term.strength_model != 1.0:
            return False
        dtype = adapter.up.dtype
        if dtype not in self._left or adapter.down.dtype is not dtype or _sums_in_fp16(dtype):
            return False
        # A narrower `down` is filled up, a wider one widens the weight.
        return product_of(adapter.down.shape[1:]) == product_of(rows.shape[1:])


# Most tensors are matrices. A call of torch less is time: merges are hundreds, of a dozen calls each.


def _as_matrix(factor: torch.Tensor) -> torch.Tensor:
    return factor if factor.dim() == 2 else factor.flatten(1)


def _rows_of(weight: torch.Tensor) -> torch.Tensor:
    """Returns the same memory as rows."""
    return weight if weight.dim() == 2 else weight.view(weight.shape[0], product_of(weight.shape[1:]))


def _sums_in_fp16(dtype: torch.dtype) -> bool:
    """Returns True where the user has allowed it: Neo has a flag for that, for the speed of products."""
    return dtype is torch.float16 and bool(getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False))


WIDE_PRODUCT = WideProduct()
"""That of the process."""
