"""Estimates what a step of a loaded model needs, from its architecture and the picture, corrected by measured peaks.

Stands in place of the estimates of Forge and its successors, `KModel.memory_required` (`backend/modules/k_model.py`). They are
asked before sampling, for eviction, and in each step, for whether prompt and negative prompt run at once.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Concatenate, TypeVar

import torch

from ..memory.calibration import Key, Kind, resolution_bucket, stack_signature
from ..models.architecture import Architecture, detect_model
from ..planning import activations
from ..planning.activations import Activations
from ..planning.tokens import ONE_PASS, Picture, tokens_for
from ..weights.storage import storage_of
from .corrections import Corrections
from .hooks import P
from .host import HostModel, ModelFormats

log = logging.getLogger(__name__)

HELD_BY_OTHERS = 1.2
"""Held bytes by used bytes, for a model that was not measured: the least of those that were (`planning.activations`). Forge
estimates what has to be free, so what is held."""

LATENT_PIXELS = 8
WITH_LORAS = stack_signature(["LoRA"])
"""One name for all stacks: in a step they take only workspace, a small part of the whole, and by their own names every change
of LoRAs would begin with nothing measured."""

M = TypeVar("M", bound=HostModel)

Shape = tuple[int, int, int]
"""Rows, height and width of a latent."""


class Estimates:
    """Predicts each model and picture size once."""

    def __init__(self, corrections: Corrections, formats: ModelFormats) -> None:
        """
        Args:
            corrections: by measured peaks.
            formats: says how the host stores and computes a model.
        """
        self._corrections, self._formats = corrections, formats
        self._architectures: weakref.WeakKeyDictionary[torch.nn.Module, Architecture | None] = (
            weakref.WeakKeyDictionary()
        )
        self._predicted: weakref.WeakKeyDictionary[torch.nn.Module, dict[Shape, tuple[Key, Activations]]] = (
            weakref.WeakKeyDictionary()
        )
        """By model: the prediction before any correction, and the key of its correction without a stack."""
        self._with_loras: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def patcher_memory_required(
        self,
        original: Callable[Concatenate[M, list[int], P], float],
        patcher: M,
        input_shape: Sequence[int],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> float:
        """Stands in place of `ModelPatcher.memory_required`, which is asked before sampling, always with two rows a picture.

        Args:
            original: the host's.
            patcher: the model with its LoRAs.
            input_shape: of the latent, `(rows, channels, height, width)`.
            args: what a newer host passes.
            kwargs: the same.
        """
        rows, *rest = input_shape
        if self.architecture(patcher.model) in ONE_PASS:
            rows = -(-rows // 2)
        self._corrections.open_for(patcher.load_device)
        (self._with_loras.add if patcher.lora_patches else self._with_loras.discard)(patcher.model)
        return original(patcher, [rows, *rest], *args, **kwargs)

    def memory_required(
        self,
        original: Callable[Concatenate[torch.nn.Module, Sequence[int], P], float],
        model: torch.nn.Module,
        input_shape: Sequence[int],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> float:
        """Stands in place of `KModel.memory_required`: the bytes to be free for a step of these rows.

        Args:
            original: the host's.
            model: the denoiser.
            input_shape: of the latent, `(rows, channels, height, width)`.
            args: what a newer host passes.
            kwargs: the same.
        """
        forges = original(model, input_shape, *args, **kwargs)
        try:
            found = self.step(model, shape_of(input_shape), forges)
            return forges if found is None else self._corrections.held(*found)
        except Exception:
            # Another extension's model, or a shape that is not a picture's.
            log.debug("no estimate of ours for %s", input_shape, exc_info=True)
            return forges

    def step(
        self, model: torch.nn.Module, shape: Shape, forges_bytes: float | None = None
    ) -> tuple[Key, Activations] | None:
        """Predicts what one step uses and holds, before any correction.

        Args:
            model: the denoiser.
            shape: of the latent.
            forges_bytes: Forge's own estimate, which counts for an architecture that was not measured.

        Returns:
            The prediction after the key of its correction; None if there is neither a prediction nor Forge's estimate.
        """
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

    def architecture(self, model: torch.nn.Module) -> Architecture | None:
        """Returns a model's architecture, read from its shapes once; None if it is unknown."""
        if model not in self._architectures:
            try:
                self._architectures[model] = detect_model(_shapes(model))
            except Exception:
                # Another extension's model, of unknown parameters.
                log.debug("no architecture of %s", type(model).__name__, exc_info=True)
                self._architectures[model] = None
        return self._architectures[model]

    def _predict(self, model: torch.nn.Module, shape: Shape) -> Activations | None:
        architecture = self.architecture(model)
        if architecture is None:
            return None
        rows, height, width = shape
        picture = Picture(width * LATENT_PIXELS, height * LATENT_PIXELS, rows)
        tokens = replace(tokens_for(architecture, picture), rows=rows)
        dtype = self._formats.compute_dtype(model)
        compute_bytes = torch.empty(0, dtype=dtype).element_size()
        found = activations.step(tokens, picture, _shapes(model), compute_bytes)
        return found.with_copy(_largest_cast(model, dtype) * compute_bytes)

    def _key(self, model: torch.nn.Module, shape: Shape) -> Key:
        rows, height, width = shape
        architecture = self.architecture(model)
        name = self._formats.network_name(model) if architecture is None else architecture.value
        size = resolution_bucket(width * LATENT_PIXELS, height * LATENT_PIXELS)
        return Key(Kind.STEP, name, self._formats.storage_name(model), size, rows)


def shape_of(input_shape: Sequence[int]) -> Shape:
    """Returns rows, height and width of a latent `(rows, ..., height, width)`.

    Raises:
        TypeError, ValueError, IndexError, OverflowError: it is not a latent's shape.
    """
    return int(input_shape[0]), int(input_shape[-2]), int(input_shape[-1])


def _largest_cast(model: torch.nn.Module, computed: torch.dtype) -> int:
    """Returns the number of values of the largest weight that is converted for use (quantised, or another dtype); 0 for none."""
    return max((math.prod(storage_of(p).shape) for p in model.parameters() if _is_cast(p, computed)), default=0)


def _is_cast(parameter: torch.nn.Parameter, computed: torch.dtype) -> bool:
    if getattr(parameter, "gguf_cls", None) is not None or hasattr(parameter, "bnb_quantized"):
        return True
    # Integer parameters are not weights.
    return parameter.is_floating_point() and parameter.dtype != computed


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: storage_of(parameter).shape for name, parameter in model.named_parameters()}
