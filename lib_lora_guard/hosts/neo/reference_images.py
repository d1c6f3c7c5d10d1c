"""Tells images that a prompt of Neo is encoded with: those of Flux Kontext, Flux.2, Qwen-Image-Edit and Krea.

Neo hands them to the model while it encodes the prompt. A prompt that is not encoded leaves the last image's there.
Sources: `get_learned_conditioning` of `backend/diffusion_engine/`, `backend/args.py`.
"""

from __future__ import annotations

import sys

_HOLDERS = (("modules.shared", "sd_model"), ("backend.args", "dynamic_args"))
"""The present model, which has images for the next prompt, and what the denoiser reads those of the last from."""


def are_there() -> bool:
    """True if the present model has images to be encoded with the next prompt, or has some of the last."""
    holders = [getattr(sys.modules.get(module), name, None) for module, name in _HOLDERS]
    return any(
        getattr(one, "ini_latent", None) is not None or bool(getattr(one, "ref_latents", None)) for one in holders
    )
