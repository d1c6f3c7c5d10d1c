"""Telling "no memory left" from every other failure."""

from __future__ import annotations

import torch

OutOfMemory: tuple[type[BaseException], ...] = (
    getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError),
    MemoryError,
)


_MESSAGES = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "MPS backend out of memory",
    "not enough GPU video memory",
)
"""What plain RuntimeErrors say: torch's CPU allocator, a matrix library without its workspace, a kernel that cannot load,
Apple's allocator, DirectML's."""


def is_out_of_memory(error: BaseException) -> bool:
    """True where another attempt with less memory may succeed."""
    if isinstance(error, OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def give_back_cached_memory() -> None:
    """Hands blocks that torch holds without using back to the driver, so that a larger one can be had."""
    for kind in (torch.cuda, torch.xpu):
        if kind.is_available():
            kind.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
