"""Forge's own memory arithmetic, to explain its log and predict its decisions. Pure, without torch.

Source, if a docstring names no other: Forge dfdcbab6, `backend/memory_management.py`. All sizes are bytes, and floats where
Forge has floats. This module describes the host without LoRA Guard; `planning.host_memory` has the parts that the guard's own
plan uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..planning.host_memory import Latent, swap_budget_bytes
from ..units import FP32_BYTES, GB, MB

SENTINEL_BYTES = 1e30
"""The request of `unload_all_models`: unload everything. Until 2024-08-21 it was printed as if it were a size."""
DEFAULT_SLIDER_REST_BYTES = 1024 * MB
"""`current_inference_memory` at start: the part of the card that the slider "GPU Weights" leaves."""
REQUEST_FACTOR = 1.3
LOADED_SHARE = 0.25
MERGE_COPIES = 3
FLUX_PRESET_WIDTH, FLUX_PRESET_HEIGHT = 896, 1152
"""Image size of the presets "flux" and "xl" (`modules_forge/main_entry.py`)."""


@dataclass(frozen=True)
class Request:
    """The parts of one request for free VRAM."""

    exclusive_bytes: float = 0
    """Weights of the models to load that are not on the device yet."""
    inclusive_bytes: float = 0
    """Weights of these models that are on the device already."""
    slider_rest_bytes: float = DEFAULT_SLIDER_REST_BYTES
    estimate_bytes: float = 0
    """The caller's `memory_required`."""
    hard_bytes: float = 0
    """ControlNets and fp16 LoRAs."""


@dataclass(frozen=True)
class Placement:
    """The placement of one model."""

    remaining_bytes: float
    """As printed."""
    swap_budget_bytes: int | None
    """None if the whole model goes to the GPU."""


@dataclass(frozen=True)
class Layer:
    """One layer of a model to place: its weight, and the rest (bias)."""

    weight_bytes: float
    extra_bytes: float = 0


@dataclass(frozen=True)
class Distribution:
    """A model divided by a swap budget, as "Swap Loaded: ... GPU Loaded: ..." prints it."""

    gpu_bytes: float
    swapped_bytes: float


@dataclass(frozen=True)
class BackupRam:
    """RAM that a merged LoRA needs: while the model is placed, and while all of it lies in RAM."""

    placed_bytes: float
    offloaded_bytes: float


def neo_estimate_bytes(latent: Latent, usage_factor: float) -> float:
    """Returns the estimate for a step in Forge Neo since autumn 2025 with torch's attention.

    0.15 MB per row and latent pixel, times a factor of the architecture (2.8 Flux, 3.2 Chroma). Source: Neo 7862a964, `KModel.memory_required` and huggingface_guess.
    """
    return 2 * latent.pictures * latent.area * 0.15 * usage_factor * MB


def slider_rest_bytes(total_bytes: float, weights_bytes: float) -> float:
    """Returns the part of the card that the slider "GPU Weights" leaves for inference. Not clamped: a slider above the
    card gives a negative number. Source: `refresh_memory_management_settings` (`modules_forge/main_entry.py`).
    """
    return total_bytes - weights_bytes


def weights_percent(total_bytes: float, weights_bytes: float) -> float:
    """Returns the share that "[GPU Setting] You will use ...% GPU memory" prints. Source: as `slider_rest_bytes`."""
    return 100 - slider_rest_bytes(total_bytes, weights_bytes) / total_bytes * 100


def neo_inference_bytes(slider_rest: float, total_bytes: float, is_windows: bool) -> float:
    """Returns Neo's `minimum_inference_memory`: 0.8 of the slider's rest, plus 400 MB, on Windows 600, there above 15
    GB 800. Source: Neo 7862a964, `backend/memory_management.py`.
    """
    extra = 400 * MB if not is_windows else 800 * MB if total_bytes > 15 * GB else 600 * MB
    return slider_rest * 0.8 + extra


def request_bytes(request: Request) -> float:
    """Returns the request of `load_models_gpu` to `free_memory` before a load.

    1.3 * (exclusive + a quarter of inclusive) + the larger of slider rest and estimate + hard.
    """
    weights = request.exclusive_bytes + request.inclusive_bytes * LOADED_SHARE
    return weights * REQUEST_FACTOR + request_when_loaded_bytes(request)


