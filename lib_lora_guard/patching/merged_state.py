"""What a model's weights would be with their LoRAs merged in: one at a time, for whoever reads the parameters themselves.

In bypass and on the fly the parameters stay as they are, so a reader of `state_dict()` sees nothing of the LoRAs.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

import torch

from ..messages import Message
from ..planning.mode import Mode
from ..weights.storage import FP8_DTYPES, dtype_name
from .attachments import Attachment, UnusableTermsError
from .merging import is_finite, keep_shape, merge


class Kept(str, Enum):
    """What becomes of the LoRA in the merged value. The value is what logs show."""

    IN_PLACE = "in place"
    """The parameter has it already."""
    EXACT = "exact"
    """Merged in fp32 and rounded once, to the 16 or more bits of the weight."""
    ROUNDED = "rounded"
    """Merged and rounded to plain fp8, which most of a LoRA does not survive."""
    LEFT_OUT = "left out"
    """The storage can only be read (4-bit, GGUF) or has scales of its own (scaled fp8): the weight stays as stored."""


class MergedWeight:
    """One patched parameter, by `value()`; nothing is calculated or kept before and after that call.

    `dtype` and `shape` are those of the value, `format` is the storage's name for people.
    """

    def __init__(self, attachment: Attachment, is_suspended: bool, device: torch.device) -> None:
        site, parameter = attachment.site, attachment.site.parameter
        self._attachment, self._device = attachment, device
        self.format = site.storage.format
        self.dtype = parameter.dtype
        self.shape = tuple(parameter.detach().size())
        is_plain = self.format == dtype_name(parameter.dtype) and _scale_of(site.layer) is None
        if attachment.mode is Mode.MERGE and not is_suspended:
            # Small fp8 parameters are held in fp32 while a LoRA is on them.
            self.dtype = next((d for d in FP8_DTYPES if dtype_name(d) == self.format), self.dtype)
            self.kept = Kept.IN_PLACE if self.dtype == parameter.dtype else Kept.ROUNDED
        elif site.storage.wide:
            self.kept = Kept.EXACT
        elif parameter.dtype in FP8_DTYPES and is_plain:
            self.kept = Kept.ROUNDED
        else:
            self.kept = Kept.LEFT_OUT
        if not self.is_in_parameter and not keep_shape(attachment.terms, self.shape):
            # A LoRA that widens a weight; whatever else does not say its shape before it is applied.
            self.shape = tuple(self.value().shape)

    @property
    def is_in_parameter(self) -> bool:
        """True where `value()` is the parameter's own memory."""
        return self.kept in (Kept.IN_PLACE, Kept.LEFT_OUT)

    @property
    def parameter(self) -> torch.nn.Parameter:
        return self._attachment.site.parameter

    def value(self) -> torch.Tensor:
        """The weight with its LoRAs, where the weight lies (or in RAM for want of room).

        Raises UnusableTermsError where the LoRA makes it infinite, MemoryError where there is no room.
        """
        with torch.inference_mode(False), torch.no_grad():
            data = self.parameter.detach()
            if self.is_in_parameter:
                return data
            if self._attachment.mode is Mode.MERGE and data.dtype != self.dtype:
                merged = data.to(self.dtype)
            else:
                # Every fp8 number is one of fp16's too.
                source = data if self.kept is Kept.EXACT else data.to(torch.float16)
                merged = merge(source, self._attachment.terms, device=self._device, out_dtype=self.dtype)
            if is_finite(data) and not is_finite(merged):
                key, terms = self._attachment.site.key, self._attachment.terms
                facts = {"key": key, "dtype": dtype_name(self.dtype)}
                raise UnusableTermsError(key, terms, Message("saving.overflow", facts))
            return merged


class MergedState:
    """Everything patched on some models. `suspended`: merges that were taken off for a while only, as an engine does before
    its host moves the model."""

    def __init__(self, attached: Iterable[Attachment], suspended: Iterable[Attachment] = ()) -> None:
        self._places: dict[tuple[torch.nn.Module, str], tuple[Attachment, bool]] = {}
        for attachments, is_suspended in ((suspended, True), (attached, False)):
            for attachment in attachments:
                self._places[attachment.site.layer, attachment.site.name] = attachment, is_suspended

    def of(self, module: torch.nn.Module) -> dict[str, MergedWeight]:
        """The patched parameters of `module`, a model or a part of one, by the names its own `state_dict()` has."""
        weights: dict[str, MergedWeight] = {}
        devices: dict[object, torch.device] = {}
        for path, layer in module.named_modules(remove_duplicate=False):
            for name in layer._parameters:
                if (layer, name) in self._places:
                    attachment, is_suspended = self._places[layer, name]
                    access = attachment.access
                    if access not in devices:
                        devices[access] = access.device()
                    weights[f"{path}.{name}" if path else name] = MergedWeight(
                        attachment, is_suspended, devices[access]
                    )
        return weights


def _scale_of(layer: torch.nn.Module) -> torch.Tensor | None:
    """The scale of a scaled fp8 weight, under the name that checkpoints and Forge have for it."""
    scale = getattr(layer, "scale_weight", None)
    return scale if isinstance(scale, torch.Tensor) else None
