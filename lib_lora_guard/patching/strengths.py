"""Other strengths for the LoRAs that lie on a model, between two steps of an image: what a whole `Engine.change` to the
same stack gives, for a tenth of its time. Nothing is read, checked, planned or moved again; only what depends on a strength
is made anew."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch

from ..adapters import Term
from .attachments import Attachment, BypassAttachment, MergeAttachment, OnTheFlyAttachment
from .engine import Engine
from .forward_program import Program
from .low_rank import JoinedLowRank, ScaleVectors
from .norms import ratio_identity
from .transaction import Transaction

Terms = tuple[Term, ...]


def set_strengths(engine: Engine, strengths: Mapping[int, float]) -> None:
    """Gives the LoRAs of the stack (by place) these strengths; the others keep theirs.

    On an exception the model has the strengths it had.
    """
    engine.finish_undoing()
    exchanges, target, vectors = _Exchanges(), dict(engine.attached), ScaleVectors()
    device: torch.device | None = None
    for key, attachment in engine.attached.items():
        terms = tuple([_at(term, strengths) for term in attachment.terms])
        if all(map(operator.is_, terms, attachment.terms)):
            continue
        if isinstance(attachment, OnTheFlyAttachment):
            exchanges.on_the_fly.append((attachment, terms))
        elif isinstance(attachment, BypassAttachment) and (joined := attachment.hook.low_rank) is not None:
            scales = joined.scales_at([term.strength for term in terms])
            exchanges.low_rank.append((attachment, terms, joined, scales))
        elif isinstance(attachment, BypassAttachment) and ratio_identity(terms) == ratio_identity(attachment.terms):
            exchanges.programs.append((attachment, terms, attachment.hook.at_strengths(terms)))
        else:
            # Asked for once: it looks at every parameter of the model.
            device = attachment.access.device() if device is None else device
            target[key] = _anew(attachment, terms, device)
    with Transaction() as transaction:
        transaction.do(lambda: exchanges.make(vectors), lambda: exchanges.undo(vectors))
        if device is not None:
            engine.commit(target)


class _Exchanges:
    """What is exchanged inside attachments that stay: new strengths in, and the old ones kept for an undo."""

    def __init__(self) -> None:
        self.low_rank: list[tuple[BypassAttachment, Terms, JoinedLowRank, tuple[float, ...]]] = []
        self.programs: list[tuple[BypassAttachment, Terms, Program]] = []
        self.on_the_fly: list[tuple[OnTheFlyAttachment, Terms]] = []
        self._undo: list[tuple[Attachment, Terms, Any]] = []

    def make(self, vectors: ScaleVectors) -> None:
        for low_rank, terms, joined, scales in self.low_rank:
            self._undo.append((low_rank, low_rank.terms, joined.exchange(scales, vectors)))
            low_rank.terms = terms
        for bypass, terms, program in self.programs:
            self._undo.append((bypass, bypass.terms, bypass.hook.exchange(program)))
            bypass.terms = terms
        for on_the_fly, terms in self.on_the_fly:
            self._undo.append((on_the_fly, on_the_fly.terms, None))
            on_the_fly.weight_terms.exchange(terms)
            on_the_fly.terms = terms

    def undo(self, vectors: ScaleVectors) -> None:
        while self._undo:
            attachment, terms, before = self._undo.pop()
            attachment.terms = terms
            if isinstance(attachment, OnTheFlyAttachment):
                attachment.weight_terms.exchange(terms)
            elif isinstance(attachment, BypassAttachment) and isinstance(before, Program):
                attachment.hook.exchange(before)
            elif isinstance(attachment, BypassAttachment) and (joined := attachment.hook.low_rank) is not None:
                joined.exchange(before, vectors)


def _at(term: Term, strengths: Mapping[int, float]) -> Term:
    strength = strengths.get(term.origin, term.strength)
    if strength == term.strength:
        return term
    # dataclasses.replace would take a quarter of the time of the whole change.
    return Term(term.adapter, strength, term.strength_model, term.part, term.function, term.origin)


def _anew(attachment: Attachment, terms: tuple[Term, ...], device: torch.device) -> Attachment:
    """Merges are computed from their backups; a DoRA after another LoRA has norms that depend on that one's strength."""
    access, site, choice = attachment.access, attachment.site, attachment.choice
    if isinstance(attachment, MergeAttachment):
        return MergeAttachment(access, site, terms, choice, device, attachment.backup)
    return BypassAttachment(access, site, terms, choice, device, attachment)
