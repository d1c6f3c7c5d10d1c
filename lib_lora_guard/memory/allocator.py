"""Applies the user's allocator options to the running torch and verifies them by reading them back.

An option that torch does not report back is never called active. Expandable segments are tested with an allocation: if
the driver refuses, they are switched off before the next image needs memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol

import torch

from ..messages import Message, say
from .allocator_machine import Machine, availability, look
from .allocator_text import (
    COLLECT,
    CUDA_VARIABLE,
    EXPANDABLE,
    LEAST_SPLIT_MB,
    OPTIONS,
    SPLIT,
    AllocatorTextError,
    AllocatorWish,
    compose,
    for_now,
    parse,
    same_effect,
    start_line,
    variable_in_force,
)
from .allocator_torch import TorchAllocator
from .out_of_memory import OutOfMemory

log = logging.getLogger(__name__)


class Standing(str, Enum):
    """Whether an allocator option is in effect."""

    ACTIVE = "active"
    NEXT_START = "next start"
    NOT_AVAILABLE = "not available"
    OFF = "off"


@dataclass(frozen=True)
class OptionState:
    """The standing of one option and the reason, for the user."""

    standing: Standing
    reason: Message


@dataclass(frozen=True)
class AllocatorState:
    """The allocator options after `apply`."""

    wish: AllocatorWish
    text: str
    """The whole string that torch uses; "" if it has none or does not report it."""
    expandable_segments: OptionState
    max_split_size_mb: OptionState
    garbage_collection_threshold: OptionState
    notes: tuple[Message, ...] = ()
    """Remarks that belong to no single option."""
    uncapped: float | None = None
    """This process's share of the card (0 to 1) before `apply` capped it so that torch collects garbage; None if it did
    not.
    """

    def options(self) -> dict[str, OptionState]:
        """Returns the state of each option by its name in torch."""
        return {name: getattr(self, name) for name in OPTIONS}


class Allocator(Protocol):
    """The functions of torch that `apply` needs. TorchAllocator implements them; tests use others."""

    def write(self, text: str) -> None: ...
    def read(self) -> Mapping[str, Any]: ...
    def takes_expandable(self, device: torch.device) -> bool | None: ...
    def cap_near_whole_card(self, device: torch.device) -> float | None: ...
    def lift_cap(self, fraction: float, device: torch.device) -> None: ...


def apply(
    wish: AllocatorWish,
    environment: Mapping[str, str],
    device: torch.device,
    before: AllocatorState | None = None,
    *,
    machine: Machine | None = None,
    allocator: Allocator | None = None,
) -> AllocatorState:
    """Applies `wish`, on top of the environment's options, to the running torch.

    Releases cached memory if anything changes.

    Args:
        wish: The user's options.
        environment: The environment variables, as in `os.environ`.
        device: The device that the models run on.
        before: The state that the last call returned. While it still holds, nothing is done and it is returned.
        machine: The facts about this process; None reads them.
        allocator: The access to torch; None uses the running torch.
    """
    machine = machine or look(device)
    unavailable = {name: why for name, why in availability(machine).items() if why is not None}
    if len(unavailable) == len(OPTIONS):
        return _state(wish, "", {name: OptionState(Standing.NOT_AVAILABLE, why) for name, why in unavailable.items()})
    variable = variable_in_force(environment, machine.torch_version, machine.rocm)
    try:
        base = parse(environment[variable]) if variable else {}
    except AllocatorTextError as error:
        why = Message("allocator.bad_environment", {"variable": variable, "why": error.message})
        return _state(wish, "", dict.fromkeys(OPTIONS, OptionState(Standing.NOT_AVAILABLE, why)))
    setup = _Setup(wish, base, variable or CUDA_VARIABLE, machine)
    if not machine.can_set:
        return setup.from_next_start(unavailable)
    allocator = allocator or TorchAllocator()
    if before is not None and before.wish == wish and allocator.read().get(CUDA_VARIABLE, "") == before.text:
        return before
    if before is None and not wish.entries():
        # The user never set an option, so the present settings belong to the environment or to other code.
        wanted, refused = setup.plan(unavailable)
        return setup.state_from(wanted, refused, allocator.read())
    state = _write_and_verify(setup, unavailable, allocator, device, touched=before is not None)
    return _with_cap(state, before, allocator, device)


def _with_cap(
    state: AllocatorState, before: AllocatorState | None, allocator: Allocator, device: torch.device
) -> AllocatorState:
    """Caps this process's memory while garbage collection is active (torch needs the cap) and lifts the cap afterwards."""
    uncapped = None if before is None else before.uncapped
    option = state.garbage_collection_threshold
    if COLLECT in state.wish.entries() and option.standing is Standing.ACTIVE:
        uncapped = allocator.cap_near_whole_card(device) if uncapped is None else uncapped
    elif uncapped is not None:
        allocator.lift_cap(uncapped, device)
        uncapped = None
    return replace(state, uncapped=uncapped)


