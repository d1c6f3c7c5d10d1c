"""Merges plain LoRAs into a 16-bit weight on a card by one product each, in the weight's own dtype.

cuBLAS multiplies 16-bit numbers exactly, sums in fp32, adds the weight to that and rounds the sum: a copy and one kernel do, without
an fp32 copy of the weight, what `merging.py` does in fp32 with five kernels and two and a half times the bytes. Whether this card's
product does so is asked of it once for each dtype, beside fp64 (`rounds_once`). Where it does not, or has no such product, nothing
here is used. A row that has two LoRAs would be rounded twice, and goes the other way.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import torch

from ..adapters import Term
from ..adapters.base import product_of
from ..adapters.lora import LoraAdapter
from ..memory.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)

SWITCH = "LORA_GUARD_ONE_PRODUCT"
"""0 in the environment: every merge is computed in fp32."""
HALVES = (torch.float16, torch.bfloat16)
_PROBES = ((96, 160, 16), (64, 96, 160))
"""Rows, columns and ranks of the products that a card is asked with."""
_FP32_ERROR = 2.0**-20
"""Of a sum in fp32, relative to what is summed: some roundings of 2**-24."""

_rounds_once: dict[tuple[torch.device, torch.dtype], bool] = {}


def merged(data: torch.Tensor, terms: Sequence[Term], out_dtype: torch.dtype) -> torch.Tensor | None:
    """Applies terms to a weight where it lies, rounded once.

    Args:
        data: The weight, `(out, in, ...)`; it is only read.
        terms: The stack. Each has passed `Term.check` for it.
        out_dtype: The dtype of the result.

    Returns:
        A new tensor. None, with nothing done, where another way has to go: other terms or storages, no memory, another kind of card.
    """
    if data.dtype not in HALVES or out_dtype is not data.dtype or data.dim() < 2 or not data.is_contiguous():
        return None
    if not _is_suited(data.device) or not terms or not all(_is_plain(term, data.dtype) for term in terms):
        return None
    parts = [term.part for term in terms]
    if parts != [None] and (None in parts or _overlap([(part.start, part.length) for part in parts if part])):
        return None
    try:
        if not rounds_once(data.device, data.dtype):
            return None
        result = data.clone()
        flat = result if data.dim() == 2 else result.view(data.shape[0], product_of(data.shape[1:]))
        with full_precision:
            for term in terms:
                _add(flat if term.part is None else flat.narrow(0, term.part.start, term.part.length), term)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            # A card of another time has no product of bf16. It is not asked again.
            _give_up(data.device, data.dtype, f"{type(error).__name__}: {error}")
        return None
    return result


def rounds_once(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns True if a product of 16-bit factors, added to a weight on a device, has one rounding of 16 bits. Asked once.

    Raises:
        RuntimeError: The device has no memory left, or no such product.
    """
    key = (device, dtype)
    if key not in _rounds_once:
        with full_precision:
            _rounds_once[key] = all(_is_exact(device, dtype, *sizes) for sizes in _PROBES)
        if not _rounds_once[key]:
            _give_up(device, dtype, "it rounds more than once")
    return _rounds_once[key]


def _give_up(device: torch.device, dtype: torch.dtype, why: str) -> None:
    _rounds_once[device, dtype] = False
    log.debug("merges in %s on %s are computed in fp32, not by one product: %s", dtype, device, why)


def _is_exact(device: torch.device, dtype: torch.dtype, rows: int, columns: int, rank: int) -> bool:
    numbers = torch.Generator().manual_seed(rank)
    weight, up, down = (
        torch.randn(shape, generator=numbers, device="cpu").to(dtype)
        for shape in ((rows, columns), (rows, rank), (rank, columns))
    )
    # The change is as large as the weight: what is lost of it shows.
    alpha = 0.7 / rank**0.5
    found = weight.to(device, copy=True).addmm_(up.to(device), down.to(device), alpha=alpha).cpu().double()
    wide, product = weight.double(), up.double() @ down.double()
    exact = wide + alpha * product
    summed = wide.abs() + alpha * (up.double().abs() @ down.double().abs())
    return bool(((found - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + _FP32_ERROR * summed).all())


def _add(rows: torch.Tensor, term: Term) -> None:
    adapter = term.adapter
    assert isinstance(adapter, LoraAdapter)
    up, down = adapter.up.flatten(1).to(rows.device), adapter.down.flatten(1).to(rows.device)
    rows.addmm_(up, down, alpha=term.strength * adapter.scale)


def _is_plain(term: Term, dtype: torch.dtype) -> bool:
    """Returns True for a LoRA whose factors are 16-bit numbers of the weight's dtype, on whole rows."""
    adapter, part = term.adapter, term.part
    return (
        type(adapter) is LoraAdapter
        and adapter.mid is None
        and adapter.magnitude is None
        and not adapter.reshaped
        and adapter.up.dtype is adapter.down.dtype is dtype
        and term.strength_model == 1.0
        and term.function is None
        and (part is None or part.dim == 0)
    )


def _overlap(rows: Sequence[tuple[int, int]]) -> bool:
    """Returns True if two of some `(start, length)` have a row in common."""
    end = 0
    for start, length in sorted(rows):
        if start < end:
            return True
        end = start + length
    return False


def _is_suited(device: torch.device) -> bool:
    """Returns True for NVIDIA's cards: of others, and of CPUs, it was not looked at."""
    return device.type == "cuda" and torch.version.hip is None and os.environ.get(SWITCH) != "0"


_ALLOWANCES = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


class _FullPrecision:
    """Takes what a host allows for the speed of its own products away for a while: sums in 16 bits. Around many merges it is
    entered once more: to look at torch's flags takes as long as to start a product.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._taken: dict[str, Any] = {}

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            try:
                if self._inside == 1:
                    self._take()
            except BaseException:
                self._leave()
                raise

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._leave()

    def _take(self) -> None:
        flags = torch.backends.cuda.matmul
        for name in _ALLOWANCES:
            # The last one is not in every torch.
            if value := getattr(flags, name, False):
                self._taken[name] = value
                setattr(flags, name, False)

    def _leave(self) -> None:
        self._inside -= 1
        if not self._inside:
            while self._taken:
                setattr(torch.backends.cuda.matmul, *self._taken.popitem())


full_precision = _FullPrecision()
"""Of the process, as the flags are."""
