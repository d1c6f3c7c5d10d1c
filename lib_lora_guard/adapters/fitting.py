"""Whether terms fit the weight that they were matched to, and what it says about their file where they do not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import LoraMismatchError, reason
from .base import Shape, Term

STANDS_ALONE = ("diff", "nested")
"""Kinds of which one of another size says nothing about the rest of the file."""


@dataclass(frozen=True)
class Misfit:
    """`why`: a sentence for users. `of_file`: the whole file was made for another model, not this weight's terms alone."""

    why: str
    of_file: bool


def misfit(terms: Iterable[Term], shape: Shape, *, may_expand: bool) -> Misfit | None:
    """None where every term can be applied to a weight of `shape`. `may_expand`: see `Adapter.check`."""
    terms = list(terms)
    try:
        for term in terms:
            term.check(shape, may_expand=may_expand)
    except LoraMismatchError as error:
        return Misfit(reason(error), not all(term.adapter.kind in STANDS_ALONE for term in terms))
    return None
