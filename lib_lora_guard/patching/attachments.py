"""One attachment per patched weight: what was done to it and how to take it back. Attach and detach are idempotent."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from ..adapters import Term, apply_terms
from ..errors import LoraMismatchError, Message, about
from ..memory.out_of_memory import is_out_of_memory
from ..planning.mode import Choice, Mode
from ..weights.storage import MB, dtype_name, storage_of, widest_float
from .access import ModelAccess, Site
from .backup import Backup, Where, moved, parameter_bytes
from .bypass import Bypass
from .merging import SLICE_BYTES, merge
from .norms import ratio_identity, ratios_of
from .on_the_fly import WeightTerms


class UnusableTermsError(LoraMismatchError):
    """What these terms make of this weight cannot be used; the LoRAs they come from must be left out."""

    def __init__(self, key: str, terms: tuple[Term, ...], message: str) -> None:
        super().__init__(message)
        self.key, self.terms = key, terms


class Attachment(ABC):
    mode: ClassVar[Mode]

    def __init__(self, access: ModelAccess, site: Site, terms: tuple[Term, ...], choice: Choice) -> None:
        self.access, self.site, self.terms, self.choice = access, site, terms, choice

    def identity(self) -> list[object]:
        return [self.mode, *(term.identity() for term in self.terms)]

    def is_same(self, choice: Choice, terms: tuple[Term, ...]) -> bool:
        return self.identity() == [choice.mode, *(term.identity() for term in terms)]

    @abstractmethod
    def attach(self) -> None: ...

    @abstractmethod
    def detach(self) -> None: ...

    def drop_device_copies(self) -> None:  # noqa: B027  # nothing to drop is the right answer for most
        """Frees what lies on a GPU for this attachment only; the next forward pass makes it again."""

    @property
    def device_bytes(self) -> int:
        """Bytes on the device while sampling."""
        return 0

    @property
    def is_resident(self) -> bool:
        """True while device copies exist."""
        return False


class BypassAttachment(Attachment):
    mode = Mode.BYPASS

    def __init__(
        self,
        access: ModelAccess,
        site: Site,
        terms: tuple[Term, ...],
        choice: Choice,
        device: torch.device,
        old: Attachment | None = None,
    ) -> None:
        super().__init__(access, site, terms, choice)
        older = old if isinstance(old, BypassAttachment) and old.site.layer is site.layer else None
        if older is not None and ratio_identity(older.terms) == ratio_identity(terms):
            ratios = older.ratios
        else:
            under = None
            if isinstance(old, MergeAttachment) and old.site.layer is site.layer:
                under = old.backup.parameter(site.parameter.device)
            with torch.inference_mode(False), torch.no_grad():
                ratios = ratios_of(access, site if under is None else site_of(site, under), terms, device)
        self.ratios: dict[int, torch.Tensor] = ratios
        self.hook = Bypass(site.key, terms, site.shape, ratios, access.bias, access.is_in_force)
        if older is not None:
            self.hook.share_factors_with(older.hook)
        self._handles: list[Any] = []

    def attach(self) -> None:
        if not self._handles:
            self._handles = self.hook.attach(self.site.layer)

    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def drop_device_copies(self) -> None:
        self.hook.drop_device_copies()

    @property
    def device_bytes(self) -> int:
        return self.hook.device_bytes(self.access.compute_dtype())

    @property
    def is_resident(self) -> bool:
        return self.hook.is_resident


class OnTheFlyAttachment(Attachment):
    mode = Mode.ON_THE_FLY

    def __init__(self, access: ModelAccess, site: Site, terms: tuple[Term, ...], choice: Choice) -> None:
        super().__init__(access, site, terms, choice)
        self.weight_terms = WeightTerms(site.key, terms)

    def attach(self) -> None:
        self.access.set_weight_terms(self.site, self.weight_terms)

    def detach(self) -> None:
        self.access.set_weight_terms(self.site, None)

    def drop_device_copies(self) -> None:
        self.weight_terms.drop_device_copies()

    @property
    def device_bytes(self) -> int:
        return self.weight_terms.device_bytes

    @property
    def is_resident(self) -> bool:
        return self.weight_terms.is_resident


class MergeAttachment(Attachment):
    """The parameter is replaced by a patched one; `backup` has the original, bit for bit.

    The new value is computed in fp32 from the original, never from an earlier merge, and only when it is put in place:
    two patched copies of a whole model would not fit beside it. It keeps the storage dtype of 16-bit and wider weights;
    anything narrower would round the LoRA away, so small fp8 parameters are held in fp32 while a LoRA is on them.
    """

    mode = Mode.MERGE

    def __init__(
        self,
        access: ModelAccess,
        site: Site,
        terms: tuple[Term, ...],
        choice: Choice,
        device: torch.device,
        backup: Backup,
    ) -> None:
        super().__init__(access, site, terms, choice)
        self.backup = backup
        self._compute_device = device
        self._strayed_from: torch.device | None = None
        self._was_attached = False
        self._is_in_place: bool | None = False
        """None where a change ended half way: then either way has to be gone again."""
        self._merged: torch.nn.Parameter | None = None
        if parameter_bytes(site.parameter) <= KEPT_BYTES:
            # An earlier merge may lie there: the original is in its backup.
            self._merged = self._merge(self._from_backup())

    def attach(self) -> None:
        if self._is_in_place:
            # A rollback of a detach that has changed nothing.
            return
        # At first the original itself lies there, since a change takes everything off before it puts anything on. A
        # rollback comes again, and then anything may lie there.
        source = self._from_backup if self._was_attached else lambda: self.site.parameter
        self._was_attached = True
        merged = self._merged if self._merged is not None else self._merge(source())
        # The model may have moved since the value was made, and the value may lie in RAM for want of room: put in place,
        # it frees what it replaces.
        device = self._strayed_from or self.site.parameter.device
        if self._merged is not None:
            # What it would free is small: better a failure that has changed nothing.
            merged = moved(merged, device)
        self._is_in_place = None
        if merged.device != device:
            self._strayed_from = device
            self.access.set_parameter(self.site, merged)
            merged = moved(merged, device)
        self.access.set_parameter(self.site, merged)
        self._strayed_from, self._is_in_place = None, True

    def detach(self) -> None:
        if self._is_in_place is False:
            # The original lies there still: to put it there takes memory that there may not be.
            return
        # Where an attach ended half way, the parameter lies in RAM and belongs elsewhere.
        self._put_original(self._strayed_from or self.site.parameter.device)

    def lift(self) -> None:
        """Puts the original back where it is kept, not where the weight lies: for when the host is about to move it."""
        device = self.site.parameter.device if self.backup.place.where is Where.VRAM else CPU
        self._put_original(device)

    def _put_original(self, device: torch.device) -> None:
        try:
            original: torch.nn.Parameter | None = self.backup.parameter(device)
        except Exception as error:
            if self._merged is not None or device == CPU or not is_out_of_memory(error):
                raise
            original = None
        self._is_in_place = None
        if original is None:
            # What takes the place of the merged weight first needs no room beside it: that is free then.
            self._strayed_from = device
            self.access.set_parameter(self.site, self.backup.parameter(CPU))
            original = moved(self.site.parameter, device)
        self.access.set_parameter(self.site, original)
        self._strayed_from, self._is_in_place = None, False

    def _from_backup(self) -> torch.nn.Parameter:
        """The original; out of VRAM where it is kept there, else in RAM."""
        return self.backup.parameter(self.site.parameter.device if self.backup.place.where is Where.VRAM else CPU)

    def _merge(self, original: torch.nn.Parameter) -> torch.nn.Parameter:
        wide = storage_of(original).wide
        dtype = original.dtype if wide else torch.float32
        with torch.inference_mode(False), torch.no_grad():
            if wide:
                data = original.detach()
                on_device = self._compute_device if data.numel() * data.element_size() > KEPT_BYTES else data.device
                small = MOVED_SLICE_BYTES if data.device != on_device else SLICE_BYTES
                merged = merge(data, self.terms, device=on_device, out_dtype=dtype, slice_bytes=small)
                was_finite = _is_finite(data)
            else:
                dense = self.access.dense(site_of(self.site, original))
                was_finite = _is_finite(dense)
                merged = apply_terms(dense, self.terms).to(dtype).contiguous()
            if was_finite and not _is_finite(merged):
                why = Message("lora.overflow", {"dtype": dtype_name(dtype)})
                raise UnusableTermsError(self.site.key, self.terms, about(self.site.key, why))
            return torch.nn.Parameter(merged, requires_grad=False)


CPU = torch.device("cpu")
KEPT_BYTES = 1 * MB
"""Parameters up to this size (norms, biases) are merged before anything is changed, where they lie."""
MOVED_SLICE_BYTES = 4 * MB
"""Slices of a weight that is patched on the GPU and lies in RAM: smaller ones overlap better with the copies
(measured: 96 ms against 218 ms for a weight of 126 MB, H200)."""


def _is_finite(tensor: torch.Tensor) -> bool:
    # NaN and Inf survive a sum, which needs no mask of the tensor's size; in fp64 no sum of fp32 numbers overflows.
    return math.isfinite(float(tensor.sum(dtype=widest_float(tensor.device))))


def site_of(site: Site, parameter: torch.nn.Parameter) -> Site:
    """The same place with another parameter in it: what lay under a merge."""
    return Site(site.key, _Holder(parameter), "value", storage_of(parameter), False, False)


class _Holder(torch.nn.Module):
    def __init__(self, value: torch.nn.Parameter) -> None:
        super().__init__()
        self.value = value
