"""Distinguishes out-of-memory errors from all other failures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_torch import is_loaded, torch

if TYPE_CHECKING:
    OutOfMemory: tuple[type[BaseException], ...]
    """torch's error and Python's."""

_MESSAGES = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "MPS backend out of memory",
    "not enough GPU video memory",
)
"""Texts of plain RuntimeErrors: torch's CPU allocator, a matrix library without its workspace, a kernel that cannot be
loaded, Apple's allocator, DirectML's allocator.
"""


def is_out_of_memory(error: BaseException) -> bool:
    """True if `error` says that memory ended, in VRAM or RAM: another attempt with less memory may succeed."""
    if isinstance(error, _types() if is_loaded() else MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def give_back_cached_memory() -> None:
    """Returns torch's unused cached blocks to the driver, so that a larger block can be allocated."""
    for kind in (torch.cuda, torch.xpu):
        if kind.is_available():
            kind.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def __getattr__(name: str) -> object:
    # torch's error is asked for where it is caught: `memory` is also imported where no torch is loaded.
    if name == "OutOfMemory":
        return _types()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _types() -> tuple[type[BaseException], ...]:
    return getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError), MemoryError
