"""Every function of Forge that the guard replaces: where it is, and which layers stand around it, the outermost first.

docs/hosts.md lists the same functions; a test compares the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ...recorder.flight_recorder import Phase
from ...runtime.hooks import Row
from ..webui import saving
from ..webui.checkpoint_reading import reading_plan, text_encoder_plan
from ..webui.takeover import HOOKS as WEB
from .access import merge_lora_to_weight
from .parts import ForgeParts
from .phases import decoding_plan, encoding_plan
from .sizes import module_size

_MEMORY, _LORA, _PATCHER = "backend.memory_management", "backend.patcher.lora", "backend.patcher.base"
_K_MODEL, _VAE, _MONITOR = "backend.modules.k_model", "backend.patcher.vae", "modules.memmon"


def with_fresh_key_map(
    original: Callable[..., dict[str, Any]],
    model: torch.nn.Module,
    key_map: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Any]:
    """Forge's default is one dict for all calls: keys of earlier checkpoints would match this LoRA too."""
    return original(model, {} if key_map is None else key_map, *args, **kwargs)


START: tuple[Row[ForgeParts], ...] = (
    Row(
        _LORA,
        "LoraLoader.refresh",
        lambda g: (g.calibration.refresh, g.journal.around(Phase.APPLY_LORA), g.control.refresh),
    ),
    Row("backend.operations", "merge_lora_to_weight", lambda g: (merge_lora_to_weight,)),
    Row(_PATCHER, "ModelPatcher.has_online_lora", lambda g: (g.loras.has_online_lora,)),
    Row(_MEMORY, "LoadedModel.model_load", lambda g: (g.calibration.model_load, g.loras.model_load)),
    Row(_MEMORY, "LoadedModel.model_unload", lambda g: (g.loading.model_unload,)),
    Row(_MEMORY, "unload_model_clones", lambda g: (g.loading.unload_model_clones,)),
    Row(_MEMORY, "load_models_gpu", lambda g: (g.calibration.load_models_gpu, g.loading.load_models_gpu)),
    Row(_MEMORY, "module_size", lambda g: (module_size,)),
    Row(_MEMORY, "free_memory", lambda g: (g.eviction.free_memory,)),
    Row(_MEMORY, "get_free_memory", lambda g: (g.free.get_free_memory,)),
    Row(
        _MEMORY,
        "compute_model_gpu_memory_when_using_cpu_swap",
        lambda g: (g.eviction.weights_on_card,),
        is_needed=False,
    ),
    Row(
        _PATCHER,
        "ModelPatcher.memory_required",
        lambda g: (g.calibration.estimates.patcher_memory_required,),
        is_needed=False,
    ),
    Row(_LORA, "model_lora_keys_unet", lambda g: (with_fresh_key_map,)),
    Row(_LORA, "model_lora_keys_clip", lambda g: (with_fresh_key_map,)),
)
"""The functions that exist when preload.py runs: all of them are replaced, or none."""

LATER: tuple[Row[ForgeParts], ...] = (
    Row(_K_MODEL, "KModel.memory_required", lambda g: (g.calibration.estimates.memory_required,), is_needed=False),
    Row(
        _K_MODEL,
        "KModel.apply_model",
        lambda g: (g.calibration.apply_model, g.steps.apply_model),
        is_needed=False,
    ),
    Row(
        _VAE,
        "VAE.decode_inner",
        lambda g: (
            g.calibration.decode_inner,
            g.journal.around(Phase.VAE_DECODE, functools.partial(decoding_plan, g.api.memory)),
            g.vae.decode_inner,
        ),
        is_needed=False,
    ),
    Row(_VAE, "VAE.decode_tiled_", lambda g: (g.calibration.decode_tiled,), is_needed=False),
    Row(
        _VAE,
        "VAE.encode_inner",
        lambda g: (
            g.journal.around(Phase.VAE_ENCODE, functools.partial(encoding_plan, g.api.memory)),
            g.vae.encode_inner,
        ),
        is_needed=False,
    ),
    Row(_MONITOR, "MemUsageMonitor.monitor", lambda g: (g.calibration.monitor_begins,), is_needed=False),
    Row(_MONITOR, "MemUsageMonitor.read", lambda g: (g.calibration.monitor_reads,), is_needed=False),
    Row(
        "modules.sd_models",
        "forge_loader",
        lambda g: (
            g.journal.around(Phase.LOAD_CHECKPOINT, reading_plan),
            g.reading.before_reading,
            g.first_lora.after_reading,
        ),
        is_needed=False,
    ),
    Row(
        "backend.loader",
        "load_huggingface_component",
        lambda g: (g.journal.around(Phase.LOAD_TEXT_ENCODER, text_encoder_plan),),
        is_needed=False,
    ),
    Row("backend.operations_bnb", "copy_quant_state", lambda g: (g.quant_states.copy_quant_state,), is_needed=False),
)
"""The functions that exist when Forge runs the extension's scripts."""

HOOKS = (*START, *LATER, *WEB, *saving.HOOKS)
