"""The seam between the engine and a host: one parameter in its place, and a model whose parameters can be patched."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..adapters.base import Shape
from ..errors import Message
from ..memory.probe import BackupBudget
from ..weights.storage import Storage
from .fused import RawWeight
from .marked_class import Forward, mark, unmark
from .on_the_fly import WeightTerms


class Site(NamedTuple):
    """One parameter in its place. A tuple, because each change makes one for every weight.

    `layer` is the module that owns it under `name`. `storage` tells its format and its real shape, also where the bytes
    are packed. `can_bypass`, `can_on_the_fly` and `can_merge` tell whether the layer's own code and storage allow these
    modes; `obstacle` says why not, where the storage does not tell.
    """

    key: str
    layer: torch.nn.Module
    name: str
    storage: Storage
    can_bypass: bool
    can_on_the_fly: bool
    can_merge: bool = True
    obstacle: Message | None = None

    @property
    def shape(self) -> Shape:
        """The real shape of the weight, `(out, in, ...)`."""
        return self.storage.shape

    @property
    def present(self) -> object:
        """What lies in the parameter's place now, whatever it is; None for nothing."""
        # Faster than `getattr` for a parameter, and a change asks several times for each. Not by `get`, which a traced module's table
        # has not.
        parameters = self.layer._parameters
        if self.name in parameters and (here := parameters[self.name]) is not None:
            return here
        return getattr(self.layer, self.name, None)

    @property
    def parameter(self) -> torch.nn.Parameter:
        """The parameter that is there now. Hosts replace Parameter objects, so the site keeps none.

        Raises:
            TypeError: Another object has taken its place.
        """
        value = self.present
        if not isinstance(value, torch.nn.Parameter):
            raise TypeError(f"{self.key} is a {type(value).__name__}, not a parameter")
        return value


class ModelAccess(Protocol):
    """A model as one host holds it. `name` is shown to the user."""

    name: str

    def site(self, key: str) -> Site | None:
        """Returns the parameter called `key`, or None if the model has none of that name."""

    def dense(self, site: Site) -> torch.Tensor:
        """Returns the dequantised values as a new fp32 tensor, on the device of the parameter."""

    def rows(self, site: Site, start: int, length: int, device: torch.device) -> torch.Tensor:
        """Returns `length` dequantised rows as a new fp32 tensor on `device`. No other row is made dense.

        Args:
            site: The parameter.
            start: The first row.
            length: The number of rows.
            device: The device of the result; the parameter may lie on another one.
        """

    def bias(self, layer: torch.nn.Module) -> torch.Tensor | None:
        """Returns the bias as the layer's forward pass adds it, on any device; None if the layer has none."""

    def owns_output(self, layer: torch.nn.Module) -> bool | None:
        """Tells whether the layer's class returns new memory from a call, so that a bypass may write into it.

        None: so does whatever else may be on the layer (a `forward` in the place of its class's, hooks).
        """

    def raw_weight(self, site: Site) -> RawWeight | None:
        """Returns how the weight is held, if there is a fused pass for such weights; else None."""

    def raw_weights(self) -> Iterable[tuple[torch.nn.Module, RawWeight]]:
        """Yields the layers of the model that `raw_weight` would return something for, with that."""

    def show_bypass(self, layer: torch.nn.Module, scales_input: bool, call: Forward | None = None) -> None:
        """Lets compiled code see that a bypass is on the layer, and whether it scales the layer's input too. Idempotent.

        Args:
            layer: The layer.
            scales_input: Whether the bypass does.
            call: Is to stand in place of the layer's `__call__`: only where `raw_weight` returns something.
        """

    def hide_bypass(self, layer: torch.nn.Module) -> None:
        """Takes that back. Idempotent."""

    def set_parameter(self, site: Site, value: torch.nn.Parameter) -> None:
        """Replaces the parameter by `value`."""

    def set_weight_terms(self, site: Site, terms: WeightTerms, call: Forward | None = None) -> None:
        """Makes the layer's forward pass add `terms` to its temporary weight. Idempotent.

        They take the place of earlier ones in one step: a forward pass of another thread has the one or the other.

        Args:
            site: The weight.
            terms: The stack on it.
            call: Is to stand in place of the layer's `__call__`: only where `raw_weight` returns something.
        """

    def take_weight_terms(self, site: Site, terms: WeightTerms) -> None:
        """Takes that back; terms that have taken the place of `terms` stay. Idempotent."""

    def device(self) -> torch.device:
        """Returns the device the model computes on."""

    def backup_budget(self) -> BackupBudget:
        """Measures how much memory backups of merged weights may take now."""

    def is_in_force(self) -> bool:
        """Returns False while another extension patches this model itself. Asked at every call of a layer."""

    def compute_dtype(self) -> torch.dtype:
        """Returns the dtype of the model's activations, for byte counts before the first forward pass."""


