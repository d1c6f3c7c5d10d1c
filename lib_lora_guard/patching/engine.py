"""Brings one model from the stack it has to the stack it should have: validate, plan, prepare, then change.

Nothing of the model is touched before everything that can fail has been done; the change itself is a transaction.
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
from ..errors import LoraMismatchError, ModeError, RestoreError, about, reason
from ..memory.probe import BackupBudget
from ..messages import say
from ..models.fit import Fit, fit_terms
from ..planning.mode import Choice, Mode, Wish, choose_mode
from ..recorder.flight_recorder import Phase
from ..reporting.report import ApplyReport, LoraReport
from ..weights.storage import MB
from .access import ModelAccess, Site
from .attachments import Attachment, BypassAttachment, MergeAttachment, OnTheFlyAttachment, UnusableTermsError
from .backup import Backup, BackupStore
from .merge_room import facts_of, with_room
from .transaction import Transaction
from .watching import Watch, merges_in, ram_for_backups, ram_for_merges, unwatched

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoraRequest:
    """One LoRA of a stack: what it says about each parameter, or why it could not be read.

    `terms` maps parameter names to the terms on them; `skipped_keys` are keys of the file that the model has no
    place for, `lost` keys (with reasons) that it has and that cannot be applied; `refused` is a sentence for the user,
    and a refused LoRA is left out as a whole.
    """

    label: str
    strength: float
    terms: Mapping[str, Sequence[Term]] = field(default_factory=dict)
    skipped_keys: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    refused: str | None = None

    @classmethod
    def of(cls, label: str, strength: float, fit: Fit) -> LoraRequest:
        """The request for what of a file fits the model."""
        return cls(label, strength, fit.terms, tuple(fit.skipped), tuple(fit.lost), fit.refused)

    @property
    def bytes(self) -> int:
        return sum(term.adapter.bytes for terms in self.terms.values() for term in terms)


class Engine:
    """The patches on one model. Holds the layers it patched through the attachments and nothing else of the model."""

    def __init__(self, watch: Watch = unwatched) -> None:
        """`watch` goes around what a process can die of: backing up, merging, putting back."""
        self.watch = watch
        self._attached: dict[str, Attachment] = {}
        self._lifted: dict[str, Attachment] = {}
        self._unfinished: list[Callable[[], object]] = []
        self._budget = _Budget()
        self._backups = BackupStore(self._budget)
        self._offloaded: Mapping[str, torch.Tensor] = {}

    @property
    def attached(self) -> Mapping[str, Attachment]:
        return self._attached

    @property
    def lifted(self) -> Mapping[str, Attachment]:
        """The merges that `lift_merges` took off and that the stack still has."""
        return self._lifted

    def originals(self) -> Originals:
        """The unpatched parameters of everything merged, by name."""
        return Originals({key: a.backup for key, a in self._attached.items() if isinstance(a, MergeAttachment)})

    def _release_backups(self) -> None:
        """Gives back what no merge needs any more; nothing while an undo is open that may need it."""
        if not self._unfinished:
            self._backups.release_all_but(a.backup for a in self._attached.values() if isinstance(a, MergeAttachment))

    def change(
        self,
        access: ModelAccess,
        stack: Sequence[LoraRequest],
        wish: Wish = Wish.AUTO,
        leave_out: bool = True,
    ) -> ApplyReport:
        """Replaces the current stack by `stack`. On an exception the model has the old stack.

        A LoRA that does not fit is left out and named in the report, the others are applied; with `leave_out` False it
        raises LoraMismatchError instead.
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
            planned = self._plan(access, accepted, reports, wish)
            if wish is not Wish.MERGE:
                planned = with_room(planned, self._attached, self._offloaded, self._budget, device, access.name)
            try:
                to_back_up = ram_for_backups(planned.values(), self._attached, self._offloaded)
                with self.watch(Phase.BACKUP, to_back_up) if to_back_up else contextlib.nullcontext():
                    prepared = self._prepare(access, planned, device)
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
        for _, terms, choice in planned.values():
            for origin in {term.origin for term in terms}:
                reports[origin].count(choice)
        return ApplyReport(
            model=access.name,
            loras=reports,
            device=str(device),
            device_bytes=self.device_bytes() if device.type != "cpu" else 0,
            ram_bytes=sum(reports[i].bytes for i in accepted),
            milliseconds=(time.perf_counter() - started) * 1000,
        )

    def lift_merges(self) -> bool:
        """Takes the merges off and leaves each original where it is kept (RAM): before the host moves the model, so that it
        moves originals, and no second copy of them lies beside the merged ones. True where there were any; the next
        `change` merges again. What cannot be lifted stays merged."""
        merges = {key: a for key, a in self._attached.items() if isinstance(a, MergeAttachment)}
        if not merges:
            return False
        with self.watch(Phase.RESTORE, 0):
            for key, attachment in merges.items():
                attachment.lift()
                self._lifted[key] = self._attached.pop(key)
        self._release_backups()
        return True

    @contextlib.contextmanager
    def offloaded(self, copies: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """`copies`: parameters in RAM as they were before the host moved them to its device. A merge that happens within
        keeps them as its backups instead of copying."""
        # What could not be put back yet is no original.
        self._offloaded = {} if self._unfinished else copies
        try:
            yield
        finally:
            self._offloaded = {}

    def fitting(self, access: ModelAccess, stack: Sequence[LoraRequest]) -> set[int]:
        """Which LoRAs of `stack` (by place) could be read and fit the model. Changes nothing."""
        return set(self._validate(access, stack)[0])

    def unpatched_shapes(self) -> dict[str, Shape]:
        """Shapes that merged parameters have without their LoRAs, which may have widened them."""
        return {key: a.site.shape for key, a in self._attached.items() if isinstance(a, MergeAttachment)}

    def merged_layers(self) -> set[torch.nn.Module]:
        return {a.site.layer for a in self._attached.values() if isinstance(a, MergeAttachment)}

    def drop_device_copies(self) -> None:
        for attachment in self._attached.values():
            attachment.drop_device_copies()

    def device_bytes(self) -> int:
        """Bytes of the factors on a device while the model runs there."""
        return sum(a.device_bytes for a in self._attached.values())

    def resident_bytes(self) -> int:
        """Bytes of the factors that lie on a device right now."""
        return sum(a.device_bytes for a in self._attached.values() if a.is_resident)

    def detach_all(self) -> bool:
        """Takes everything off without a transaction, for when one has failed; False where something would not go."""
        attached, self._attached, self._lifted = self._attached, {}, {}
        # What an undo was still to put back goes as well: done later, it would lie on the model unknown to everyone.
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
        """The site as it is without LoRAs: a merge may have given the parameter another shape or dtype."""
        site, old = access.site(key), self._attached.get(key)
        if site is not None and isinstance(old, MergeAttachment) and old.site.layer is site.layer:
            return replace(site, storage=old.site.storage)
        return site

    def _plan(
        self,
        access: ModelAccess,
        accepted: Mapping[int, Mapping[str, tuple[Site, list[Term]]]],
        reports: Sequence[LoraReport],
        wish: Wish,
    ) -> dict[str, tuple[Site, tuple[Term, ...], Choice]]:
        merged: dict[str, tuple[Site, list[Term]]] = {}
        for fitting in accepted.values():
            for key, (site, terms) in fitting.items():
                merged.setdefault(key, (site, []))[1].extend(terms)
        planned = {}
        for key, (site, terms) in merged.items():
            try:
                planned[key] = (site, tuple(terms), choose_mode(facts_of(site), terms, wish))
            except ModeError as error:
                if wish is Wish.MERGE:
                    raise
                for origin in {term.origin for term in terms}:
                    reports[origin].skipped.append(reason(error))
                    reports[origin].lost.append(reason(error))
        return planned

    def _prepare(
        self,
        access: ModelAccess,
        planned: Mapping[str, tuple[Site, tuple[Term, ...], Choice]],
        device: torch.device,
    ) -> dict[str, Attachment]:
        target: dict[str, Attachment] = {}
        for key, (site, terms, choice) in planned.items():
            old = self._attached.get(key)
            if choice.mode is Mode.BYPASS:
                if old is not None and old.site.layer is site.layer and old.is_same(choice, terms):
                    target[key] = old
                    continue
                new: Attachment = BypassAttachment(access, site, terms, choice, device, old)
            elif choice.mode is Mode.ON_THE_FLY:
                new = OnTheFlyAttachment(access, site, terms, choice)
            else:
                under = old.backup if isinstance(old, MergeAttachment) and old.site.layer is site.layer else None
                if under is not None and old is not None and old.is_same(choice, terms):
                    target[key] = old
                    continue
                backup = under
                if backup is None:
                    backup = self._backups.keep(key, site.parameter, self._offloaded.get(key))
                    self._budget.take(backup)
                new = MergeAttachment(access, site, terms, choice, device, backup)
            target[key] = (
                old if old is not None and old.site.layer is site.layer and old.identity() == new.identity() else new
            )
        return target

    def commit(self, target: dict[str, Attachment]) -> None:
        """Puts `target` in the place of what is attached: all of it, or on an exception what was there."""
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
                self._attached, self._lifted = target, {}
        finally:
            self._unfinished += transaction.failed

    def finish_undoing(self) -> None:
        """Tries again what an earlier failure could not undo. Raises RestoreError where it still cannot."""
        waiting, self._unfinished = self._unfinished, []
        for number, undo in enumerate(waiting):
            try:
                undo()
            except Exception as error:
                self._unfinished = waiting[number:]
                raise RestoreError.of("memory.not_restored", error=reason(error)) from error


class Originals(Mapping[str, torch.nn.Parameter]):
    """Reads what was merged over from its backups, when it is asked for."""

    def __init__(self, backups: Mapping[str, Backup]) -> None:
        self._backups = backups

    def __getitem__(self, key: str) -> torch.nn.Parameter:
        return self._backups[key].parameter(torch.device("cpu"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._backups)

    def __len__(self) -> int:
        return len(self._backups)


class _Budget:
    """What the model of the present change may spend on backups: measured once, and again after every REMEASURE_BYTES,
    because a measurement takes milliseconds and a model has hundreds of norms and biases. (An object of its own, so that
    the engine is no reference cycle.)"""

    def __init__(self) -> None:
        self._ask: Callable[[], BackupBudget] = lambda: BackupBudget(0, 0, 0)
        self._measured: BackupBudget | None = None
        self._taken_bytes = 0

    def start(self, ask: Callable[[], BackupBudget]) -> None:
        self._ask, self._measured, self._taken_bytes = ask, None, 0

    def take(self, backup: Backup) -> None:
        self._taken_bytes += backup.bytes

    def __call__(self) -> BackupBudget:
        if self._measured is None or self._taken_bytes > REMEASURE_BYTES:
            self._measured, self._taken_bytes = self._ask(), 0
        # Whatever was kept since counts against every place: rather too little than too much.
        vram, ram, disk = (
            max(0, spare - self._taken_bytes)
            for spare in (
                self._measured.vram_spare_bytes,
                self._measured.ram_spare_bytes,
                self._measured.disk_spare_bytes,
            )
        )
        return BackupBudget(vram, ram, disk)


REMEASURE_BYTES = 256 * MB
