"""Merges a stack into one weight, in fp32 and a few rows at a time: a merge needs little memory beyond its result.

A row slice of a sum, a replacement or a row-wise norm has the same bits as the same rows of the whole. A slice of a
matrix product may differ in the last bits of fp32: the BLAS library picks the order of its sums by the matrix's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch

from ..adapters.base import Adapter, Shape, Slice, Term, apply_terms, mismatch, product_of
from ..errors import LoraMismatchError, Message
from ..inference_mode import outside_inference
from ..memory.out_of_memory import give_back_cached_memory, is_out_of_memory
from ..units import MB
from ..weights.storage import FP8_DTYPES, widest_float
from .wide_product import WIDE_PRODUCT

SLICE_BYTES = 64 * MB
"""Bytes of a slice in the dtype it is computed in."""
SMALLEST_SLICE_BYTES = 1 * MB
"""Below this a slice saves nothing: allocators hand out 2 MB blocks, and each slice costs a dozen kernel starts."""

CPU = torch.device("cpu")


@outside_inference
def merge(
    original: torch.Tensor,
    terms: Sequence[Term],
    *,
    device: torch.device,
    out_dtype: torch.dtype,
    slice_bytes: int = SLICE_BYTES,
) -> torch.Tensor:
    """Applies `terms` to `original` and returns a new contiguous tensor, rounded once.

    It is computed in row slices; whole if a term needs the whole weight or changes its shape. Out of memory, slices are
    halved down to SMALLEST_SLICE_BYTES; then the CPU computes. The result lies where `original` lies, or in RAM if there
    is no room for it: look at its `device`.

    Args:
        original: Plain data, `(out, in, ...)`, of 16, 32 or 64 bits; it is only read. 64 bits are computed in fp64, all
            others in fp32.
        terms: The stack, in order.
        device: The device to compute on.
        out_dtype: The dtype of the result.
        slice_bytes: Bytes of a row slice in the dtype it is computed in.

    Raises:
        MemoryError: Neither the device nor the CPU has room.
    """
    data, terms = original.detach(), tuple(terms)
    size = min(slice_bytes, data.numel() * _compute_dtype(data).itemsize)
    if not keep_shape(terms, tuple(data.shape)) or (first := _slices(terms, 0, data, size)) is None:
        return _merge_whole(data, terms, device, out_dtype)
    # What is more than a tensor stays so in its own calls, and not in memory that it is copied to.
    is_here = len(first) == 1 and data.device == device and type(data) is torch.Tensor
    if is_here and (merged := _merge_at_once(data, first[0][2], out_dtype)) is not None:
        return merged
    return _merge_slices(data, terms, device, out_dtype, size, first)


def term_rows(term: Term, start: int, length: int, shape: Shape) -> Term | Literal["nothing"] | None:
    """Returns the term that does to these rows alone what `term` does to them in the whole weight.

    Args:
        term: A term on the whole weight.
        start: The first row.
        length: The number of rows.
        shape: The shape of the whole weight.

    Returns:
        The term on the rows; "nothing" if `term` does not touch them; None if these rows alone do not tell.
    """
    if term.function is not None or not shape:
        return None
    part, first = term.part, start
    if part is not None and part.dim == 0:
        low, high = max(start, part.start), min(start + length, part.start + part.length)
        if low >= high:
            return "nothing"
        part, first, length = Slice(0, low - start, high - low), low - part.start, high - low
    adapter = term.adapter.rows(first, length)
    return None if adapter is None else replace(term, adapter=adapter, part=part)


def _merge_at_once(data: torch.Tensor, terms: Sequence[Term], out_dtype: torch.dtype) -> torch.Tensor | None:
    """Merges one slice that is the whole weight, where it lies, in as few calls as there are: most weights of small models.

    Returns:
        None, with nothing done, where the memory is not enough.
    """
    try:
        if data.dtype is out_dtype and (merged := WIDE_PRODUCT.merged(data, terms)) is not None:
            return merged
        patched = _checked(apply_terms(_scratch(data, data.device), terms), data)
        return patched.to(out_dtype, copy=True).contiguous()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return None


def _merge_slices(
    data: torch.Tensor,
    terms: tuple[Term, ...],
    device: torch.device,
    out_dtype: torch.dtype,
    slice_bytes: int,
    first: list[tuple[int, int, list[Term]]],
) -> torch.Tensor:
    result = _room(tuple(data.shape), out_dtype, data.device)
    done, cut = 0, first
    for place, size in _attempts(device, slice_bytes):
        try:
            # None: slices of this size would cut through a block of a term. Another size will not.
            for start, length, row_terms in cut or _slices(terms, done, data, size) or ():
                _merge_rows(data.narrow(0, start, length), row_terms, result.narrow(0, start, length), place)
                done = start + length
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if done == data.shape[0]:
            return result
        cut = []
        give_back_cached_memory()
    raise MemoryError(Message("memory.merge_slices", {"shape": list(data.shape)}))


def _merge_rows(rows: torch.Tensor, terms: Sequence[Term], result: torch.Tensor, device: torch.device) -> None:
    # A function of its own: its locals are freed before the next slice is made, and after a failure.
    if rows.device == device and WIDE_PRODUCT.merged(rows, terms, result) is not None:
        return
    scratch = _scratch(rows, device)
    result.copy_(_checked(apply_terms(scratch, terms), rows))


def _checked(patched: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if patched.shape != rows.shape:
        raise mismatch("a slice of rows", patched.shape, rows.shape)
    return patched


def _merge_whole(
    data: torch.Tensor, terms: tuple[Term, ...], device: torch.device, out_dtype: torch.dtype
) -> torch.Tensor:
    for place in dict.fromkeys((device, CPU)):
        try:
            result = _patched(data, terms, place, out_dtype)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return result if result.device == data.device else _at_home(result, data.device)
        give_back_cached_memory()
    raise MemoryError(Message("memory.merge_whole", {"shape": list(data.shape)}))


def _patched(data: torch.Tensor, terms: tuple[Term, ...], device: torch.device, out_dtype: torch.dtype) -> torch.Tensor:
    scratch = _scratch(data, device)
    patched = apply_terms(scratch, terms)
    # A kind of another extension may return a tensor that it goes on using.
    return patched.to(dtype=out_dtype, copy=patched is not scratch).contiguous()


def _attempts(device: torch.device, slice_bytes: int) -> Iterator[tuple[torch.device, int]]:
    """Yields device and bytes of a slice to try: ever smaller slices on `device`, then the same on the CPU."""
    for place in dict.fromkeys((device, CPU)):
        size = slice_bytes
        yield place, size
        while size > SMALLEST_SLICE_BYTES:
            size = max(size // 2, SMALLEST_SLICE_BYTES)
            yield place, size


def _slices(
    terms: tuple[Term, ...], done: int, data: torch.Tensor, slice_bytes: int
) -> list[tuple[int, int, list[Term]]] | None:
    """Cuts the rows from `done` on into `(start, length, terms on these rows)`.

    The slices are the largest ones within `slice_bytes` that cut through no block of a term; None if there are none.
    """
    if data.dim() == 0 or data.numel() == 0:
        return None
    shape = tuple(data.shape)
    row_bytes = product_of(shape[1:]) * _compute_dtype(data).itemsize
    for rows in _row_counts(shape[0], max(1, slice_bytes // row_bytes)):
        pieces = []
        for start in range(done, shape[0], rows):
            length = min(rows, shape[0] - start)
            if length == shape[0] and all(map(_may_be_cut, terms)):
                # The whole: most weights of small models. The terms are what they would be on its rows.
                return [(0, length, list(terms))]
            on_rows = [term_rows(term, start, length, shape) for term in terms]
            if any(term is None for term in on_rows):
                break
            pieces.append((start, length, [term for term in on_rows if isinstance(term, Term)]))
        else:
            return pieces
    return None


def _may_be_cut(term: Term) -> bool:
    """Returns True for a kind of which rows can be told apart, in some slices at least."""
    return term.function is None and type(term.adapter).rows is not Adapter.rows


def _row_counts(total: int, most: int) -> Iterator[int]:
    """Yields rows of a slice to try: `most`, then divisors of `total`, as the blocks of a Kronecker product are."""
    yield min(most, total)
    # Below a sixteenth of `most` there would be hundreds of slices.
    yield from (rows for rows in range(min(most, total) - 1, most // 16, -1) if total % rows == 0)


def keep_shape(terms: Sequence[Term], shape: Shape) -> bool:
    """Returns True if every term fits `shape` as it is. A term that would widen or grow the weight does not."""
    try:
        for term in terms:
            term.check(shape, may_expand=False)
    except LoraMismatchError:
        return False
    return True


def is_finite(tensor: torch.Tensor) -> bool:
    """Returns True if `tensor` has neither NaN nor infinity. Both survive a sum, which needs no mask of its size."""
    # torch has no sum of fp8; every fp8 number is one of fp16.
    summed = tensor.to(torch.float16) if tensor.dtype in FP8_DTYPES else tensor
    # In fp64 no sum of finite fp32 numbers overflows.
    return math.isfinite(float(summed.sum(dtype=widest_float(tensor.device))))


def are_finite(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Returns `is_finite` of each. A card is asked about all of them at once: about one it takes the processor 50 us.

    Both NaN and infinity survive a norm too. One that is not finite may have overflowed: such a tensor is asked about alone.
    """
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, alike in enumerate([(one.device, one.dtype) for one in tensors]):
        places.setdefault(alike, []).append(place)
    doubtful: list[int] = []
    for mine in places.values():
        try:
            norms = torch.stack(list(torch._foreach_norm([tensors[place] for place in mine])))
        except Exception:
            # Not of every dtype, and not by a public name. Where memory has ended one alone needs less.
            doubtful += mine
        else:
            fine = torch.isfinite(norms).tolist()
            doubtful += [place for place, is_fine in zip(mine, fine, strict=True) if not is_fine]
    found = [True] * len(tensors)
    for place in doubtful:
        found[place] = is_finite(tensors[place])
    return found


def _compute_dtype(data: torch.Tensor) -> torch.dtype:
    return torch.float64 if data.dtype == torch.float64 else torch.float32


def _scratch(data: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies `data` into memory to compute in. It goes to the device in its own dtype: 16 bits are half the bytes."""
    dtype = _compute_dtype(data)
    if data.device == device and type(data) is torch.Tensor:
        return data.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return torch.empty(data.shape, dtype=dtype, device=device).copy_(data.to(device))


def _room(shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocates uninitialised memory on `device`, or in RAM if the device is full."""
    for place in dict.fromkeys((device, CPU)):
        try:
            return torch.empty(shape, dtype=dtype, device=place)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        give_back_cached_memory()
    raise MemoryError(Message("memory.merge_result", {"shape": list(shape)}))


def _at_home(result: torch.Tensor, device: torch.device) -> torch.Tensor:
    return _room(tuple(result.shape), result.dtype, device).copy_(result)
