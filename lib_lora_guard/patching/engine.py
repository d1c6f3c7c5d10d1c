"""Brings one model from its present stack of LoRAs to the requested one: validate, plan, prepare, commit.

The model is not touched before everything that can fail early has been done; the change itself is a transaction.

One thread changes a model at a time; others wait. Forward passes do not wait: beside a change each weight has its old
stack or its new one (for a moment none where its mode changes, and on a GPU while a merge is replaced), and a whole pass
may have some of both.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from ..adapters import Term
from ..adapters.base import Shape
from ..adapters.left_out import LeftOut
from ..errors import BusyError, LoraMismatchError, Message, ModeError, RestoreError, about, reason
from ..messages import say
from ..models.fit import Fit, fit_terms
from ..planning.mode import Mode, Wish
from ..recorder.flight_recorder import Phase
from ..reporting.report import ApplyReport, LoraReport
from ..weights.dtype_names import dtype_name
from .access import ModelAccess, Site
from .attachments import (
    Attachment,
    BypassAttachment,
    MergeAttachment,
    MergeState,
    OnTheFlyAttachment,
    UnusableTermsError,
)
from .backup import Backup, BackupStore, Budget, Originals
from .file_backup import FileBackups
from .fused_choice import CHOICE, Key
from .host_casts import HostCasts
from .merge_room import only_from_files, with_room
from .neighbours import Neighbours, Place
from .placed import Found
from .plan import Plan, PlannedWeight, plan_weights
from .staging import bring, waiting
from .transaction import Pair, Step, Transaction
from .watching import Watch, merges_in, ram_for_backups, ram_for_merges, unwatched

log = logging.getLogger(__name__)

T = TypeVar("T")

SETTLE_ATTEMPTS = 8
"""How often an undo starts again because of a further interrupt. What is left then is undone before the next change."""


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


class State(NamedTuple):
    """The LoRAs that are on a model. An engine replaces it as a whole, so that no interrupt leaves a part of it.

    Args:
        attached: The attachments of the present stack, by parameter name.
        suspended: The merges that `suspend_merges` took off and that the stack still has.
        unfinished: A change that is under way, or could not be undone: some of it may be on the model.
        report: The report of the present stack.
    """

    attached: Mapping[str, Attachment]
    suspended: Mapping[str, Attachment]
    unfinished: Transaction[Attachment] | None = None
    report: ApplyReport | None = None


class Engine:
    """The LoRAs on one model. It holds the patched layers, through the attachments, and nothing else of the model.

    Changes come from any thread; a second one waits for the first.

    Args:
        watch: Entered around the phases that a process can die of: backing up, merging, restoring.
        neighbours: Other engines that may have LoRAs on the same layers.
        weight_files: Returns the files that the model may have been loaded from: they are the backups of merges where
            their bytes are proven to be the loaded ones.
    """

    def __init__(
        self,
        watch: Watch = unwatched,
        neighbours: Neighbours | None = None,
        weight_files: Callable[[], Sequence[Path]] = tuple,
    ) -> None:
        self.watch = watch
        self.name = "model"
        self._lock = threading.RLock()
        self._state = State({}, {})
        self._budget = Budget()
        self._backups = BackupStore(self._budget)
        self._files = FileBackups(weight_files)
        self._offloaded: Mapping[str, torch.Tensor] = {}
        self._neighbours = neighbours
        self._casts = HostCasts()
        self._labels: tuple[str, ...] = ()
        """The LoRAs of the last stack that may use kernels."""
        if neighbours is not None:
            neighbours.add(self)

    @property
    def attached(self) -> Mapping[str, Attachment]:
        """The attachments of the present stack, by parameter name."""
        return self._state.attached

    @property
    def suspended(self) -> Mapping[str, Attachment]:
        """The merges that `suspend_merges` took off and that the stack still has."""
        return self._state.suspended

    @property
    def report(self) -> ApplyReport | None:
        """The report of the stack that is on the model; None before the first change."""
        return self._state.report

    @property
    def is_unfinished(self) -> bool:
        """True while a change that failed could not be undone. The next change tries again before it does anything."""
        return self._state.unfinished is not None

    def places(self) -> set[Place]:
        """Returns the parameters that have a LoRA, or may get one by the change that is under way."""
        state = self._state
        present = [*state.attached.values(), *state.suspended.values(), *_attachments_of(state.unfinished)]
        return {_place(attachment) for attachment in present}

    def originals(self) -> Originals:
        """Returns the unpatched parameters of everything merged, by name."""
        return Originals({key: a.backup for key, a in self.attached.items() if isinstance(a, MergeAttachment)})

    def _release_backups(self) -> None:
        """Releases the backups that no merge needs any more; none while an unfinished undo may need one."""
        if self._backups.is_empty:
            return
        if not self.is_unfinished:
            self._backups.release_all_but(a.backup for a in self.attached.values() if isinstance(a, MergeAttachment))

    def exclusively(self, work: Callable[[], T]) -> T:
        """Runs a change of the model with no other beside it, and undoes what is under way if it ends in an exception.

        Further interrupts may come while an interrupted change is undone, in any place. Hence two handlers: what comes
        before the first one has begun is caught by the second.

        Args:
            work: The change.

        Raises:
            BusyError: This thread is in the middle of a change already.
        """
        if self._lock._is_owned():  # type: ignore[attr-defined]  # typeshed has left it out; `threading.Condition` uses it
            raise BusyError.of("change.busy")
        with self._lock:
            try:
                try:
                    result = work()
                except BaseException:
                    self._settle()
                    raise
            except BaseException:
                self._settle()
                raise
            finally:
                self._release_backups()
            return result

    def change(
        self,
        access: ModelAccess,
        stack: Sequence[LoraRequest] | Callable[[], Sequence[LoraRequest]],
        wish: Wish = Wish.AUTO,
        leave_out: bool = True,
    ) -> ApplyReport:
        """Replaces the present stack by `stack`. On an exception the model has the old stack.

        An interrupt that comes after the change was made, on the way back to the caller, leaves the new stack; `report`
        describes it.

        Args:
            access: The model.
            stack: The LoRAs, in order; or a function that returns them, called when no other thread changes the model.
            wish: The requested mode.
            leave_out: A LoRA that does not fit is left out and named in the report, and the others are applied. False
                raises instead.

        Raises:
            LoraMismatchError: A LoRA does not fit, and `leave_out` is False.
            ModeError: The requested mode cannot be had, or there is no room for a backup. With `leave_out` False also: no
                mode can carry a weight.
            BusyError: This thread is in the middle of a change, or LoRAs of another engine are on a weight.
            RestoreError: An earlier change could not be undone, and still cannot.
        """
        return self.exclusively(
            lambda: self._change(access, stack() if callable(stack) else stack, wish, leave_out),
        )

    def _change(self, access: ModelAccess, stack: Sequence[LoraRequest], wish: Wish, leave_out: bool) -> ApplyReport:
        started = time.perf_counter()
        self._budget.start(access.backup_budget)
        device, self.name = access.device(), access.name
        self.finish_undoing()
        self._forget_replaced()
        accepted, reports = self._validate(access, stack)
        for report in reports:
            if report.refused is not None and not leave_out:
                raise LoraMismatchError(about(report.label, report.refused))
        in_files: dict[str, Backup] = {}
        while True:
            plan, otherwise = self._plan(accepted, reports, wish, leave_out), list[Message]()
            self._prove(plan, in_files, access.name)
            if wish is Wish.MERGE_FROM_FILE:
                plan = only_from_files(plan, self.attached, in_files)
            backed_up = {*self._offloaded, *in_files}
            if wish is not Wish.MERGE:
                plan = with_room(plan, self.attached, backed_up, self._budget, device, access.name, otherwise)
            try:
                to_back_up = ram_for_backups(plan.values(), self.attached, backed_up)
                with self.watch(Phase.BACKUP, to_back_up) if to_back_up else contextlib.nullcontext():
                    prepared = self._prepare(access, plan, device, in_files)
                whole = ApplyReport(
                    model=access.name,
                    loras=reports,
                    device=str(device),
                    device_bytes=sum(a.device_bytes for a in prepared.values()) if device.type != "cpu" else 0,
                    ram_bytes=sum(reports[i].bytes for i in accepted),
                    milliseconds=0.0,
                    otherwise=otherwise,
                )
                for report in reports:
                    report.forget_counts()
                kernels = _kernels(prepared, device)
                for key, planned in plan.items():
                    for origin in planned.origins:
                        reports[origin].count(planned.choice, key in kernels)
                # An attachment that stays may have terms that came from other places in the stack.
                moved = [
                    (kept, kept.planned, plan[key]) for key, kept in prepared.items() if kept.planned is not plan[key]
                ]
                self.commit(prepared, [_replan(moved)], whole)
                break
            except UnusableTermsError as error:
                if not leave_out:
                    raise
                self.finish_undoing()
                # Each round leaves at least one LoRA out, so this ends.
                for origin in {term.origin for term in error.terms}:
                    accepted.pop(origin, None)
                    reports[origin].refused = reason(error)
                    reports[origin].forget_counts()
        if kernels:
            labels = tuple(lora.label for lora in reports)
            CHOICE.prepare(set(kernels.values()), are_new_files=labels != self._labels)
            self._labels = labels
        self._casts.settle(access, {one.site.layer for one in self.attached.values()}, device)
        whole.milliseconds = (time.perf_counter() - started) * 1000
        return whole

    def suspend_merges(self) -> bool:
        """Takes the merges off until the next `change`, and leaves each original where its backup lies (RAM).

        For a host that is about to move the model: it moves originals, and no second copy of them lies beside the merged
        weights. Merges that cannot be taken off stay.

        Returns:
            True if there were any merges.
        """
        return self.exclusively(self._suspend_merges)

    def _suspend_merges(self) -> bool:
        self._forget_replaced()
        before = self._state
        merges = {key: a for key, a in before.attached.items() if isinstance(a, MergeAttachment)}
        if not merges:
            return False
        others = {key: a for key, a in before.attached.items() if key not in merges}
        waiting = _pairs_of(before.unfinished)
        # An interrupt finds them as what is to be taken off: on its way out it takes off those that are left.
        self._state = before._replace(
            attached=others,
            suspended={**before.suspended, **merges},
            unfinished=Transaction([*waiting, *_strays(merges.values())]),
        )
        try:
            with self.watch(Phase.RESTORE, 0):
                for attachment in merges.values():
                    attachment.suspend()
        except Exception:
            stay = {key: a for key, a in merges.items() if a.state is MergeState.MERGED}
            half = [a for a in merges.values() if a.state in (MergeState.UNKNOWN, MergeState.STRAYED)]
            off = {key: a for key, a in merges.items() if key not in stay}
            left = [*waiting, *_strays(half)]
            self._state = before._replace(
                attached={**others, **stay},
                suspended={**before.suspended, **off},
                unfinished=Transaction(left) if left else None,
            )
            raise
        self._state = self._state._replace(unfinished=before.unfinished)
        return True

    @contextlib.contextmanager
    def offloaded(self, copies: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Makes merges inside the block keep `copies` as their backups, instead of copying.

        `copies`: parameters in RAM, by name, as they were before the host moved them to its device.
        """
        # A weight that could not be restored yet is no original.
        self._offloaded = {} if self.is_unfinished else copies
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
        return {key: a.site.shape for key, a in self.attached.items() if isinstance(a, MergeAttachment)}

    def merged_layers(self) -> set[torch.nn.Module]:
        """Returns the layers that have a merged parameter."""
        return {a.site.layer for a in self.attached.values() if isinstance(a, MergeAttachment)}

    def drop_device_copies(self) -> None:
        """Frees the factors' copies on devices; the next forward pass makes them again."""
        for attachment in self.attached.values():
            attachment.drop_device_copies()

    def bring_factors(self, access: ModelAccess) -> int:
        """Makes the factors' copies on the model's device before its first call; returns the bytes that went there.

        Raises:
            torch.cuda.OutOfMemoryError: The first call makes the rest.
        """
        terms = waiting(self.attached.values())
        return bring(terms, access.device(), access.compute_dtype()) if terms else 0

    def device_bytes(self) -> int:
        """Returns the bytes of the factors on a device while the model runs there."""
        return sum(a.device_bytes for a in self.attached.values())

    def resident_bytes(self) -> int:
        """Returns the bytes of the factors that lie on a device right now."""
        return sum(a.device_bytes for a in self.attached.values() if a.is_resident)

    def detach_all(self) -> bool:
        """Takes everything off without a transaction, after one has failed.

        Returns:
            False if something could not be taken off; the next change tries it again.
        """
        return self.exclusively(self._detach_all)

    def _detach_all(self) -> bool:
        self._forget_replaced()
        # Attachments that an undo was still to put back go as well: put back later, no stack would hold them.
        leaving = dict.fromkeys((*self.attached.values(), *_attachments_of(self._state.unfinished)))
        self._casts.take_all({one.site.layer for one in leaving})
        self._state = State({}, {}, unfinished=Transaction(_strays(leaving)) if leaving else None)
        with self.watch(Phase.RESTORE, 0) if merges_in(leaving) else contextlib.nullcontext():
            self._undo()
        for attachment in _attachments_of(self._state.unfinished):
            say(log, logging.ERROR, "memory.key_not_restored", key=attachment.site.key)
        return not self.is_unfinished

    def _forget_replaced(self) -> None:
        """Forgets merges whose parameter the user has replaced, loaded or converted. The user's values stay."""
        found = {
            key: what
            for key, one in self.attached.items()
            if isinstance(one, MergeAttachment) and (what := one.look()) is not Found.MERGED
        }
        if not found:
            return
        state, gone = self._state, {key for key, what in found.items() if what is not Found.CONVERTED}
        foreign = [key for key, what in found.items() if what is Found.FOREIGN]
        converted = [key for key in found if key not in gone]
        self._state = state._replace(attached={key: a for key, a in state.attached.items() if key not in gone})
        if foreign:
            say(log, logging.WARNING, "change.replaced", model=self.name, count=len(foreign), key=foreign[0])
        if converted:
            first = converted[0]
            dtype = dtype_name(state.attached[first].site.parameter.dtype)
            say(
                log,
                logging.WARNING,
                "change.converted",
                model=self.name,
                count=len(converted),
                key=first,
                dtype=dtype,
            )

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
        site, old = access.site(key), self.attached.get(key)
        if site is not None and isinstance(old, MergeAttachment) and old.site.layer is site.layer:
            return site._replace(storage=old.site.storage)
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

        present = {key: one.planned for key, one in ({**self.suspended, **self.attached}).items()}
        return plan_weights(stacks, wish, present, report_lost if leave_out else None)

    def _prove(self, plan: Plan, in_files: dict[str, Backup], model: str) -> None:
        """Adds the backups of weights that the file of the model is proven to have, where they are merged anew."""
        new = {
            key: one.site.parameter
            for key, one in plan.items()
            if one.mode is Mode.MERGE and key not in in_files and not _is_merged(self.attached.get(key), one.site)
        }
        if new:
            for key, backup in self._files.prove(new, model).items():
                self._backups.add(backup)
                in_files[key] = backup

    def _prepare(
        self, access: ModelAccess, plan: Plan, device: torch.device, in_files: Mapping[str, Backup]
    ) -> dict[str, Attachment]:
        target: dict[str, Attachment] = {}
        for key, planned in plan.items():
            old = self.attached.get(key)
            keeps = old is not None and old.carries_out(planned)
            target[key] = old if old is not None and keeps else self._attachment(access, planned, device, old, in_files)
        return target

    def _attachment(
        self,
        access: ModelAccess,
        planned: PlannedWeight,
        device: torch.device,
        old: Attachment | None,
        in_files: Mapping[str, Backup],
    ) -> Attachment:
        """Returns a new attachment for `planned`, with what still holds of `old`, which is on this weight now."""
        if planned.mode is Mode.BYPASS:
            return BypassAttachment(access, planned, device, old)
        if planned.mode is Mode.ON_THE_FLY:
            return OnTheFlyAttachment(access, planned)
        key, site = planned.site.key, planned.site
        if isinstance(old, MergeAttachment) and old.site.layer is site.layer:
            backup = old.backup
        elif key in in_files:
            backup = in_files[key]
        else:
            backup = self._backups.keep(key, site.parameter, self._offloaded.get(key))
            self._budget.take(backup)
        return MergeAttachment(access, planned, device, backup)

    def commit(
        self, target: Mapping[str, Attachment], also: Sequence[Step] = (), report: ApplyReport | None = None
    ) -> None:
        """Replaces the attachments by `target`. On an exception the model has the earlier ones. To be called by `exclusively`.

        Args:
            target: The attachments of the new stack, by parameter name.
            also: Changes that go with it.
            report: The report of the new stack; None to keep the present one.

        Raises:
            BusyError: LoRAs of another engine are on a weight.
        """
        before = self._state
        leaving, coming = _difference(before.attached, target)
        change = Transaction([*leaving, *coming], also)
        # From here on an undo finds in the state whatever may be on the model, and so do other engines.
        self._state = before._replace(unfinished=change)
        try:
            if coming and self._neighbours is not None:
                self._refuse_shared(self._neighbours, coming)
            has_merges = any(old.mode is Mode.MERGE for old, _ in leaving)
            self._files.expect(a.backup for a in merges_in([*(old for old, _ in leaving), *_replaced_in(coming)]))
            with self.watch(Phase.RESTORE, 0) if has_merges else contextlib.nullcontext():
                change.do(0, len(leaving))
            merges = merges_in([new for _, new in coming])
            with self.watch(Phase.MERGE, ram_for_merges(merges)) if merges else contextlib.nullcontext():
                change.do(len(leaving), len(change.pairs))
            change.do_also()
            self._state = State(target, {}, report=before.report if report is None else report)
        except BaseException:
            self._settle()
            raise

    def _refuse_shared(self, neighbours: Neighbours, coming: Sequence[tuple[Attachment | None, Attachment]]) -> None:
        keys = {_place(new): new.site.key for old, new in coming if old is None or not new.is_beside(old)}
        found = neighbours.in_the_way(self, keys)
        if found is not None:
            other, shared = found
            key = next(key for place, key in keys.items() if place in shared)
            facts = {"other": other, "model": self.name, "count": len(shared)}
            raise BusyError(about(key, Message("change.shared", facts)))

    def finish_undoing(self) -> None:
        """Tries again what an earlier failure could not undo.

        Raises:
            RestoreError: It still cannot be undone.
        """
        error = self._undo()
        if error is not None:
            raise RestoreError.of("memory.not_restored", error=reason(error)) from error

    def _settle(self) -> None:
        """Undoes the change that is under way. Interrupts do not end it: one is on its way to the caller already."""
        for _ in range(SETTLE_ATTEMPTS):
            try:
                self._undo()
                return
            except BaseException:
                continue

    def _undo(self) -> Exception | None:
        """Undoes what is unfinished. What could not be undone stays unfinished, and the last error is returned."""
        unfinished = self._state.unfinished
        if unfinished is None:
            return None
        rest, error = unfinished.undo()
        self._state = self._state._replace(unfinished=rest)
        return error


