"""The guard on any `torch.nn.Module`, without Forge."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..adapters.base import Term
from ..adapters.files import module_finder, read_lora_file
from ..errors import LoraFileError, LoraMismatchError
from ..patching.access import Site, find_owner, is_linear, is_plain_convolution
from ..patching.engine import Engine, LoraRequest
from ..patching.on_the_fly import WeightTerms
from ..planning.mode import Wish
from ..reporting.report import ApplyReport
from ..weights.storage import storage_of
from ..weights.stored_linear import StoredLinear


class LoraGuard:
    """Applies LoRA files to a model and takes them off again.

    >>> guard = LoraGuard(model)
    >>> print(guard.apply([("style.safetensors", 0.8)]))
    >>> guard.remove()

    As a context manager it removes its LoRAs at the end, whatever happened in between. The model is held weakly.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._engine = Engine()
        self._access = PlainAccess(model)

    def apply(self, stack: Sequence[tuple[str | Path, float]], mode: str = "auto") -> ApplyReport:
        """Replaces the current stack by `stack`, pairs of file and strength.

        `mode`: "auto" chooses per weight; "bypass", "on_the_fly" and "merge" ask for one. Raises LoraFileError for a
        file that cannot be read, LoraMismatchError for one that does not fit, ModeError for a merge into low-bit
        weights; after an exception the model has the stack it had before.
        """
        wish = Wish(mode)
        requests = [self._request(index, Path(path), strength) for index, (path, strength) in enumerate(stack)]
        with torch.no_grad():
            for request, refusal in zip(requests, self._engine.refusals(self._access, requests), strict=True):
                if refusal is not None:
                    raise LoraMismatchError(f"{request.label}: {refusal}")
            return self._engine.change(self._access, requests, wish)

    def remove(self) -> ApplyReport:
        """Takes everything off: every weight has its original values, bit for bit."""
        with torch.no_grad():
            return self._engine.change(self._access, [])

    def drop_device_copies(self) -> None:
        """Frees the factors' copies on GPUs; the next forward pass makes them again."""
        self._engine.drop_device_copies()

    def __enter__(self) -> LoraGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _request(self, index: int, path: Path, strength: float) -> LoraRequest:
        file = read_lora_file(path)
        find = module_finder(name for name, _ in self._access.model.named_modules())
        terms: dict[str, list[Term]] = {}
        skipped = list(file.unknown_keys)
        for (module, parameter), adapter in file.adapters.items():
            found = find(module)
            if found is None or find_owner(self._access.model, f"{found}.{parameter}") is None:
                skipped.append(f"{module}.{parameter}")
                continue
            terms.setdefault(f"{found}.{parameter}", []).append(Term(adapter, float(strength), origin=index))
        if not terms:
            raise LoraFileError(
                f"{path.name}: none of its {len(file.adapters)} modules is in this {self._access.name}; it was made for another model"
            )
        return LoraRequest(path.name, float(strength), terms, tuple(skipped))


class PlainAccess:
    """Any module as the engine sees it; our own StoredLinear layers are known, all others are dense."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self.name = type(model).__name__

    @property
    def model(self) -> torch.nn.Module:
        model = self._model()
        if model is None:
            raise ReferenceError(f"the {self.name} this guard was made for is gone")
        return model

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
            can_on_the_fly=is_weight and (stored or isinstance(layer, _WEIGHT_LAYERS)),
        )

    def dense(self, site: Site) -> torch.Tensor:
        if isinstance(site.layer, StoredLinear) and site.name == "weight":
            return site.layer.decode(torch.float32).clone()
        return site.parameter.detach().to(torch.float32, copy=True)

    def set_parameter(self, site: Site, value: torch.nn.Parameter) -> None:
        setattr(site.layer, site.name, value)

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

    def compute_dtype(self) -> torch.dtype:
        wide = (p.dtype for p in self.model.parameters() if p.dtype in (torch.float32, torch.bfloat16, torch.float16))
        return next(wide, torch.float32)


_WEIGHT_LAYERS = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)


class _PatchedForward:
    """The layer's own forward code, run on a shallow copy of the layer that holds the patched weight."""

    def __init__(self, layer: torch.nn.Module, name: str, terms: WeightTerms) -> None:
        self._layer = weakref.ref(layer)
        self._name = name
        self._terms = terms

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