def _write_and_verify(
    setup: _Setup, unavailable: Mapping[str, Message], allocator: Allocator, device: torch.device, touched: bool
) -> AllocatorState:
    """Writes the options and verifies them.

    `touched`: an earlier call may have written options. It matters only if torch does not report its settings.
    """
    wanted, refused = setup.plan(unavailable)
    wished = setup.wish.entries()
    text = for_now(wanted)
    settings = allocator.read()
    held = settings.get(CUDA_VARIABLE, "")
    notes: tuple[Message, ...] = ()
    other = any(_disagrees(name, wanted, settings) for name in OPTIONS if name in wished or name not in wanted)
    unknown = CUDA_VARIABLE not in settings and (touched or bool(wished))
    if unknown or other or not same_effect(held, text):
        try:
            allocator.write(text)
        except (RuntimeError, ValueError) as error:
            why = Message("allocator.refused", {"text": text, "error": _one_line(error)})
            return setup.state_from(
                setup.base, {**dict.fromkeys(wished, why), **refused}, _restore(allocator, held), (why,)
            )
        settings = allocator.read()
        notes = (Message("allocator.new_memory"),)
    proof: Message | None = None
    if EXPANDABLE in wished and EXPANDABLE not in refused:
        proof, failure = _prove(settings, allocator, device)
        if failure is not None:
            without = {name: value for name, value in setup.base.items() if name != EXPANDABLE}
            return _write_and_verify(
                replace(setup, base=without), {**unavailable, EXPANDABLE: failure}, allocator, device, True
            )
    return setup.state_from(wanted, refused, settings, notes, proof)


def _restore(allocator: Allocator, held: str) -> Mapping[str, Any]:
    """Writes the previous string again and returns the settings. Falls back to "": the failed string may have switched
    on expandable segments.
    """
    for text in (held, ""):
        try:
            allocator.write(for_now(parse(text)))
            break
        except (AllocatorTextError, RuntimeError, ValueError) as error:
            say(log, logging.WARNING, "allocator.not_restored", text=text, error=_one_line(error))
    return allocator.read()


def _prove(
    settings: Mapping[str, Any], allocator: Allocator, device: torch.device
) -> tuple[Message | None, Message | None]:
    """Returns `(proof, None)` if expandable segments may stay on, `(None, reason)` if they must be switched off again."""
    if settings.get(EXPANDABLE) is False:
        return None, _ignored(True, False)
    try:
        found = allocator.takes_expandable(device)
    except OutOfMemory:
        return Message("allocator.no_room"), None
    except RuntimeError as error:
        return None, Message("allocator.driver", {"error": _one_line(error)})
    if found is None:
        return Message("allocator.unproven"), None
    return (Message("allocator.proven"), None) if found else (None, Message("allocator.not_expandable"))


