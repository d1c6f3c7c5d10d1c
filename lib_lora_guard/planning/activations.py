"""Estimates the VRAM that one call of a model needs beside its weights, from the image size and the architecture. Pure.

Measured with Forge's own modules on an H200, torch 2.11, PyTorch attention, 16 bit (`benchmarks/activations_gpu.py`).
The need is linear in pixels for U-Nets and VAEs, in tokens for transformers. `tests/planning/activations.jsonl` has the
151 measurements that the constants here are tested against.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..units import MB
from .host_memory import Latent, unet_estimate_bytes
from .tokens import Picture, Tokens

if TYPE_CHECKING:  # adapters need torch, and the replay does without
    from ..adapters.base import Shape

FIXED_BYTES = 10 * MB
"""Workspaces of convolutions and matrix products, at any size."""
LEAST_BYTES = 74 * MB
"""The least that any call needs: the workspaces of cuBLAS and cuDNN."""


@dataclass(frozen=True)
class Activations:
    """VRAM of one call."""

    used_bytes: int
    """At the peak."""
    held_bytes: int
    """Held by torch's allocator for it: free blocks of other sizes lie between the used ones. With less free memory,
    the call has to stop and collect. With expandable segments it is about `used_bytes`.
    """

    def with_copy(self, copy_bytes: int) -> Activations:
        """Adds the copy of a weight that is cast or dequantized for its layer's product."""
        return Activations(self.used_bytes + copy_bytes, self.held_bytes + copy_bytes)


@dataclass(frozen=True)
class _Peak:
    """Peak of a call, in values of the compute dtype."""

    values: float
    """U-Net: per pixel of the latent and each of `width` channels of the first level. Transformer: per token and width.
    """
    held: float
    """Held by torch, as a multiple of the used bytes."""
    width: int


_UNETS = {
    "SD 1.x": _Peak(8040, 1.18, 320),
    "SD 2.x": _Peak(8040, 1.18, 320),
    "SDXL": _Peak(4920, 1.7, 320),
    "SDXL refiner": _Peak(4920, 1.7, 384),
    "Kolors": _Peak(4920, 1.7, 320),
}
_TRANSFORMERS = {
    "Flux": _Peak(22.5, 1.99, 3072),
    "Chroma": _Peak(22.6, 2.31, 3072),
    "SD 3": _Peak(21.1, 1.29, 1536),
}
_SD3_WITHOUT_NORMS = _Peak(19.1, 1.29, 1536)
"""SD 3 medium does not normalize queries and keys; the 3.5 models do."""
_OTHER_TRANSFORMER = _TRANSFORMERS["Flux"]

_DECODE_VALUES, _DECODE_HELD = 69_640, 1.46
"""Values per pixel of the latent for the VAE of Stable Diffusion, SDXL, SD 3 and Flux (128 to 512 channels), decoding.
"""
_ENCODE_VALUES, _ENCODE_HELD = 40_980, 1.26
"""The same for encoding."""
DECODE_WHERE_FORGE_HAS = _DECODE_VALUES / (2178 * 64)
"""The used bytes of a decode, divided by Forge's request before it (`memory_used_decode`)."""
ENCODE_WHERE_FORGE_HAS = _ENCODE_VALUES / (1767 * 64)
"""The same for an encode (`memory_used_encode`)."""

VAE_HOLDS_WHERE_FORGE_HAS = max(DECODE_WHERE_FORGE_HAS * _DECODE_HELD, ENCODE_WHERE_FORGE_HAS * _ENCODE_HELD)


def step(tokens: Tokens, picture: Picture, shapes: Mapping[str, Shape], compute_bytes: int) -> Activations:
    """Estimates one step of the denoiser.

    For an unmeasured architecture the used bytes are Forge's own estimate (U-Nets) or Flux's by width (transformers).

    Args:
        tokens: The tokens of the step.
        picture: The image.
        shapes: The denoiser's parameters.
        compute_bytes: Bytes per activation value.
    """
    if tokens.is_unet:
        peak = _UNETS.get(tokens.architecture or "")
        if peak is None:
            return _held(
                unet_estimate_bytes(Latent.of(picture.width, picture.height, picture.batch), compute_bytes), 1.2
            )
        values = peak.values * tokens.rows * tokens.image * _first_width(shapes, peak.width) / peak.width
    else:
        peak = _TRANSFORMERS.get(tokens.architecture or "", _OTHER_TRANSFORMER)
        if tokens.architecture == "SD 3" and not any(key.endswith("attn.ln_q.weight") for key in shapes):
            peak = _SD3_WITHOUT_NORMS
        values = peak.values * tokens.rows * (tokens.image + tokens.text) * _usual_width(shapes, peak.width)
    return _held(values * compute_bytes, peak.held)


def decode(latent: Latent, value_bytes: int) -> Activations:
    """Estimates the VAE's decoder for whole images at once. `value_bytes`: bytes per activation value."""
    return _held(_DECODE_VALUES * latent.pictures * latent.area * value_bytes, _DECODE_HELD)


def encode(latent: Latent, value_bytes: int) -> Activations:
    """As `decode`, for the encoder."""
    return _held(_ENCODE_VALUES * latent.pictures * latent.area * value_bytes, _ENCODE_HELD)


_FIRST_CONVOLUTIONS = ("input_blocks.0.0.weight", "conv_in.weight")


def _held(used: float, times: float) -> Activations:
    used = max(LEAST_BYTES, used + FIXED_BYTES)
    return Activations(int(used), int(used * times))


def _first_width(shapes: Mapping[str, Shape], usual: int) -> int:
    """Returns the channels of a U-Net's first level."""
    first = (shape for key, shape in shapes.items() if len(shape) == 4 and key.endswith(_FIRST_CONVOLUTIONS))
    return next(first, (usual,))[0]


def _usual_width(shapes: Mapping[str, Shape], usual: int) -> int:
    """Returns the input width of most layers of a transformer."""
    widths = Counter(shape[1] for shape in shapes.values() if len(shape) == 2)
    return widths.most_common(1)[0][0] if widths else usual
