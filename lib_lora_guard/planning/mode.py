"""Chooses how the LoRAs on one weight are applied. Pure: facts in, a choice with its reason out.

The choice depends on storage, kind, shape and the requested mode. It never depends on free memory, so the same seed
gives the same picture on every card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ..adapters import Term
from ..adapters.forms import LowRank
from ..errors import Message, ModeError, about
from .cheap import Forms, forms_of, pays


class Mode(str, Enum):
    """How the delta reaches the result. The value is what logs and reports show."""

    BYPASS = "bypass"
    ON_THE_FLY = "on_the_fly"
    MERGE = "merge"


class Wish(str, Enum):
    """The mode that a caller requests for a whole stack; `choose_mode` turns it into a Mode for each weight."""

    AUTO = "auto"
    """The rules of `choose_mode`."""
    BYPASS = "bypass"
    ON_THE_FLY = "on_the_fly"
    MERGE = "merge"
    """Merge every weight, and fail on storage that would round the LoRA away."""
    NEVER_MERGE = "never_merge"
    """AUTO, but merge only weights that have no other mode."""
    PREFER_MERGE = "prefer_merge"
    """Merge where the storage keeps all of the LoRA; AUTO elsewhere."""
    MERGE_FROM_FILE = "merge_from_file"
    """PREFER_MERGE where the original needs no copy in RAM, because a file has it; AUTO elsewhere."""


_ASKED = Message("reason.asked")
_LOW_RANK, _CHEAP, _NO_WEIGHT = Message("reason.low_rank"), Message("reason.cheap"), Message("reason.no_weight")
_CHEAPER_ON_WEIGHT, _NEEDS_WEIGHT = Message("reason.cheaper_on_weight"), Message("reason.needs_weight")
_SMALL, _NO_CALL = Message("reason.small"), Message("reason.no_call")
_LARGE, _DIRECT = Message("reason.large"), Message("reason.direct")

REQUESTABLE = (Wish.AUTO, Wish.BYPASS, Wish.ON_THE_FLY, Wish.MERGE)
"""The documented values of a `mode` argument. The others belong to settings of a host."""


def requested(mode: str) -> Wish:
    """Returns the wish that a `mode` argument names.

    Raises:
        ModeError: `mode` is none of the documented names.
    """
    for wish in REQUESTABLE:
        if wish.value == mode:
            return wish
    raise ModeError(f"mode must be one of {', '.join(wish.value for wish in REQUESTABLE)}, not {mode!r}")


@dataclass(frozen=True)
class WeightFacts:
    """Everything about a weight that the choice may depend on.

    `wide` is storage of 16 bits or more. `can_bypass`, `can_on_the_fly` and `can_merge` tell what the layer's own code and
    storage allow, `obstacle` why not.
    """

    key: str
    shape: tuple[int, ...]
    format: str
    wide: bool
    can_bypass: bool
    can_on_the_fly: bool
    one_token: bool = False
    """True for modulations and embedders, which see one token a picture instead of thousands."""
    can_merge: bool = True
    obstacle: Message | None = None

    @property
    def takes_merge(self) -> bool:
        """True if a merge into this weight loses nothing."""
        return self.wide and self.can_merge

    def refusal(self, sentence: str) -> ModeError:
        """Returns the error for this weight: its obstacle, or else `sentence` with the storage."""
        return ModeError(about(self.key, self.obstacle or Message(sentence, {"format": self.format})))


@dataclass(frozen=True)
class Choice:
    """The mode of one weight, and the reason for it.

    `forms` are the cheap forms of its terms (`planning.cheap.forms_of`), for whatever carries the choice out. They are
    None where the choice needed none.
    """

    mode: Mode
    reason: Message
    forms: Forms | None = None


def choose_mode(
    facts: WeightFacts, terms: Sequence[Term], wish: Wish = Wish.AUTO, forms: Forms | None = None
) -> Choice:
    """Chooses the mode for one weight and its stack.

    Args:
        facts: The weight.
        terms: Its stack, in order.
        wish: The requested mode.
        forms: The cheap forms of `terms`, where an earlier choice has derived them. None: they are derived if needed.

    Raises:
        ModeError: No mode keeps the LoRA. Either this storage cannot carry the requested mode, or no call of a layer
            reaches a low-bit weight.
    """
    must_merge = _reason_to_merge(facts, terms, wish)
    if must_merge is not None:
        return Choice(Mode.MERGE, must_merge, forms)
    if forms is None:
        forms = forms_of(terms, facts.shape)
    exact = facts.can_bypass and None not in forms
    if exact and wish is Wish.BYPASS:
        return Choice(Mode.BYPASS, _ASKED, forms)
    if exact and wish is not Wish.ON_THE_FLY and pays(forms, facts.one_token):
        plain = all(isinstance(form, LowRank) for form in forms)
        return Choice(Mode.BYPASS, _LOW_RANK if plain else _CHEAP, forms)
    if facts.can_on_the_fly:
        asked = wish is Wish.ON_THE_FLY and (exact or not facts.can_bypass)
        reason = _CHEAPER_ON_WEIGHT if exact else facts.obstacle or _NEEDS_WEIGHT
        return Choice(Mode.ON_THE_FLY, _ASKED if asked else reason, forms)
    if exact:
        return Choice(Mode.BYPASS, _NO_WEIGHT, forms)
    if facts.takes_merge:
        return Choice(Mode.MERGE, _DIRECT, forms)
    raise facts.refusal("reason.hidden_weight")


def _reason_to_merge(facts: WeightFacts, terms: Sequence[Term], wish: Wish) -> Message | None:
    """Returns the reason to merge, if there is one whatever the cheap forms are; None if the forms decide."""
    if len(facts.shape) < 2:
        if facts.can_merge:
            return _SMALL
        raise facts.refusal("reason.outside_layers")
    if not (facts.can_bypass or facts.can_on_the_fly):
        if facts.takes_merge:
            return facts.obstacle or _NO_CALL
        raise facts.refusal("reason.outside_layers")
    if wish is Wish.MERGE and not facts.takes_merge:
        raise facts.refusal("reason.rounds_away")
    if wish is Wish.MERGE or (wish in (Wish.PREFER_MERGE, Wish.MERGE_FROM_FILE) and facts.takes_merge):
        return _ASKED
    if wish is Wish.AUTO and facts.takes_merge and any(term.adapter.is_whole_tensor for term in terms):
        # As many numbers as the weight itself: on the fly they would take its size again in VRAM, or, where another
        # extension calculates them, be calculated again in every step.
        return _LARGE
    return None
