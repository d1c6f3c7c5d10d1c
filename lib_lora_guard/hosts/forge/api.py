"""Is this a Forge that the guard fits? Capabilities are probed, never versions; nothing is changed here."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ...errors import HostError


@dataclass(frozen=True)
class ForgeApi:
    """The parts of Forge the guard stands on, all proven to be there."""

    lora: ModuleType
    operations: ModuleType
    memory: ModuleType
    base: ModuleType
    linear_classes: tuple[type, ...]
    weight_classes: tuple[type, ...]
    """Layers whose every forward pass gets its weight from `operations.get_weight_and_bias`."""


def probe() -> ForgeApi:
    """The host's parts. Raises HostError with the one probe that failed."""
    # Memory first, as every host does itself: Forge Neo's modules import each other in a circle that opens only there.
    memory = _module("backend.memory_management")
    operations = _module("backend.operations")
    lora = _module("backend.patcher.lora")
    base = _module("backend.patcher.base")

    if getattr(getattr(_attribute(lora, "LoraLoader.refresh"), "lora_guard_hook", None), "active", False):
        raise HostError.of("host.second_copy")
    _parameters(lora, "LoraLoader.refresh", ["self", "lora_patches", "offload_device"])
    _parameters(lora, "LoraLoader.__init__", ["self", "model"])
    _parameters(lora, "merge_lora_to_weight", ["patches", "weight", "key", "computation_dtype"])
    for name in ("model_lora_keys_unet", "model_lora_keys_clip"):
        _parameters(lora, name, ["model", "key_map"])
    _parameters(operations, "get_weight_and_bias", ["layer"])
    if _attribute(operations, "merge_lora_to_weight") is not lora.merge_lora_to_weight:
        raise HostError("backend.operations.merge_lora_to_weight is not the one of backend.patcher.lora")
    _parameters(base, "ModelPatcher.has_online_lora", ["self"])
    _parameters(base, "ModelPatcher.refresh_loras", ["self"])
    _parameters(memory, "load_models_gpu", ["models", "hard_memory_preservation"])
    _parameters(memory, "LoadedModel.model_load", ["self"])
    _parameters(memory, "LoadedModel.model_unload", ["self", "avoid_model_moving"])
    for name in ("unload_model_clones", "minimum_inference_memory", "get_free_memory", "module_size"):
        _attribute(memory, name)
    _attribute(memory, "current_loaded_models")

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
        weights.append(_attribute(operations, f"ForgeOperations.{name}"))
    _check_patch_kinds(lora)
    return ForgeApi(lora, operations, memory, base, tuple(linears), tuple(weights))


def check_networks(networks: ModuleType) -> None:
    """Raises HostError unless Forge's LoRA extension reads files in the way the guard replaces."""
    # The others come by position.
    _parameters(networks, "load_lora_for_models", ["filename", "online_mode"])
    _attribute(networks, "load_lora_state_dict")
    _parameters(networks, "load_networks", ["names"])
    for name in (
        "available_networks",
        "available_network_aliases",
        "forbidden_network_aliases",
        "sd_models.model_data",
    ):
        _attribute(networks, name)
    for name in ("update_available_networks_by_names", "list_available_networks"):
        _attribute(networks, name)


def check_processing(processing: ModuleType) -> None:
    """Raises HostError unless Forge keeps conditionings in the way the guard builds on."""
    name = "StableDiffusionProcessing"
    _parameters(processing, f"{name}.cached_params", ["required_prompts", "steps", "extra_network_data"])
    _parameters(
        processing,
        f"{name}.get_conds_with_caching",
        ["function", "required_prompts", "steps", "caches", "extra_network_data", "hires_steps"],
    )


def _check_patch_kinds(lora: ModuleType) -> None:
    """Forge merges `("lora", (up, down, alpha, mid, dora_scale))`; Forge Neo takes ComfyUI's objects instead since 2026."""
    two = torch.full((1, 1), 2.0)
    patch = ("lora", (two, two, None, None, None))
    try:
        merged = lora.merge_lora_to_weight([[1.0, patch, 1.0, None, None]], torch.ones(1, 1), key="probe")
    except Exception as error:
        raise HostError(f"{lora.__name__}.merge_lora_to_weight does not take Forge's patches: {error}") from None
    if merged.item() != 5.0:
        raise HostError(f"{lora.__name__}.merge_lora_to_weight does not take Forge's patches")


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise HostError(f"{name} cannot be imported: {error}") from error


def _attribute(owner: Any, path: str) -> Any:
    value = owner
    for part in path.split("."):
        if not hasattr(value, part):
            raise HostError(f"{owner.__name__}.{path} is missing")
        value = getattr(value, part)
    return value


def _parameters(owner: ModuleType, path: str, wanted: list[str]) -> None:
    parameters = inspect.signature(_attribute(owner, path)).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        # Another extension's wrapper that takes whatever comes.
        return
    found = list(parameters)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise HostError(f"{owner.__name__}.{path} has no parameter {', '.join(missing)} (it has {', '.join(found)})")
