"""The contract between the guard's runtime and a host: what a host provides, as Protocols.

A host's own objects may fit as they are. Where they do not, the host has a small class that fits.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch

from ..adapters import Term
from ..adapters.files import LoraFile
from ..adapters.patch_tuples import PatchValue
from ..messages import Message
from ..models.fit import Fit

PatcherT = TypeVar("PatcherT", contravariant=True)
"""The host's object for a model with a stack of LoRAs that the model shall have, as a caller knows it."""

PatcherObject: TypeAlias = Any
"""The same, where it is only handed on: each host has its own class."""


class ModelSizes(Protocol):
    """The host's sizes of models."""

    def module_size(
        self,
        module: torch.nn.Module,
        exclude_device: torch.device | None = ...,
        include_device: torch.device | None = ...,
    ) -> float:
        """Returns the bytes of a model's weights, as the host counts them when it decides on placement.

        Args:
            module: the model.
            exclude_device: leaves out what lies on this device.
            include_device: counts only what lies on this device.
        """
        ...


class TotalMemory(Protocol):
    """The host's size of each device."""

    def get_total_memory(self, dev: torch.device | None = ...) -> int:
        """Returns the bytes of memory that a device has."""
        ...


class HostModel(Protocol):
    """A model with the stack of LoRAs that it shall have. Several of them may share one `model`."""

    @property
    def model(self) -> torch.nn.Module: ...
    @property
    def load_device(self) -> torch.device: ...
    @property
    def lora_patches(self) -> Sized:
        """The stack; empty without LoRAs."""
        ...


class Swapped(NamedTuple):
    """What of a placed model is copied to the device in each call, in bytes, as one look at its layers finds it."""

    all_bytes: int = 0
    away_bytes: int = 0
    """The part that `shrink` has taken and `grow` has not brought back. The rest only the host brings back."""
    pinned_bytes: int = 0
    """The part of `away_bytes` that lies in pinned RAM, and keeps its copy there when it comes back."""


class PlacedModel(Protocol):
    """A model that the host has placed on a device, whole or in part."""

    @property
    def module(self) -> torch.nn.Module: ...

    def is_for(self, model: HostModel) -> bool:
        """True if it was placed for exactly this one; False for another stack on the same module."""
        ...

    def returns(self) -> bool:
        """True if the same image needs it again after others have run, like the denoiser."""
        ...

    def swappable_bytes(self) -> int:
        """Returns the bytes that `shrink` can take at most."""
        ...

    def swapped(self) -> Swapped:
        """Returns what is copied to the device in each call, as it lies now."""
        ...

    def copied_bytes(self) -> int:
        """Returns the bytes on the device that have their copy in RAM, so that they leave for nothing."""
        ...

    def shrink(self, wanted_bytes: int) -> int:
        """Moves layers into RAM until `wanted_bytes` have left the device, or none is left that may go.

        Returns:
            The bytes moved.

        Raises:
            Exception: what moving raises; every layer has then moved whole or stayed.
        """
        ...

    def grow(self, room_bytes: int) -> int:
        """Brings back what `shrink` took, as far as `room_bytes` and the device go; returns the bytes moved."""
        ...

    def unload(self) -> None:
        """Moves the whole model into RAM; the host lists it no more. Raises what moving raises."""
        ...


class DeviceMemory(Protocol):
    """The host's devices and the models on them. Sizes are of weights as they lie, or as the host will place them."""

    def total_bytes(self, device: torch.device) -> int: ...
    def free_bytes(self, device: torch.device) -> int: ...

    def size_bytes(
        self, model: torch.nn.Module, on: torch.device | None = None, outside: torch.device | None = None
    ) -> int:
        """Returns the size of a model, or of its part `on` a device or `outside` of one."""
        ...

    def fixed_bytes(self, model: torch.nn.Module, outside: torch.device) -> int:
        """Returns the size of a model's part `outside` a device that cannot run swapped: it comes even where the rest stays
        in RAM."""
        ...

    def inference_bytes(self) -> float:
        """Returns what the user's setting leaves free for computing. It may be out of any range, or NaN."""
        ...

    def set_inference_bytes(self, size_bytes: int) -> None:
        """Puts a setting right that is out of range."""
        ...

    def placed(self, model: HostModel) -> PlacedModel | None:
        """Returns what is placed of a model, for it or for another stack on its module."""
        ...

    def placed_on(self, device: torch.device, but: Sequence[HostModel]) -> Sequence[PlacedModel]:
        """Returns the models on a device in eviction order (least recently used first), except those that share a
        module with one of `but`."""
        ...

    def take_back(self, device: torch.device) -> Sequence[HostModel]:
        """Lists again what lies on a device and was forgotten by the host, so that it can leave.

        Returns:
            The models. The host forgets them again once nothing holds them.
        """
        ...

    def drop_abandoned(self) -> None:
        """Takes models off the host's list that nothing holds any more."""
        ...

    def empty_cache(self) -> None:
        """Gives back what the allocator holds of the devices without using it."""
        ...

    def passes(self, models: Sequence[HostModel]) -> int | None:
        """Returns how often models run before others need the room; None for often, or unknown."""
        ...

    def knows_swapping(self) -> bool:
        """True if the VRAM that swapping takes was measured for the host's way of swapping, and free VRAM is known."""
        ...

    def swapping_bytes(self, model: torch.nn.Module) -> int:
        """Returns the VRAM to leave for swapped layers while a model runs in part from RAM."""
        ...


