"""The parts of Forge's memory arithmetic that the guard's own plan uses. Pure, without torch.

Source, if a docstring names no other: Forge dfdcbab6, `backend/memory_management.py`. All sizes are bytes, and floats where
Forge has floats. `replay.forge_memory` has the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..units import GB as GB
from ..units import MB as MB
from .limits import RAM_FLOOR_BYTES as RAM_FLOOR_BYTES

PROCESS_LOADING_BYTES = 1 * GB
"""RAM of Python, torch and a CUDA context. Measured: 12.1 GB with 11.1 GB of weights, 7.2 GB with 6.2 GB."""
PROCESS_RUNNING_BYTES = int(2.4 * GB)
"""The same with the kernels of a forward pass loaded, which CUDA keeps in RAM too. Measured: 2.8 GB with all weights on
the GPU and 0.3 GB of LoRA; 8.9 GB with a backup of 6.2 GB.
"""


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


def swap_budget_bytes(free_bytes: float, inference_bytes: float) -> int:
    """Returns the weights that go to the GPU if not all do. Source: `compute_model_gpu_memory_when_using_cpu_swap`."""
    rest = free_bytes - inference_bytes
    return int(max(0, rest / 1.3, rest - 1.25 * GB))
