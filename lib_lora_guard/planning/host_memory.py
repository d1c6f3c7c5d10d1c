"""Forge's own memory arithmetic, to explain its log and predict its decisions. Pure, without torch.

Source, if a docstring names no other: Forge dfdcbab6, `backend/memory_management.py`. All sizes are bytes, and floats
where Forge has floats. This module describes the host without LoRA Guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MB = 1 << 20
GB = 1 << 30

SENTINEL_BYTES = 1e30
"""The request of `unload_all_models`: unload everything. Until 2024-08-21 it was printed as if it were a size."""
DEFAULT_SLIDER_REST_BYTES = 1024 * MB
"""`current_inference_memory` at start: the part of the card that the slider "GPU Weights" leaves."""
SAFE_FREE_BYTES = 1536 * MB
"""With less free VRAM a step prints "[Low GPU VRAM Warning]", for any model."""
REQUEST_FACTOR = 1.3
LOADED_SHARE = 0.25
FP32_BYTES = 4
MERGE_COPIES = 3
PROCESS_LOADING_BYTES = 1 * GB
"""RAM of Python, torch and a CUDA context. Measured: 12.1 GB with 11.1 GB of weights, 7.2 GB with 6.2 GB."""
PROCESS_RUNNING_BYTES = int(2.4 * GB)
"""The same with the kernels of a forward pass loaded, which CUDA keeps in RAM too. Measured: 2.8 GB with all weights on
the GPU and 0.3 GB of LoRA; 8.9 GB with a backup of 6.2 GB.
"""
RAM_FLOOR_BYTES = 2 * GB
"""RAM that is left to the system: below it Windows starts to swap (the guard keeps to the same floor)."""
FLUX_PRESET_WIDTH, FLUX_PRESET_HEIGHT = 896, 1152
"""Image size of the presets "flux" and "xl" (`modules_forge/main_entry.py`)."""


@dataclass(frozen=True)
class Latent:
    """Number of images at once, and their size in latent pixels: an eighth of the image's."""

    pictures: int
    height: int
    width: int

    @classmethod
    def of(cls, width: int, height: int, pictures: int = 1) -> Latent:
        """Makes a latent from the image size in pixels."""
        return cls(pictures, height // 8, width // 8)

    @property
    def area(self) -> int:
        """Latent pixels of one image."""
        return self.height * self.width


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


def as_logged(count: float) -> str:
    """As Forge prints sizes: MB of 2^20, two places."""
    return f"{count / MB:.2f} MB"


def unet_estimate_bytes(latent: Latent, compute_bytes: int, sliced_attention: bool = False) -> float:
    """Returns Forge's estimate for a step of any model: 1.28 * 2B * H/8 * W/8 * size of a value * 16384.

    Source: `KModel.memory_required` (`backend/modules/k_model.py`). The 2 rows per image come from `sampling_prepare`
    (`backend/sampling/sampling_function.py`).

    Args:
        latent: The images.
        compute_bytes: Bytes per value.
        sliced_attention: Neither torch's nor xformers' attention: the factor is 1.65.
    """
    return (1.65 if sliced_attention else 1.28) * 2 * latent.pictures * latent.area * compute_bytes * 16384


def neo_estimate_bytes(latent: Latent, usage_factor: float) -> float:
    """The same in Forge Neo since autumn 2025 with torch's attention: 0.15 MB per row and latent pixel, times a factor
    of the architecture (2.8 Flux, 3.2 Chroma). Source: Neo 7862a964, `KModel.memory_required` and huggingface_guess.
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
    """The same if all models are loaded already: nothing for weights."""
    return max(request.slider_rest_bytes, request.estimate_bytes) + request.hard_bytes


def early_request_bytes(model_bytes: float, slider_rest: float, estimate: float = 0, hard: float = 0) -> float:
    """Returns the request in August 2024: the whole model counts, even if loaded, and `hard` competes with the slider.
    Source: Forge 0252ad86 to 33b5b9d2, `load_models_gpu` and `sampling_prepare`.
    """
    return model_bytes * REQUEST_FACTOR + max(slider_rest, estimate + hard)


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


def swap_budget_bytes(free_bytes: float, inference_bytes: float) -> int:
    """Returns the weights that go to the GPU if not all do. Source: `compute_model_gpu_memory_when_using_cpu_swap`."""
    rest = free_bytes - inference_bytes
    return int(max(0, rest / 1.3, rest - 1.25 * GB))


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


def vae_encode_bytes(width: int, height: int, value_bytes: int) -> float:
    """The same for an encode, from pixels: 1767 * H * W * size of a value. Source: `VAE.memory_used_encode`."""
    return 1767.0 * width * height * value_bytes


def vae_pictures_at_once(free_bytes: float, decode_bytes: float) -> int:
    """Pictures that are decoded together: as many as fit, and one where none does. Source: `VAE.decode_inner`."""
    return max(1, int(free_bytes / decode_bytes))


def warns_of_low_vram(free_bytes: float) -> bool:
    """True where a step prints the warning. Source: `backend/sampling/sampling_function.py`."""
    return free_bytes < SAFE_FREE_BYTES


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