class ModuleAccess(ABC):
    """The part of `ModelAccess` that is the same for every host whose model is a `torch.nn.Module`.

    The module is held weakly, so that a model that its owner drops is freed.
    """

    gone: ClassVar[str] = "{name} has been unloaded"
    """The text of the error after the module was freed."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self.name = type(model).__name__

    @property
    def model(self) -> torch.nn.Module:
        """The module.

        Raises:
            ReferenceError: It was freed.
        """
        model = self._model()
        if model is None:
            raise ReferenceError(self.gone.format(name=self.name))
        return model

    @abstractmethod
    def decoded_rows(self, site: Site, start: int, length: int, device: torch.device) -> torch.Tensor:
        """Returns `length` rows from `start` as plain numbers of any dtype on any device; it may be a view.

        `device` is where the caller wants them: decoding there saves a copy.
        """

    def dense(self, site: Site) -> torch.Tensor:
        """Returns the dequantised values as a new fp32 tensor, on the device of the parameter."""
        if not site.shape:
            return site.parameter.detach().to(torch.float32, copy=True)
        return self.rows(site, 0, site.shape[0], site.parameter.device)

    def rows(self, site: Site, start: int, length: int, device: torch.device) -> torch.Tensor:
        """Returns `length` dequantised rows from `start` as a new fp32 tensor on `device`."""
        values = self.decoded_rows(site, start, length, device)
        return torch.empty(values.shape, dtype=torch.float32, device=device).copy_(values)

    def owns_output(self, layer: torch.nn.Module) -> bool | None:
        """Returns None: the host's layers return new memory."""
        return None

    def raw_weight(self, site: Site) -> RawWeight | None:
        """Returns None: there is no fused pass for the host's weights."""
        return None

    def raw_weights(self) -> Iterable[tuple[torch.nn.Module, RawWeight]]:
        """Yields the layers that have a fused pass, with how they hold their weight."""
        return ()

    def show_bypass(self, layer: torch.nn.Module, scales_input: bool, call: Forward | None = None) -> None:
        """Gives the layer its `call`, and else does nothing: the host compiles none of its layers."""
        if call is None:
            unmark(layer)
        else:
            mark(layer, (scales_input, call), call=call)

    def hide_bypass(self, layer: torch.nn.Module) -> None:
        """Takes that back."""
        unmark(layer)

    def set_parameter(self, site: Site, value: torch.nn.Parameter) -> None:
        """Replaces the parameter by `value`."""
        layer, name = site.layer, site.name
        is_plain = type(layer).__setattr__ is torch.nn.Module.__setattr__ and name in layer._parameters
        if is_plain and not torch.nn.modules.module._global_parameter_registration_hooks:
            # As torch's own, without the questions what else it could be: a third of the time of a restore.
            layer._parameters[name] = value
        else:
            setattr(layer, name, value)


def find_owner(model: torch.nn.Module, key: str) -> tuple[torch.nn.Module, str] | None:
    """Returns the module that owns parameter `key` and the parameter's name in it; None if there is none."""
    path, _, name = key.rpartition(".")
    owner: object = model
    for part in path.split(".") if path else ():
        # Most are children, which torch finds last, after an error inside the interpreter. A traced module's tables have no `get`.
        if isinstance(owner, torch.nn.Module) and part in owner._modules:
            owner = owner._modules[part]
        else:
            owner = getattr(owner, part, None)
    if not isinstance(owner, torch.nn.Module):
        return None
    kept = owner._parameters
    found = kept[name] if name in kept else getattr(owner, name, None)
    return (owner, name) if isinstance(found, torch.nn.Parameter) else None


def is_linear(layer: torch.nn.Module) -> bool:
    """Returns True for torch's Linear; hosts add their own classes.

    `MultiheadAttention.out_proj` is excluded: it is never called, the attention reads its weight.
    """
    return isinstance(layer, torch.nn.Linear) and not isinstance(layer, NonDynamicallyQuantizableLinear)


def is_plain_convolution(layer: torch.nn.Module) -> bool:
    """Returns True for a convolution whose cheap forward is exact: one group, not transposed."""
    return isinstance(layer, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)) and layer.groups == 1


def plain_bias(layer: torch.nn.Module) -> torch.Tensor | None:
    """Returns the bias of a layer that stores it as plain numbers."""
    bias = getattr(layer, "bias", None)
    return bias.detach() if isinstance(bias, torch.Tensor) else None
