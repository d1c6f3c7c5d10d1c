"""Decides which parts of a LoRA file a model can use. The single rule for applying, planning, inspecting, baking and
all hosts.

A file that was made for another model is refused as a whole: by its architecture, or if at most half of what has a place
in this model fits by size. A layer of the wrong size is lost alone where most of the file fits. So is a difference, which
does not concern the rest of the file (`adapters.fitting`). A file that contradicts itself is refused as damaged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..adapters import Term
from ..adapters.base import Shape
from ..adapters.files import LoraFile
from ..adapters.fitting import Blame, Misfit, misfit
from ..adapters.left_out import LeftOut
from ..cached_property import cached_property
from ..errors import LoraMismatchError, Message, about, named, reason
from .architecture import Architecture, detect_model
from .left_out import left_out
from .matching import foreign_to, match_file
from .names import NameMap

log = logging.getLogger(__name__)

_INPUT_PROJECTIONS = (
    "img_in.weight",
    "x_embedder.weight",
    "x_embedder.proj.weight",
    "conv_in.weight",
    "input_blocks.0.0.weight",
    "patch_embedding.weight",
)
"""The image's channels come first in all of them; a mask or a second image follows (inpainting, FLUX tools, Wan I2V)."""


@dataclass(eq=False)
class Fit:
    """The part of a LoRA file that a model can use, and the rest.

    Attributes:
        terms: Usable terms by parameter name; empty if the file is refused.
        skipped: Keys of the file without a counterpart in the model.
        lost: Keys with a counterpart that cannot be applied, each with the reason.
        refused: The reason if the whole file cannot be used, as a sentence for users.
        used: Number of entries of the file that are applied.
        left_out: The part of the file that is not applied, by its own names.
    """

    terms: dict[str, list[Term]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    refused: str | None = None
    used: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)


class Target:
    """A model to match files with: the names and unpatched shapes of its parameters."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = shapes

    def work_out(self) -> None:
        """Works out now what the first file would wait for.

        Raises:
            IndexError: The shapes contradict the names.
            ValueError: The shapes contradict the names.
        """
        _ = self.architecture, self.names

    @cached_property
    def architecture(self) -> Architecture | None:
        """The architecture; None if the names are ambiguous."""
        return detect_model(self.shapes)

    @cached_property
    def names(self) -> NameMap:
        """The names of the model.

        Raises:
            IndexError: The shapes contradict the names.
            ValueError: The shapes contradict the names.
        """
        return NameMap(self.shapes)


def fit_file(file: LoraFile, target: Target, strength: float = 1.0, origin: int = 0, *, is_all: bool = True) -> Fit:
    """Fits a whole file to a model.

    Args:
        file: The LoRA, with values or from its header alone.
        target: The model.
        strength: The user's strength, stored in the terms.
        origin: The position of the file in the user's stack, stored in the terms.
        is_all: The file meets no other model; one of which more than half is left out is refused.
    """
    foreign = foreign_to(file, target.architecture)
    if foreign is not None:
        return Fit(refused=foreign)
    try:
        match = match_file(file, target.names, target.shapes, strength, origin)
    except LoraMismatchError as error:
        return Fit(refused=reason(error))
    found = fit_terms(match.terms, target.shapes, match.misfits)
    found.skipped[:0], found.lost[:0] = match.skipped, match.lost
    if found.refused is None:
        lost = [line.partition(": ")[0] for line in found.lost]
        left = {*found.skipped, *lost, *(written for name in lost for written in match.written(name))}
        used = [module for module, parameter in file.adapters if not left or f"{module}.{parameter}" not in left]
        found.used = len(used)
        found.left_out = left_out(file, used, target.shapes)
        if is_all and found.terms and (why := found.left_out.refusal) is not None:
            return Fit(skipped=found.skipped, lost=found.lost, refused=why, left_out=found.left_out)
    return found


def fit_terms(
    terms: Mapping[str, Sequence[Term]], shapes: Mapping[str, Shape], misfits: Sequence[tuple[str, Misfit]] = ()
) -> Fit:
    """Fits terms that are already matched to parameters: by `fit_file`, by the host, or by another extension.

    Args:
        terms: By parameter name.
        shapes: The model's parameters without patches.
        misfits: Modules of the same file that were found not to fit before, by name.
    """
    found = Fit()
    unfit = list(misfits)
    for key, on_key in terms.items():
        shape = shapes.get(key) if on_key else None
        if shape is None:
            if on_key:
                found.skipped.append(key)
            continue
        try:
            wrong = misfit(on_key, shape, may_expand=is_input_projection(key))
        except Exception as error:
            # If shapes of factors contradict their names, torch raises its own errors.
            log.debug("%s", key, exc_info=True)
            found.refused = Message("lora.damaged_key", {"key": key, "error": named(error)})
            break
        if wrong is None:
            found.terms[key] = list(on_key)
        else:
            unfit.append((key, wrong))
    found.lost = [about(key, wrong.why) for key, wrong in unfit]
    if found.refused is None and unfit:
        factors = sum(any(not term.adapter.stands_alone for term in on_key) for on_key in found.terms.values())
        found.refused = _refusal(unfit, factors)
    return found if found.refused is None else Fit(skipped=found.skipped, lost=found.lost, refused=found.refused)


def _refusal(unfit: Sequence[tuple[str, Misfit]], fitting: int) -> str | None:
    """The reason to refuse a whole file for what does not fit.

    Args:
        unfit: Parameters or modules, by name.
        fitting: How many parameters fit, those with differences alone not counted.
    """
    for key, wrong in unfit:
        if wrong.blame is Blame.FILE:
            return Message("lora.damaged_layer", {"key": key, "why": wrong.why})
        if wrong.blame is Blame.STRENGTH:
            return wrong.why
    of_size = [(key, wrong) for key, wrong in unfit if wrong.blame is Blame.MODEL]
    # A LoRA for another model of the same names finds the size wrong everywhere, or nearly so.
    if not of_size or len(of_size) < fitting:
        return None
    key, wrong = of_size[0]
    return Message("lora.other_model", {"key": key, "why": wrong.why})


def is_input_projection(key: str) -> bool:
    """True for the first projection of the latent image, which FLUX-tools and inpainting LoRAs widen."""
    return key.endswith(_INPUT_PROJECTIONS)
