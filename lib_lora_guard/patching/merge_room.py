"""What merges would take in RAM, known before the first one: where that is more than there is, the rest goes through the
layers' calls instead, whose factors are a hundredth of the size. The disk is for what can only be merged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

from ..adapters import Term
from ..errors import ModeError
from ..memory.probe import BackupBudget
from ..messages import say
from ..planning.mode import Choice, Mode, WeightFacts, Wish, choose_mode
from ..planning.tokens import sees_one_token
from ..weights.storage import MB
from .access import Site
from .attachments import Attachment, MergeAttachment
from .backup import lies_in_ram, parameter_bytes

log = logging.getLogger(__name__)

Plan: TypeAlias = dict[str, tuple[Site, tuple[Term, ...], Choice]]

LEAST_BYTES = 32 * MB
"""Merges of less than this (norms and biases, mostly) are not worth a look at the memory, which takes milliseconds."""


def facts_of(site: Site) -> WeightFacts:
    """What the choice of a mode may look at."""
    return WeightFacts(
        site.key,
        site.shape,
        site.storage.format,
        site.storage.wide,
        site.can_bypass,
        site.can_on_the_fly,
        sees_one_token(site.key),
    )


def with_room(
    planned: Plan,
    attached: Mapping[str, Attachment],
    offloaded: Mapping[str, torch.Tensor],
    budget: Callable[[], BackupBudget],
    device: torch.device,
    model: str,
) -> Plan:
    """`planned` with as many merges as there is room for. A weight on a device needs room for its backup, one in RAM for its
    merged value; one that is merged already, or that the host has a copy of, needs none. `budget` is asked only where it
    matters; `device` is where the model computes."""
    needs = {
        key: parameter_bytes(site.parameter)
        for key, (site, _, choice) in planned.items()
        if choice.mode is Mode.MERGE and not _is_merged(attached.get(key), site) and not _has_copy(site, offloaded)
    }
    total = sum(needs.values())
    if total < LEAST_BYTES:
        return planned
    spare = budget()
    vram, ram = spare.vram_spare_bytes, spare.ram_spare_bytes
    if total <= ram:
        return planned
    others = {key: choice for key in needs if (choice := _other_choice(*planned[key][:2], device)) is not None}
    # What can only be merged comes first, then the others in the model's order.
    result, left = dict(planned), 0
    for key in sorted(needs, key=lambda key: key in others):
        site, terms, _ = planned[key]
        fits = needs[key] <= ram or (needs[key] <= vram and not lies_in_ram(site.parameter))
        if fits or key not in others:
            # Wherever it goes, it counts against both, as in the engine's own budget.
            vram, ram = vram - needs[key], ram - needs[key]
        else:
            result[key] = (site, terms, others[key])
            left += 1
    if left:
        say(
            log,
            logging.WARNING,
            "preflight.not_merged",
            model=model,
            count=left,
            of=len(needs),
            need_mb=total / MB,
            free_mb=spare.ram_spare_bytes / MB,
        )
    return result


def _is_merged(old: Attachment | None, site: Site) -> bool:
    return isinstance(old, MergeAttachment) and old.site.layer is site.layer


def _has_copy(site: Site, offloaded: Mapping[str, torch.Tensor]) -> bool:
    return site.key in offloaded and not lies_in_ram(site.parameter)


def _other_choice(site: Site, terms: tuple[Term, ...], device: torch.device) -> Choice | None:
    """Another mode than merging; None where there is none. On the fly only where it costs no VRAM: nobody has reserved it."""
    try:
        choice = choose_mode(facts_of(site), terms, Wish.NEVER_MERGE)
    except ModeError:
        return None
    carries = choice.mode is Mode.BYPASS or (choice.mode is Mode.ON_THE_FLY and device.type == "cpu")
    return choice if carries else None
