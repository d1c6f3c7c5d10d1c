"""Counts the tokens in each layer during one step, from the image size and the architecture. Pure.

Sources: Flux, Chroma and SD 3 divide the image into patches of 16x16 pixels and add 512 or 333 text tokens (77 of CLIP
and 256 of T5). U-Nets use 8x8 pixels, and a quarter of the tokens on each lower level. Modulations and the embedders of
time, guidance and pooled text process one token. A layer's width identifies its level in a U-Net. The two lowest levels
have the same width and are counted as one, which is an average.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # adapters need torch, and the replay does without
    from ..adapters.base import Shape

_TEXT_TOKENS = {"Flux": 512, "Chroma": 512, "SD 3": 333}
_OTHER_TEXT_TOKENS = 512
"""For other transformers: as Flux."""
_UNETS = ("SD 1.x", "SD 2.x", "SDXL", "SDXL refiner", "Kolors")
ONE_PASS = ("Flux",)
"""Flux-dev has guidance as an input. All others run once with the prompt and once with the negative prompt."""
_CLIP_TOKENS = 77
_BASE_WIDTH = 320
"""Channels of the first level of all U-Nets of this family."""

_ONE_TOKEN = re.compile(
    r"(^|\.)(img_mod|txt_mod|modulation|adaLN_modulation|norm1(_context)?\.linear|norm\.linear|norm_out\.linear|time_in|vector_in"
    r"|guidance_in|time_text_embed|time_embed|time_embedding|add_embedding|label_emb|t_embedder|y_embedder|emb_layers"
    r"|time_emb_proj|distilled_guidance_layer)(\.|$)"
)
_TEXT_STREAM = re.compile(r"(^|\.)(txt_|txt_in|context_block|context_embedder|attn\.add_|attn\.to_add_out|ff_context)")
_BOTH_STREAMS = re.compile(r"(^|\.)single_(transformer_)?blocks\.")
_CROSS = re.compile(r"\.attn2\.to_[kv](\.|$)")


@dataclass(frozen=True)
class Picture:
    """The size of the image in pixels, and the number of images at once."""

    width: int
    height: int
    batch: int = 1


@dataclass(frozen=True)
class Tokens:
    """Tokens of one step: `rows` images at once, each with `image` and `text` tokens."""

    architecture: str | None
    rows: int
    image: int
    text: int
    is_unet: bool

    def of(self, key: str, shape: Shape) -> int:
        """Returns the tokens that a layer of the denoiser processes in one step.

        Args:
            key: The name of the layer's parameter.
            shape: Its shape.
        """
        if _ONE_TOKEN.search(key):
            return self.rows
        if not self.is_unet:
            if _BOTH_STREAMS.search(key):
                return self.rows * (self.image + self.text)
            return self.rows * (self.text if _TEXT_STREAM.search(key) else self.image)
        if _CROSS.search(key):
            return self.rows * _CLIP_TOKENS
        width = min(shape[0], shape[1]) if len(shape) > 1 else shape[0]
        level = 0 if width < 2 * _BASE_WIDTH else 1 if width < 4 * _BASE_WIDTH else 2
        return self.rows * max(1, self.image >> (2 * level))


def tokens_for(architecture: str | None, picture: Picture) -> Tokens:
    """Returns the tokens of one step.

    Args:
        architecture: The value of `models.Architecture`; None if unknown: counted as Flux.
        picture: The image.
    """
    is_unet = architecture in _UNETS
    patch = 8 if is_unet else 16
    image = -(-picture.width // patch) * -(-picture.height // patch)
    text = _CLIP_TOKENS if is_unet else _TEXT_TOKENS.get(architecture or "Flux", _OTHER_TEXT_TOKENS)
    rows = picture.batch * (1 if architecture in (*ONE_PASS, None) else 2)
    return Tokens(architecture, rows, image, text, is_unet)


def sees_one_token(key: str) -> bool:
    """True for layers that process one token per image: modulations, embedders of time and pooled text."""
    return _ONE_TOKEN.search(key) is not None
