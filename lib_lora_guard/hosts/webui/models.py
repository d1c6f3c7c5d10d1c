"""Facts about models that Forge and Forge Neo say in the same way, each asked for in one place.

Sources: `backend/modules/k_model.py` (`KModel`), `backend/loader.py`.
"""

from __future__ import annotations

import torch

from ...runtime.journal import ModelFacts
from ...weights.dtype_names import dtype_name


def is_denoiser(model: torch.nn.Module) -> bool:
    """True for Forge's wrapper of a denoiser, `KModel`."""
    return hasattr(model, "diffusion_model")


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
    return known_compute_dtype(model) or torch.float16


def known_compute_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """Returns the dtype that a model computes in; None if Forge does not say."""
    dtype = getattr(model, "computation_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def about_model(model: torch.nn.Module | None) -> ModelFacts:
    """Describes a model for the journal; None is no model in particular."""
    return ModelFacts("") if model is None else ModelFacts(type(model).__name__, storage_name(model))
