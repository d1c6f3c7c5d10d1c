"""Changes the strengths of the LoRAs on a model between two steps of an image.

The result is that of an `Engine.change` to the same stack, in a tenth of the time: nothing is read, checked, planned or
moved again.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch

from ..adapters import Term
from .attachment import Attachment
from .change_pairs import replan
from .engine import Engine
from .exchanges import Exchanges
from .hook_attachments import BypassAttachment
from .merge_attachment import MergeAttachment
from .plan import PlannedWeight


def set_strengths(engine: Engine, strengths: Mapping[int, float]) -> None:
    """Gives LoRAs of the stack other strengths. On an exception the model has the strengths it had.

    Args:
        engine: The engine of the model.
        strengths: The new strength by place in the stack. LoRAs that are not named keep theirs.
    """
    engine.exclusively(lambda: _set_strengths(engine, strengths))


def _set_strengths(engine: Engine, strengths: Mapping[int, float]) -> None:
    engine.finish_undoing()
    exchanges, anew = Exchanges(), dict[str, Attachment]()
    moved: list[tuple[Attachment, PlannedWeight, PlannedWeight]] = []
    device: torch.device | None = None
    for key, attachment in engine.attached.items():
        old = attachment.planned
        terms = tuple([_at(term, strengths) for term in old.terms])
        if all(map(operator.is_, terms, old.terms)):
            continue
        new = old.with_terms(terms)
        if exchanges.take(attachment, new):
            moved.append((attachment, old, new))
        else:
            # Called once: it looks at every parameter of the model.
            device = attachment.access.device() if device is None else device
            anew[key] = _anew(attachment, new, device)
    target = {**engine.attached, **anew} if anew else engine.attached
    engine.commit(target, [exchanges.step, replan(moved)])


def _at(term: Term, strengths: Mapping[int, float]) -> Term:
    strength = strengths.get(term.origin, term.strength)
    if strength == term.strength:
        return term
    # dataclasses.replace would take a quarter of the time of the whole change.
    return Term(term.adapter, strength, term.strength_model, term.part, term.function, term.origin)


def _anew(attachment: Attachment, new: PlannedWeight, device: torch.device) -> Attachment:
    """Returns a new attachment for other strengths.

    A merge is computed from its backup. A DoRA after another LoRA has norms that depend on that LoRA's strength.
    """
    if isinstance(attachment, MergeAttachment):
        return MergeAttachment(attachment.access, new, device, attachment.backup)
    return BypassAttachment(attachment.access, new, device, attachment)
