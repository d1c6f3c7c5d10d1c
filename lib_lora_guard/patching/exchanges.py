"""Other strengths for attachments that stay on their weights: nothing is made, moved or hooked anew.

It is carried out as one step of a change, and undone as a whole. Merges are not for it, nor norms that depend on a
strength: those attachments are made anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters import Term
from .attachment import Attachment
from .forward_program import Program
from .hook_attachments import BypassAttachment, OnTheFlyAttachment
from .low_rank import JoinedLowRank, ScaleVectors, Scaling
from .plan import PlannedWeight
from .transaction import Step


class Exchanges:
    """The exchanges of one change, with the old strengths beside the new ones."""

    def __init__(self) -> None:
        self._low_rank: list[tuple[JoinedLowRank, Scaling, tuple[float, ...]]] = []
        self._programs: list[tuple[BypassAttachment, Program, Program]] = []
        self._on_the_fly: list[tuple[OnTheFlyAttachment, Sequence[Term], Sequence[Term]]] = []

    def take(self, attachment: Attachment, new: PlannedWeight) -> bool:
        """Notes an attachment that is to have the strengths of `new`. Nothing is changed yet.

        Args:
            attachment: It is on the model.
            new: Differs from its plan in strengths alone.

        Returns:
            False if the attachment has to be made anew.
        """
        terms = new.terms
        if isinstance(attachment, OnTheFlyAttachment):
            self._on_the_fly.append((attachment, attachment.weight_terms.terms, terms))
            return True
        if not isinstance(attachment, BypassAttachment):
            return False
        hook = attachment.hook
        if (joined := hook.low_rank) is not None:
            self._low_rank.append((joined, joined.scaling, joined.scales_at([term.strength for term in terms])))
            return True
        if attachment.has_ratios_of(new):
            self._programs.append((attachment, hook.program, hook.at_strengths(terms)))
            return True
        return False

    @property
    def step(self) -> Step:
        """The step that makes all of them."""
        return Step(self._make, self._undo)

    def _make(self) -> None:
        vectors = ScaleVectors()
        for joined, _, scales in self._low_rank:
            joined.exchange(Scaling(scales, vectors))
        for bypass, _, program in self._programs:
            bypass.hook.exchange(program)
        for on_the_fly, _, terms in self._on_the_fly:
            on_the_fly.weight_terms.exchange(terms)

    def _undo(self) -> None:
        for joined, scaling, _ in self._low_rank:
            joined.exchange(scaling)
        for bypass, program, _ in self._programs:
            bypass.hook.exchange(program)
        for on_the_fly, terms, _ in self._on_the_fly:
            on_the_fly.weight_terms.exchange(terms)
