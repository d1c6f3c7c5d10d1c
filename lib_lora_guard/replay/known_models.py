"""Sizes of well-known models as Forge counts them, computed from their published shapes to reproduce logs. Pure.

Shapes: the published configurations of FLUX.1, CLIP-L, CLIP-G and T5-XXL; totals of SDXL's U-Net and of the two VAEs.
Bytes per value: `module_size` of Forge dfdcbab6 (`backend/memory_management.py`), which counts NF4 as 0.55. Parts that
stay in fp32: `backend/loader.py`, `backend/text_processing/classic_engine.py` and `backend/nn/`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..planning.gguf_baked import value_bytes
from ..planning.usual_parts import CLIP_G_PARAMETERS as CLIP_G_PARAMETERS
from ..planning.usual_parts import CLIP_G_WIDTH as CLIP_G_WIDTH
from ..planning.usual_parts import CLIP_L_PARAMETERS as CLIP_L_PARAMETERS
from ..planning.usual_parts import CLIP_L_WIDTH as CLIP_L_WIDTH
from ..planning.usual_parts import FLUX_VAE_PARAMETERS as FLUX_VAE_PARAMETERS
from ..planning.usual_parts import VAE_PARAMETERS as VAE_PARAMETERS
from ..planning.usual_parts import clip_embedding_growth_bytes as clip_embedding_growth_bytes
from ..planning.usual_parts import t5_bytes as t5_bytes
from ..units import FP32_BYTES
from .forge_memory import Layer

SDXL_UNET_PARAMETERS = 2_567_463_684

FLUX_WIDTH = 3072
FLUX_DOUBLE_BLOCKS, FLUX_SINGLE_BLOCKS = 19, 38
_MODULATION = (6 * FLUX_WIDTH, FLUX_WIDTH)
_STREAM = {
    "mod.lin": _MODULATION,
    "attn.qkv": (3 * FLUX_WIDTH, FLUX_WIDTH),
    "attn.proj": (FLUX_WIDTH, FLUX_WIDTH),
    "mlp.0": (4 * FLUX_WIDTH, FLUX_WIDTH),
    "mlp.2": (FLUX_WIDTH, 4 * FLUX_WIDTH),
}
FLUX_DOUBLE = {f"{stream}_{name}": shape for stream in ("img", "txt") for name, shape in _STREAM.items()}
"""The matrices of a double block, (out, in), in the model's order."""
FLUX_SINGLE = {
    "linear1": (7 * FLUX_WIDTH, FLUX_WIDTH),
    "linear2": (FLUX_WIDTH, 5 * FLUX_WIDTH),
    "modulation.lin": (3 * FLUX_WIDTH, FLUX_WIDTH),
}
_EMBEDDERS = {
    "img_in": (FLUX_WIDTH, 64),
    "txt_in": (FLUX_WIDTH, 4096),
    "time_in.in_layer": (FLUX_WIDTH, 256),
    "time_in.out_layer": (FLUX_WIDTH, FLUX_WIDTH),
    "vector_in.in_layer": (FLUX_WIDTH, 768),
    "vector_in.out_layer": (FLUX_WIDTH, FLUX_WIDTH),
    "final_layer.linear": (64, FLUX_WIDTH),
    "final_layer.adaLN_modulation.1": (2 * FLUX_WIDTH, FLUX_WIDTH),
}
_GUIDANCE = {"guidance_in.in_layer": (FLUX_WIDTH, 256), "guidance_in.out_layer": (FLUX_WIDTH, FLUX_WIDTH)}
_NORM_VALUES = 128 * (4 * FLUX_DOUBLE_BLOCKS + 2 * FLUX_SINGLE_BLOCKS)

SDXL_FEED_FORWARD = (2 * 4 * 1280, 1280)
"""`ff.net.0.proj` of the lower levels, (out, in)."""

CLIP_L_PROJECTION = 768 * 768


@dataclass(frozen=True)
class Storage:
    """Bytes per value of a Flux model: matrices of the blocks, other matrices, biases and the norms' scales."""

    block_bytes: float
    other_bytes: float
    bias_bytes: float
    norm_bytes: float


FLUX_STORAGES = {
    "bf16": Storage(2, 2, 2, 2),
    "fp8": Storage(1, 1, 1, 1),
    # A low-bit model is not cast as a whole, so its norms keep their dtype.
    "nf4": Storage(0.55, 0.55, 2, FP32_BYTES),
    "Q8_0": Storage(value_bytes("Q8_0"), 2, 2, FP32_BYTES),
}
"""GGUF after baking; Q8_0 has the same size in the file."""


