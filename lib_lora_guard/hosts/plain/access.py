"""Any `torch.nn.Module` as the engine sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ...adapters.base import Shape
from ...errors import Message, ModeError, about
from ...memory.probe import BackupBudget, measure_budget
from ...patching.access import ModuleAccess, Site, is_linear, is_plain_convolution, plain_bias
from ...patching.marked_class import Forward, class_of, mark, takes_marks, unmark
from ...patching.on_the_fly import WeightTerms
from ...patching.operators import WEIGHT_PATCH
from ...planning.limits import RAM_FLOOR_BYTES
from ...units import MB
from ...weights.dtype_names import dtype_name
from ...weights.storage import WIDE_DTYPES, Storage, storage_of
from ...weights.stored_linear import StoredLinear
from .hidden_weights import HiddenWeight, has_no_marks, hidden_weight, is_plain
from .layer_code import Code, code_of, runs_torchs_code
from .weight_forward import patch_weight, unpatch_weight

VRAM_RESERVE_BYTES = 2048 * MB
"""VRAM that backups leave to the forward pass."""


class PlainAccess(ModuleAccess):
    """A module whose layers are dense, quantised by another library, or StoredLinear from `load_stored`."""

    gone = "the {name} this guard was made for is gone"

    def __init__(self, model: torch.nn.Module) -> None:
        """
        Args:
            model: The module.
        """
        super().__init__(model)
        self._first_paths: dict[str, str] = {}
        """Of a module that several names lead to: the first one, by the others."""

    def shapes(self) -> dict[str, Shape]:
        """Returns the real shapes of all parameters by name, without those that hold the scales of a stored weight.

        A module that two names lead to has both.
        """
        shapes: dict[str, Shape] = {}
        seen: dict[int, str] = {}
        self._first_paths = {}
        for path, layer in _all_paths(self.model, "", ()):
            first = seen.setdefault(id(layer), path)
            if first != path:
                self._first_paths[path] = first
            dot = f"{path}." if path else ""
            shapes.update([(dot + name, shape) for name, shape in _shapes_of(layer)])
        return shapes

    def site(self, key: str) -> Site | None:
        """Returns the parameter called `key`, or None if the model has none of that name."""
        path, _, name = key.rpartition(".")
        parents = _modules_on(self.model, path)
        if parents is None:
            return None
        layer = parents[-1]
        first = self._first_paths.get(path, path)
        key = f"{first}.{name}" if first else name
        if isinstance(layer, StoredLinear) and name == "weight":
            return Site(key, layer, name, layer.storage(), can_bypass=True, can_on_the_fly=True)
        parameter = layer._parameters.get(name)
        hidden = None if is_plain(parameter) and has_no_marks(layer) else _hidden(layer, name)
        if hidden is not None:
            storage = hidden.storage(layer._parameters.get(hidden.name) if hidden.name else None)
        elif parameter is not None:
            storage = storage_of(parameter)
        else:
            return None
        return _site(key, layer, name, storage, hidden, _reads_its_layers(parents[-2]) if len(parents) > 1 else False)

    def decoded_rows(self, site: Site, start: int, length: int, device: torch.device) -> torch.Tensor:
        """Returns `length` rows from `start` as plain numbers.

        Raises:
            ModeError: Nothing here can decode the weight.
        """
        if isinstance(site.layer, StoredLinear) and site.name == "weight":
            return site.layer.decode_rows(start, length, torch.float32)
        hidden = _hidden(site.layer, site.name)
        if hidden is None:
            return site.parameter.detach().narrow(0, start, length)
        if hidden.decode is None:
            raise ModeError(
                about(site.key, hidden.obstacle or Message("reason.hidden_weight", {"format": hidden.format}))
            )
        return hidden.decode(start, length)

    def bias(self, layer: torch.nn.Module) -> torch.Tensor | None:
        """Returns the bias of a layer as its call adds it; None if it has none."""
        bias = plain_bias(layer)
        if bias is None or not bias.is_meta:
            return bias
        hidden = hidden_weight(layer, "bias")
        if hidden is None or hidden.decode is None:
            raise ModeError(about(f"{class_of(layer).__name__}.bias", Message("reason.elsewhere")))
        return hidden.decode(0, hidden.shape[0])

    def owns_output(self, layer: torch.nn.Module) -> bool:
        """Tells whether the layer's class returns new memory from a call."""
        return isinstance(layer, StoredLinear) or runs_torchs_code(layer)

    def show_bypass(self, layer: torch.nn.Module, scales_input: bool, call: Forward | None = None) -> None:
        """Lets compiled code see that a bypass is on the layer."""
        mark(layer, (scales_input, call), call=call)

    def hide_bypass(self, layer: torch.nn.Module) -> None:
        """Takes that back."""
        unmark(layer)

    def set_weight_terms(self, site: Site, terms: WeightTerms, call: Forward | None = None) -> None:
        """Makes the layer's forward pass add `terms` to its weight. There is no `call`: no weight has a fused pass here."""
        layer = site.layer
        if isinstance(layer, StoredLinear):
            layer.weight_terms = terms
        else:
            patch_weight(layer, terms)

    def take_weight_terms(self, site: Site, terms: WeightTerms) -> None:
        """Takes that back, unless others have taken the place of `terms`."""
        layer = site.layer
        if layer.__dict__.get(WEIGHT_PATCH) is terms:
            unpatch_weight(layer)
        elif isinstance(layer, StoredLinear) and layer.weight_terms is terms:
            layer.weight_terms = None

    def device(self) -> torch.device:
        """Returns the device of the first parameter that lies on one."""
        devices = (p.device for p in self.model.parameters() if not p.is_meta)
        return next(devices, torch.device("cpu"))

    def backup_budget(self) -> BackupBudget:
        """Measures how much memory backups of merged weights may take now."""
        budget = measure_budget(self.device(), RAM_FLOOR_BYTES)
        return replace(budget, vram_spare_bytes=max(0, budget.vram_spare_bytes - VRAM_RESERVE_BYTES))

    def is_in_force(self) -> bool:
        """Returns True: nothing else patches the model."""
        return True

    def compute_dtype(self) -> torch.dtype:
        """Returns the dtype of the first parameter in 16 or 32 bit: that of the activations."""
        wide = (p.dtype for p in self.model.parameters() if p.dtype in (torch.float32, torch.bfloat16, torch.float16))
        return next(wide, torch.float32)


