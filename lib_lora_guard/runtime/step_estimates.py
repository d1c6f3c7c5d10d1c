"""What a step of a loaded model needs: predicted from its architecture and the picture, corrected by what was measured.

Source of what it stands in for: Forge's `KModel.memory_required` (`backend/modules/k_model.py`), asked before sampling for
eviction and in each step for whether prompt and negative prompt run at once.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..memory.calibration import Key, Kind, resolution_bucket, stack_signature
from ..models.architecture import Architecture, detect_model
from ..planning import activations
from ..planning.activations import Activations
from ..planning.tokens import ONE_PASS, Picture, tokens_for
from ..weights.dtype_names import dtype_name
from ..weights.storage import storage_of
from .corrections import Corrections

log = logging.getLogger(__name__)

HELD_BY_OTHERS = 1.2
"""How many times as much as it uses torch holds for a model that was not measured: the least of those that were
(`planning.activations`). Forge's estimate is of what has to be free, so of what is held."""

LATENT_PIXELS = 8
WITH_LORAS = stack_signature(["LoRA"])
"""All stacks alike: in a step they take the workspace of their ways, a small part of the whole, and by their names every
change of LoRAs would begin with nothing measured."""

Shape = tuple[int, int, int]
"""Rows, height and width of a latent."""


class Estimates:
    def __init__(self, corrections: Corrections) -> None:
        self._corrections = corrections
        self._architectures: weakref.WeakKeyDictionary[torch.nn.Module, Architecture | None] = (
            weakref.WeakKeyDictionary()
        )
        self._predicted: weakref.WeakKeyDictionary[torch.nn.Module, dict[Shape, tuple[Key, Activations]]] = (
            weakref.WeakKeyDictionary()
        )
        """By model: what was predicted, before any correction, and the key of its correction without a stack."""
        self._with_loras: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def patcher_memory_required(self, original: Callable[..., Any], patcher: Any, input_shape: Sequence[int]) -> Any:
        """In place of `ModelPatcher.memory_required`, which is asked before sampling, always with two rows a picture."""
        rows, *rest = input_shape
        if self.architecture(patcher.model) in ONE_PASS:
            rows = -(-rows // 2)
        self._corrections.open_for(patcher.load_device)
        (self._with_loras.add if patcher.lora_patches else self._with_loras.discard)(patcher.model)
        return original(patcher, [rows, *rest])

    def memory_required(self, original: Callable[..., Any], model: Any, input_shape: Sequence[int]) -> Any:
        """In place of `KModel.memory_required`: what has to be free for a step of these rows."""
        forges = original(model, input_shape)
        try:
            found = self.step(model, shape_of(input_shape), forges)
            return forges if found is None else self._corrections.held(*found)
        except Exception:
            # Another extension's model, or another shape than pictures have.
            log.debug("no estimate of ours for %s", input_shape, exc_info=True)
            return forges

    def step(self, model: Any, shape: Shape, forges_bytes: float | None = None) -> tuple[Key, Activations] | None:
        """What one step uses and holds, before any correction, and the key of its correction. `forges_bytes`: Forge's own
        estimate, which counts for an architecture that was not measured; None where neither is known."""
        known = self._predicted.setdefault(model, {})
        if shape not in known:
            predicted = self._predict(model, shape)
            if predicted is None:
                if forges_bytes is None:
                    return None
                predicted = Activations(int(forges_bytes / HELD_BY_OTHERS), int(forges_bytes))
            known[shape] = self._key(model, shape), predicted
        key, predicted = known[shape]
        return (replace(key, stack=WITH_LORAS) if model in self._with_loras else key), predicted

    def architecture(self, model: Any) -> Architecture | None:
        if model not in self._architectures:
            try:
                self._architectures[model] = detect_model(_shapes(model))
            except Exception:
                # Another extension's model, of parameters that nobody here knows.
                log.debug("no architecture of %s", type(model).__name__, exc_info=True)
                self._architectures[model] = None
        return self._architectures[model]

    def _predict(self, model: Any, shape: Shape) -> Activations | None:
        architecture = self.architecture(model)
        if architecture is None:
            return None
        rows, height, width = shape
        picture = Picture(width * LATENT_PIXELS, height * LATENT_PIXELS, rows)
        tokens = replace(tokens_for(architecture, picture), rows=rows)
        dtype = getattr(model, "computation_dtype", torch.float16)
        compute_bytes = torch.empty(0, dtype=dtype).element_size()
        found = activations.step(tokens, picture, _shapes(model), compute_bytes)
        return found.with_copy(_largest_cast(model, dtype) * compute_bytes)

    def _key(self, model: Any, shape: Shape) -> Key:
        rows, height, width = shape
        architecture = self.architecture(model)
        own = type(getattr(model, "diffusion_model", model)).__name__
        name = own if architecture is None else architecture.value
        size = resolution_bucket(width * LATENT_PIXELS, height * LATENT_PIXELS)
        return Key(Kind.STEP, name, stored_as(model), size, rows)


def shape_of(input_shape: Sequence[int]) -> Shape:
    """Raises TypeError, ValueError, IndexError, OverflowError for what is no shape of a latent."""
    return int(input_shape[0]), int(input_shape[-2]), int(input_shape[-1])


def stored_as(model: Any) -> str:
    """The format of a model's weights as Forge names it: "nf4", "gguf", or a dtype; "" where it says none."""
    kept: Any = getattr(model, "storage_dtype", "")
    return dtype_name(kept) if isinstance(kept, torch.dtype) else str(kept)


def _largest_cast(model: torch.nn.Module, computed: torch.dtype) -> int:
    """Values of the largest weight that is not used as it lies: quantised, or in another dtype; 0 where none is."""
    return max((math.prod(storage_of(p).shape) for p in model.parameters() if _is_cast(p, computed)), default=0)


def _is_cast(parameter: torch.nn.Parameter, computed: torch.dtype) -> bool:
    if getattr(parameter, "gguf_cls", None) is not None or hasattr(parameter, "bnb_quantized"):
        return True
    # Whole numbers are somebody's own, and no weights.
    return parameter.is_floating_point() and parameter.dtype != computed


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: storage_of(parameter).shape for name, parameter in model.named_parameters()}