def _kernels(attachments: Mapping[str, Attachment], device: torch.device) -> dict[str, Key]:
    """Returns the kernels that a stack may use, by the name of the weight."""
    found = {key: one.kernel(device) for key, one in attachments.items() if isinstance(one, BypassAttachment)}
    may_take = {kernel for kernel in set(found.values()) if kernel is not None and CHOICE.may_take(kernel)}
    return {key: kernel for key, kernel in found.items() if kernel is not None and kernel in may_take}


def _difference(
    present: Mapping[str, Attachment], target: Mapping[str, Attachment]
) -> tuple[list[tuple[Attachment, None]], list[tuple[Attachment | None, Attachment]]]:
    """Returns what leaves without another, and pairs of what is replaced (or None) and what comes."""
    if target is present:
        return [], []
    leaving = [(old, None) for key, old in present.items() if key not in target]
    coming = [(old, new) for key, new in target.items() if (old := present.get(key)) is not new]
    return leaving, coming


def _replaced_in(coming: Iterable[tuple[Attachment | None, Attachment]]) -> list[Attachment]:
    return [old for old, _ in coming if old is not None]


def _is_merged(old: Attachment | None, site: Site) -> bool:
    return isinstance(old, MergeAttachment) and old.site.layer is site.layer


def _strays(attachments: Iterable[Attachment]) -> list[tuple[None, Attachment]]:
    """Returns pairs whose undo takes off what may be on the model and is not of its stack."""
    return [(None, attachment) for attachment in attachments]


def _replan(moved: Sequence[tuple[Attachment, PlannedWeight, PlannedWeight]]) -> Step:
    """Returns the step that gives attachments that stay another plan; `moved` has each with the old and the new one."""

    def do() -> None:
        for attachment, _, new in moved:
            attachment.planned = new

    def undo() -> None:
        for attachment, old, _ in moved:
            attachment.planned = old

    return Step(do, undo)


def _pairs_of(change: Transaction[Attachment] | None) -> Sequence[Pair[Attachment]]:
    return () if change is None else change.pairs


def _attachments_of(change: Transaction[Attachment] | None) -> list[Attachment]:
    return [one for pair in _pairs_of(change) for one in pair if one is not None]


def _place(attachment: Attachment) -> Place:
    return id(attachment.site.layer), attachment.site.name
