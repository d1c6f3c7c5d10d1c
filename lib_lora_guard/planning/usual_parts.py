"""Sizes of the text encoders and VAEs that models usually run with, in memory. For parts that lie in another file. Pure.

A checkpoint of a transformer alone says nothing about the files beside it. These are the ones that most people load: T5 in
fp8, language models as they are published. Sizes are computed from the published configurations; of the language models
from their published numbers of parameters. T5 keeps its token table, norms and position biases in fp32, CLIP takes its
tables to fp32 with the first prompt (Forge dfdcbab6, `backend/nn/t5.py`, `backend/text_processing/classic_engine.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..units import FP32_BYTES

VAE_KIND = "vae"

CLIP_L_PARAMETERS = 123_060_480
CLIP_G_PARAMETERS = 694_659_840
CLIP_H_PARAMETERS = 354_032_640
CLIP_L_WIDTH, CLIP_G_WIDTH, CLIP_H_WIDTH = 768, 1280, 1024
_CLIP_ROWS = 49408 + 77
"""Rows of the embeddings: tokens and positions."""
T5_MATRICES = 24 * (4 * 4096 * 4096 + 3 * 4096 * 10240)
T5_WIDE = 32128 * 4096 + 49 * 4096 + 32 * 64
"""Values of T5-XXL in fp32: token table, norms and position biases."""
_UMT5_TABLE = 256384 * 4096
_PILE_T5_MATRICES = 24 * (4 * 2048 * 2048 + 3 * 2048 * 5120)
_PILE_T5_WIDE = 32128 * 2048
VAE_PARAMETERS = 83_653_863
"""The VAE of SD and SDXL: 4 latent channels."""
FLUX_VAE_PARAMETERS = 83_819_683
"""16 latent channels."""
_WAN_VAE_PARAMETERS = 126_892_531


@dataclass(frozen=True)
class UsualPart:
    """One part of a model that lies in a file of its own.

    Attributes:
        kind: A kind of `models.text`, or VAE_KIND.
        name: Its name for users, with its storage.
        bytes: Its size in memory.
    """

    kind: str
    name: str
    bytes: int


def clip_embedding_growth_bytes(width: int) -> int:
    """Returns the growth of a CLIP in fp16 when the first prompt converts its embeddings to fp32."""
    return _CLIP_ROWS * width * 2


def t5_bytes(matrix_bytes: float) -> float:
    """Returns the size of T5-XXL's encoder with its matrices in fp16 (2), fp8 (1) or Q8_0 (34 / 32)."""
    return T5_MATRICES * matrix_bytes + T5_WIDE * FP32_BYTES


def _clip(kind: str, name: str, parameters: int, width: int) -> UsualPart:
    return UsualPart(kind, name, parameters * 2 + clip_embedding_growth_bytes(width))


def _llm(name: str, parameters: float, value_bytes: float = 2) -> UsualPart:
    return UsualPart("llm", name, int(parameters * value_bytes))


CLIP_L = _clip("clip_l", "CLIP-L", CLIP_L_PARAMETERS, CLIP_L_WIDTH)
_CLIP_G = _clip("clip_g", "CLIP-G", CLIP_G_PARAMETERS, CLIP_G_WIDTH)
T5_FP8 = UsualPart("t5", "T5 fp8", int(t5_bytes(1)))
_VAE = UsualPart(VAE_KIND, "VAE", VAE_PARAMETERS * 2)
_FLUX_VAE = UsualPart(VAE_KIND, "VAE", FLUX_VAE_PARAMETERS * 2)
_WAN_VAE = UsualPart(VAE_KIND, "VAE", _WAN_VAE_PARAMETERS * 2)

USUAL_PARTS: Mapping[str, Sequence[UsualPart]] = {
    "SD 1.x": (CLIP_L, _VAE),
    "SD 2.x": (_clip("clip_h", "OpenCLIP-H", CLIP_H_PARAMETERS, CLIP_H_WIDTH), _VAE),
    "SDXL": (CLIP_L, _CLIP_G, _VAE),
    "SDXL refiner": (_CLIP_G, _VAE),
    "SD 3": (CLIP_L, _CLIP_G, T5_FP8, _FLUX_VAE),
    "Flux": (CLIP_L, T5_FP8, _FLUX_VAE),
    "Chroma": (T5_FP8, _FLUX_VAE),
    "AuraFlow": (
        UsualPart("t5", "Pile-T5-XL", _PILE_T5_MATRICES * 2 + _PILE_T5_WIDE * FP32_BYTES),
        _VAE,
    ),
    "Wan": (UsualPart("t5", "UMT5 fp8", T5_MATRICES + _UMT5_TABLE * 2), _WAN_VAE),
    "Qwen-Image": (_llm("Qwen2.5-VL 7B fp8", 8.29e9, 1.13), _WAN_VAE),
    "Z-Image": (_llm("Qwen3 4B", 4.02e9), _FLUX_VAE),
    "Lumina 2": (_llm("Gemma 2 2B", 2.61e9), _FLUX_VAE),
    "Krea 2": (_llm("Qwen3-VL 4B", 4.44e9), _WAN_VAE),
    "Anima": (_llm("Qwen3 0.6B", 0.6e9), _WAN_VAE),
    "ERNIE-Image": (_llm("Ministral 3 3B", 3.43e9), _FLUX_VAE),
    "Flux 2": (_llm("Mistral 3 24B fp8", 18.0e9, 1), _FLUX_VAE),
}
"""The parts by the value of `models.Architecture`."""

_FLUX2_BY_PROMPT_WIDTH = {7680: _llm("Qwen3 4B", 4.02e9), 12288: _llm("Qwen3 8B fp8", 8.19e9, 1.07)}
"""Flux 2 Klein, by the width of what its text encoder hands over: three layers side by side."""


def usual_parts(architecture: str | None, prompt_width: int | None = None) -> Sequence[UsualPart]:
    """Returns the parts that a model of this architecture usually runs with; none where they are not known.

    Args:
        architecture: The value of `models.Architecture`; None if unknown.
        prompt_width: Values per token that the model takes from its text encoder; None if unknown.
    """
    parts = USUAL_PARTS.get(architecture or "", ())
    if architecture == "Flux 2" and prompt_width in _FLUX2_BY_PROMPT_WIDTH:
        return (_FLUX2_BY_PROMPT_WIDTH[prompt_width], *parts[1:])
    return parts
