"""Facts about Forge's models, each asked for in one place."""

from __future__ import annotations

import weakref

import torch

from ...runtime.journal import ModelFacts
from ..webui.models import about_model, compute_dtype, is_a, is_denoiser, network_name, storage_dtype, storage_name
from .identifiers import describe
from .types import LoadedModel, LoraLoader, Patcher, Patches

__all__ = [
    "FORGES_TEXT_ENCODER",
    "FORGES_VAE",
    "about_model",
    "about_patcher",
    "compute_dtype",
    "is_a",
    "is_denoiser",
    "is_forges_text_encoder",
    "is_forges_vae",
    "loaded_module",
    "loader_of",
    "loader_of_model",
    "network_name",
    "patches_of",
    "storage_dtype",
    "storage_name",
]

FORGES_VAE = ("backend.nn.vae", "IntegratedAutoencoderKL")
FORGES_TEXT_ENCODER = ("backend.patcher.clip", "JointTextEncoder")


def is_forges_vae(model: torch.nn.Module) -> bool:
    """True for Forge's own VAE and what derives from it; another extension's VAE decodes by rules of its own."""
    return is_a(model, *FORGES_VAE)


def is_forges_text_encoder(model: torch.nn.Module) -> bool:
    """True for the text encoders of a checkpoint, which Forge loads as one model."""
    return is_a(model, *FORGES_TEXT_ENCODER)


def loaded_module(loaded: LoadedModel) -> torch.nn.Module | None:
    """Returns the model that was loaded; None before that, and after Forge has given it up."""
    model = getattr(loaded, "real_model", None)
    # Forge Neo of 2025 keeps a weak reference here.
    found: torch.nn.Module | None = model() if isinstance(model, weakref.ref) else model
    return found


def loader_of(patcher: Patcher) -> LoraLoader | None:
    """Returns a patcher's LoRA loader; another extension's patchers have none."""
    loader: LoraLoader | None = getattr(patcher, "lora_loader", None)
    return loader


def loader_of_model(model: torch.nn.Module | None) -> LoraLoader | None:
    """Returns the LoRA loader that a model's patchers share; None for a model that Forge has not made a patcher for."""
    loader: LoraLoader | None = getattr(model, "lora_loader", None)
    return loader


def patches_of(patcher: Patcher) -> Patches:
    """Returns a patcher's stack of LoRAs; another extension's patchers have none."""
    patches: Patches = getattr(patcher, "lora_patches", None) or {}
    return patches


def about_patcher(patcher: Patcher) -> ModelFacts:
    """Describes a patcher's model and its LoRAs for the journal. Another extension's patcher may have neither."""
    model: torch.nn.Module | None = getattr(patcher, "model", None)
    loras = tuple(describe(identifier)[0] for identifier in patches_of(patcher))
    return ModelFacts(type(model).__name__, storage_name(model), loras)