def request_when_loaded_bytes(request: Request) -> float:
    """Returns the request if all models are loaded already: nothing for weights."""
    return max(request.slider_rest_bytes, request.estimate_bytes) + request.hard_bytes


def early_request_bytes(model_bytes: float, slider_rest: float, estimate: float = 0, hard: float = 0) -> float:
    """Returns the request in August 2024: the whole model counts, even if loaded, and `hard` competes with the slider.
    Source: Forge 0252ad86 to 33b5b9d2, `load_models_gpu` and `sampling_prepare`.
    """
    return model_bytes * REQUEST_FACTOR + max(slider_rest, estimate + hard)


def place(
    free_bytes: float, exclusive_bytes: float, inclusive_bytes: float, slider_rest: float, hard_bytes: float = 0
) -> Placement:
    """Places one model as `load_models_gpu` does. It ignores the estimate of the step and uses only the slider's rest.
    If a part of the model was loaded before, exactly that much is loaded again.
    """
    inference = slider_rest + hard_bytes
    remaining = free_bytes - exclusive_bytes - inference
    if remaining >= 0:
        return Placement(remaining, None)
    budget = int(inclusive_bytes) if inclusive_bytes > 0 else swap_budget_bytes(free_bytes, inference)
    return Placement(remaining, budget)


def distribute(layers: Sequence[Layer], budget_bytes: float, fixed_bytes: float = 0) -> Distribution:
    """Divides a model by a swap budget. Source: `build_module_profile`.

    In this order, each while the sum stays below the budget: parameters that cannot be swapped, all biases, then
    weights, the small ones first. "Below" makes a model that was placed once lose a layer the next time.

    Args:
        layers: The model's layers.
        budget_bytes: The swap budget.
        fixed_bytes: Parameters that cannot be swapped (norms of the model's own).
    """
    gpu, swapped, with_extras = fixed_bytes, 0.0, []
    for layer in sorted(layers, key=lambda one: one.extra_bytes):
        if gpu + layer.extra_bytes < budget_bytes:
            gpu += layer.extra_bytes
            with_extras.append(layer)
        else:
            swapped += layer.weight_bytes + layer.extra_bytes
    for layer in sorted(with_extras, key=lambda one: one.weight_bytes):
        if gpu + layer.weight_bytes < budget_bytes:
            gpu += layer.weight_bytes
        else:
            swapped += layer.weight_bytes
    return Distribution(gpu, swapped)


def vae_decode_bytes(latent: Latent, value_bytes: int) -> float:
    """Returns Forge's estimate for a decode, for one image whatever the batch: 2178 * h * w * 64 * size of a value.
    Source: `VAE.memory_used_decode` (`backend/patcher/vae.py`).
    """
    return 2178.0 * latent.area * 64 * value_bytes


def merge_copy_bytes(values: int) -> int:
    """Returns the size of one fp32 tensor of a layer, which "Tried to allocate" names if a merge runs out of memory.
    Source: `merge_lora_to_weight` (`backend/patcher/lora.py`), which computes in fp32 when it merges into stored
    weights.
    """
    return values * FP32_BYTES


def merge_peak_bytes(values: int) -> int:
    """Returns the VRAM that merging one layer needs: its fp32 copy, the product and the scaled product. DoRA needs
    more. Forge's requests and placements do not include it. Source: as `merge_copy_bytes`.
    """
    return MERGE_COPIES * merge_copy_bytes(values)


def backup_ram_bytes(on_gpu_bytes: float, swapped_bytes: float) -> BackupRam:
    """Returns the RAM of the backups that a merge keeps.

    For a weight on the GPU that is the original, for a swapped weight the patched copy (the original becomes the
    backup). When the model moves to RAM for the text encoder or the VAE, its weights on the GPU are added to their
    backups. Source: `LoraLoader.refresh` (`backend/patcher/lora.py`).
    """
    backup = on_gpu_bytes + swapped_bytes
    return BackupRam(backup, backup + on_gpu_bytes)
