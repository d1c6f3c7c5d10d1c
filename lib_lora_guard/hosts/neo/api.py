"""Probes whether the guard fits this Forge Neo: by what it has, never by its version. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from ...errors import HostError
from ..probing import attribute, module, parameters
from .types import MemoryManagement

FAMILIES = ("ForgeOperations", "ForgeOperationsGGUF", "ForgeOperationsBNB4bits")
"""Neo's families of layers. The mixed one is made anew for each model; its layers are told by `ForgeWeights` and their name."""

_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")


@dataclass(frozen=True)
class NeoApi:
    """The modules and classes of Neo that the guard needs, all probed."""

    memory: MemoryManagement
    memory_module: ModuleType
    base: ModuleType
    lora: ModuleType
    operations: ModuleType
    layer_class: type
    """`ForgeWeights`, from which every layer of Neo's derives."""
    adapter_class: type
    """`WeightAdapterBase`: the values of patches that Neo's own merge takes."""
    plain_linear: type
    fast_fp8: type | None
    """The linear layer of `--fast-fp8`; None where Neo has none."""
    online_as_functions: bool
    """True where patchers keep LoRAs on the fly as functions, which each load puts on the layers; else marked in `patches`."""


def is_neo_like() -> bool:
    """Returns True for a host whose patchers load models in part and keep no Forge `LoraLoader`.

    What it lacks beside that is for `probe` to say.
    """
    try:
        lora, base = module("backend.patcher.lora"), module("backend.patcher.base")
        attribute(base, "ModelPatcher.partially_load")
    except HostError:
        return False
    return not hasattr(lora, "LoraLoader")


def probe() -> NeoApi:
    """Returns Neo's parts.

    Raises:
        HostError: Something is missing; names the first.
    """
    # Memory first, as the host does itself: its modules import each other in a circle that opens only there.
    memory = module("backend.memory_management")
    operations = module("backend.operations")
    lora = module("backend.patcher.lora")
    base = module("backend.patcher.base")
    if getattr(getattr(attribute(base, "ModelPatcher.clone"), "lora_guard_hook", None), "active", False):
        raise HostError.of("host.second_copy")
    parameters(base, "ModelPatcher.clone", ["self"])
    parameters(base, "ModelPatcher.partially_load", ["self", "device_to", "extra_memory", "force_patch_weights"])
    parameters(base, "ModelPatcher.partially_unload", ["self", "device_to", "memory_to_free"])
    parameters(base, "ModelPatcher.load", ["self", "device_to"])
    parameters(base, "ModelPatcher.unpatch_model", ["self", "device_to", "unpatch_weights"])
    parameters(base, "ModelPatcher.memory_required", ["self", "input_shape"])
    parameters(base, "ModelPatcher.add_patches", ["self", "patches", "strength_patch"])
    parameters(lora, "merge_lora_to_weight", ["patches", "weight", "key", "computation_dtype"])
    parameters(memory, "load_models_gpu", ["models", "memory_required", "minimum_memory_required"])
    for name in ("get_free_memory", "minimum_inference_memory", "unpin_memory", "bake_gguf_model"):
        attribute(memory, name)
    attribute(memory, "current_loaded_models")
    for family in FAMILIES[:2]:
        attribute(operations, f"{family}.Linear")
    for name in _CONVOLUTIONS:
        attribute(operations, f"ForgeOperations.{name}")
    layer_class = attribute(operations, "ForgeWeights")
    adapter_class = attribute(lora, "weight_adapter.WeightAdapterBase")
    _check_weight_functions(operations)
    _check_patchers(base)
    fast = getattr(operations, "ForgeOperationsFP8", None)
    return NeoApi(
        memory,
        memory,
        base,
        lora,
        operations,
        layer_class,
        adapter_class,
        plain_linear=operations.ForgeOperations.Linear,
        fast_fp8=None if fast is None else fast.Linear,
        online_as_functions=_keeps_functions(base),
    )


def _check_weight_functions(operations: ModuleType) -> None:
    """Tries whether a layer's forward pass hands its weight to the functions in `weight_function`, in both of its ways."""
    with torch.inference_mode(False), torch.no_grad():
        layer = operations.ForgeOperations.Linear(1, 1, bias=False)
        layer.weight = torch.nn.Parameter(torch.ones(1, 1), requires_grad=False)
        layer.weight_function = [lambda weight: weight + 2.0]
        for manual_cast in (False, True):
            layer.parameters_manual_cast = manual_cast
            if layer(torch.ones(1, 1)).item() != 3.0:
                raise HostError(f"{operations.__name__}.ForgeOperations.Linear does not use weight_function")


def _keeps_functions(base: ModuleType) -> bool:
    """Tries where a patcher puts a patch that is to be on the fly."""
    cpu = torch.device("cpu")
    try:
        patcher = base.ModelPatcher(torch.nn.Linear(1, 1), load_device=cpu, offload_device=cpu, current_device=cpu)
        patcher.add_patches({"weight": (torch.zeros(1, 1),)}, 1.0, online_mode=True)
    except Exception as error:
        raise HostError(f"{base.__name__}.ModelPatcher.add_patches does not work: {error}") from error
    return not patcher.patches


def _check_patchers(base: ModuleType) -> None:
    """Tries whether a clone shares its model and the id of its patches: else Neo would move the model for each new stack."""
    cpu, model = torch.device("cpu"), torch.nn.Linear(1, 1)
    try:
        patcher = base.ModelPatcher(model, load_device=cpu, offload_device=cpu, current_device=cpu)
        clone = patcher.clone()
        is_same = clone.model is model and clone.patches_uuid == patcher.patches_uuid and clone.patches == {}
    except Exception as error:
        raise HostError(f"{base.__name__}.ModelPatcher.clone does not work: {error}") from error
    if not is_same:
        raise HostError(f"{base.__name__}.ModelPatcher.clone does not share the model and patches_uuid")
