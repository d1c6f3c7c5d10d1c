"""Checks that terms fit the weight they were matched to, and tells what a misfit says about their file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from ..errors import LoraMismatchError, reason
from .base import Shape, Term, UnsuitedLayerError, UnusableStrengthError, WrongSizeError


class Blame(Enum):
    """The cause of a misfit.

    Attributes:
        LAYER: this one layer of the model. The rest of the file is not concerned.
        MODEL: the model, if most of the file is so (`models.fit`).
        FILE: the file, which contradicts itself.
        STRENGTH: the user's strength.
    """

    LAYER = "layer"
    MODEL = "model"
    FILE = "file"
    STRENGTH = "strength"


@dataclass(frozen=True)
class Misfit:
    """Terms that cannot be applied.

    Attributes:
        why: a sentence for users.
        blame: the cause.
    """

    why: str
    blame: Blame


def misfit(terms: Iterable[Term], shape: Shape, *, may_expand: bool) -> Misfit | None:
    """None if every term can be applied to a weight.

    Args:
        terms: the terms of one file on the weight.
        shape: the weight's real shape.
        may_expand: the weight is an input projection, see `Adapter.check`.
    """
    terms = list(terms)
    try:
        for term in terms:
            term.check(shape, may_expand=may_expand)
    except LoraMismatchError as error:
        alone = all(term.adapter.stands_alone for term in terms)
        return Misfit(reason(error), blame_of(error, alone))
    return None


def blame_of(error: LoraMismatchError, stands_alone: bool = False) -> Blame:
    """The cause of a misfit.

    Args:
        error: what `Term.check` raised.
        stands_alone: a wrong size says nothing about the rest of the file, see `Adapter.stands_alone`.
    """
    if isinstance(error, UnusableStrengthError):
        return Blame.STRENGTH
    if isinstance(error, UnsuitedLayerError) or (stands_alone and isinstance(error, WrongSizeError)):
        return Blame.LAYER
    return Blame.MODEL if isinstance(error, WrongSizeError) else Blame.FILE