def flux_matrices(with_guidance: bool = True) -> list[tuple[tuple[int, int], bool]]:
    """Returns `(shape, is_in_block)` of each linear layer of FLUX.1. Without guidance: FLUX.1-schnell, which lacks the
    two layers of the guidance embedder."""
    blocks = [shape for _ in range(FLUX_DOUBLE_BLOCKS) for shape in FLUX_DOUBLE.values()]
    blocks += [shape for _ in range(FLUX_SINGLE_BLOCKS) for shape in FLUX_SINGLE.values()]
    others = _EMBEDDERS | (_GUIDANCE if with_guidance else {})
    return [(shape, True) for shape in blocks] + [(shape, False) for shape in others.values()]


def flux_layers(storage: str) -> list[Layer]:
    """Returns FLUX.1-dev's linear layers, as Forge places them. It does not swap the rest, `flux_norm_bytes`."""
    size = FLUX_STORAGES[storage]
    return [
        Layer(rows * columns * (size.block_bytes if in_block else size.other_bytes), rows * size.bias_bytes)
        for (rows, columns), in_block in flux_matrices()
    ]


def flux_norm_bytes(storage: str) -> float:
    """Returns the size of the norms' scales of query and key."""
    return _NORM_VALUES * FLUX_STORAGES[storage].norm_bytes


def flux_bytes(storage: str, with_guidance: bool = True) -> float:
    """Returns the size of FLUX.1's transformer: "Model Require" of KModel."""
    size = FLUX_STORAGES[storage]
    weights = sum(
        rows * columns * (size.block_bytes if in_block else size.other_bytes) + rows * size.bias_bytes
        for (rows, columns), in_block in flux_matrices(with_guidance)
    )
    return weights + flux_norm_bytes(storage)


def flux_matrices_before(block: str, index: int, name: str) -> int:
    """Returns how many of the 304 matrices of Flux's blocks precede this one in the model's order.

    Args:
        block: "double" or "single".
        index: The number of the block.
        name: The matrix inside it.
    """
    if block == "double":
        return index * len(FLUX_DOUBLE) + list(FLUX_DOUBLE).index(name)
    return FLUX_DOUBLE_BLOCKS * len(FLUX_DOUBLE) + index * len(FLUX_SINGLE) + list(FLUX_SINGLE).index(name)


def flux_lora_pairs(rank: int) -> list[int]:
    """Returns the values of each pair of factors of a LoRA on every linear layer of FLUX.1-dev.

    Layers are split as in diffusers: query, key and value are separate, in single blocks the first half of the
    feed-forward too.
    """
    half = FLUX_WIDTH + 4 * FLUX_WIDTH
    square = [2 * FLUX_WIDTH] * 3
    double = [rows + columns for name, (rows, columns) in _STREAM.items() if name != "attn.qkv"] + square
    single = [*square, half, 6 * FLUX_WIDTH, 4 * FLUX_WIDTH]
    others = [rows + columns for rows, columns in (_EMBEDDERS | _GUIDANCE).values()]
    sides = 2 * FLUX_DOUBLE_BLOCKS * double + FLUX_SINGLE_BLOCKS * single + others
    return [rank * side for side in sides]


def flux_text_bytes(matrix_bytes: float, with_projection: bool, after_first_prompt: bool) -> float:
    """Returns the size of Flux's JointTextEncoder: CLIP-L in fp16 and T5.

    `with_projection`: the file has CLIP-L's text projection.
    """
    clip = CLIP_L_PARAMETERS + (CLIP_L_PROJECTION if with_projection else 0)
    grown = clip_embedding_growth_bytes(CLIP_L_WIDTH) if after_first_prompt else 0
    return clip * 2 + t5_bytes(matrix_bytes) + grown


def sdxl_text_bytes(after_first_prompt: bool) -> float:
    """Returns the size of SDXL's JointTextEncoder (CLIP-L and CLIP-G) in fp16. The first prompt converts the embeddings
    to fp32."""
    grown = clip_embedding_growth_bytes(CLIP_L_WIDTH + CLIP_G_WIDTH) if after_first_prompt else 0
    return (CLIP_L_PARAMETERS + CLIP_G_PARAMETERS) * 2 + grown
