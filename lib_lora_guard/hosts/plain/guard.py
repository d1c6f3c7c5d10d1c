"""The guard on any `torch.nn.Module`, without Forge."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ...adapters.base import Shape
from ...adapters.files import LoraFile, read_lora_file
from ...errors import LoraGuardError, LoraMismatchError, about
from ...files import shown
from ...memory.probe import BackupBudget, measure_budget
from ...models.fit import Target, fit_file
from ...patching.access import ModuleAccess, Site, find_owner, is_linear, is_plain_convolution, plain_bias
from ...patching.engine import Engine, LoraRequest
from ...patching.on_the_fly import WeightTerms
from ...planning.host_memory import RAM_FLOOR_BYTES
from ...planning.mode import requested
from ...reporting.report import ApplyReport
from ...units import MB
from ...weights.storage import storage_of
from ...weights.stored_linear import StoredLinear

Shapes = dict[str, Shape]


class LoraGuard:
    """Applies LoRA files to a model and takes them off again.

    >>> guard = LoraGuard(model)
    >>> print(guard.apply([("style.safetensors", 0.8)]))
    >>> guard.remove()

    As a context manager it removes its LoRAs at the end, whatever happened in between. The model is held weakly; a
    model has one stack, which all guards of it share. Take LoRAs off before you copy, save, convert or reload a model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"LoraGuard needs a torch.nn.Module, this is a {type(model).__name__}")
        self._engine = _engines.setdefault(model, Engine())
        self._access = PlainAccess(model)
        self._files: dict[tuple[str, int, int, bool], LoraFile] = {}

    def apply(
        self, stack: Sequence[tuple[str | Path, float]], mode: str = "auto", as_trained: bool = False
    ) -> ApplyReport:
        """Replaces the current stack by `stack`, pairs of file and strength.

        `as_trained`: DoRA in the meaning of its trainer instead of Forge's (docs/architecture.md lists the differences).
        `mode`: "auto" chooses per weight; "bypass", "on_the_fly" and "merge" ask for one. Raises LoraFileError for a
        file that cannot be read, LoraMismatchError for one that does not fit, ModeError for a merge into low-bit
        weights; after an exception the model has the stack it had before.
        """
        wish = requested(mode)
        if isinstance(stack, (str, Path)) or not all(
            isinstance(item, (tuple, list)) and len(item) == 2 for item in stack
        ):
            raise TypeError('stack must be a list of (file, strength) pairs: [("style.safetensors", 0.8)]')
        # Tensors made in inference mode could never be changed or differentiated outside it.
        with torch.inference_mode(False), torch.no_grad():
            files = [self._read(Path(path), as_trained) for path, _ in stack]
            target = Target(self._access.shapes() | self._engine.unpatched_shapes())
            requests = [
                self._request(n, file, float(strength), target)
                for n, (file, (_, strength)) in enumerate(zip(files, stack, strict=True))
            ]
            report = self._engine.change(self._access, requests, wish, leave_out=False)
        self._files = {(*_identity(file.path), as_trained): file for file in files}
        return report

    def remove(self) -> ApplyReport:
        """Takes everything off: every weight has its original values, bit for bit."""
        with torch.inference_mode(False), torch.no_grad():
            report = self._engine.change(self._access, [])
        self._files = {}
        return report

    def drop_device_copies(self) -> None:
        """Frees the factors' copies on GPUs; the next forward pass makes them again."""
        self._engine.drop_device_copies()

    def __enter__(self) -> LoraGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _read(self, path: Path, as_trained: bool) -> LoraFile:
        """The file, from memory while it is in the stack and unchanged on disk."""
        known = self._files.get((*_identity(path), as_trained)) if path.is_file() else None
        return known or read_lora_file(path, as_trained)

    def _request(self, index: int, file: LoraFile, strength: float, target: Target) -> LoraRequest:
        name = shown(file.path.name)
        fit = fit_file(file, target, strength, index)
        if fit.refused is not None:
            raise LoraMismatchError(about(name, fit.refused))
        if not fit.terms:
            modules = [n for n, _ in self._access.model.named_modules() if n]
            raise LoraMismatchError(
                f"{name}: none of its {len(file.adapters)} modules is in this {self._access.name}; it was made for "
                f"another model (the file has {shown((fit.lost or fit.skipped)[0])}, the model {modules[-1] if modules else 'no layers'})"
            )
        return LoraRequest.of(name, strength, fit)


