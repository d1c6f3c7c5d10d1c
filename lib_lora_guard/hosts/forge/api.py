"""Probes whether the guard fits this Forge: by what it has, never by its version. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from ...errors import HostError
from ..probing import attribute, module, parameters


@dataclass(frozen=True)
class ForgeApi:
    """The modules and classes of Forge that the guard needs, all probed."""

    lora: ModuleType
    operations: ModuleType
    memory: ModuleType
    base: ModuleType
    linear_classes: tuple[type, ...]
    weight_classes: tuple[type, ...]
    """The layers that ask `operations.get_weight_and_bias` for their weight in every forward pass."""


def probe() -> ForgeApi:
    """Returns Forge's parts.

    Raises:
        HostError: Something is missing; names the first.
    """
    # Memory first, as every host does itself: Forge Neo's modules import each other in a circle that opens only there.
    memory = module("backend.memory_management")
    operations = module("backend.operations")
    lora = module("backend.patcher.lora")
    base = module("backend.patcher.base")

    if getattr(getattr(attribute(lora, "LoraLoader.refresh"), "lora_guard_hook", None), "active", False):
        raise HostError.of("host.second_copy")
    parameters(lora, "LoraLoader.refresh", ["self", "lora_patches", "offload_device"])
    parameters(lora, "LoraLoader.__init__", ["self", "model"])
    parameters(lora, "merge_lora_to_weight", ["patches", "weight", "key", "computation_dtype"])
    for name in ("model_lora_keys_unet", "model_lora_keys_clip"):
        parameters(lora, name, ["model", "key_map"])
    parameters(operations, "get_weight_and_bias", ["layer"])
    if attribute(operations, "merge_lora_to_weight") is not lora.merge_lora_to_weight:
        raise HostError("backend.operations.merge_lora_to_weight is not the one of backend.patcher.lora")
    parameters(base, "ModelPatcher.has_online_lora", ["self"])
    parameters(base, "ModelPatcher.refresh_loras", ["self"])
    parameters(memory, "load_models_gpu", ["models", "hard_memory_preservation"])
    parameters(memory, "LoadedModel.model_load", ["self"])
    parameters(memory, "LoadedModel.model_unload", ["self", "avoid_model_moving"])
    for name in ("unload_model_clones", "minimum_inference_memory", "get_free_memory", "module_size"):
        attribute(memory, name)
    attribute(memory, "current_loaded_models")

    linears: list[type] = []
    weights: list[type] = []
    for family in ("ForgeOperations", "ForgeOperationsGGUF", "ForgeOperationsBNB4bits"):
        operations_class = getattr(operations, family, None)
        if operations_class is None:
            # Only bitsandbytes is optional: Forge leaves its class out where the package does not import.
            if family != "ForgeOperationsBNB4bits":
                raise HostError(f"backend.operations.{family} is missing")
            continue
        linears.append(operations_class.Linear)
        weights.append(operations_class.Linear)
    for name in ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"):
        weights.append(attribute(operations, f"ForgeOperations.{name}"))
    _check_patch_kinds(lora)
    return ForgeApi(lora, operations, memory, base, tuple(linears), tuple(weights))


def _check_patch_kinds(lora: ModuleType) -> None:
    """Tries a merge of `("lora", (up, down, alpha, mid, dora_scale))`. Since 2026 Forge Neo takes ComfyUI's objects instead."""
    two = torch.full((1, 1), 2.0)
    patch = ("lora", (two, two, None, None, None))
    try:
        merged = lora.merge_lora_to_weight([[1.0, patch, 1.0, None, None]], torch.ones(1, 1), key="probe")
    except Exception as error:
        raise HostError(f"{lora.__name__}.merge_lora_to_weight does not take Forge's patches: {error}") from None
    if merged.item() != 5.0:
        raise HostError(f"{lora.__name__}.merge_lora_to_weight does not take Forge's patches")
