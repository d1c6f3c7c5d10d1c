"""Estimates the RAM that merging needs before it starts. Weights that do not fit use bypass, whose factors are a hundredth
of their size; only weights that have no other mode than merging may spill to disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

import torch

from ..errors import ModeError
from ..memory.probe import BackupBudget
from ..messages import Message
from ..planning.mode import Choice, Mode, Wish, choose_mode
from ..units import MB
from .access import Site
from .attachment import Attachment
from .backup import Where, lies_in_ram, parameter_bytes
from .merge_attachment import is_merged
from .plan import Plan, PlannedWeight, facts_of

log = logging.getLogger(__name__)

LEAST_BYTES = 32 * MB
"""Smaller merges (norms and biases, mostly) start without a measurement of memory, which takes milliseconds."""


def with_room(
    plan: Plan,
    attached: Mapping[str, Attachment],
    backed_up: Collection[str],
    budget: Callable[[], BackupBudget],
    device: torch.device,
    model: str,
    otherwise: list[Message],
) -> Plan:
    """Returns `plan` with as many merges as there is room for.

    A weight on a device needs room for its backup, a weight in RAM for its merged value. A weight that is merged already,
    or that has a copy in `backed_up`, needs none.

    Args:
        plan: The weights of the next stack.
        attached: The attachments of the present stack, by name.
        backed_up: Weights that need no room for a backup: the host has left a copy of them in RAM, or their file has them.
        budget: Returns the spare memory; called only if the answer matters.
        device: The device the model computes on.
        model: The model's name, for the log.
        otherwise: Gets the sentence on what is not merged.
    """
    needs = {
        key: parameter_bytes(one.site.parameter)
        for key, one in plan.items()
        if one.mode is Mode.MERGE and not is_merged(attached.get(key), one.site) and not _has_copy(one.site, backed_up)
    }
    total = sum(needs.values())
    if total < LEAST_BYTES:
        return plan
    spare = budget()
    vram, ram = spare.vram_spare_bytes, spare.ram_spare_bytes
    if total <= ram:
        return plan
    others = {key: choice for key in needs if (choice := _other_choice(plan[key], device)) is not None}
    # Weights that can only be merged come first, then the others in the model's order.
    result, left = dict(plan), 0
    for key in sorted(needs, key=lambda key: key in others):
        one = plan[key]
        fits = needs[key] <= ram or (needs[key] <= vram and not lies_in_ram(one.site.parameter))
        if fits or key not in others:
            # Wherever it goes, it counts against both, as in `backup.Budget`.
            vram, ram = vram - needs[key], ram - needs[key]
        else:
            result[key] = PlannedWeight(one.site, one.terms, others[key])
            left += 1
    if left:
        room = {"need_mb": total / MB, "free_mb": spare.ram_spare_bytes / MB}
        otherwise.append(Message("preflight.not_merged", {"model": model, "count": left, "of": len(needs), **room}))
        log.warning("%s", otherwise[-1])
    return result


def only_from_files(plan: Plan, attached: Mapping[str, Attachment], in_files: Collection[str]) -> Plan:
    """Returns `plan`, in which every weight that could be merged is, with the choice of "auto" for those whose original would
    need a copy.

    It depends on the file and on which weights lie on the card: for users who ask for it, not for "auto" itself, which is to give the
    same picture on every card.

    Args:
        plan: The weights of the next stack.
        attached: The attachments of the present stack, by name.
        in_files: Weights whose file is proven to have them.
    """
    result = dict(plan)
    for key, one in plan.items():
        old = attached.get(key)
        has_file = is_merged(old, one.site) and old.backup.place.where is Where.FILE
        if one.mode is Mode.MERGE and key not in in_files and not has_file:
            choice = choose_mode(facts_of(one.site), one.terms, Wish.AUTO, one.forms)
            result[key] = PlannedWeight(one.site, one.terms, choice)
    return result


def _has_copy(site: Site, backed_up: Collection[str]) -> bool:
    return site.key in backed_up and not lies_in_ram(site.parameter)


def _other_choice(planned: PlannedWeight, device: torch.device) -> Choice | None:
    """Chooses another mode than merging; None if there is none.

    On the fly counts only on the CPU: on a device it takes VRAM, and none was reserved for it.
    """
    try:
        choice = choose_mode(facts_of(planned.site), planned.terms, Wish.NEVER_MERGE, planned.forms)
    except ModeError:
        return None
    carries = choice.mode is Mode.BYPASS or (choice.mode is Mode.ON_THE_FLY and device.type == "cpu")
    return choice if carries else None