@dataclass(frozen=True)
class _Setup:
    """The user's options, the environment's options and the machine."""

    wish: AllocatorWish
    base: Mapping[str, str]
    variable: str
    machine: Machine

    def plan(self, unavailable: Mapping[str, Message]) -> tuple[dict[str, str], dict[str, Message]]:
        """Returns `(entries to write, reason for each refused option)`."""
        wished = self.wish.entries()
        refused = {name: why for name, why in unavailable.items() if name in wished or name not in self.base}
        if SPLIT in wished and self.wish.max_split_size_mb < LEAST_SPLIT_MB:
            refused.setdefault(SPLIT, Message("allocator.split_least", {"least": LEAST_SPLIT_MB}))
        if COLLECT in wished and not 0 < self.wish.garbage_collection_threshold < 1:
            refused.setdefault(COLLECT, Message("allocator.threshold_range"))
        base = dict(self.base)
        if EXPANDABLE not in unavailable and "True" in (wished.get(EXPANDABLE), base.get(EXPANDABLE)):
            # Torch splits expandable segments at any size and never collects them; before 2.5 the mixture could stop it
            # near the end of memory (pull request 134338).
            refused |= {name: Message("allocator.beside_expandable") for name in (SPLIT, COLLECT) if name in wished}
            if EXPANDABLE in wished:
                dropped = [name for name in (SPLIT, COLLECT) if base.pop(name, None) is not None]
                refused |= {name: Message("allocator.beside_expandable") for name in dropped}
        return {**base, **{name: value for name, value in wished.items() if name not in refused}}, refused

    def from_next_start(self, unavailable: Mapping[str, Message]) -> AllocatorState:
        """Returns the state for a torch that takes options only at its start."""
        wanted, refused = self.plan(unavailable)
        line = start_line(compose(wanted), self.machine.system == "Windows")
        states = {}
        for name in OPTIONS:
            if name in refused:
                states[name] = OptionState(Standing.NOT_AVAILABLE, refused[name])
            elif name not in wanted:
                states[name] = OptionState(Standing.OFF, Message("allocator.off"))
            elif self.base.get(name) == wanted[name]:
                states[name] = self._set_by_environment(name, wanted)
            else:
                states[name] = OptionState(Standing.NEXT_START, Message("allocator.next_start", {"line": line}))
        return _state(self.wish, compose(self.base), states)

    def state_from(
        self,
        wanted: Mapping[str, str],
        refused: Mapping[str, Message],
        settings: Mapping[str, Any],
        notes: tuple[Message, ...] = (),
        proof: Message | None = None,
    ) -> AllocatorState:
        """Returns the state that the `settings` read back from torch support."""
        states = {name: self._option_state(name, wanted, refused, settings, proof) for name in OPTIONS}
        return _state(self.wish, str(settings.get(CUDA_VARIABLE, "")), states, notes)

    def _option_state(
        self,
        name: str,
        wanted: Mapping[str, str],
        refused: Mapping[str, Message],
        settings: Mapping[str, Any],
        proof: Message | None,
    ) -> OptionState:
        if name in refused:
            return OptionState(Standing.NOT_AVAILABLE, refused[name])
        found, expected = _found(name, settings), _expected(name, wanted)
        if not expected and found:
            return OptionState(Standing.ACTIVE, Message("allocator.still_on", {"found": found}))
        if name not in wanted:
            return OptionState(Standing.OFF, Message("allocator.off"))
        if found is None and not (name == EXPANDABLE and proof == Message("allocator.proven")):
            line = start_line(compose(wanted), self.machine.system == "Windows")
            return OptionState(Standing.NEXT_START, Message("allocator.no_read_back", {"line": line}))
        if found is not None and found != expected:
            return OptionState(Standing.NOT_AVAILABLE, _ignored(expected, found))
        if name not in self.wish.entries():
            return self._set_by_environment(name, wanted)
        if name == EXPANDABLE and proof is not None:
            return OptionState(Standing.ACTIVE, proof)
        return OptionState(Standing.ACTIVE, Message(f"allocator.active_{name}", {"value": wanted[name]}))

    def _set_by_environment(self, name: str, wanted: Mapping[str, str]) -> OptionState:
        facts = {"variable": self.variable, "value": wanted[name]}
        standing = Standing.OFF if wanted[name] == "False" else Standing.ACTIVE
        return OptionState(standing, Message("allocator.by_environment", facts))


def _disagrees(name: str, entries: Mapping[str, str], settings: Mapping[str, Any]) -> bool:
    """True if torch reports another value. An option that torch does not report never disagrees."""
    return _found(name, settings) not in (None, _expected(name, entries))


def _ignored(wanted: bool | float, found: bool | float) -> Message:
    return Message("allocator.ignored", {"wanted": wanted, "found": found})


def _expected(name: str, entries: Mapping[str, str]) -> bool | float:
    """Returns the value that torch should report for an option; False or 0 for an option that is off."""
    if name == EXPANDABLE:
        return entries.get(name) == "True"
    if name == SPLIT:
        return int(entries.get(name, "0")) << 20
    return float(entries.get(name, "0"))


_UNLIMITED = 2.0**62
_REPORTED = {EXPANDABLE: EXPANDABLE, SPLIT: "max_split_size", COLLECT: COLLECT}


def _found(name: str, settings: Mapping[str, Any]) -> bool | float | None:
    """Returns the value that torch reports, in the units of `_expected`; None if it reports none. torch writes
    "unlimited" as -1 or as the largest number.
    """
    value = settings.get(_REPORTED[name])
    if value is None or isinstance(value, bool):
        return value
    number = float(value)
    return number if 0 < number < _UNLIMITED else 0


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _state(
    wish: AllocatorWish, text: str, states: Mapping[str, OptionState], notes: tuple[Message, ...] = ()
) -> AllocatorState:
    return AllocatorState(wish, text, states[EXPANDABLE], states[SPLIT], states[COLLECT], notes)
