"""Which treatment a weight gets. Pure: facts in, a choice with its reason out.

The choice depends on storage, kind, shape and the user's wish, never on the memory that happens to be free, so that
the same seed gives the same picture on every card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ..adapters import Term
from ..adapters.forms import LowRank
from ..errors import Message, ModeError, about
from .cheap import forms_of, pays


class Mode(str, Enum):
    """How the delta reaches the result. The value is what logs and reports show."""

    BYPASS = "bypass"
    ON_THE_FLY = "on_the_fly"
    MERGE = "merge"


class Wish(str, Enum):
    """What the user asked for. AUTO leaves it to the rules below, NEVER_MERGE leaves all of it to them but merging where
    there is another way; PREFER_MERGE merges where the storage keeps all of the LoRA and is AUTO elsewhere."""

    AUTO = "auto"
    BYPASS = "bypass"
    ON_THE_FLY = "on_the_fly"
    MERGE = "merge"
    NEVER_MERGE = "never_merge"
    PREFER_MERGE = "prefer_merge"


@dataclass(frozen=True)
class WeightFacts:
    """What the choice may look at. `can_*` say what the layer's own code allows."""

    key: str
    shape: tuple[int, ...]
    format: str
    wide: bool
    can_bypass: bool
    can_on_the_fly: bool
    one_token: bool = False
    """True for modulations and embedders, which see one token a picture instead of thousands."""


@dataclass(frozen=True)
class Choice:
    mode: Mode
    reason: Message


def choose_mode(facts: WeightFacts, terms: Sequence[Term], wish: Wish = Wish.AUTO) -> Choice:
    """The mode for one weight and its stack.

    Raises ModeError where no mode keeps the LoRA: a wish that this storage cannot carry, or a low-bit weight that no
    layer call reaches.
    """
    if len(facts.shape) < 2:
        return Choice(Mode.MERGE, Message("reason.small"))
    if not (facts.can_bypass or facts.can_on_the_fly):
        if facts.wide:
            return Choice(Mode.MERGE, Message("reason.no_call"))
        raise ModeError(about(facts.key, Message("reason.outside_layers", {"format": facts.format})))
    if wish is Wish.MERGE:
        if not facts.wide:
            raise ModeError(about(facts.key, Message("reason.rounds_away", {"format": facts.format})))
        return Choice(Mode.MERGE, Message("reason.asked"))
    if wish is Wish.PREFER_MERGE and facts.wide:
        return Choice(Mode.MERGE, Message("reason.asked"))
    if wish is Wish.AUTO and facts.wide and any(term.adapter.is_whole_tensor for term in terms):
        # As many numbers as the weight itself: on the fly they would take its size again in VRAM (or, where another
        # extension calculates them, be calculated again in every step).
        return Choice(Mode.MERGE, Message("reason.large"))
    forms = forms_of(terms, facts.shape)
    exact = facts.can_bypass and None not in forms
    if exact and wish is Wish.BYPASS:
        return Choice(Mode.BYPASS, Message("reason.asked"))
    if exact and wish is not Wish.ON_THE_FLY and pays(forms, facts.one_token):
        plain = all(isinstance(form, LowRank) for form in forms)
        return Choice(Mode.BYPASS, Message("reason.low_rank" if plain else "reason.cheap"))
    if facts.can_on_the_fly:
        asked = exact and wish is Wish.ON_THE_FLY
        why = "reason.asked" if asked else "reason.cheaper_on_weight" if exact else "reason.needs_weight"
        return Choice(Mode.ON_THE_FLY, Message(why))
    if exact:
        return Choice(Mode.BYPASS, Message("reason.no_weight"))
    if facts.wide:
        return Choice(Mode.MERGE, Message("reason.direct"))
    raise ModeError(about(facts.key, Message("reason.hidden_weight", {"format": facts.format})))
