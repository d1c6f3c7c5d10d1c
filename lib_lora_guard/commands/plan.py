"""`lora-guard plan`: predicts the cost of a stack of LoRAs on a model from the headers of the files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.lora_header import read_facts
from ..checkpoints.model_header import DENOISER, TEXT, VAE, Checkpoint, read_checkpoint
from ..errors import LoraMismatchError
from ..files import shown
from ..models.text import ANY, CLIP_G, CLIP_H, CLIP_L, LLM, T5, find_encoders, missing_encoders
from ..planning import activations
from ..planning.advice import advice
from ..planning.host_memory import Latent, unet_estimate_bytes
from ..planning.mode import Wish
from ..planning.predict import ModelFacts, Prediction, Weight, predict
from ..planning.rates import GpuRates
from ..planning.tokens import Picture, Tokens, tokens_for
from .stack import Stack, plan_stack


@dataclass(frozen=True)
class PlanRequest:
    """The user's request. `vram_bytes` is what Forge finds free, `ram_bytes` what is installed."""

    model: Path
    loras: Sequence[tuple[Path, float]]
    vram_bytes: int
    ram_bytes: int
    picture: Picture
    rates: GpuRates
    wish: Wish = Wish.AUTO


@dataclass(frozen=True)
class PlanResult:
    """The result of `plan`. `predictions` (the guard's first) is empty if no LoRA can be used."""

    request: PlanRequest
    checkpoint: Checkpoint
    model: ModelFacts
    tokens: Tokens
    forge_activation_bytes: int
    stack: Stack
    predictions: tuple[Prediction, ...]
    advice: list[str]

    def check_usable(self) -> None:
        """Checks that a LoRA can be used.

        Raises:
            LoraMismatchError: The model can use none of them.
        """
        reasons = [f"{lora.facts.name}: {lora.fit.refused}" for lora in self.stack.loras if lora.fit.refused]
        if reasons and len(reasons) == len(self.stack.loras):
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            raise LoraMismatchError(reasons[0] + more)


def make_plan(request: PlanRequest) -> PlanResult:
    """Reads the headers and predicts.

    Raises:
        FileFormatError: The model file cannot be read or is no model.
        LoraFileError: A LoRA file cannot be read or is no LoRA.
        ModeError: The model cannot have the mode asked for.
    """
    compute_bytes = request.rates.compute_bytes
    checkpoint = read_checkpoint(request.model)
    facts = [(read_facts(path), strength) for path, strength in request.loras]
    tokens = tokens_for(checkpoint.architecture, request.picture)
    stack = plan_stack(checkpoint, facts, request.wish, tokens, compute_bytes)
    model = model_facts(checkpoint, tokens, request.picture, compute_bytes)
    predictions: tuple[Prediction, ...] = ()
    lines: list[str] = []
    if stack.patches:
        predictions = predict(
            model, stack.patches, request.vram_bytes, request.ram_bytes, request.rates, sys.platform == "win32"
        )
        lines = advice(model, stack.patches, predictions) + [
            shown(line, LINE_CHARACTERS) for line in _beside(checkpoint, stack)
        ]
    latent = Latent.of(request.picture.width, request.picture.height, request.picture.batch)
    estimate = int(unet_estimate_bytes(latent, compute_bytes))
    return PlanResult(request, checkpoint, model, tokens, estimate, stack, predictions, lines)


def model_facts(checkpoint: Checkpoint, tokens: Tokens, picture: Picture, compute_bytes: int) -> ModelFacts:
    """Returns the facts of a checkpoint that the predictions need."""
    denoiser = checkpoint.of_part(DENOISER)
    shapes = {parameter.name: parameter.shape for parameter in denoiser}
    formats = checkpoint.formats()
    most = formats.most_common(1)[0][0] if formats else ""
    step = activations.step(tokens, picture, shapes, compute_bytes)
    return ModelFacts(
        weights=[
            Weight(p.name, p.values, p.memory_bytes(compute_bytes), p.placed_bytes(compute_bytes)) for p in denoiser
        ],
        other_bytes=sum(p.memory_bytes(compute_bytes) for p in checkpoint.parameters.values() if p.part != DENOISER),
        wide=any(p.wide for p in denoiser if p.is_layer and p.format == most),
        activation_bytes=step.used_bytes,
        compute_bytes=compute_bytes,
        held_bytes=step.held_bytes,
        is_unet=tokens.is_unet,
        not_counted=_names_of_missing(checkpoint),
    )


PARTS = {TEXT: "text encoders", VAE: "VAE"}
"""The parts of a model beside its denoiser that an image needs, with their names for users."""


def not_counted(checkpoint: Checkpoint) -> list[str]:
    """Returns the parts that an image needs and that this file lacks, in whole or in part."""
    return [part for part in PARTS if not checkpoint.of_part(part) or (part == TEXT and encoders_missing(checkpoint))]


def encoders_missing(checkpoint: Checkpoint) -> list[str]:
    """Returns the kinds of text encoders, of `models.text`, that an image needs and that this file lacks."""
    return missing_encoders(checkpoint.architecture, find_encoders(checkpoint.shapes).values())


def _names_of_missing(checkpoint: Checkpoint) -> list[str]:
    names = [PARTS[part] for part in not_counted(checkpoint)]
    if TEXT in not_counted(checkpoint) and checkpoint.of_part(TEXT):
        kinds = [ENCODERS[kind] for kind in encoders_missing(checkpoint)]
        names[0] = f"text encoder {' and '.join(kinds)}"
    return names


ENCODERS = {
    CLIP_L: "CLIP-L",
    CLIP_G: "CLIP-G",
    CLIP_H: "OpenCLIP-H",
    T5: "T5",
    LLM: "language model",
    ANY: "of any kind",
}
"""The kinds of text encoders with their names for users."""


LINE_CHARACTERS = 300
"""Characters shown of a line with names from a file in it."""
MOST_UNMATCHED = 12
"""Forge drops a LoRA that has more keys left over than this."""


def _beside(checkpoint: Checkpoint, stack: Stack) -> list[str]:
    """Returns warnings that the numbers do not show."""
    lines = []
    for lora in stack.loras:
        if lora.fit.refused:
            lines.append(f"{lora.facts.name} cannot be used: {lora.fit.refused}.")
        if lora.unknown_to_forge:
            lines.append(
                f"Forge's own reader does not know {', '.join(lora.unknown_to_forge)} ({lora.facts.name}); the guard does."
            )
        if lora.fit.lost:
            lines.append(f"{lora.facts.name}: {len(lora.fit.lost)} keys are lost on this model.")
        if len(lora.fit.skipped) > MOST_UNMATCHED and not lora.fit.refused:
            lines.append(
                f"{lora.facts.name}: {len(lora.fit.skipped)} keys have no place in this file. Forge leaves out a LoRA with more "
                f"than {MOST_UNMATCHED} such keys; keys of a text encoder that lies in another file do not count."
            )
    if checkpoint.is_scaled_fp8:
        lines.append("The model is scaled fp8: Forge's merge forgets its scales, the guard and 'fp16 LoRA' do not.")
    if checkpoint.architecture is None:
        lines.append("The architecture is not known: tokens are counted as for Flux, the numbers are rough.")
    return lines
