"""Facts about Forge's models, each asked for in one place."""

from __future__ import annotations

import torch

from ...runtime.journal import ModelFacts
from ...weights.dtype_names import dtype_name
from .patches import describe
from .types import Patcher

FORGES_VAE = ("backend.nn.vae", "IntegratedAutoencoderKL")


def is_forges_vae(model: torch.nn.Module) -> bool:
    """True for Forge's own VAE and what derives from it; another extension's VAE decodes by rules of its own."""
    return is_a(model, *FORGES_VAE)


def is_a(thing: object, module: str, name: str) -> bool:
    """True if `module.name` is among the classes of `thing`: asked by name, without an import of Forge."""
    return any((kind.__module__, kind.__name__) == (module, name) for kind in type(thing).__mro__)


def storage_name(model: torch.nn.Module | None) -> str:
    """Returns the storage of a model's weights ("bf16", "nf4", "gguf"); empty where Forge does not say."""
    kept: str | torch.dtype = getattr(model, "storage_dtype", "")
    return kept if isinstance(kept, str) else dtype_name(kept)


def about_model(model: torch.nn.Module | None) -> ModelFacts:
    """Describes a model for the journal; None is no model in particular."""
    return ModelFacts("") if model is None else ModelFacts(type(model).__name__, storage_name(model))


def about_patcher(patcher: Patcher) -> ModelFacts:
    """Describes a patcher's model and its LoRAs for the journal."""
    # Another extension may hand over a patcher of its own that has neither.
    model = getattr(patcher, "model", None)
    loras = tuple(describe(identifier)[0] for identifier in getattr(patcher, "lora_patches", None) or {})
    return ModelFacts(type(model).__name__, storage_name(model), loras)
