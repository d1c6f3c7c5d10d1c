"""Tells whether a merged value still lies where it was put, or the user has replaced, loaded or converted the parameter."""

from __future__ import annotations

import weakref
from enum import Enum

import torch

CLOSE_SHARE = 0.999
"""The share of numbers that must be close to the merged value for a parameter to count as it, moved or converted. Merged on
another device, a few numbers fall to the other side of a rounding border."""


class Found(Enum):
    """The value that lies where a merged one was put."""

    MERGED = "the merged value"
    CONVERTED = "the merged value in another dtype"
    ORIGINAL = "the original, put back by another"
    FOREIGN = "another value: the user's own"


class Placed:
    """One merged value, noted when it is put in place. It is held weakly: what replaces it frees it.

    Args:
        value: The merged parameter.
    """

    def __init__(self, value: torch.nn.Parameter) -> None:
        self._value = weakref.ref(value)
        self._version, self._dtype, self._device = _version_of(value), value.dtype, value.device
        self._address = value.data_ptr()

    def is_surely(self, parameter: object) -> bool:
        """Returns True if `parameter` is the merged value; where it returns False, `compare` has to compare numbers.

        A model that was moved keeps its Parameter objects. Values that are loaded raise the version, or lie at another
        address of the same device.
        """
        if parameter is None or parameter is not self._value() or not isinstance(parameter, torch.Tensor):
            return False
        if _version_of(parameter) != self._version:
            return False
        if parameter.data_ptr() == self._address:
            return True
        return parameter.device != self._device and parameter.dtype == self._dtype


def compare(parameter: object, merged: torch.Tensor, original: torch.Tensor) -> Found:
    """Compares what lies in a merged parameter's place with what was put there.

    Args:
        parameter: What lies there.
        merged: The merged value, calculated again.
        original: The value without LoRAs.
    """
    if not isinstance(parameter, torch.nn.Parameter) or not parameter.is_floating_point():
        return Found.FOREIGN
    now = parameter.detach().cpu()
    if now.shape == original.shape and torch.equal(now, original.detach().cpu().to(now.dtype)):
        return Found.ORIGINAL
    if now.shape != merged.shape or not _is_close(now, merged.detach().cpu().to(now.dtype)):
        return Found.FOREIGN
    return Found.MERGED if now.dtype == merged.dtype else Found.CONVERTED


def _version_of(tensor: torch.Tensor) -> int | None:
    """Returns how often a tensor was written to; None for one that was made in inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version


def _is_close(now: torch.Tensor, wanted: torch.Tensor) -> bool:
    info = torch.finfo(now.dtype)
    close = torch.isclose(now.float(), wanted.float(), rtol=2 * info.eps, atol=info.smallest_normal)
    return float(close.float().mean()) >= CLOSE_SHARE if close.numel() else True
