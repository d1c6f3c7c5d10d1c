"""The objects of Forge Neo that the guard works with, as far as it uses them.

Sources: Neo's `backend/patcher/base.py`, `backend/memory_management.py`, `backend/operations.py`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch

from ...adapters.base import RowFunction
from ...adapters.patch_tuples import PatchValue
from ...runtime.host import FittedLora

HostPatch: TypeAlias = tuple[float, PatchValue, float, tuple[int, int, int] | None, RowFunction | None, bool | None]
"""`(strength, value, strength of the model, offset, function, on the fly)`."""

WeightChange: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""An entry of a layer's `weight_function`: takes the weight of a forward pass, returns what is to be used."""

Loras: TypeAlias = tuple[FittedLora, ...]
"""The LoRAs of a patcher, in the prompt's order."""


class Patcher(Protocol):
    """`backend.patcher.base.ModelPatcher`: a model with the patches that it shall have. Clones share the model."""

    model: torch.nn.Module
    load_device: torch.device
    offload_device: torch.device
    patches: dict[str, list[HostPatch]]
    patches_uuid: uuid.UUID
    object_patches: Mapping[str, PatchValue]
    weight_wrapper_patches: dict[str, list[WeightChange]]
    """Functions for weights, which each load puts on the layers."""

    def clone(self) -> Patcher: ...
    def memory_required(self, input_shape: Sequence[int]) -> float: ...
    def add_patches(
        self,
        patches: Mapping[str, PatchValue],
        strength_patch: float = ...,
        strength_model: float = ...,
        *,
        filename: str | None = ...,
        online_mode: bool | None = ...,
    ) -> Sequence[str]: ...
    def partially_load(
        self, device_to: torch.device, extra_memory: float = ..., force_patch_weights: bool = ...
    ) -> float: ...


@runtime_checkable
class PatchFunction(Protocol):
    """A function of a weight that a later Neo has made of patches that are given in each forward pass."""

    patch: Sequence[HostPatch]


class LoadedModel(Protocol):
    """`backend.memory_management.LoadedModel`: a patcher whose model was placed; None once the patcher is gone."""

    @property
    def model(self) -> Patcher | None: ...


class Vae(Protocol):
    """`backend.patcher.vae.VAE`. Shapes are of latents `(pictures, channels, height, width)`."""

    device: torch.device
    vae_dtype: torch.dtype

    def memory_used_decode(self, shape: Sequence[int], dtype: torch.dtype) -> float: ...


class MemoryManagement(Protocol):
    """The module `backend.memory_management`."""

    current_loaded_models: list[LoadedModel]

    def get_torch_device(self) -> torch.device: ...
    def get_total_memory(self, dev: torch.device | None = ...) -> int: ...
    def get_free_memory(self, dev: torch.device | None = ...) -> int: ...
    def minimum_inference_memory(self) -> float: ...
    def unpin_memory(self, tensor: torch.Tensor) -> bool: ...
    def bake_gguf_model(self, model: torch.nn.Module) -> torch.nn.Module | None: ...
    def load_models_gpu(self, models: Sequence[Patcher], memory_required: float = ...) -> None: ...
    def unload_all_models(self) -> None: ...
    def soft_empty_cache(self) -> None: ...


class WeightLayer(Protocol):
    """A layer of Neo's: each forward pass hands its temporary weight and bias to these functions."""

    weight_function: list[WeightChange]
    bias_function: list[WeightChange]
