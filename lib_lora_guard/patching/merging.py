"""The patched value of one weight, computed in fp32 a few rows at a time, so that a merge needs little beyond its result.

A row slice of a sum, a replacement or a row-wise norm has the same bits as the same rows of the whole. A slice of a matrix
product may differ in the last bits of fp32: the library that multiplies picks the order of its sums by the matrix's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch

from ..adapters.base import Shape, Slice, Term, apply_terms, mismatch, product_of
from ..errors import LoraMismatchError, Message
from ..memory.out_of_memory import give_back_cached_memory, is_out_of_memory
from ..weights.storage import MB

SLICE_BYTES = 64 * MB
SMALLEST_SLICE_BYTES = 1 * MB
"""Below this a slice saves nothing: allocators hand out 2 MB blocks, and each slice costs a dozen kernel starts."""

CPU = torch.device("cpu")


def merge(
    original: torch.Tensor,
    terms: Sequence[Term],
    *,
    device: torch.device,
    out_dtype: torch.dtype,
    slice_bytes: int = SLICE_BYTES,
) -> torch.Tensor:
    """`original` with `terms` applied: a new contiguous tensor of `out_dtype`, rounded once.

    `original` is plain data of 16, 32 or 64 bits (64 are computed as such, all others in fp32); it is only read.
    Computed on `device` in row slices of `slice_bytes`, whole where a term needs the whole weight or changes its shape.
    The result lies where `original` lies, or in RAM where there is no room for it: look at its `device`.
    Out of memory: in halves of the slice down to SMALLEST_SLICE_BYTES, then on the CPU. Raises MemoryError where that
    is not enough either.
    """
    data, terms = original.detach(), tuple(terms)
    with torch.inference_mode(False), torch.no_grad():
        size = min(slice_bytes, data.numel() * _compute_dtype(data).itemsize)
        if _keep_shape(terms, tuple(data.shape)) and _slices(terms, 0, data, size) is not None:
            return _merge_slices(data, terms, device, out_dtype, size)
        return _merge_whole(data, terms, device, out_dtype)


def term_rows(term: Term, start: int, length: int, shape: Shape) -> Term | Literal["nothing"] | None:
    """What `term` on a weight of `shape` does to `length` of its rows from `start`, as a term on these rows alone.

    "nothing" where it leaves these rows alone, None where it cannot be told from these rows.
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


def _merge_slices(
    data: torch.Tensor, terms: tuple[Term, ...], device: torch.device, out_dtype: torch.dtype, slice_bytes: int
) -> torch.Tensor:
    result = _room(tuple(data.shape), out_dtype, data.device)
    done = 0
    for place, size in _attempts(device, slice_bytes):
        try:
            # None: this size would cut through a block of a term; another one will not.
            for start, length, row_terms in _slices(terms, done, data, size) or ():
                _merge_rows(data.narrow(0, start, length), row_terms, result.narrow(0, start, length), place)
                done = start + length
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if done == data.shape[0]:
            return result
        give_back_cached_memory()
    raise MemoryError(Message("memory.merge_slices", {"shape": list(data.shape)}))


def _merge_rows(rows: torch.Tensor, terms: Sequence[Term], result: torch.Tensor, device: torch.device) -> None:
    # A function of its own: its names let go of one slice before the next one is made, and after a failure.
    scratch = _scratch(rows, device)
    patched = apply_terms(scratch, terms)
    if patched.shape != rows.shape:
        raise mismatch("a slice of rows", patched.shape, rows.shape)
    result.copy_(patched)


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
    # A kind of another program may return a tensor it goes on using.
    return patched.to(dtype=out_dtype, copy=patched is not scratch).contiguous()


def _attempts(device: torch.device, slice_bytes: int) -> Iterator[tuple[torch.device, int]]:
    """Where and in slices of how many bytes to try: ever smaller on `device`, then the same on the CPU."""
    for place in dict.fromkeys((device, CPU)):
        size = slice_bytes
        yield place, size
        while size > SMALLEST_SLICE_BYTES:
            size = max(size // 2, SMALLEST_SLICE_BYTES)
            yield place, size


def _slices(
    terms: tuple[Term, ...], done: int, data: torch.Tensor, slice_bytes: int
) -> list[tuple[int, int, list[Term]]] | None:
    """`(start, length, terms on these rows)` for the rows from `done` on, in the largest slices that are within
    `slice_bytes` and cut through no block of a term; None where there are none."""
    if data.dim() == 0 or data.numel() == 0:
        return None
    shape = tuple(data.shape)
    row_bytes = product_of(shape[1:]) * _compute_dtype(data).itemsize
    for rows in _row_counts(shape[0], max(1, slice_bytes // row_bytes)):
        pieces = []
        for start in range(done, shape[0], rows):
            length = min(rows, shape[0] - start)
            on_rows = [term_rows(term, start, length, shape) for term in terms]
            if any(term is None for term in on_rows):
                break
            pieces.append((start, length, [term for term in on_rows if isinstance(term, Term)]))
        else:
            return pieces
    return None


def _row_counts(total: int, most: int) -> Iterator[int]:
    """Sizes of a slice to try: `most`, then what divides `total` evenly, as the blocks of a Kronecker product do."""
    yield min(most, total)
    # Smaller ones than a sixteenth would be hundreds of slices.
    yield from (rows for rows in range(min(most, total) - 1, most // 16, -1) if total % rows == 0)


def _keep_shape(terms: tuple[Term, ...], shape: Shape) -> bool:
    """True where every term fits `shape` as it is: one that would widen or grow the weight does not."""
    try:
        for term in terms:
            term.check(shape, may_expand=False)
    except LoraMismatchError:
        return False
    return True


def _compute_dtype(data: torch.Tensor) -> torch.dtype:
    return torch.float64 if data.dtype == torch.float64 else torch.float32


def _scratch(data: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of `data` to compute in. It goes to the device as it is, 16-bit data in half the bytes."""
    return torch.empty(data.shape, dtype=_compute_dtype(data), device=device).copy_(data.to(device))


def _room(shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory on `device`, or in RAM where there is none left."""
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
