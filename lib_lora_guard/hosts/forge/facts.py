"""Facts about Forge's models, each asked for in one place."""

from __future__ import annotations

import weakref

import torch

from ...runtime.journal import ModelFacts
from ...weights.dtype_names import dtype_name
from .identifiers import describe
from .types import LoadedModel, LoraLoader, Patcher, Patches

FORGES_VAE = ("backend.nn.vae", "IntegratedAutoencoderKL")
FORGES_TEXT_ENCODER = ("backend.patcher.clip", "JointTextEncoder")


def is_denoiser(model: torch.nn.Module) -> bool:
    """True for Forge's wrapper of a denoiser, `KModel`."""
    return hasattr(model, "diffusion_model")


def is_forges_vae(model: torch.nn.Module) -> bool:
    """True for Forge's own VAE and what derives from it; another extension's VAE decodes by rules of its own."""
    return is_a(model, *FORGES_VAE)


def is_forges_text_encoder(model: torch.nn.Module) -> bool:
    """True for the text encoders of a checkpoint, which Forge loads as one model."""
    return is_a(model, *FORGES_TEXT_ENCODER)


def is_a(model: torch.nn.Module, module: str, name: str) -> bool:
    """True if `module.name` is among the classes of `model`: asked by name, without an import of Forge."""
    return any((kind.__module__, kind.__name__) == (module, name) for kind in type(model).__mro__)


def network_name(model: torch.nn.Module) -> str:
    """Returns the class name of the network itself, without Forge's wrapper."""
    return type(getattr(model, "diffusion_model", model)).__name__


def storage_dtype(model: torch.nn.Module | None) -> torch.dtype | str | None:
    """Returns the storage of a model's weights: a dtype, "nf4", "fp4" or "gguf"; None if Forge does not say."""
    kept: torch.dtype | str | None = getattr(model, "storage_dtype", None)
    return kept


def storage_name(model: torch.nn.Module | None) -> str:
    """Returns the storage of a model's weights ("bf16", "nf4", "gguf"); empty if Forge does not say."""
    kept = storage_dtype(model)
    return dtype_name(kept) if isinstance(kept, torch.dtype) else kept or ""


def compute_dtype(model: torch.nn.Module) -> torch.dtype:
    """Returns the dtype that a model computes in; fp16 if Forge does not say."""
    dtype = getattr(model, "computation_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float16


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


def about_model(model: torch.nn.Module | None) -> ModelFacts:
    """Describes a model for the journal; None is no model in particular."""
    return ModelFacts("") if model is None else ModelFacts(type(model).__name__, storage_name(model))


def about_patcher(patcher: Patcher) -> ModelFacts:
    """Describes a patcher's model and its LoRAs for the journal. Another extension's patcher may have neither."""
    model: torch.nn.Module | None = getattr(patcher, "model", None)
    loras = tuple(describe(identifier)[0] for identifier in patches_of(patcher))
    return ModelFacts(type(model).__name__, storage_name(model), loras)
