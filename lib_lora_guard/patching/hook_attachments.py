"""Attachments that leave the weight as it is: a bypass beside the layer, and terms that the host's own call adds to a temporary weight."""

from __future__ import annotations

import logging

import torch

from ..planning.cheap import Forms, forms_of
from ..planning.mode import Mode
from .access import ModelAccess
from .attachment import Attachment
from .bypass import Bypass, call_of_layer
from .forward_program import lokr_pass
from .fused import Fused
from .fused_choice import Key
from .merge_attachment import MergeAttachment, site_of
from .norms import has_dora, ratio_identity, ratios_of
from .on_the_fly import WeightTerms
from .plan import PlannedWeight

log = logging.getLogger(__name__)


class BypassAttachment(Attachment):
    """The stack goes through hooks on the layer; the weight stays as it is.

    Args:
        access: The model.
        planned: The weight and its stack.
        device: The device that the norms for a DoRA are computed on.
        old: The attachment on this weight so far. Norms and device copies that still hold are taken over from it, and
            a merge tells what the weight was before.
    """

    mode = Mode.BYPASS

    def __init__(
        self, access: ModelAccess, planned: PlannedWeight, device: torch.device, old: Attachment | None = None
    ) -> None:
        super().__init__(access, planned)
        site, terms, forms = planned.site, planned.terms, _forms(planned)
        if old is not None and old.site.layer is not site.layer:
            old = None
        older = old if isinstance(old, BypassAttachment) else None
        if older is not None and older.has_ratios_of(planned):
            ratios = older.ratios
        else:
            if isinstance(old, MergeAttachment) and has_dora(forms):
                site = site_of(site, old.backup.parameter(site.parameter.device))
            ratios = ratios_of(access, site, terms, forms, device)
        self.ratios: dict[int, torch.Tensor] = ratios
        self.hook = Bypass(planned.site.key, terms, planned.site.shape, ratios, access.bias, access.is_in_force, forms)
        self.hook.owns_output = access.owns_output(planned.site.layer)
        if older is not None:
            self.hook.share_factors_with(older.hook)
        stack = self.hook.program.one_pass
        if stack is not None and (raw := access.raw_weight(site)) is not None:
            self.hook.fused = Fused(raw, stack)

    def differs_in_strengths(self, access: ModelAccess, planned: PlannedWeight) -> bool:
        if not super().differs_in_strengths(access, planned):
            return False
        hook, site = self.hook, planned.site
        if hook.scales_input:
            # Two hooks: a call in another thread, begun with the old scale, would go on with the new strengths.
            return False
        if not hook.is_on(site.layer):
            # Made anew, it comes back.
            return False
        # What the layer's own code allows may be another answer by now: its class can change.
        may_be_fused = access.raw_weight(site) is not None and hook.program.one_pass is not None
        return may_be_fused == (hook.fused is not None) and access.owns_output(site.layer) == hook.owns_output

    def has_ratios_of(self, planned: PlannedWeight) -> bool:
        """Returns True if the DoRAs of `planned` have the norms that are known here."""
        mine = ratio_identity(self.terms, _forms(self.planned))
        return mine == ratio_identity(planned.terms, _forms(planned))

    def attach(self) -> None:
        self.hook.attach(self.planned.site.layer)
        self._show()

    def detach(self) -> None:
        layer = self.planned.site.layer
        self.hook.detach(layer)
        self.access.hide_bypass(layer)

    def replace(self, other: Attachment) -> None:
        if not (
            isinstance(other, BypassAttachment)
            and self.is_beside(other)
            and self.hook.take_place_of(other.hook, self.site.layer)
        ):
            super().replace(other)
        elif (self.hook.fused is None) is not (other.hook.fused is None):
            self._show()

    def _show(self) -> None:
        call = None if self.hook.fused is None else call_of_layer
        self.access.show_bypass(self.planned.site.layer, self.hook.scales_input, call)

    def kernel(self, device: torch.device) -> Key | None:
        """Returns the kernel of the layer's short way on `device`; None where there is none."""
        return _kernel(self, self.hook.fused, device)

    def drop_device_copies(self) -> None:
        self.hook.drop_device_copies()

    @property
    def device_bytes(self) -> int:
        return self.hook.device_bytes(self.access.compute_dtype())

    @property
    def is_slow(self) -> bool:
        return self.hook.was_on_the_cpu

    @property
    def is_resident(self) -> bool:
        return self.hook.is_resident


class OnTheFlyAttachment(Attachment):
    """The layer's forward pass applies the stack to its temporary weight; the parameter stays as it is."""

    mode = Mode.ON_THE_FLY

    def __init__(self, access: ModelAccess, planned: PlannedWeight) -> None:
        super().__init__(access, planned)
        self.weight_terms = WeightTerms(planned.site.key, planned.terms)
        self.weight_terms.fused = self._fused(access)

    def _fused(self, access: ModelAccess) -> Fused | None:
        """Returns the short way of a LoKr that is alone on a weight of low bits; None for anything else."""
        stack = lokr_pass(self.terms, _forms(self.planned), self.site.shape, access.bias)
        raw = None if stack is None else access.raw_weight(self.site)
        return None if raw is None else Fused(raw, stack)

    def differs_in_strengths(self, access: ModelAccess, planned: PlannedWeight) -> bool:
        if not super().differs_in_strengths(access, planned):
            return False
        # What the layer's own code allows may be another answer by now: its class can change.
        return (self._fused(access) is None) == (self.weight_terms.fused is None)

    def kernel(self, device: torch.device) -> Key | None:
        """Returns the kernel of the layer's short way on `device`; None where there is none."""
        return _kernel(self, self.weight_terms.fused, device)

    def attach(self) -> None:
        call = None if self.weight_terms.fused is None else call_of_layer
        self.access.set_weight_terms(self.site, self.weight_terms, call)

    def detach(self) -> None:
        # Those of another guard stay.
        self.access.take_weight_terms(self.planned.site, self.weight_terms)

    def replace(self, other: Attachment) -> None:
        if isinstance(other, OnTheFlyAttachment) and self.is_beside(other):
            self.attach()
        else:
            super().replace(other)

    def drop_device_copies(self) -> None:
        self.weight_terms.drop_device_copies()

    @property
    def device_bytes(self) -> int:
        return self.weight_terms.device_bytes

    @property
    def is_resident(self) -> bool:
        return self.weight_terms.is_resident


def _kernel(attachment: Attachment, fused: Fused | None, device: torch.device) -> Key | None:
    """Returns the kernel of a layer's short way on `device`; None where there is none."""
    site = attachment.site
    try:
        return None if fused is None else fused.key(site.layer, device, attachment.access.compute_dtype())
    except Exception:
        # A weight of a library's other version. No LoRA fails for a way that is only faster.
        log.debug("%s has no short way", site.key, exc_info=True)
        return None


def _forms(planned: PlannedWeight) -> Forms:
    return forms_of(planned.terms, planned.site.shape) if planned.forms is None else planned.forms
