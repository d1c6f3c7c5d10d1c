"""The LoRAs that a model is asked to have, and how much of each fits the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ..adapters import Term
from ..adapters.left_out import LeftOut
from ..models.fit import Fit, fit_terms
from ..reporting.report import LoraReport
from .access import Site


@dataclass(frozen=True, eq=False)
class LoraRequest:
    """One LoRA of a stack: its terms for each parameter, or the reason why it could not be read.

    Args:
        label: The LoRA's name for the user.
        strength: The strength the user asked for, for the report; each term has its own.
        terms: The terms by parameter name.
        skipped_keys: Keys of the file that the model has no place for.
        lost: Keys, with reasons, that the model has and that cannot be applied.
        refused: A sentence for the user. A refused LoRA is left out as a whole.
        left_out: The part of the file that is not applied.
    """

    label: str
    strength: float
    terms: Mapping[str, Sequence[Term]] = field(default_factory=dict)
    skipped_keys: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    refused: str | None = None
    left_out: LeftOut = field(default_factory=LeftOut)

    @classmethod
    def of(cls, label: str, strength: float, fit: Fit) -> LoraRequest:
        """Makes the request from the part of a file that fits the model."""
        return cls(label, strength, fit.terms, tuple(fit.skipped), tuple(fit.lost), fit.refused, fit.left_out)

    @property
    def bytes(self) -> int:
        """Bytes of the factors in RAM."""
        return sum(term.adapter.bytes for terms in self.terms.values() for term in terms)


Fitting: TypeAlias = dict[int, dict[str, tuple[Site, list[Term]]]]
"""The LoRAs that fit, by their place in the stack: for each parameter's name its site and the terms on it."""


def fit_stack(stack: Sequence[LoraRequest], site_of: Callable[[str], Site | None]) -> tuple[Fitting, list[LoraReport]]:
    """Finds out which LoRAs of a stack fit a model, and begins the report on each.

    Args:
        stack: The LoRAs, in order.
        site_of: Returns the parameter of a name as it is without LoRAs; None if the model has none.

    Returns:
        The LoRAs that fit, and a report for each LoRA of the stack, with the reason where it does not.
    """
    fitting: Fitting = {}
    reports = []
    for place, lora in enumerate(stack):
        report = LoraReport(
            lora.label,
            lora.strength,
            bytes=lora.bytes,
            skipped=[*lora.skipped_keys, *lora.lost],
            lost=list(lora.lost),
            refused=lora.refused,
            left_out=lora.left_out,
        )
        reports.append(report)
        if lora.refused is not None:
            continue
        sites = {key: site for key in lora.terms if (site := site_of(key)) is not None}
        fit = fit_terms(lora.terms, {key: site.shape for key, site in sites.items()})
        report.skipped += [*fit.skipped, *fit.lost]
        report.lost += fit.lost
        report.refused = fit.refused
        if fit.refused is None:
            fitting[place] = {key: (sites[key], terms) for key, terms in fit.terms.items()}
    return fitting, reports
