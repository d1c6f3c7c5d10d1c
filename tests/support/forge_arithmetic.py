"""Forge's arithmetic and output that only tests compare with. Source: Forge dfdcbab6, `backend/memory_management.py`."""

from collections.abc import Sequence
from dataclasses import dataclass

from lib_lora_guard.units import MB


@dataclass(frozen=True)
class Loaded:
    """A model in `current_loaded_models`."""

    name: str
    bytes: float
    can_go: bool = True
    """True if it is on the device in question and not among those to keep."""


@dataclass(frozen=True)
class Eviction:
    """`unloaded`: names in the order in which they went."""

    unloaded: tuple[str, ...]
    free_bytes: float


def as_logged(count: float) -> str:
    """As Forge prints sizes: MB of 2^20, two places."""
    return f"{count / MB:.2f} MB"


def evict(loaded: Sequence[Loaded], free_bytes: float, wanted_bytes: float) -> Eviction:
    """Unloads models as `free_memory` does: the oldest (last of the list) first, whole models, until more is free than
    wanted. A request above the card unloads everything that can go; SENTINEL_BYTES is such a request.
    """
    unloaded = []
    for model in reversed(loaded):
        if free_bytes > wanted_bytes:
            break
        if model.can_go:
            unloaded.append(model.name)
            free_bytes += model.bytes
    return Eviction(tuple(unloaded), free_bytes)


def vae_encode_bytes(width: int, height: int, value_bytes: int) -> float:
    """Returns Forge's estimate for an encode, from pixels: 1767 * H * W * size of a value. Source: `VAE.memory_used_encode`."""
    return 1767.0 * width * height * value_bytes
