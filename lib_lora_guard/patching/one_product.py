"""Merges plain LoRAs into a 16-bit weight on a card by one product each, in the weight's own dtype.

cuBLAS multiplies 16-bit numbers exactly, sums in fp32, adds the weight to that and rounds the sum: a copy and one kernel do, without
an fp32 copy of the weight, what `merging.py` does in fp32 with five kernels and two and a half times the bytes. Whether this card's
product does so is asked of it once for each dtype, beside fp64 (`rounds_once`). Where it does not, or has no such product, nothing
here is used. A row that has two LoRAs would be rounded twice, and goes the other way.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch

from ..adapters import Term
from ..adapters.base import product_of
from ..adapters.lora import LoraAdapter
from ..memory.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)

SWITCH = "LORA_GUARD_ONE_PRODUCT"
"""0 in the environment: every merge is computed in fp32."""
_ALLOWANCES = {
    torch.float16: "allow_fp16_reduced_precision_reduction",
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
}
"""The dtypes that it is for, and torch's flag for partial sums in each."""
_PROBES = ((96, 160, 16), (64, 96, 160))
"""Rows, columns and ranks of the products that a card is asked with."""
_FP32_ERROR = 2.0**-20
"""Of a sum in fp32, relative to what is summed: some roundings of 2**-24."""

MOST_FAILURES = 3
"""Of products on a device, before it is not asked again: an error may have been of the moment."""

_rounds_once: dict[tuple[torch.device, torch.dtype], bool] = {}
_failures: dict[tuple[torch.device, torch.dtype], int] = {}


def merged(data: torch.Tensor, terms: Sequence[Term], out_dtype: torch.dtype) -> torch.Tensor | None:
    """Applies terms to a weight where it lies, rounded once.

    Args:
        data: The weight, `(out, in, ...)`; it is only read.
        terms: The stack. Each has passed `Term.check` for it.
        out_dtype: The dtype of the result.

    Returns:
        A new tensor. None, with nothing done, where another way has to go: other terms or storages, no memory, another kind of card.
    """
    if data.dtype not in _ALLOWANCES or out_dtype is not data.dtype or data.dim() < 2 or not data.is_contiguous():
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
        for term in terms:
            _add(flat if term.part is None else flat.narrow(0, term.part.start, term.part.length), term)
    except Exception as error:
        if not is_out_of_memory(error):
            _note(error, data.device, data.dtype)
        return None
    return result


def rounds_once(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns True if a product of 16-bit factors, added to a weight on a device, has one rounding of 16 bits. Asked once.

    Raises:
        RuntimeError: The device has no memory left, or no such product.
    """
    found = _rounds_once.get((device, dtype))
    if found is None:
        found = _rounds_once[device, dtype] = all(_is_exact(device, dtype, *sizes) for sizes in _PROBES)
        if not found:
            log.debug("merges in %s on %s are computed in fp32: its product rounds more than once", dtype, device)
    return found


def _note(error: Exception, device: torch.device, dtype: torch.dtype) -> None:
    """Notes that a product has failed. A card of another time has none of bf16, and is not asked for each weight."""
    key = (device, dtype)
    _failures[key] = _failures.get(key, 0) + 1
    if _failures[key] == MOST_FAILURES:
        _rounds_once[key] = False
    log.debug("a merge in %s on %s is computed in fp32: %s: %s", dtype, device, type(error).__name__, error)


def _is_exact(device: torch.device, dtype: torch.dtype, rows: int, columns: int, rank: int) -> bool:
    numbers = torch.Generator().manual_seed(rank)
    weight, up, down = (
        torch.randn(shape, generator=numbers, device="cpu").to(dtype)
        for shape in ((rows, columns), (rows, rank), (rank, columns))
    )
    # The change is as large as the weight: what is lost of it shows.
    alpha = 0.7 / rank**0.5
    found = weight.to(device, copy=True)
    _multiply(found, up.to(device), down.to(device), alpha)
    found = found.cpu().double()
    wide, product = weight.double(), up.double() @ down.double()
    exact = wide + alpha * product
    summed = wide.abs() + alpha * (up.double().abs() @ down.double().abs())
    return bool(((found - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + _FP32_ERROR * summed).all())


def _add(rows: torch.Tensor, term: Term) -> None:
    adapter = term.adapter
    assert isinstance(adapter, LoraAdapter)
    up, down = adapter.up.flatten(1).to(rows.device), adapter.down.flatten(1).to(rows.device)
    _multiply(rows, up, down, term.strength * adapter.scale)


def _multiply(rows: torch.Tensor, up: torch.Tensor, down: torch.Tensor, alpha: float) -> None:
    """Adds `alpha * up @ down` to rows. Meanwhile no partial sums of 16 bits, which torch allows for the speed of large products."""
    flags, name = torch.backends.cuda.matmul, _ALLOWANCES[rows.dtype]
    allowed = getattr(flags, name)
    if allowed:
        setattr(flags, name, False)
    try:
        rows.addmm_(up, down, alpha=alpha)
    finally:
        if allowed:
            setattr(flags, name, allowed)


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
    """Returns True for NVIDIA's cards: of others, and of CPUs, it was not looked at. Not where the host sums all its products in fp16."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and os.environ.get(SWITCH) != "0"
        # Not in every torch.
        and not getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    )
