"""Bytes that Forge's functions are about to take, known before they run: for the journal's phases.

Source: Forge's `backend/patcher/vae.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...recorder.flight_recorder import KEPT_FREE, RAM_NEED, VRAM_NEED
from ...runtime.journal import Plan
from .types import LoadedModel, MemoryManagement, Patcher, Vae


def moving_plan(
    memory: MemoryManagement, patchers: Sequence[Patcher], device: torch.device | None, free_bytes: int
) -> Plan:
    """Plans for models that go to a device: what is not there yet, and `free_bytes` that have to be free beside it."""
    coming = sum(int(memory.module_size(p.model, exclude_device=device)) for p in patchers)
    return {VRAM_NEED: free_bytes + coming, KEPT_FREE: free_bytes}


def leaving_plan(memory: MemoryManagement, loaded: LoadedModel) -> Plan:
    """Plans for a loaded model that leaves its device: what comes to RAM."""
    if loaded.device.type == "cpu":
        return {}
    return {RAM_NEED: int(memory.module_size(loaded.model.model, include_device=loaded.device))}


def decoding_plan(memory: MemoryManagement, vae: Vae, samples: torch.Tensor) -> Plan:
    """Plans for `VAE.decode_inner`, by Forge's own estimate."""
    return _vae_plan(memory, vae, vae.memory_used_decode, samples.shape)


def encoding_plan(memory: MemoryManagement, vae: Vae, pixels: torch.Tensor) -> Plan:
    """Plans for `VAE.encode_inner`.

    It gets `(pictures, height, width, colours)`, and estimates for the colours first.
    """
    return _vae_plan(memory, vae, vae.memory_used_encode, pixels.movedim(-1, 1).shape)


def _vae_plan(
    memory: MemoryManagement,
    vae: Vae,
    estimate: Callable[[Sequence[int], torch.dtype], float],
    shape: Sequence[int],
) -> Plan:
    if getattr(memory, "VAE_ALWAYS_TILED", False):
        # The estimate is of the whole picture.
        return {}
    return {RAM_NEED if vae.device.type == "cpu" else VRAM_NEED: int(estimate(shape, vae.vae_dtype))}
