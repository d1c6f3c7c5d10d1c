"""The objects of Forge that the guard works with, as far as it uses them.

Sources: Forge's `backend/memory_management.py`, `backend/patcher/base.py`, `backend/patcher/lora.py`,
`backend/patcher/vae.py`, `backend/modules/k_model.py`. What some versions lack is asked for with `getattr` where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch

from ...adapters.patch_tuples import PatchValue

PatchEntry: TypeAlias = Sequence[PatchValue]
"""`[strength, value, strength_model, offset, function]`."""

Identifier: TypeAlias = Hashable
"""Forge's `(filename, strength_patch, strength_model, online_mode)`; other extensions have keys of their own."""

Patches: TypeAlias = Mapping[Identifier, Mapping[str, Sequence[PatchEntry]]]
"""The patches of a stack: by LoRA, then by parameter name, or by `(name, offset)` as they are added."""


class LoraLoader(Protocol):
    """`backend.patcher.lora.LoraLoader`: one for each model, shared by the model's patchers."""

    model: torch.nn.Module
    backup: Mapping[str, torch.Tensor]
    online_backup: Sequence[torch.nn.Module]
    loaded_hash: str

    def refresh(self, lora_patches: Patches, offload_device: torch.device = ..., force_refresh: bool = ...) -> None: ...


class Patcher(Protocol):
    """`backend.patcher.base.ModelPatcher`: a model with a stack of LoRAs that it shall have."""

    model: torch.nn.Module
    load_device: torch.device
    offload_device: torch.device
    current_device: torch.device
    lora_patches: Patches
    lora_loader: LoraLoader
    model_options: MutableMapping[str, Any]

    def clone(self) -> Patcher: ...
    def is_clone(self, other: Patcher) -> bool: ...
    def refresh_loras(self) -> None: ...
    def has_online_lora(self) -> bool: ...
    def memory_required(self, input_shape: Sequence[int]) -> float: ...
    def model_dtype(self) -> torch.dtype: ...
    def model_patches_to(self, device: torch.device | torch.dtype) -> None: ...
    def forge_patch_model(self, target_device: torch.device | None = ...) -> torch.nn.Module: ...
    def forge_unpatch_model(self, target_device: torch.device | None = ...) -> None: ...
    def add_patches(
        self,
        *,
        filename: str,
        patches: Mapping[Any, PatchValue],
        strength_patch: float = ...,
        strength_model: float = ...,
        online_mode: bool = ...,
    ) -> set[str]: ...


class LoadedModel(Protocol):
    """`backend.memory_management.LoadedModel`: a patcher whose model lies on a device, or None once Forge gave it up."""

    model: Patcher
    real_model: torch.nn.Module | None
    device: torch.device
    offload_device: torch.device
    model_accelerated: bool

    def model_load(self, model_gpu_memory_when_using_cpu_swap: float = ...) -> torch.nn.Module: ...
    def model_unload(self, avoid_model_moving: bool = ...) -> None: ...


class MemoryManagement(Protocol):
    """The module `backend.memory_management`."""

    current_loaded_models: list[LoadedModel]
    current_inference_memory: int
    VAE_ALWAYS_TILED: bool

    def get_torch_device(self) -> torch.device: ...
    def get_total_memory(self, dev: torch.device | None = ...) -> int: ...
    def get_free_memory(self, dev: torch.device | None = ...) -> int: ...
    def minimum_inference_memory(self) -> int: ...
    def module_size(
        self,
        module: torch.nn.Module,
        exclude_device: torch.device | None = ...,
        include_device: torch.device | None = ...,
    ) -> float: ...
    def dtype_size(self, dtype: torch.dtype) -> int: ...
    def soft_empty_cache(self, force: bool = ...) -> None: ...
    def unload_all_models(self) -> None: ...
    def free_memory(
        self,
        memory_required: float,
        device: torch.device,
        keep_loaded: Sequence[LoadedModel] = ...,
        free_all: bool = ...,
    ) -> None: ...
    def load_models_gpu(
        self, models: Sequence[Patcher], memory_required: float = ..., hard_memory_preservation: float = ...
    ) -> None: ...


class LoraModule(Protocol):
    """The module `backend.patcher.lora`."""

    LoraLoader: type[LoraLoader]
    extra_weight_calculators: MutableMapping[str, Callable[[torch.Tensor, float, Any], torch.Tensor]]


class Vae(Protocol):
    """`backend.patcher.vae.VAE`. Shapes are of latents `(pictures, channels, height, width)`."""

    first_stage_model: torch.nn.Module
    patcher: Patcher
    device: torch.device
    vae_dtype: torch.dtype
    downscale_ratio: int

    def memory_used_decode(self, shape: Sequence[int], dtype: torch.dtype) -> float: ...
    def memory_used_encode(self, shape: Sequence[int], dtype: torch.dtype) -> float: ...
