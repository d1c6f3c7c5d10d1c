"""Brings one model from its present stack of LoRAs to the requested one: validate, plan, prepare, commit.

The model is not touched before everything that can fail early has been done; the change itself is a transaction.

One thread changes a model at a time; others wait. Forward passes do not wait: beside a change each weight has its old
stack or its new one (for a moment none where its mode changes, and on a GPU while a merge is replaced), and a whole pass
may have some of both.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from ..adapters import Term
from ..adapters.base import Shape
from ..errors import BusyError, LoraMismatchError, Message, ModeError, RestoreError, about, reason
from ..inference_mode import outside_inference
from ..locks import is_held, while_locked
from ..messages import say
from ..planning.mode import Mode, Wish
from ..recorder.flight_recorder import Phase
from ..reporting.report import ApplyReport, LoraReport
from ..weights.dtype_names import dtype_name
from .access import ModelAccess, Site
from .attachment import Attachment, UnusableTermsError
from .backup import Backup, Originals
from .change_pairs import Coming, attachments_of, difference, going, pairs_of, place_of, replan, strays
from .exchanges import Exchanges
from .hook_attachments import BypassAttachment, OnTheFlyAttachment
from .lora_request import Fitting, LoraRequest, fit_stack
from .merge_attachment import MergeAttachment, MergeState, is_merged
from .merge_room import only_from_files, with_room
from .merging_together import MergingTogether
from .model_backups import ModelBackups
from .neighbours import Neighbours, Place
from .placed import Found
from .plan import Plan, PlannedWeight, plan_weights
from .short_ways import ShortWays, kernels_of
from .staging import bring
from .transaction import Step, Transaction
from .waiting_factors import waiting
from .watching import Watch, merges_in, ram_for_backups, ram_for_merges, unwatched

log = logging.getLogger(__name__)

T = TypeVar("T")

SWITCH = "LORA_GUARD_STRENGTHS"
"""0 in the environment: a change makes the attachments of every weight anew on which a strength is another."""

SETTLE_ATTEMPTS = 8
"""How often an undo starts again because of a further interrupt. What is left then is undone before the next change."""


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
        self._backups = ModelBackups(weight_files)
        self._together: MergingTogether[MergeAttachment] | None = None
        """The merges of the change that is under way."""
        self._neighbours = neighbours
        self._short_ways = ShortWays()
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
        present = [*state.attached.values(), *state.suspended.values(), *attachments_of(state.unfinished)]
        return {place_of(attachment) for attachment in present}

    def originals(self) -> Originals:
        """Returns the unpatched parameters of everything merged, by name."""
        return Originals({key: a.backup for key, a in self.attached.items() if isinstance(a, MergeAttachment)})

    def _release_backups(self) -> None:
        """Releases the backups that no merge needs any more; none while an unfinished undo may need one."""
        if self._backups.is_empty:
            return
        if not self.is_unfinished:
            self._backups.release_all_but(a.backup for a in merges_in(self.attached.values()))

    def exclusively(self, work: Callable[[], T]) -> T:
        """Runs a change of the model with no other beside it, and undoes what is under way if it ends in an exception.

        Further interrupts may come while an interrupted change is undone, in any place. Hence two handlers: what comes
        before the first one has begun is caught by the second.

        Args:
            work: The change.

        Raises:
            BusyError: This thread is in the middle of a change already.
        """
        if is_held(self._lock):
            raise BusyError.of("change.busy")
        return while_locked(self._lock, lambda: self._undone_if_it_ends(work))

    def _undone_if_it_ends(self, work: Callable[[], T]) -> T:
        try:
            try:
                return work()
            except BaseException:
                self._settle()
                raise
        except BaseException:
            self._settle()
            raise
        finally:
            self._release_backups()

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
        self._backups.budget.start(access.backup_budget)
        device, self.name = access.device(), access.name
        self.finish_undoing()
        self._forget_replaced()
        accepted, reports = self._fit(access, stack)
        for report in reports:
            if report.refused is not None and not leave_out:
                raise LoraMismatchError(about(report.label, report.refused))
        in_files: dict[str, Backup] = {}
        while True:
            plan, otherwise = self._plan(accepted, reports, wish, leave_out), list[Message]()
            in_files |= self._backups.prove(plan, self.attached, in_files, access.name)
            if wish is Wish.MERGE_FROM_FILE:
                plan = only_from_files(plan, self.attached, in_files)
            backed_up = {*self._backups.host_copies, *in_files}
            if wish is not Wish.MERGE:
                plan = with_room(plan, self.attached, backed_up, self._backups.budget, device, access.name, otherwise)
            try:
                to_back_up = ram_for_backups(plan.values(), self.attached, backed_up)
                with self.watch(Phase.BACKUP, to_back_up) if to_back_up else contextlib.nullcontext():
                    prepared, exchanges = self._prepare(access, plan, device, in_files)
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
                kernels = kernels_of(prepared, device)
                # Most weights are alike in this.
                alike = Counter(
                    (one.choice.mode, one.choice.reason, key in kernels, one.places) for key, one in plan.items()
                )
                for (mode, why, is_fused, places), weights in alike.items():
                    for origin in set(places):
                        reports[origin].count(mode, why, weights, is_fused)
                # An attachment that stays may have terms that came from other places in the stack.
                moved = [
                    (kept, kept.planned, plan[key]) for key, kept in prepared.items() if kept.planned is not plan[key]
                ]
                self.commit(prepared, [exchanges.step, replan(moved)], whole)
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
        labels = tuple(lora.label for lora in reports)
        self._short_ways.settle(access, self.attached, kernels.values(), labels, device)
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
        waiting = pairs_of(before.unfinished)
        # An interrupt finds them as what is to be taken off: on its way out it takes off those that are left.
        self._state = before._replace(
            attached=others,
            suspended={**before.suspended, **merges},
            unfinished=Transaction([*waiting, *strays(merges.values())]),
        )
        try:
            with self.watch(Phase.RESTORE, 0):
                for attachment in merges.values():
                    attachment.suspend()
        except Exception:
            stay = {key: a for key, a in merges.items() if a.state is MergeState.MERGED}
            half = [a for a in merges.values() if a.state in (MergeState.UNKNOWN, MergeState.STRAYED)]
            off = {key: a for key, a in merges.items() if key not in stay}
            left = [*waiting, *strays(half)]
            self._state = before._replace(
                attached={**others, **stay},
                suspended={**before.suspended, **off},
                unfinished=Transaction(left) if left else None,
            )
            raise
        self._state = self._state._replace(unfinished=before.unfinished)
        return True

    def offloaded(self, copies: Mapping[str, torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        """Makes merges inside the block keep `copies` as their backups, instead of copying.

        `copies`: parameters in RAM, by name, as they were before the host moved them to its device.
        """
        # A weight that could not be restored yet is no original.
        return self._backups.offloaded({} if self.is_unfinished else copies)

    def fitting(self, access: ModelAccess, stack: Sequence[LoraRequest]) -> set[int]:
        """Returns the places in `stack` of the LoRAs that could be read and fit the model. Changes nothing."""
        return set(self._fit(access, stack)[0])

    def refusals(self, access: ModelAccess, stack: Sequence[LoraRequest]) -> dict[int, str]:
        """Returns the reasons for the LoRAs of `stack` that `fitting` leaves out, by place. Changes nothing."""
        reports = self._fit(access, stack)[1]
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
        leaving = dict.fromkeys((*self.attached.values(), *attachments_of(self._state.unfinished)))
        self._short_ways.take_all(leaving)
        self._state = State({}, {}, unfinished=Transaction(strays(leaving)) if leaving else None)
        with self.watch(Phase.RESTORE, 0) if merges_in(leaving) else contextlib.nullcontext():
            self._undo()
        for attachment in attachments_of(self._state.unfinished):
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

    def _fit(self, access: ModelAccess, stack: Sequence[LoraRequest]) -> tuple[Fitting, list[LoraReport]]:
        # Several LoRAs ask for the same parameters.
        return fit_stack(stack, functools.cache(lambda key: self._site(access, key)))

    def _site(self, access: ModelAccess, key: str) -> Site | None:
        """Returns the site as it is without LoRAs: a merge may have given the parameter another shape or dtype."""
        site, old = access.site(key), self.attached.get(key)
        return site._replace(storage=old.site.storage) if site is not None and is_merged(old, site) else site

    def _plan(
        self,
        accepted: Fitting,
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

    def _prepare(
        self, access: ModelAccess, plan: Plan, device: torch.device, in_files: Mapping[str, Backup]
    ) -> tuple[dict[str, Attachment], Exchanges]:
        """Returns the attachments of the new stack, and the strengths that those of the old one among them are to get."""
        target: dict[str, Attachment] = {}
        exchanges, may_exchange = Exchanges(), os.environ.get(SWITCH) != "0"
        for key, planned in plan.items():
            old = self.attached.get(key)
            if old is not None and (
                old.carries_out(planned)
                or (may_exchange and old.differs_in_strengths(access, planned) and exchanges.take(old, planned))
            ):
                target[key] = old
            else:
                target[key] = self._attachment(access, planned, device, old, in_files)
        return target, exchanges

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
        return MergeAttachment(access, planned, device, self._backups.of(planned.site, old, in_files))

    @outside_inference
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
        leaving, coming = difference(before.attached, target)
        change = Transaction([*leaving, *coming], also)
        # From here on an undo finds in the state whatever may be on the model, and so do other engines.
        self._state = before._replace(unfinished=change)
        try:
            if coming and self._neighbours is not None:
                self._refuse_shared(self._neighbours, coming)
            has_merges = any(old.mode is Mode.MERGE for old, _ in leaving)
            merges = merges_in([new for _, new in coming])
            taken_off = merges_in(going(leaving, coming))
            self._backups.expect(taken_off)
            together = self._together = MergingTogether(taken_off, merges)
            together.open()
            with self.watch(Phase.RESTORE, 0) if has_merges else contextlib.nullcontext():
                change.do(0, len(leaving))
            with self.watch(Phase.MERGE, ram_for_merges(merges)) if merges else contextlib.nullcontext():
                change.do(len(leaving), len(change.pairs))
            change.do_also()
            together.finish()
            self._state = State(target, {}, report=before.report if report is None else report)
        except BaseException:
            self._settle()
            raise

    def _refuse_shared(self, neighbours: Neighbours, coming: Sequence[Coming]) -> None:
        keys = {place_of(new): new.site.key for old, new in coming if old is None or not new.is_beside(old)}
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
        if self._together is not None:
            # What is undone counts as undone when it is: each merge waits for its own answers.
            self._together.close()
        unfinished = self._state.unfinished
        if unfinished is None:
            return None
        rest, error = unfinished.undo()
        self._state = self._state._replace(unfinished=rest)
        return error
