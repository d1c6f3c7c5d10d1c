"""Tells which names in a LoRA file are one module in two spellings.

Trainers flatten some dots of a name and not others (OneTrainer keeps those of a LoHa's factors and not that of its alpha),
and converters give some tensors of a module another prefix.
"""

from __future__ import annotations

import re

_PREFIXES = re.compile(
    r"^(?:base_model_model_|_orig_mod_|module_|lycoris_|lora_|oft_|model_diffusion_model_|diffusion_model_|prior_unet_"
    r"|prior_(?!te_)|unet_+|transformer_(?!blocks_|2_))+"
)
"""Prefixes of trainers and of the denoiser, in any order and number."""
_ENCODERS = re.compile(r"^(?:te1?_|te2_|te3_|text_encoder_(?:[23]_)?)")
_SAME_ENCODER = {"te_": "te1_", "text_encoder_": "te1_", "text_encoder_2_": "te2_", "text_encoder_3_": "te3_"}


def plain_name(module: str) -> str:
    """The module's name without dots and prefixes: the same for every spelling of it in one file."""
    flat = module.replace(".", "_")
    flat = _PREFIXES.sub("", flat) or flat
    encoder = _ENCODERS.match(flat)
    if encoder is None:
        return flat
    return _SAME_ENCODER.get(encoder[0], encoder[0]) + flat[encoder.end() :]
