"""Brings one model from its present stack of LoRAs to the requested one: validate, plan, prepare, commit.

The model is not touched before everything that can fail early has been done; the change itself is a transaction.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..adapters import Term
from ..adapters.base import Shape
from ..adapters.left_out import LeftOut
from ..errors import LoraMismatchError, ModeError, RestoreError, about, reason
from ..messages import say
from ..models.fit import Fit, fit_terms
from ..planning.mode import Mode, Wish
from ..recorder.flight_recorder import Phase
from ..reporting.report import ApplyReport, LoraReport
from .access import ModelAccess, Site
from .attachments import Attachment, BypassAttachment, MergeAttachment, OnTheFlyAttachment, UnusableTermsError
from .backup import BackupStore, Budget, Originals
from .merge_room import with_room
from .plan import Plan, PlannedWeight, plan_weights
from .transaction import Transaction
from .watching import Watch, merges_in, ram_for_backups, ram_for_merges, unwatched

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoraRequest:
    """One LoRA of a stack: its terms for each parameter, or the reason why it could not be read.

    Args:
        label: The LoRA's name for the user.
        strength: The strength the user asked for, for the report; each term has its own.
        terms: The terms by parameter name.
        skipped_keys: Keys of the file that the model has no place for.
        lost: Keys, with reasons, that the model has and that cannot be applied.
        refused: A sentence for the user. A refused LoRA is left out as a whole.
        left_out: The part of the file that is not applied.
    """

    label: str
    strength: float
    terms: Mapping[str, Sequence[Term]] = field(default_factory=dict)
    skipped_keys: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    refused: str | None = None
    left_out: LeftOut = field(default_factory=LeftOut)

    @classmethod
    def of(cls, label: str, strength: float, fit: Fit) -> LoraRequest:
        """Makes the request from the part of a file that fits the model."""
        return cls(label, strength, fit.terms, tuple(fit.skipped), tuple(fit.lost), fit.refused, fit.left_out)

    @property
    def bytes(self) -> int:
        """Bytes of the factors in RAM."""
        return sum(term.adapter.bytes for terms in self.terms.values() for term in terms)


class Engine:
    """The LoRAs on one model. It holds the patched layers, through the attachments, and nothing else of the model.

    Args:
        watch: Entered around the phases that a process can die of: backing up, merging, restoring.
    """

    def __init__(self, watch: Watch = unwatched) -> None:
        self.watch = watch
        self._attached: dict[str, Attachment] = {}
        self._suspended: dict[str, Attachment] = {}
        self._unfinished: list[Callable[[], object]] = []
        self._budget = Budget()
        self._backups = BackupStore(self._budget)
        self._offloaded: Mapping[str, torch.Tensor] = {}

    @property
    def attached(self) -> Mapping[str, Attachment]:
        """The attachments of the present stack, by parameter name."""
        return self._attached

    @property
    def suspended(self) -> Mapping[str, Attachment]:
        """The merges that `suspend_merges` took off and that the stack still has."""
        return self._suspended

    def originals(self) -> Originals:
        """Returns the unpatched parameters of everything merged, by name."""
        return Originals({key: a.backup for key, a in self._attached.items() if isinstance(a, MergeAttachment)})

    def _release_backups(self) -> None:
        """Releases the backups that no merge needs any more; none while an unfinished undo may need one."""
        if not self._unfinished:
            self._backups.release_all_but(a.backup for a in self._attached.values() if isinstance(a, MergeAttachment))

    def change(
        self,
        access: ModelAccess,
        stack: Sequence[LoraRequest],
        wish: Wish = Wish.AUTO,
        leave_out: bool = True,
    ) -> ApplyReport:
        """Replaces the present stack by `stack`. On an exception the model has the old stack.

        Args:
            access: The model.
            stack: The LoRAs, in order.
            wish: The requested mode.
            leave_out: A LoRA that does not fit is left out and named in the report, and the others are applied. False
                raises instead.

        Raises:
            LoraMismatchError: A LoRA does not fit, and `leave_out` is False.
            ModeError: The requested mode cannot be had, or there is no room for a backup. With `leave_out` False also: no
                mode can carry a weight.
            RestoreError: An earlier change could not be undone, and still cannot.
        """
        try:
            return self._change(access, stack, wish, leave_out)
        finally:
            self._release_backups()

    def _change(self, access: ModelAccess, stack: Sequence[LoraRequest], wish: Wish, leave_out: bool) -> ApplyReport:
        started = time.perf_counter()
        self._budget.start(access.backup_budget)
        device = access.device()
        self.finish_undoing()
        accepted, reports = self._validate(access, stack)
        for report in reports:
            if report.refused is not None and not leave_out:
                raise LoraMismatchError(about(report.label, report.refused))
        while True:
            plan = self._plan(accepted, reports, wish, leave_out)
            if wish is not Wish.MERGE:
                plan = with_room(plan, self._attached, self._offloaded, self._budget, device, access.name)
            try:
                to_back_up = ram_for_backups(plan.values(), self._attached, self._offloaded)
                with self.watch(Phase.BACKUP, to_back_up) if to_back_up else contextlib.nullcontext():
                    prepared = self._prepare(access, plan, device)
                self.commit(prepared)
                break
            except UnusableTermsError as error:
                if not leave_out:
                    raise
                self.finish_undoing()
                # Each round leaves at least one LoRA out, so this ends.
                for origin in {term.origin for term in error.terms}:
                    accepted.pop(origin, None)
                    reports[origin].refused = reason(error)
        for key, planned in plan.items():
            # An attachment that stays may have terms that came from other places in the stack.
            self._attached[key].planned = planned
            for origin in planned.origins:
                reports[origin].count(planned.choice)
        return ApplyReport(
            model=access.name,
            loras=reports,
            device=str(device),
            device_bytes=self.device_bytes() if device.type != "cpu" else 0,
            ram_bytes=sum(reports[i].bytes for i in accepted),
            milliseconds=(time.perf_counter() - started) * 1000,
        )

    def suspend_merges(self) -> bool:
        """Takes the merges off until the next `change`, and leaves each original where its backup lies (RAM).

        For a host that is about to move the model: it moves originals, and no second copy of them lies beside the merged
        weights. Merges that cannot be taken off stay.

        Returns:
            True if there were any merges.
        """
        merges = {key: a for key, a in self._attached.items() if isinstance(a, MergeAttachment)}
        if not merges:
            return False
        with self.watch(Phase.RESTORE, 0):
            for key, attachment in merges.items():
                attachment.suspend()
                self._suspended[key] = self._attached.pop(key)
        self._release_backups()
        return True

    @contextlib.contextmanager
    def offloaded(self, copies: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Makes merges inside the block keep `copies` as their backups, instead of copying.

        `copies`: parameters in RAM, by name, as they were before the host moved them to its device.
        """
        # A weight that could not be restored yet is no original.
        self._offloaded = {} if self._unfinished else copies
        try:
            yield
        finally:
            self._offloaded = {}

    def fitting(self, access: ModelAccess, stack: Sequence[LoraRequest]) -> set[int]:
        """Returns the places in `stack` of the LoRAs that could be read and fit the model. Changes nothing."""
        return set(self._validate(access, stack)[0])

    def refusals(self, access: ModelAccess, stack: Sequence[LoraRequest]) -> dict[int, str]:
        """Returns the reasons for the LoRAs of `stack` that `fitting` leaves out, by place. Changes nothing."""
        reports = self._validate(access, stack)[1]
        return {place: report.refused for place, report in enumerate(reports) if report.refused is not None}

    def unpatched_shapes(self) -> dict[str, Shape]:
        """Returns the shapes that merged parameters have without their LoRAs, which may have widened them."""
        return {key: a.site.shape for key, a in self._attached.items() if isinstance(a, MergeAttachment)}

    def merged_layers(self) -> set[torch.nn.Module]:
        """Returns the layers that have a merged parameter."""
        return {a.site.layer for a in self._attached.values() if isinstance(a, MergeAttachment)}

    def drop_device_copies(self) -> None:
        """Frees the factors' copies on devices; the next forward pass makes them again."""
        for attachment in self._attached.values():
            attachment.drop_device_copies()

    def device_bytes(self) -> int:
        """Returns the bytes of the factors on a device while the model runs there."""
        return sum(a.device_bytes for a in self._attached.values())

    def resident_bytes(self) -> int:
        """Returns the bytes of the factors that lie on a device right now."""
        return sum(a.device_bytes for a in self._attached.values() if a.is_resident)

    def detach_all(self) -> bool:
        """Takes everything off without a transaction, after one has failed.

        Returns:
            False if something could not be taken off; the next change tries it again.
        """
        attached, self._attached, self._suspended = self._attached, {}, {}
        # Attachments that an undo was still to put back go as well: put back later, no stack would hold them.
        waiting, self._unfinished = self._unfinished, []
        owners = [owner for undo in waiting if isinstance(owner := getattr(undo, "__self__", None), Attachment)]
        leaving = dict.fromkeys((*attached.values(), *owners))
        with self.watch(Phase.RESTORE, 0) if merges_in(leaving) else contextlib.nullcontext():
            for attachment in leaving:
                try:
                    attachment.detach()
                except Exception:
                    self._unfinished.append(attachment.detach)
                    say(log, logging.ERROR, "memory.key_not_restored", exc_info=True, key=attachment.site.key)
        self._release_backups()
        return not self._unfinished

    def _validate(
        self, access: ModelAccess, stack: Sequence[LoraRequest]
    ) -> tuple[dict[int, dict[str, tuple[Site, list[Term]]]], list[LoraReport]]:
        accepted: dict[int, dict[str, tuple[Site, list[Term]]]] = {}
        reports = []
        for index, lora in enumerate(stack):
            report = LoraReport(
                lora.label,
                lora.strength,
                bytes=lora.bytes,
                skipped=[*lora.skipped_keys, *lora.lost],
                lost=list(lora.lost),
                refused=lora.refused,
                left_out=lora.left_out,
            )
            reports.append(report)
            if lora.refused is not None:
                continue
            sites = {key: site for key in lora.terms if (site := self._site(access, key)) is not None}
            fit = fit_terms(lora.terms, {key: site.shape for key, site in sites.items()})
            report.skipped += [*fit.skipped, *fit.lost]
            report.lost += fit.lost
            report.refused = fit.refused
            if fit.refused is None:
                accepted[index] = {key: (sites[key], terms) for key, terms in fit.terms.items()}
        return accepted, reports

    def _site(self, access: ModelAccess, key: str) -> Site | None:
        """Returns the site as it is without LoRAs: a merge may have given the parameter another shape or dtype."""
        site, old = access.site(key), self._attached.get(key)
        if site is not None and isinstance(old, MergeAttachment) and old.site.layer is site.layer:
            return replace(site, storage=old.site.storage)
        return site

    def _plan(
        self,
        accepted: Mapping[int, Mapping[str, tuple[Site, list[Term]]]],
        reports: Sequence[LoraReport],
        wish: Wish,
        leave_out: bool,
    ) -> Plan:
        stacks: dict[str, tuple[Site, list[Term]]] = {}
        for fitting in accepted.values():
            for site, terms in fitting.values():
                # A module that two names lead to is one weight.
                stacks.setdefault(site.key, (site, []))[1].extend(terms)

        def report_lost(origins: set[int], error: ModeError) -> None:
            for origin in origins:
                reports[origin].skipped.append(reason(error))
                reports[origin].lost.append(reason(error))

        present = {key: one.planned for key, one in (self._suspended | self._attached).items()}
        return plan_weights(stacks, wish, present, report_lost if leave_out else None)

    def _prepare(self, access: ModelAccess, plan: Plan, device: torch.device) -> dict[str, Attachment]:
        target: dict[str, Attachment] = {}
        for key, planned in plan.items():
            old = self._attached.get(key)
            keeps = old is not None and old.carries_out(planned)
            target[key] = old if old is not None and keeps else self._attachment(access, planned, device, old)
        return target

    def _attachment(
        self, access: ModelAccess, planned: PlannedWeight, device: torch.device, old: Attachment | None
    ) -> Attachment:
        """Returns a new attachment for `planned`, with what still holds of `old`, which is on this weight now."""
        if planned.mode is Mode.BYPASS:
            return BypassAttachment(access, planned, device, old)
        if planned.mode is Mode.ON_THE_FLY:
            return OnTheFlyAttachment(access, planned)
        key, site = planned.site.key, planned.site
        if isinstance(old, MergeAttachment) and old.site.layer is site.layer:
            backup = old.backup
        else:
            backup = self._backups.keep(key, site.parameter, self._offloaded.get(key))
            self._budget.take(backup)
        return MergeAttachment(access, planned, device, backup)

    def commit(self, target: dict[str, Attachment]) -> None:
        """Replaces the attachments by `target`. On an exception the model has the earlier ones."""
        before = self._attached
        transaction = Transaction()
        try:
            with transaction:
                leaving = [old for key, old in before.items() if target.get(key) is not old]
                with self.watch(Phase.RESTORE, 0) if merges_in(leaving) else contextlib.nullcontext():
                    for old in leaving:
                        transaction.do(old.detach, old.attach)
                coming = [new for key, new in target.items() if before.get(key) is not new]
                merges = merges_in(coming)
                with self.watch(Phase.MERGE, ram_for_merges(merges)) if merges else contextlib.nullcontext():
                    for new in coming:
                        transaction.do(new.attach, new.detach)
                self._attached, self._suspended = target, {}
        finally:
            self._unfinished += transaction.failed

    def finish_undoing(self) -> None:
        """Tries again what an earlier failure could not undo.

        Raises:
            RestoreError: It still cannot be undone.
        """
        waiting, self._unfinished = self._unfinished, []
        for number, undo in enumerate(waiting):
            try:
                undo()
            except Exception as error:
                self._unfinished = waiting[number:]
                raise RestoreError.of("memory.not_restored", error=reason(error)) from error
