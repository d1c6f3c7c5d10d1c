"""The attachment that replaces a parameter by a patched one, and puts the original back."""

from __future__ import annotations

from enum import Enum
from typing import TypeGuard

import torch

from ..adapters import apply_terms
from ..errors import Message, about
from ..inference_mode import outside_inference
from ..memory.out_of_memory import is_out_of_memory
from ..planning.mode import Mode
from ..units import MB
from ..weights.dtype_names import dtype_name
from ..weights.storage import storage_of
from .access import ModelAccess, Site
from .attachment import Attachment, UnusableTermsError
from .backup import Backup, HeldBackup, Place, Where, lies_in_ram, moved, parameter_bytes
from .file_backup import FileBackup
from .merging import CPU, SLICE_BYTES, is_finite, merge
from .merging_together import MergingTogether
from .placed import Found, Placed, compare
from .plan import PlannedWeight


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
        unseen = None
        if self._ready is None:
            merged, unseen = self._merge_unseen(self.site.parameter if is_new else self._from_backup())
            if merged.device != device and together is not None and together.settle():
                # What was held has made room on the device.
                merged, unseen = self._merge_unseen(self.site.parameter if is_new else self._from_backup())
        else:
            # Moved before anything is changed: if the device has no room for it, nothing has changed.
            merged = moved(self._ready, device)
        if together is not None:
            # Before it is in place: what is refused or done again later has to be found.
            together.merged(self, unseen)
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
        return self.planned.site.present

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

    def _merge(self, original: torch.nn.Parameter) -> torch.nn.Parameter:
        """Returns the merged value. Raises UnusableTermsError if it is not finite, and the original is."""
        merged, unseen = self._merge_unseen(original)
        if unseen is not None and not is_finite(unseen) and is_finite(original.detach()):
            raise self._overflow(unseen.dtype)
        return merged

    @outside_inference
    def _merge_unseen(self, original: torch.nn.Parameter) -> tuple[torch.nn.Parameter, torch.Tensor | None]:
        """Returns the merged value, and its values where nobody has looked whether they are finite: the change asks later."""
        wide = storage_of(original).wide
        dtype = original.dtype if wide else torch.float32
        together, unseen = self._open(), None
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
                overflows, unseen = False, merged
        else:
            dense = self.access.dense(site_of(self.site, original))
            was_finite = is_finite(dense)
            merged = apply_terms(dense, self.terms).to(dtype).contiguous()
            overflows = was_finite and not is_finite(merged)
        if overflows:
            raise self._overflow(dtype)
        return torch.nn.Parameter(merged, requires_grad=False), unseen


def is_merged(old: Attachment | None, site: Site) -> TypeGuard[MergeAttachment]:
    """Returns True if `old`, the attachment of the same name, is a merge of this very weight."""
    return isinstance(old, MergeAttachment) and old.site.layer is site.layer


KEPT_BYTES = 1 * MB
"""Parameters up to this size (norms, biases) are merged before anything is changed, on the device where they lie."""
MOVED_SLICE_BYTES = 4 * MB
"""Slices of a weight that is patched on the GPU and lies in RAM: smaller ones overlap better with the copies
(measured: 96 ms against 218 ms for a weight of 126 MB, H200)."""


def site_of(site: Site, parameter: torch.nn.Parameter) -> Site:
    """Returns the same place with another parameter in it, such as the one under a merge."""
    return Site(site.key, _Holder(parameter), "value", storage_of(parameter), False, False)


class _Holder(torch.nn.Module):
    def __init__(self, value: torch.nn.Parameter) -> None:
        super().__init__()
        self.value = value
