"""Makes room on a device before the host loads models, and moves no more than is missing.

`planning.eviction` decides which models leave and how much of them, `planning.on_card` how much of a placed model stays.
Here these decisions are carried out on the host's models.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..memory import rules
from ..memory.out_of_memory import is_out_of_memory
from ..messages import Message, say
from ..planning.eviction import Coming, Eviction, Resident, plan_eviction
from ..planning.job_cost import Choice, Neighbour, State
from ..planning.on_card import LEAST_SWAPPING_SHARE, change_bytes
from ..weights.storage import MB
from .host import DeviceMemory, HostModel, PlacedModel, Swapped
from .job_costs import JobCosts
from .needs import Needs, names_of
from .preflight import Preflight
from .rule_log import RuleLog
from .told_sizes import ToldSizes

log = logging.getLogger(__name__)

DECODE_PASSES = 1
"""Of a VAE: its pictures are what follows the denoiser's calls."""
STAYS = Resident(0, 0, False)
"""Stands for a model of which nothing is wanted: its layers are not looked at."""


class _Part(NamedTuple):
    """One model of a load, as it lies before anything moves: its layers, of which there may be a thousand, are looked at once."""

    model: torch.nn.Module
    outside_bytes: int
    """What can come."""
    fixed_bytes: int
    """The part of it that cannot be swapped."""
    by_host_bytes: int
    """The part of it that the host is about to place."""
    swapped: Swapped
    """Of a placed one."""

    @property
    def stays_bytes(self) -> int:
        """Bytes that run swapped in any case."""
        return self.swapped.all_bytes - self.swapped.away_bytes


