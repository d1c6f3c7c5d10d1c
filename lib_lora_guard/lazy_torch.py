"""Gives modules a `torch` that is imported on first use: headers of files are read without it, and it takes over a second.

A module that is also used on headers alone says `from ..lazy_torch import torch` instead of `import torch`. Where torch is
loaded already, as in every host, the name is torch itself. Elsewhere it is a stand-in, which never enters `sys.modules`.
"""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["is_loaded", "torch"]


def is_loaded() -> bool:
    """Returns True where this process has imported torch, so that a tensor, a dtype or a CUDA context can exist."""
    return "torch" in sys.modules


@cache
def _torch() -> ModuleType:
    import torch

    return torch


class _ImportedOnUse:
    """Stands for torch: each attribute is torch's own, looked up anew, as a patch of torch must be seen here too."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        return getattr(_torch(), name)


if TYPE_CHECKING or is_loaded():
    import torch
else:
    torch = _ImportedOnUse()