VRAM_RESERVE_BYTES = 2048 * MB
"""Backups leave this much VRAM to the forward pass."""

_engines: weakref.WeakKeyDictionary[torch.nn.Module, Engine] = weakref.WeakKeyDictionary()
"""One engine per model: two of them would not know what the other has done to a weight."""


def _identity(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.resolve()), status.st_mtime_ns, status.st_size


class PlainAccess(ModuleAccess):
    """Any module as the engine sees it; our own StoredLinear layers are known, all others are dense."""

    gone = "the {name} this guard was made for is gone"

    def shapes(self) -> Shapes:
        """Names and real shapes of all parameters; those that hold a stored weight's scales are left out."""
        shapes: Shapes = {}
        for path, layer in self.model.named_modules():
            dot = f"{path}." if path else ""
            if isinstance(layer, StoredLinear):
                shapes[f"{dot}weight"] = layer.storage().shape
                if layer.bias is not None:
                    shapes[f"{dot}bias"] = tuple(layer.bias.shape)
            else:
                shapes |= {f"{dot}{n}": tuple(p.shape) for n, p in layer.named_parameters(recurse=False)}
        return shapes

    def site(self, key: str) -> Site | None:
        owner = find_owner(self.model, key)
        if owner is None:
            return None
        layer, name = owner
        is_weight = name == "weight"
        stored = isinstance(layer, StoredLinear)
        storage = layer.storage() if isinstance(layer, StoredLinear) and is_weight else storage_of(getattr(layer, name))
        return Site(
            key=key,
            layer=layer,
            name=name,
            storage=storage,
            can_bypass=is_weight and (stored or is_linear(layer) or is_plain_convolution(layer)),
            can_on_the_fly=is_weight
            and (stored or is_linear(layer) or isinstance(layer, torch.nn.modules.conv._ConvNd)),
        )

    def decoded_rows(self, site: Site, start: int, length: int, device: torch.device) -> torch.Tensor:
        if isinstance(site.layer, StoredLinear) and site.name == "weight":
            return site.layer.decode_rows(start, length, torch.float32)
        return site.parameter.detach().narrow(0, start, length)

    def bias(self, layer: torch.nn.Module) -> torch.Tensor | None:
        return plain_bias(layer)

    def set_weight_terms(self, site: Site, terms: WeightTerms | None) -> None:
        layer: Any = site.layer
        if isinstance(layer, StoredLinear):
            layer.weight_terms = terms
        elif terms is not None:
            layer.forward = _PatchedForward(layer, site.name, terms)
        else:
            layer.__dict__.pop("forward", None)

    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def backup_budget(self) -> BackupBudget:
        budget = measure_budget(self.device(), RAM_FLOOR_BYTES)
        return replace(budget, vram_spare_bytes=max(0, budget.vram_spare_bytes - VRAM_RESERVE_BYTES))

    def is_in_force(self) -> bool:
        return True

    def compute_dtype(self) -> torch.dtype:
        wide = (p.dtype for p in self.model.parameters() if p.dtype in (torch.float32, torch.bfloat16, torch.float16))
        return next(wide, torch.float32)


class _PatchedForward:
    """The layer's own forward code, run on a shallow copy of the layer that holds the patched weight."""

    def __init__(self, layer: torch.nn.Module, name: str, terms: WeightTerms) -> None:
        self._layer = weakref.ref(layer)
        self._name = name
        self._terms = terms

    def __reduce__(self) -> str:
        raise LoraGuardError("a LoRA is on this model; take it off (guard.remove()) before copying or saving the model")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer()
        if layer is None:
            raise ReferenceError("the layer is gone")
        parameter = getattr(layer, self._name)
        patched = self._terms.apply(parameter.detach(), parameter)
        shadow = copy.copy(layer)
        shadow.__dict__ = {
            **layer.__dict__,
            "_parameters": {**layer._parameters, self._name: torch.nn.Parameter(patched, requires_grad=False)},
        }
        return type(layer).forward(shadow, *args, **kwargs)