class Room:
    """Evicts models from a device, and shrinks and grows those that stay."""

    def __init__(self, memory: DeviceMemory, ram: Preflight, rule_log: RuleLog, costs: JobCosts | None = None) -> None:
        """
        Args:
            memory: the host's.
            ram: says how much may be moved into RAM.
            rule_log: gets what the rules find.
            costs: chooses what lies on the card while the denoiser runs; without it the denoiser takes all room.
        """
        self._memory, self._ram, self._rule_log, self._costs = memory, ram, rule_log, costs
        self._shares: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
        """Bytes of each model on the device after its last load."""
        self._needs: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
        """Bytes that each model of many calls last had to have free beside it."""
        self._told = ToldSizes()

    def prepare(self, models: Sequence[HostModel], device: torch.device, needs: Needs) -> None:
        """Makes room for `models`, of which some may be placed already, and brings back what had to leave before."""
        parts = [self._part(one, device) for one in models]
        outside = sum(part.outside_bytes for part in parts)
        if self._memory.passes(models) is None:
            self._needs.update({one.model: needs.free_bytes for one in models})
        fixed = min(outside, sum(part.fixed_bytes for part in parts))
        coming = Coming(outside, outside - fixed, self._memory.passes(models))
        choice = self._choose(models, parts, device, coming, needs) if coming.passes is None else None
        if choice is not None:
            by_host = sum(part.by_host_bytes for part in parts)
            for one in models:
                placed = self._memory.placed(one)
                if placed is not None:
                    is_for = placed.is_for(one)
                    self._fit(placed, device, needs.free_bytes, fixed, is_for, choice.grows, coming_bytes=by_host)
            return
        self._note(coming, models, needs)
        copies = self._copies_bytes(parts, device, needs) if coming.passes is None else 0
        plan = self.make_room(device, coming, needs.free_bytes + copies, models)
        if plan.swapped_bytes and coming.passes is not None:
            level = self._told.level(models[0].model, "memory.swapped", plan.swapped_bytes)
            size_mb = plan.swapped_bytes / MB
            say(log, level, "memory.swapped", model=names_of(models), size_mb=size_mb, passes=coming.passes)
        for one in models:
            placed = self._memory.placed(one)
            if placed is not None:
                may_grow = not self.stays_out(models, device, needs)
                self._fit(placed, device, needs.free_bytes, fixed, placed.is_for(one), may_grow)

    def stays_out(self, models: Sequence[HostModel], device: torch.device, needs: Needs) -> bool:
        """True for a model of few passes that had better run from RAM: the denoiser lacks the room that it would take, so that
        it would come and leave again."""
        passes = self._memory.passes(models)
        if self._costs is None or passes is None or passes == DECODE_PASSES:
            return False
        others = [one for one in self._memory.placed_on(device, but=models) if one.returns()]
        lacking = sum(one.swapped().all_bytes for one in others)
        if not lacking:
            return False
        need = max([needs.free_bytes, *(self._needs.get(one.module, 0) for one in others)])
        room = self._memory.free_bytes(device) - need - sum(self._part(one, device).outside_bytes for one in models)
        return lacking > max(0, room) and self._costs.runs_from_ram(passes, device)

    def make_room(
        self, device: torch.device, coming: Coming, need_bytes: int, staying: Sequence[HostModel]
    ) -> Eviction:
        """Carries out `plan_eviction`.

        Args:
            device: where room is missing.
            coming: what will be placed.
            need_bytes: has to be free beside it.
            staying: these models, and other stacks on their modules, may not leave.
        """
        free = self._memory.free_bytes(device)
        is_short = coming.outside_bytes + need_bytes > free
        if is_short:
            self._memory.take_back(device)
        leaving = self._memory.placed_on(device, but=staying)
        residents = [self._resident(one, device) if is_short else STAYS for one in leaving]
        plan = plan_eviction(coming, need_bytes, free, residents)
        self._send(leaving, residents, plan.leaving_bytes)
        return plan

    def _note(self, coming: Coming, models: Sequence[HostModel], needs: Needs) -> None:
        """Remembers what one image tells about the next."""
        if self._costs is None or coming.passes is None:
            return
        if coming.passes == DECODE_PASSES:
            self._costs.note_decode(needs.free_bytes + sum(self._memory.size_bytes(one.model) for one in models))
        else:
            self._costs.note_prompt()

    def _choose(
        self, models: Sequence[HostModel], parts: Sequence[_Part], device: torch.device, coming: Coming, needs: Needs
    ) -> Choice | None:
        """Chooses by the seconds of the whole job which neighbours leave for the denoiser, and lets them leave. Models that run
        in its calls come with it.

        Returns:
            The choice; None where the usual way is right: no denoiser, all on the card, or switched off.
        """
        outside = coming.outside_bytes
        if self._costs is None or outside <= 0 or self._memory.passes(models[:1]) is not None:
            return None
        model = models[0].model
        free = self._memory.free_bytes(device)
        if outside + needs.free_bytes > free:
            self._memory.take_back(device)
        neighbours = self._memory.placed_on(device, but=models)
        residents = [self._resident(one, device) for one in neighbours]
        placed = self._memory.placed(models[0])
        state = State(
            outside,
            self._memory.size_bytes(model, on=device),
            0 if placed is None else placed.copied_bytes(),
            free,
            needs.free_bytes,
            self._memory.swapping_bytes(model),
            [
                Neighbour(one.on_device_bytes, one.swappable_bytes, neighbour.copied_bytes())
                for one, neighbour in zip(residents, neighbours, strict=True)
            ],
            sum(part.by_host_bytes for part in parts),
            outside - coming.swappable_bytes,
            sum(part.stays_bytes for part in parts),
            parts[0].swapped.pinned_bytes,
        )
        choice = self._costs.choose(names_of(models), device, state)
        if choice is not None:
            self._send(neighbours, residents, choice.leaving_bytes)
        return choice

    def _send(self, leaving: Sequence[PlacedModel], residents: Sequence[Resident], wanted_bytes: Sequence[int]) -> None:
        has_moved = False
        for one, resident, wanted in zip(leaving, residents, wanted_bytes, strict=True):
            if wanted:
                has_moved |= self._send_away(one, resident, wanted)
        if has_moved:
            self._memory.empty_cache()
        self._memory.drop_abandoned()

    def note_unloaded(self) -> None:
        """Called when the host unloads all models."""
        if self._costs is not None:
            self._costs.note_unloaded()

    def moving(self) -> contextlib.AbstractContextManager[None]:
        """Wraps a load: after a crash in one, caches in RAM are given back first."""
        return self._ram.careful("moving")

    def give_back_unused(self, device: torch.device, need_bytes: int) -> None:
        """Empties torch's cache after a load if it holds more unused VRAM than a step takes of it. Baking GGUF weights leaves
        gigabytes of old pieces; on Windows they push other programs, or the step itself, into RAM."""
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if unused > need_bytes:
            log.debug("%d bytes of the card are held and not used after a load", unused)
            self._memory.empty_cache()

    def watch_share(self, models: Sequence[HostModel], device: torch.device) -> None:
        """Records how many bytes of each model are on the device after a load. Logs rule LG-R09 if they shrank since the last
        load although no room was needed."""
        for one in models:
            now = self._memory.size_bytes(one.model, on=device)
            before = self._shares.get(one.model)
            if before is not None:
                name = type(one.model).__name__
                self._rule_log.tell(rules.share_on_device(before, now, was_needed=False, model=name), one.model)
            self._shares[one.model] = now

    def forget_share(self, model: torch.nn.Module | None) -> None:
        """Called when a share shrinks for a reason: the room was needed."""
        if model is not None:
            self._shares.pop(model, None)

    def _part(self, model: HostModel, device: torch.device) -> _Part:
        placed = self._memory.placed(model)
        if placed is not None and placed.is_for(model):
            # The host does not place it again: only what `shrink` took can come back.
            swapped = placed.swapped()
            return _Part(placed.module, swapped.away_bytes, 0, 0, swapped)
        outside = self._memory.size_bytes(model.model, outside=device)
        fixed = self._memory.fixed_bytes(model.model, device) if outside else 0
        return _Part(model.model, outside, fixed, outside if placed is None else 0, Swapped())

    def _copies_bytes(self, parts: Sequence[_Part], device: torch.device, needs: Needs) -> int:
        """Returns the room to make for copies of layers that run swapped in any case, or a part of the model had to leave for
        them while others stay; 0 while enough of it is free."""
        swapping = [self._memory.swapping_bytes(part.model) for part in parts if part.stays_bytes]
        if not swapping:
            return 0
        kept, room = max(swapping), self._memory.free_bytes(device) - needs.free_bytes
        return kept if room < kept * LEAST_SWAPPING_SHARE else 0

    def _fit(
        self,
        placed: PlacedModel,
        device: torch.device,
        need_bytes: int,
        fixed_bytes: int,
        may_leave: bool,
        may_grow: bool = True,
        coming_bytes: int = 0,
    ) -> None:
        """Changes how much of a placed model is on the device. It was placed for a smaller picture or fewer LoRAs and no other
        model can make room; or it had to shrink, and there is room again that no other model is coming for. The `fixed_bytes`
        of models of the same load are still to come."""
        outside, away, _ = placed.swapped()
        free = self._memory.free_bytes(device) - need_bytes
        if not outside and free >= fixed_bytes:
            # All of it is there, and nothing is short.
            return
        on_card = self._memory.size_bytes(placed.module, on=device)
        swapping = self._memory.swapping_bytes(placed.module)
        change = change_bytes(on_card, outside, away, free - fixed_bytes, swapping)
        if change < 0 and may_leave:
            self._shrink(placed, min(-change, placed.swappable_bytes()))
        elif may_grow:
            room = max(0, free - max(coming_bytes, fixed_bytes))
            placed.grow(change_bytes(on_card, outside, away, room, swapping))

    def _resident(self, placed: PlacedModel, device: torch.device) -> Resident:
        on_device = self._memory.size_bytes(placed.module, on=device)
        return Resident(on_device, min(on_device, placed.swappable_bytes()), placed.returns())

    def _send_away(self, placed: PlacedModel, resident: Resident, wanted_bytes: int) -> bool:
        """Returns True if something may have left."""
        if wanted_bytes < resident.on_device_bytes:
            return self._shrink(placed, wanted_bytes)
        name = type(placed.module).__name__
        with self._ram.leaving(placed.module, wanted_bytes) as may_leave:
            if may_leave < resident.on_device_bytes:
                return self._shrink(placed, min(may_leave, resident.swappable_bytes))
            if not self._fits_in_ram(name, wanted_bytes):
                return False
            self.forget_share(placed.module)
            try:
                # Layer by layer first: if RAM runs out on the way, the model can still run.
                placed.shrink(wanted_bytes)
                placed.unload()
                level = self._told.level(placed.module, "memory.left", resident.on_device_bytes)
                say(log, level, "memory.left", model=name, size_mb=resident.on_device_bytes / MB)
            except Exception as error:
                _log_or_raise(error, name)
            return True

    def _shrink(self, placed: PlacedModel, wanted_bytes: int) -> bool:
        """Returns True if something may have left."""
        name = type(placed.module).__name__
        if not self._fits_in_ram(name, wanted_bytes):
            return False
        self.forget_share(placed.module)
        try:
            moved = placed.shrink(wanted_bytes)
        except Exception as error:
            _log_or_raise(error, name)
            return True
        if moved:
            level = self._told.level(placed.module, "memory.shrunk", moved)
            say(log, level, "memory.shrunk", model=name, size_mb=moved / MB)
        return moved > 0

    def _fits_in_ram(self, name: str, size_bytes: int) -> bool:
        """False if the page file has no room for what would be moved: the system would end the process for that."""
        room = self._ram.room_bytes()
        if room is None or size_bytes <= room:
            return True
        error = Message("memory.ram_room", {"room_mb": room / MB, "size_mb": size_bytes / MB})
        say(log, logging.WARNING, "memory.not_moved", model=name, error=error)
        return False


def _log_or_raise(error: Exception, name: str) -> None:
    """Logs that a model stays for lack of RAM; raises every other error."""
    if not is_out_of_memory(error):
        raise error
    # Python's own MemoryError has no text.
    why = (str(error) or type(error).__name__).splitlines()[0]
    say(log, logging.WARNING, "memory.not_moved", model=name, error=why)
