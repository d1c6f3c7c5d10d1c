"""A model's weights with their LoRAs merged in, one at a time, for code that reads the parameters themselves.

In bypass and on the fly the parameters stay as they are, so that `state_dict()` has nothing of the LoRAs.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

import torch

from ..messages import Message
from ..planning.mode import Mode
from ..weights.dtype_names import dtype_name
from ..weights.storage import FP8_DTYPES
from .attachment import Attachment, UnusableTermsError
from .merging import is_finite, keep_shape, merge


class Kept(str, Enum):
    """How much of the LoRA the merged value has. The enum's value is what logs show."""

    IN_PLACE = "in place"
    """All: the parameter has it already."""
    EXACT = "exact"
    """All: merged in fp32 and rounded once, to the 16 or more bits of the weight."""
    ROUNDED = "rounded"
    """A part: merged and rounded to plain fp8, which most of a LoRA does not survive."""
    LEFT_OUT = "left out"
    """None: the storage can only be read (4-bit, GGUF) or has scales of its own (scaled fp8). The weight is as stored."""


class MergedWeight:
    """One patched parameter. `value()` computes it; nothing is kept before or after that call.

    Attributes:
        dtype: The dtype of the value.
        shape: The shape of the value.
        format: The storage's name for people.
        kept: How much of the LoRA the value has.
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
            # A LoRA that widens a weight, or a kind that does not tell its shape before it is applied.
            self.shape = tuple(self.value().shape)

    @property
    def is_in_parameter(self) -> bool:
        """True if `value()` is the parameter's own memory."""
        return self.kept in (Kept.IN_PLACE, Kept.LEFT_OUT)

    @property
    def parameter(self) -> torch.nn.Parameter:
        """The parameter as it is now."""
        return self._attachment.site.parameter

    def value(self) -> torch.Tensor:
        """Returns the weight with its LoRAs, on the device of the weight (or in RAM for want of room).

        Raises:
            UnusableTermsError: The LoRA makes it infinite.
            MemoryError: There is no room.
        """
        with torch.inference_mode(False), torch.no_grad():
            data = self.parameter.detach()
            if self.is_in_parameter:
                return data
            if self._attachment.mode is Mode.MERGE and data.dtype != self.dtype:
                merged = data.to(self.dtype)
            else:
                # fp16 has every number of fp8.
                source = data if self.kept is Kept.EXACT else data.to(torch.float16)
                merged = merge(source, self._attachment.terms, device=self._device, out_dtype=self.dtype)
            if is_finite(data) and not is_finite(merged):
                key, terms = self._attachment.site.key, self._attachment.terms
                facts = {"key": key, "dtype": dtype_name(self.dtype)}
                raise UnusableTermsError(key, terms, Message("saving.overflow", facts))
            return merged


class MergedState:
    """All patched parameters of some models.

    Args:
        attached: The attachments of the models' engines.
        suspended: Merges that an engine has taken off until its next change.
    """

    def __init__(self, attached: Iterable[Attachment], suspended: Iterable[Attachment] = ()) -> None:
        self._places: dict[tuple[torch.nn.Module, str], tuple[Attachment, bool]] = {}
        for attachments, is_suspended in ((suspended, True), (attached, False)):
            for attachment in attachments:
                self._places[attachment.site.layer, attachment.site.name] = attachment, is_suspended

    def of(self, module: torch.nn.Module) -> dict[str, MergedWeight]:
        """Returns the patched parameters of `module`, a model or a part of one, by their names in its `state_dict()`."""
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
    """Returns the scale of a scaled fp8 weight, which checkpoints and Forge call `scale_weight`."""
    scale = getattr(layer, "scale_weight", None)
    return scale if isinstance(scale, torch.Tensor) else None
