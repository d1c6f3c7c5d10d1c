"""One attachment per patched weight: what was done to it and how to take it back. Attach and detach are idempotent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from ..adapters import Term, apply_terms
from ..errors import LoraMismatchError
from ..planning.mode import Choice, Mode
from ..weights.storage import dtype_name, storage_of
from .access import ModelAccess, Site
from .bypass import Bypass
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

    def __init__(self, access: ModelAccess, site: Site, terms: tuple[Term, ...], choice: Choice) -> None:
        super().__init__(access, site, terms, choice)
        self.hook = Bypass(site.key, terms, site.shape)
        self._handle: Any = None

    def attach(self) -> None:
        if self._handle is None:
            self._handle = self.site.layer.register_forward_hook(self.hook, with_kwargs=True)

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def drop_device_copies(self) -> None:
        self.hook.joined.drop_device_copies()

    @property
    def device_bytes(self) -> int:
        return self.hook.joined.device_bytes(self.access.compute_dtype())

    @property
    def is_resident(self) -> bool:
        return self.hook.joined.is_resident


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
    """The parameter is replaced by a patched one; `original` is the very object that was there, moved to RAM at most.

    The new value is computed in fp32 from the original, never from an earlier merge. It keeps the storage dtype of
    16-bit and wider weights; anything narrower would round the LoRA away, so small fp8 parameters are held in fp32
    while a LoRA is on them.
    """

    mode = Mode.MERGE

    def __init__(
        self,
        access: ModelAccess,
        site: Site,
        terms: tuple[Term, ...],
        choice: Choice,
        original: torch.nn.Parameter | None,
        backup_device: torch.device,
    ) -> None:
        super().__init__(access, site, terms, choice)
        current = site.parameter
        if original is None:
            original = _moved(current, backup_device)
        else:
            # A merge lies on the weight already: compute from what was under it.
            site = Site(site.key, _Holder(_moved(original, current.device)), "value", site.storage, False, False)
        self.original = original
        # The storage of the original: what lies there now may be an earlier merge, held wider.
        dtype = original.dtype if storage_of(original).wide else torch.float32
        with torch.inference_mode(False), torch.no_grad():
            dense = access.dense(site)
            was_finite = bool(torch.isfinite(dense).all())
            merged = apply_terms(dense, terms).to(dtype).contiguous()
            self.merged = torch.nn.Parameter(merged, requires_grad=False)
        if was_finite and not torch.isfinite(merged).all():
            raise UnusableTermsError(
                site.key,
                terms,
                f"{site.key}: the patched values do not fit into {dtype_name(dtype)}; the LoRA is damaged or its strength far too high",
            )

    def attach(self) -> None:
        # The model may have moved since the value was made.
        self.access.set_parameter(self.site, _moved(self.merged, self.site.parameter.device))

    def detach(self) -> None:
        self.access.set_parameter(self.site, _moved(self.original, self.site.parameter.device))


class _Holder(torch.nn.Module):
    def __init__(self, value: torch.nn.Parameter) -> None:
        super().__init__()
        self.value = value


def _moved(parameter: torch.nn.Parameter, device: torch.device) -> torch.nn.Parameter:
    if parameter.device == device:
        return parameter
    moved = parameter.to(device)
    return moved if isinstance(moved, torch.nn.Parameter) else torch.nn.Parameter(moved, requires_grad=False)
