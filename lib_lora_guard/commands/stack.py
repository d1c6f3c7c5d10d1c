"""Matches a stack of LoRAs to a model, both read from their headers, and chooses the mode of every weight.

`models.fit` and `planning.mode` decide, as for a loaded model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..adapters import Term
from ..adapters.kinds import KINDS
from ..checkpoints.lora_header import LoraFacts, damaged_where_torch_refuses
from ..checkpoints.model_header import DENOISER, TEXT, Checkpoint, Parameter
from ..errors import ModeError, about, reason
from ..files import shown
from ..messages import Message
from ..models.fit import Fit, fit_file
from ..planning.costs import bypass_bytes, bypass_cost, forge_on_the_fly_cost, on_the_fly_cost
from ..planning.mode import Choice, Mode, WeightFacts, Wish, choose_mode
from ..planning.predict import Patch
from ..planning.tokens import Tokens


@dataclass
class ModeShare:
    """The weights of one LoRA that are carried in one mode."""

    count: int = 0
    bytes: int = 0
    reasons: set[str] = field(default_factory=set)


@dataclass
class StackedLora:
    """One LoRA of the stack, and what of it the model can use.

    `modes` is by the mode's name. `unknown_to_forge` are the kinds that Forge's own reader drops.
    """

    facts: LoraFacts
    strength: float
    fit: Fit
    modes: dict[str, ModeShare] = field(default_factory=dict)
    unknown_to_forge: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stack:
    """The LoRAs in the user's order, and one patch for each weight that they change."""

    loras: list[StackedLora]
    patches: list[Patch]


def plan_stack(
    checkpoint: Checkpoint, loras: Sequence[tuple[LoraFacts, float]], wish: Wish, tokens: Tokens, compute_bytes: int
) -> Stack:
    """Matches every LoRA and chooses the mode of every weight.

    Args:
        checkpoint: The model.
        loras: The LoRAs and their strengths, in the user's order.
        wish: The mode asked for.
        tokens: Tokens that the layers of the denoiser see.
        compute_bytes: Bytes of one number in the compute dtype.

    Raises:
        ModeError: A merge was asked for, and a weight cannot have it. With another wish the reason is listed in the
            LoRA's `fit.lost`.
    """
    target = checkpoint.target()
    stacked = []
    merged: dict[str, list[Term]] = {}
    for origin, (facts, strength) in enumerate(loras):
        with damaged_where_torch_refuses(facts.file.path):
            fit = fit_file(facts.file, target, strength, origin)
        lora = StackedLora(facts, strength, fit)
        stacked.append(lora)
        if fit.refused is None:
            lora.unknown_to_forge = sorted({kind for kind in facts.kinds if kind not in KINDS.host})
            if not fit.terms:
                fit.refused = _nothing_fits(checkpoint, facts, fit)
        for key, terms in fit.terms.items():
            merged.setdefault(key, []).extend(terms)
    patches = []
    for key, terms in merged.items():
        parameter = checkpoint.parameters[key]
        try:
            choice = choose_mode(_facts(parameter), terms, wish)
        except ModeError as error:
            if wish is Wish.MERGE:
                raise ModeError(about(shown(checkpoint.header.path.name), reason(error))) from None
            for origin in {term.origin for term in terms}:
                stacked[origin].fit.lost.append(reason(error))
            continue
        _count(stacked, terms, choice, compute_bytes)
        patches.append(_patch(parameter, terms, choice, tokens, compute_bytes))
    return Stack(stacked, patches)


def _nothing_fits(checkpoint: Checkpoint, facts: LoraFacts, fit: Fit) -> str:
    if all(part not in ("U-Net", "transformer") for part in facts.parts) and not checkpoint.of_part(TEXT):
        return Message("advice.no_text_encoder")
    first = next(iter(fit.lost or sorted(fit.skipped)), Message("host.nothing"))
    return Message("advice.nothing_fits", {"count": len(facts.file.adapters), "first": first})


def _facts(parameter: Parameter) -> WeightFacts:
    return WeightFacts(
        parameter.name,
        parameter.shape,
        parameter.format,
        parameter.wide,
        can_bypass=parameter.is_layer,
        can_on_the_fly=parameter.is_layer,
    )


def _count(stacked: Sequence[StackedLora], terms: Sequence[Term], choice: Choice, compute_bytes: int) -> None:
    for origin in sorted({term.origin for term in terms}):
        share = stacked[origin].modes.setdefault(choice.mode.value, ModeShare())
        share.count += 1
        share.reasons.add(choice.reason)
        if choice.mode is Mode.BYPASS and choice.forms is not None:
            own = tuple(form for term, form in zip(terms, choice.forms, strict=True) if term.origin == origin)
            share.bytes += bypass_bytes(own, compute_bytes)
        else:
            share.bytes += sum(term.adapter.bytes for term in terms if term.origin == origin)


def _patch(parameter: Parameter, terms: Sequence[Term], choice: Choice, tokens: Tokens, compute_bytes: int) -> Patch:
    in_denoiser = parameter.part == DENOISER
    seen = tokens.of(parameter.name, parameter.shape) if in_denoiser else 0
    if choice.mode is Mode.BYPASS and choice.forms is not None:
        guard = bypass_cost(terms, choice.forms, parameter.shape, seen, compute_bytes)
    else:
        guard = on_the_fly_cost(terms, parameter.shape, seen > 0, compute_bytes)
    return Patch(
        key=parameter.name,
        values=parameter.values,
        bytes=parameter.memory_bytes(compute_bytes),
        format=parameter.format,
        wide=parameter.wide,
        in_denoiser=in_denoiser,
        mode=choice.mode,
        file_bytes=sum(term.adapter.bytes for term in terms),
        guard=guard,
        forge=forge_on_the_fly_cost(terms, parameter.shape, seen > 0, compute_bytes),
        has_norms=any(term.adapter.is_dora for term in terms),
    )
