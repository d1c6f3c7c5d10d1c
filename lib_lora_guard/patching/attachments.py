"""One attachment per patched weight: it applies the stack to the weight and takes it back.

Both are idempotent and may be interrupted anywhere: what there is to do is found on the layer, each time anew.
"""

from __future__ import annotations

import logging
from enum import Enum
from typing import ClassVar, TypeGuard

import torch

from ..adapters import Term, apply_terms
from ..errors import LoraMismatchError, Message, about
from ..inference_mode import outside_inference
from ..memory.out_of_memory import is_out_of_memory
from ..planning.cheap import Forms, forms_of
from ..planning.mode import Choice, Mode
from ..units import MB
from ..weights.dtype_names import dtype_name
from ..weights.storage import storage_of
from .access import ModelAccess, Site
from .backup import Backup, HeldBackup, Place, Where, lies_in_ram, moved, parameter_bytes
from .bypass import Bypass, call_of_layer
from .file_backup import FileBackup
from .forward_program import lokr_pass
from .fused import Fused
from .fused_choice import Key
from .merging import CPU, SLICE_BYTES, is_finite, merge, total_of
from .merging_together import MergingTogether
from .norms import has_dora, ratio_identity, ratios_of
from .on_the_fly import WeightTerms
from .placed import Found, Placed, compare
from .plan import PlannedWeight, has_same_factors, is_same_term

log = logging.getLogger(__name__)


class UnusableTermsError(LoraMismatchError):
    """The terms give this weight values that cannot be used. The LoRAs they come from must be left out."""

    def __init__(self, key: str, terms: tuple[Term, ...], message: str) -> None:
        super().__init__(message)
        self.key, self.terms = key, terms


class Attachment:
    """One planned weight, carried out on a model."""

    # No abstract class: a change asks `isinstance` of each attachment, which would take ten times as long.
    mode: ClassVar[Mode]

    def __init__(self, access: ModelAccess, planned: PlannedWeight) -> None:
        self.access, self.planned = access, planned

    @property
    def site(self) -> Site:
        """The parameter in its place."""
        return self.planned.site

    @property
    def terms(self) -> tuple[Term, ...]:
        """The stack on it, in order."""
        return self.planned.terms

    @property
    def choice(self) -> Choice:
        """The mode with its reason."""
        return self.planned.choice

    def carries_out(self, planned: PlannedWeight) -> bool:
        """Returns True if `planned` is what this attachment does already: same layer, mode, terms and strengths."""
        return (
            self.mode is planned.mode
            and self.site.layer is planned.site.layer
            and len(self.terms) == len(planned.terms)
            and all(map(is_same_term, self.terms, planned.terms))
        )

    def differs_in_strengths(self, access: ModelAccess, planned: PlannedWeight) -> bool:
        """Returns True if `planned` is this very weight, stored as before, in the same mode with the same factors, and calls in
        other threads may go on beside an exchange of the strengths.

        Args:
            access: The model as the change of now sees it.
            planned: The weight with its coming stack.
        """
        return (
            self.mode is planned.mode
            and self.site.layer is planned.site.layer
            and self.site.storage == planned.site.storage
            and len(self.terms) == len(planned.terms)
            and all(map(has_same_factors, self.terms, planned.terms))
        )

    def attach(self) -> None:
        """Applies the stack."""
        raise NotImplementedError

    def detach(self) -> None:
        """Takes it back: the weight has its original bits."""
        raise NotImplementedError

    def replace(self, other: Attachment) -> None:
        """Applies the stack in the place of `other`, which is on the same parameter.

        Where both work in the same way this is one step: a forward pass beside it has the one stack or the other. Else
        it may find the weight without any. Idempotent, and undone by `other.replace(self)`.
        """
        other.detach()
        self.attach()

    def is_beside(self, other: Attachment) -> bool:
        """Returns True if `other` is on the same parameter of the same layer."""
        return other.site.layer is self.site.layer and other.site.name == self.site.name

    def drop_device_copies(self) -> None:
        """Frees this attachment's copies on a GPU, if it keeps any; the next forward pass makes them again."""

    @property
    def device_bytes(self) -> int:
        """Bytes on the device while sampling."""
        return 0

    @property
    def is_resident(self) -> bool:
        """True while device copies exist."""
        return False

    @property
    def is_slow(self) -> bool:
        """True if the device had no memory for the stack, so that a part of it was calculated in RAM."""
        return False


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