def _site(
    key: str, layer: torch.nn.Module, name: str, storage: Storage, hidden: HiddenWeight | None, is_read: bool
) -> Site:
    """Decides which modes a layer's parameter allows."""
    if hidden is None and name == "weight" and storage.wide and not is_read and _is_torchs_own(layer):
        return Site(key, layer, name, storage, True, True)
    if name != "weight":
        can_merge = hidden is None
        return Site(key, layer, name, storage, False, False, can_merge, None if hidden is None else hidden.obstacle)
    linear = is_linear(layer) or is_plain_convolution(layer) or _is_linear_of_a_library(layer)
    convolution = isinstance(layer, torch.nn.modules.conv._ConvNd)
    code = code_of(layer) if linear or convolution else None
    obstacle = None if hidden is None else hidden.obstacle
    # A class that packs its weight has code of its own for it, and could not be anything but `W x + b`.
    bypass = linear and not is_read and (code in (Code.TORCH, Code.LINEAR) or (code is Code.CLASS and not storage.wide))
    on_the_fly = (
        (is_linear(layer) or convolution)
        and not is_read
        and hidden is None
        and (code is Code.TORCH or (code is Code.CLASS and storage.wide))
        and takes_marks(layer)
    )
    if obstacle is None and code is Code.REPLACED:
        obstacle = Message("reason.own_forward", {"class_name": class_of(layer).__name__})
    elif obstacle is None and code is Code.CLASS and storage.wide:
        obstacle = Message("reason.own_code", {"class_name": class_of(layer).__name__})
    return Site(key, layer, name, storage, bypass, on_the_fly, hidden is None, obstacle)


def _hidden(layer: torch.nn.Module, name: str) -> HiddenWeight | None:
    found = hidden_weight(layer, name)
    parameter = layer._parameters.get(name)
    if found is not None or name != "weight" or parameter is None or parameter.dtype in WIDE_DTYPES:
        return found
    if not (is_linear(layer) or is_plain_convolution(layer)) or runs_torchs_code(layer):
        return None
    shape = tuple(parameter.shape)
    if isinstance(layer, torch.nn.Linear):
        shape = layer.out_features, layer.in_features
    return HiddenWeight(dtype_name(parameter.dtype), shape, None)


def _is_torchs_own(layer: torch.nn.Module) -> bool:
    """Returns True for the most frequent layers, to which every mode is open: they are not looked at any closer."""
    base = class_of(layer)
    return "forward" not in layer.__dict__ and (
        base is torch.nn.Linear
        or (isinstance(layer, torch.nn.Conv2d) and base is torch.nn.Conv2d and layer.groups == 1)
    )


def _is_linear_of_a_library(layer: torch.nn.Module) -> bool:
    return class_of(layer).__module__.startswith("hqq.")


def _reads_its_layers(parent: torch.nn.Module) -> bool:
    """Returns True if `parent` may compute with its layers' weights without calling them, as torch's fast path does."""
    return isinstance(parent, torch.nn.TransformerEncoderLayer)


def _all_paths(
    module: torch.nn.Module, path: str, above: tuple[torch.nn.Module, ...]
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yields every name of every module. A module inside itself is left out."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and child is not module and child not in above:
            yield from _all_paths(child, f"{path}.{name}" if path else name, (*above, module))


def _modules_on(model: torch.nn.Module, path: str) -> list[torch.nn.Module] | None:
    """Returns the modules on the way from `model` to the one at `path`; None if there is none."""
    modules = [model]
    for part in path.split(".") if path else ():
        above = modules[-1]
        # Faster than `getattr` for a module; not by `get`, which a traced module's table has not.
        child = above._modules[part] if part in above._modules else getattr(above, part, None)
        if not isinstance(child, torch.nn.Module):
            return None
        modules.append(child)
    return modules


def _shapes_of(layer: torch.nn.Module) -> Iterator[tuple[str, Shape]]:
    if isinstance(layer, StoredLinear):
        yield "weight", layer.storage().shape
        if layer.bias is not None:
            yield "bias", tuple(layer.bias.shape)
        return
    parameters = [(name, one) for name, one in layer._parameters.items() if one is not None]
    if "weight" in layer._parameters and has_no_marks(layer) and all(is_plain(one) for _, one in parameters):
        yield from [(name, tuple(one.shape)) for name, one in parameters]
        return
    weight = _hidden(layer, "weight")
    if weight is not None:
        yield "weight", weight.shape
    for name, parameter in parameters:
        if weight is None or name != "weight":
            hidden = hidden_weight(layer, name)
            yield name, tuple(parameter.shape) if hidden is None else hidden.shape
