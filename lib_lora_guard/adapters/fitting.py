"""Checks that terms fit the weight they were matched to, and tells what a misfit says about their file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import LoraMismatchError, reason
from .base import Shape, Term


@dataclass(frozen=True)
class Misfit:
    """Terms that cannot be applied.

    Attributes:
        why: a sentence for users.
        of_file: the whole file was made for another model, not this weight's terms alone.
    """

    why: str
    of_file: bool


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
        return Misfit(reason(error), not all(term.adapter.stands_alone for term in terms))
    return None