class MergeState(Enum):
    """The value that a merged parameter has."""

    NEW = "the original, which this merge has never replaced"
    MERGED = "the merged value"
    RESTORED = "the original, put back"
    UNKNOWN = "the original or the merged value: a change ended half way"
    STRAYED = "either of the two, in RAM instead of on its device: a change ended half way"


class MergeAttachment(Attachment):
    """The parameter is replaced by a patched one; `backup` has the original, bit for bit.

    The new value is computed in fp32 from the original, never from an earlier merge, and only when it is put in place:
    two patched copies of a whole model would not fit beside it. It keeps the storage dtype of 16-bit and wider weights;
    anything narrower would round the LoRA away, so small fp8 parameters are held in fp32 while a LoRA is on them.

    While `together` is open, the merges of a change ask the card for many of them at once (`merging_together.py`): an original
    is in place before the checksums of what was read are known, and `_held` has the merged value that it replaces. Either way of
    an undo puts that back.

    `state` changes in `_put`, and where one merge takes another's place (`replace`):

        NEW, RESTORED, UNKNOWN, STRAYED  --attach-->           MERGED
        MERGED, UNKNOWN, STRAYED         --detach, suspend-->  RESTORED
        any, if that ends half way       -->                   UNKNOWN or STRAYED; either way can be tried again

    Args:
        access: The model.
        planned: The weight and its stack.
        device: The device that the merge is computed on.
        backup: The original.
    """

    mode = Mode.MERGE

    def __init__(self, access: ModelAccess, planned: PlannedWeight, device: torch.device, backup: Backup) -> None:
        super().__init__(access, planned)
        self.backup = backup
        self.state = MergeState.NEW
        self.together: MergingTogether[MergeAttachment] | None = None
        """The change that is under way, or was the last one."""
        self._held: torch.nn.Parameter | None = None
        """The merged value that was in place before the original, until that is known to be right."""
        self._total: torch.Tensor | None = None
        """The sum of the values of the last merge, on their device, where they were not asked for."""
        self.compute_device = device
        self._home: torch.device | None = None
        """The device that a strayed parameter belongs on."""
        self._placed: Placed | None = None
        """The merged value that this attachment has last put in place."""
        self._ready: torch.nn.Parameter | None = None
        """The merged value of a small parameter, computed before anything is changed."""
        # A file is read in the order in which the change asks for it.
        if parameter_bytes(planned.site.parameter) <= KEPT_BYTES and backup.place.where is not Where.FILE:
            # An earlier merge may be in place: the original is in its backup.
            self._ready = self._merge(self._from_backup())

    def attach(self) -> None:
        if self.state is MergeState.MERGED:
            # A rollback of a detach that has changed nothing.
            self._held = None
            return
        if self._held is not None:
            self._take_back(self._held)
            return
        # A new merge finds the original in place: a change takes everything off before it puts anything on. A rollback
        # attaches again, and then the parameter may hold anything.
        is_new, device = self.state is MergeState.NEW, self._device()
        together = self._open()
        if self._ready is None:
            merged = self._merge(self.site.parameter if is_new else self._from_backup())
            if merged.device != device and together is not None and together.settle():
                # What was held has made room on the device.
                merged = self._merge(self.site.parameter if is_new else self._from_backup())
        else:
            # Moved before anything is changed: if the device has no room for it, nothing has changed.
            merged = moved(self._ready, device)
        total, self._total = self._total, None
        if together is not None:
            # Before it is in place: what is refused or done again later has to be found.
            together.merged(self, total)
        self._put(merged, device, MergeState.MERGED)

    def detach(self) -> None:
        if self._held is not None and self._open() is None:
            # What an unfinished undo has left in place was never checked.
            self._take_back(self._held)
        if self.state in (MergeState.NEW, MergeState.RESTORED):
            # Putting the original in its own place could need memory that is not there.
            return
        device, together = self._device(), self._open()
        if together is None or not self._restore_unchecked(device, together):
            self._restore(device)

    def replace(self, other: Attachment) -> None:
        """On a device, one weight after the other has its original in place: three values of it would not fit there."""
        if self._held is not None and isinstance(other, MergeAttachment) and self.is_beside(other):
            # An undo. The merged value that this one has held takes the place of the original and of what `other` made of it.
            if self.state is not MergeState.MERGED:
                # In this order: wherever it ends, this one is what has to be put right.
                self.state = MergeState.UNKNOWN
            other.state = MergeState.RESTORED
            self._take_back(self._held)
            return
        if not (
            isinstance(other, MergeAttachment)
            and other.backup is self.backup
            and self.is_beside(other)
            and lies_in_ram(self.site.parameter)
        ):
            super().replace(other)
            return
        if not self._is_in_place():
            merged = self._merge(self._from_backup()) if self._ready is None else self._ready
            self._put(merged, CPU, MergeState.MERGED)
        # In this order: an undo in between finds both merged, and this one in place.
        self.state = MergeState.MERGED
        other.state = MergeState.RESTORED

    def look(self) -> Found:
        """Tells what lies where the merged value was put. Costs nothing unless something has happened to it."""
        if self.state is not MergeState.MERGED:
            # Half done, or not done at all: that is for an undo.
            return Found.MERGED
        site, placed = self.planned.site, self._placed
        # Asked at every change for every merge: written out.
        if placed is not None and placed.is_surely(site.layer._parameters.get(site.name)):
            return Found.MERGED
        parameter, original = self._here(), self._from_backup()
        found = compare(parameter, self._merge(original), original)
        if found is Found.MERGED and isinstance(parameter, torch.nn.Parameter):
            self._placed = Placed(parameter)
        elif found is Found.CONVERTED and isinstance(parameter, torch.nn.Parameter):
            self._convert(original, parameter)
        return found

    def _convert(self, original: torch.nn.Parameter, parameter: torch.nn.Parameter) -> None:
        """Follows the user, who has converted the merged parameter: the original has the same dtype from now on."""
        data = original.detach().to(parameter.device, parameter.dtype)
        converted = torch.nn.Parameter(data, requires_grad=original.requires_grad)
        where = Where.RAM if lies_in_ram(converted) else Where.VRAM
        self._ready, self._placed = None, Placed(parameter)
        site = self.site._replace(storage=storage_of(converted))
        self.planned = self.planned._replace(site=site)
        self.backup = HeldBackup(self.site.key, converted, Place(where, "converted by the user"))

    def _is_in_place(self) -> bool:
        return self._placed is not None and self._placed.is_surely(self._here())

    def _here(self) -> object:
        """Returns what lies in the parameter's place, whatever it is. Faster than `getattr` for a parameter."""
        site = self.planned.site
        here = site.layer._parameters.get(site.name)
        return getattr(site.layer, site.name, None) if here is None else here

    def suspend(self) -> None:
        """Puts the original back where its backup lies, not where the weight lies: the host is about to move it."""
        self._restore(self.site.parameter.device if self.backup.place.where is Where.VRAM else CPU)

    def _restore(self, device: torch.device) -> None:
        # A small original needs little room: if there is not even that, nothing has changed yet.
        original = self._original(device) if self._ready is None else self.backup.parameter(device)
        self._put(original, device, MergeState.RESTORED)
        self._held = None

    def _restore_unchecked(self, device: torch.device, together: MergingTogether[MergeAttachment]) -> bool:
        """Puts the original in place before its checksums are known, and holds the merged value.

        Returns:
            False if nothing was changed: it is to be restored alone.
        """
        backup, merged = self.backup, self._here()
        if (
            self.state is not MergeState.MERGED
            or not isinstance(backup, FileBackup)
            or not isinstance(merged, torch.nn.Parameter)
            or not self._is_in_place()
            or merged.device != device
            or lies_in_ram(merged)
            or not together.may_hold(backup.bytes)
        ):
            return False
        try:
            original, sums = backup.unchecked(device)
        except (OSError, ValueError):
            # It may miss a beat; alone it is read again.
            return False
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            original = None
        if original is None:
            # Out of the handler, the error no longer holds what was allocated.
            together.settle()
            return False
        self._held = merged
        together.restored(self, backup, sums)
        self._put(original, device, MergeState.RESTORED)
        return True

    def _take_back(self, held: torch.nn.Parameter) -> None:
        """Puts the merged value back that was held: nothing is read or calculated for it."""
        if self.state is not MergeState.MERGED:
            self._put(held, held.device, MergeState.MERGED)
        self._held = None

    def let_go(self) -> None:
        """Frees the merged value that is held: the original in its place is right."""
        self._held = None

    def refuse_if_it_overflows(self) -> None:
        """To be called for a merged value that is not finite.

        Raises:
            UnusableTermsError: The original is.
        """
        original = self._from_backup()
        if is_finite(original.detach()):
            raise self._overflow(original.dtype)

    def _overflow(self, dtype: torch.dtype) -> UnusableTermsError:
        why = Message("lora.overflow", {"dtype": dtype_name(dtype)})
        return UnusableTermsError(self.site.key, self.terms, about(self.site.key, why))

    def _open(self) -> MergingTogether[MergeAttachment] | None:
        """Returns the change that is under way, if its merges ask together."""
        return self.together if self.together is not None and self.together.is_open else None

    def _put(self, value: torch.nn.Parameter, device: torch.device, done: MergeState) -> None:
        """Makes `value` the parameter, on `device`, and then the state `done`.

        A value that lies elsewhere goes in as it is first: what it replaces is freed and makes room on the device.
        """
        if value.device != device:
            self._home, self.state = device, MergeState.STRAYED
            self.access.set_parameter(self.site, value)
            value = moved(value, device)
        elif self.state is not MergeState.STRAYED:
            self.state = MergeState.UNKNOWN
        self._placed = Placed(value) if done is MergeState.MERGED else None
        self.access.set_parameter(self.site, value)
        self.state, self._home = done, None

    def _device(self) -> torch.device:
        """Where the parameter belongs. The model may have been moved since this attachment was made."""
        if self._home is not None:
            return self._home
        here = self._here()
        return here.device if isinstance(here, torch.Tensor) else self.site.parameter.device

    def _from_backup(self) -> torch.nn.Parameter:
        """Returns the original: on the parameter's device if its backup lies there or in a file, else in RAM.

        In RAM too where the device has no room for it beside what lies in its place.
        """
        is_there = self.backup.place.where in (Where.VRAM, Where.FILE)
        return self._original(self.site.parameter.device if is_there else CPU)

    def _original(self, device: torch.device) -> torch.nn.Parameter:
        """Returns the original on a device; in RAM if that has no room for it."""
        try:
            return self.backup.parameter(device)
        except Exception as error:
            if device == CPU or not is_out_of_memory(error):
                raise
        # Out of the handler, the error no longer holds what was allocated.
        return self.backup.parameter(CPU)

    @outside_inference
    def _merge(self, original: torch.nn.Parameter) -> torch.nn.Parameter:
        wide = storage_of(original).wide
        dtype = original.dtype if wide else torch.float32
        together, self._total = self._open(), None
        if wide:
            data = original.detach()
            on_device = self.compute_device if data.numel() * data.element_size() > KEPT_BYTES else data.device
            small = MOVED_SLICE_BYTES if data.device != on_device else SLICE_BYTES
            brought = together is not None and on_device == self.compute_device
            terms = together.terms_of(self) if together is not None and brought else self.terms
            merged = merge(data, terms, device=on_device, out_dtype=dtype, slice_bytes=small)
            if together is None or lies_in_ram(merged):
                # In this order: each question waits for the card, and a finite result answers both.
                overflows = not is_finite(merged) and is_finite(data)
            else:
                overflows, self._total = False, total_of(merged)
        else:
            dense = self.access.dense(site_of(self.site, original))
            was_finite = is_finite(dense)
            merged = apply_terms(dense, self.terms).to(dtype).contiguous()
            overflows = was_finite and not is_finite(merged)
        if overflows:
            raise self._overflow(dtype)
        return torch.nn.Parameter(merged, requires_grad=False)


def is_merged(old: Attachment | None, site: Site) -> TypeGuard[MergeAttachment]:
    """Returns True if `old`, the attachment of the same name, is a merge of this very weight."""
    return isinstance(old, MergeAttachment) and old.site.layer is site.layer


KEPT_BYTES = 1 * MB
"""Parameters up to this size (norms, biases) are merged before anything is changed, on the device where they lie."""
MOVED_SLICE_BYTES = 4 * MB
"""Slices of a weight that is patched on the GPU and lies in RAM: smaller ones overlap better with the copies
(measured: 96 ms against 218 ms for a weight of 126 MB, H200)."""


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


def site_of(site: Site, parameter: torch.nn.Parameter) -> Site:
    """Returns the same place with another parameter in it, such as the one under a merge."""
    return Site(site.key, _Holder(parameter), "value", storage_of(parameter), False, False)


class _Holder(torch.nn.Module):
    def __init__(self, value: torch.nn.Parameter) -> None:
        super().__init__()
        self.value = value
