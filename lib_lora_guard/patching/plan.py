"""The plan of a change: every weight that gets a LoRA, with its stack and the mode it is applied in.

A plan takes over what the present one has worked out. Cheap forms do not depend on strengths, so a change of strength
derives none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from ..adapters import Term
from ..errors import ModeError
from ..planning.cheap import Forms, form_of
from ..planning.mode import Choice, Mode, WeightFacts, Wish, choose_mode
from ..planning.tokens import sees_one_token
from .access import Site


class PlannedWeight(NamedTuple):
    """One parameter, the stack of terms on it in order, and the mode chosen for them.

    A tuple, because strengths that change between two steps make one of these for each layer.
    """

    site: Site
    terms: tuple[Term, ...]
    choice: Choice

    @property
    def mode(self) -> Mode:
        """The chosen mode."""
        return self.choice.mode

    @property
    def forms(self) -> Forms | None:
        """The cheap forms of the terms, in order; None if the choice needed none."""
        return self.choice.forms

    @property
    def places(self) -> tuple[int, ...]:
        """The places in the stack of the LoRAs that the terms come from, a LoRA's as often as it has terms here."""
        return tuple([term.origin for term in self.terms])

    def with_terms(self, terms: tuple[Term, ...]) -> PlannedWeight:
        """Returns the same plan for terms that differ from the present ones in strengths alone."""
        return PlannedWeight(self.site, terms, self.choice)


Plan: TypeAlias = dict[str, PlannedWeight]
"""Planned weights by parameter name."""

OnModeError: TypeAlias = Callable[[set[int], ModeError], None]


def facts_of(site: Site) -> WeightFacts:
    """Collects what the choice of a mode depends on."""
    return WeightFacts(
        site.key,
        site.shape,
        site.storage.format,
        site.storage.wide,
        site.can_bypass,
        site.can_on_the_fly,
        sees_one_token(site.key),
        site.can_merge,
        site.obstacle,
    )


def plan_weights(
    stacks: Mapping[str, tuple[Site, Sequence[Term]]],
    wish: Wish,
    present: Mapping[str, PlannedWeight],
    on_mode_error: OnModeError | None,
) -> Plan:
    """Chooses the mode of every weight.

    Args:
        stacks: Each parameter with its whole stack of terms, by name.
        wish: The requested mode.
        present: The weights of the stack that the model has now.
        on_mode_error: Called with the origins of the terms and the error for a weight that no mode can carry. Such a
            weight is left out. None: the error is raised.

    Raises:
        ModeError: Merging was requested for a weight whose storage would round the LoRA away, or no mode can carry a weight
            and `on_mode_error` is None.
    """
    plan = {}
    for key, (site, terms) in stacks.items():
        kept, forms = _taken_over(site, tuple(terms), present.get(key))
        try:
            plan[key] = PlannedWeight(site, kept, choose_mode(facts_of(site), kept, wish, forms))
        except ModeError as error:
            if wish is Wish.MERGE or on_mode_error is None:
                raise
            on_mode_error({term.origin for term in terms}, error)
    return plan


def _taken_over(
    site: Site, terms: tuple[Term, ...], present: PlannedWeight | None
) -> tuple[tuple[Term, ...], Forms | None]:
    """Returns the terms with the adapter objects that the present plan has for the same factors, and their cheap forms.

    The forms are None if the present plan has none; otherwise only those of new terms are derived. Hosts parse adapters
    anew at each change. With the old objects in their place, later comparisons are by identity.
    """
    if present is None:
        return terms, None
    if len(terms) == len(present.terms) and all(map(has_same_factors, present.terms, terms)):
        # The usual case: other strengths, or nothing else on this weight.
        kept = tuple(map(_with_adapter_of, terms, present.terms))
        return kept, present.forms if present.site.shape == site.shape else None
    places = [_place_of(term, place, present.terms) for place, term in enumerate(terms)]
    kept = tuple(
        [t if p is None else _with_adapter_of(t, present.terms[p]) for t, p in zip(terms, places, strict=True)]
    )
    if present.forms is None or present.site.shape != site.shape:
        return kept, None
    forms = [
        form_of(term, site.shape, is_first=place == 0) if known is None else present.forms[known]
        for place, (term, known) in enumerate(zip(kept, places, strict=True))
    ]
    return kept, tuple(forms)


def _place_of(term: Term, place: int, present: Sequence[Term]) -> int | None:
    """Returns where `present` has the same factors in the same role; None if nowhere."""
    return next((p for p in _places(place, len(present)) if has_same_factors(present[p], term)), None)


def _places(place: int, count: int) -> Iterator[int]:
    """Yields the places to look at for a term at `place`. The first term of a stack has forms that later ones have not."""
    if place < count:
        yield place
    if place > 0:
        yield from (other for other in range(1, count) if other != place)


def is_same_term(old: Term, new: Term) -> bool:
    """Returns True if the two do the same to a weight. They may come from different places in the stack."""
    return old.strength == new.strength and has_same_factors(old, new)


def has_same_factors(old: Term, new: Term) -> bool:
    """Returns True if the two differ in strength alone."""
    return (
        (old.adapter is new.adapter or old.adapter.known_identity == new.adapter.known_identity)
        and old.strength_model == new.strength_model
        and old.part == new.part
        and old.function == new.function
    )


def _with_adapter_of(term: Term, old: Term) -> Term:
    if term.adapter is old.adapter:
        return term
    return Term(old.adapter, term.strength, term.strength_model, term.part, term.function, term.origin)