class ModelFormats(Protocol):
    """The host's way to say how a model is stored and computed."""

    def network_name(self, model: torch.nn.Module) -> str:
        """Returns the class name of the network itself, without the host's wrapper."""
        ...

    def storage_name(self, model: torch.nn.Module) -> str:
        """Returns the storage of the weights ("bf16", "nf4", "gguf"); empty if the host does not say."""
        ...

    def compute_dtype(self, model: torch.nn.Module) -> torch.dtype:
        """Returns the dtype that the model computes in."""
        ...


class HostStacks(Protocol[PatcherT]):
    """The stacks of LoRAs that are applied to a host's models."""

    def is_current(self, patcher: PatcherT) -> bool:
        """Returns True if the stack of a patcher is applied to its model."""
        ...

    def invalidate_all(self) -> None:
        """Makes every model be refreshed at its next load, because a file has changed under its name."""
        ...


Entries: TypeAlias = Mapping[Hashable, Sequence[Sequence[PatchValue]]]
"""Patches by parameter: `(strength, value, strength of the model, part)`. They are compared, never applied."""


@dataclass(frozen=True, eq=False)
class FittedLora:
    """The part of a LoRA file that fits one model.

    Attributes:
        filename: as the host names the file.
        terms: by parameter; the same object for the same file and model. Their strength is 1.
        strength: the user's.
        is_online: the host's wish to apply it in each forward pass.
        weight: a factor of the strength that another extension has set.
        keys: the parameters that it has set it for; None for all of `terms`.
        file: the file, whose values may still be on their way.
        fit: what of the file fits the model; the same object as long as file and model are the same.
    """

    filename: str
    terms: Mapping[str, Sequence[Term]]
    strength: float
    is_online: bool = False
    weight: float = 1.0
    keys: tuple[str, ...] | None = None
    file: LoraFile | None = None
    fit: Fit | None = None

    def wait(self) -> None:
        """Waits until the values of the terms are there.

        Raises:
            LoraFileError: they never will be.
        """
        if self.file is not None:
            self.file.wait()

    def asked_terms(self) -> Mapping[str, Sequence[Term]]:
        """Returns the terms of the parameters that are asked for."""
        return self.terms if self.keys is None else {key: self.terms[key] for key in self.keys}

    def asked_strength(self, strength: float | None = None) -> float:
        """Returns the strength that the terms are to have, where the user's is `strength` instead of its own."""
        return self.weight * (self.strength if strength is None else strength)


class LoraPatchers(Protocol):
    """The host's patchers, to which the LoRAs of a prompt are added one after the other."""

    @property
    def counts_once(self) -> bool:
        """True if the same file with the same strength counts once however often a prompt names it."""
        ...

    def has_loras(self, patcher: PatcherObject) -> bool:
        """Returns True if a patcher has LoRAs already."""
        ...

    def with_lora(self, patcher: PatcherObject, lora: FittedLora) -> PatcherObject:
        """Returns a clone of a patcher that has one LoRA more."""
        ...

    def entries(self, patcher: PatcherObject) -> Iterable[tuple[str, Entries]]:
        """Returns the patches that a patcher asks for, by the name of each LoRA. Equal lists mean equal weights."""
        ...

    def not_patchable(self, patcher: PatcherObject) -> Message | None:
        """Returns why only the host itself can apply LoRAs to a model; None if the guard can."""
        ...


class StepStrengths(Protocol[PatcherT]):
    """Strengths that LoRAs have for a part of an image, instead of those that their patcher asks for."""

    @property
    def are_changed(self) -> bool:
        """True if the LoRAs of a model may have other strengths than their patcher asks for."""
        ...

    def loras(self, patcher: PatcherT) -> Sequence[tuple[str, float] | None]:
        """Returns the file and the strength of each LoRA in a patcher's stack; None for what another extension put there."""
        ...

    def set(self, patcher: PatcherT, strengths: Mapping[int, float]) -> None:
        """Gives LoRAs of a patcher's stack other strengths.

        Args:
            patcher: Its model is loaded.
            strengths: By place in the stack. The other LoRAs get the strengths that the patcher asks for.
        """
        ...

    def restore(self) -> None:
        """Gives every LoRA the strength that its patcher asks for."""
        ...
