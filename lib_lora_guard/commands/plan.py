"""`lora-guard plan`: predicts the cost of a stack of LoRAs on a model from the headers of the files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.lora_header import read_facts
from ..checkpoints.model_header import DENOISER, TEXT, VAE, Checkpoint, read_checkpoint
from ..checkpoints.part_files import PartBeside, kind_names, parts_beside, read_parts
from ..errors import LoraMismatchError, about
from ..messages import Message
from ..models.text import T5, find_encoders, missing_encoders
from ..planning import activations
from ..planning.advice import advice
from ..planning.host_memory import Latent, unet_estimate_bytes
from ..planning.instead import Instead, Saving, instead
from ..planning.limits import RAM_FLOOR_BYTES
from ..planning.mode import Wish
from ..planning.predict import ModelFacts, Patch, Prediction, Weight, predict
from ..planning.rates import GpuRates
from ..planning.tokens import Picture, Tokens, tokens_for
from ..planning.usual_parts import T5_FP8, VAE_KIND
from .stack import Stack, plan_stack


@dataclass(frozen=True)
class PlanRequest:
    """The user's request. `vram_bytes` is what Forge finds free, `ram_bytes` what is installed, `beside` are files of text
    encoders and VAE."""

    model: Path
    loras: Sequence[tuple[Path, float]]
    vram_bytes: int
    ram_bytes: int
    picture: Picture
    rates: GpuRates
    wish: Wish = Wish.AUTO
    beside: Sequence[Path] = ()


@dataclass(frozen=True)
class PlanResult:
    """The result of `plan`.

    Attributes:
        beside: Text encoders and VAE outside the model file: those given, and what is assumed for the rest.
        unknown: The kinds of parts, of `models.text` or VAE_KIND, that an image needs and whose size is not known.
        predictions: The guard's first; none if no LoRA can be used.
        instead: What would fit, or would not be swapped; None if nothing is known.
    """

    request: PlanRequest
    checkpoint: Checkpoint
    model: ModelFacts
    tokens: Tokens
    forge_activation_bytes: int
    stack: Stack
    beside: list[PartBeside]
    unknown: list[str]
    predictions: tuple[Prediction, ...]
    instead: Instead | None
    advice: list[Message]

    def check_usable(self) -> None:
        """Checks that a LoRA can be used.

        Raises:
            LoraMismatchError: The model can use none of them.
        """
        reasons = [about(lora.facts.name, lora.fit.refused) for lora in self.stack.loras if lora.fit.refused]
        if reasons and len(reasons) == len(self.stack.loras):
            more = {"message": reasons[0], "count": len(reasons) - 1}
            raise LoraMismatchError(Message("log.alike", more) if len(reasons) > 1 else reasons[0])


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
    given = [part for path in request.beside for part in read_parts(path, compute_bytes)]
    beside, unknown = parts_beside(checkpoint, given)
    model = model_facts(checkpoint, tokens, request.picture, compute_bytes, beside, unknown)
    predictions: tuple[Prediction, ...] = ()
    lines: list[Message] = []
    other = None
    if stack.patches or not request.loras:
        predictions = predict(
            model, stack.patches, request.vram_bytes, request.ram_bytes, request.rates, sys.platform == "win32"
        )
        other = _instead(request, checkpoint, model, stack, beside, predictions[0])
        lines = [*advice(model, stack.patches, predictions), *_beside(checkpoint, stack)]
    latent = Latent.of(request.picture.width, request.picture.height, request.picture.batch)
    estimate = int(unet_estimate_bytes(latent, compute_bytes))
    return PlanResult(request, checkpoint, model, tokens, estimate, stack, beside, unknown, predictions, other, lines)


def _instead(
    request: PlanRequest,
    checkpoint: Checkpoint,
    model: ModelFacts,
    stack: Stack,
    beside: Sequence[PartBeside],
    guard: Prediction,
) -> Instead | None:
    """Searches what would fit, or what would stay on the card where the model is swapped."""
    if guard.problem or (guard.fits and not guard.swapped_bytes):
        return None

    def predicted(other: ModelFacts, patches: Sequence[Patch]) -> Prediction:
        spills = sys.platform == "win32"
        return predict(other, patches, request.vram_bytes, request.ram_bytes, request.rates, spills)[0]

    def good(prediction: Prediction) -> bool:
        spare = prediction.ram_peak_bytes * SPARE_SHARE
        if not prediction.fits or prediction.ram_peak_bytes + spare + RAM_FLOOR_BYTES > request.ram_bytes:
            return False
        return not (guard.fits and prediction.swapped_bytes)

    matrices = frozenset(p.name for p in checkpoint.of_part(DENOISER) if p.is_layer)
    wide = [part.bytes for part in beside if part.kinds and set(part.kinds) <= {T5} and not part.is_assumed]
    text = Saving(T5_FILE, sum(wide) - T5_FP8.bytes) if sum(wide) > T5_FP8.bytes else None
    architecture = checkpoint.architecture.value if checkpoint.architecture else None
    return instead(model, stack.patches, matrices, text, predicted, architecture, good)


SPARE_SHARE = 0.05
"""Share of the RAM that another file must leave unused, because predictions are not exact."""
T5_FILE = "t5xxl_fp8_e4m3fn.safetensors"
"""The usual name of T5-XXL's encoder in fp8."""


def model_facts(
    checkpoint: Checkpoint,
    tokens: Tokens,
    picture: Picture,
    compute_bytes: int,
    beside: Sequence[PartBeside] = (),
    unknown: Sequence[str] = (),
) -> ModelFacts:
    """Returns the facts of a checkpoint that the predictions need.

    Args:
        checkpoint: The model file.
        tokens: What the denoiser's layers see.
        picture: The image.
        compute_bytes: Bytes of one number in the compute dtype.
        beside: Parts that lie in other files.
        unknown: Kinds of parts that an image needs and that nothing is known of.
    """
    denoiser = checkpoint.of_part(DENOISER)
    shapes = {parameter.name: parameter.shape for parameter in denoiser}
    formats = checkpoint.formats()
    most = formats.most_common(1)[0][0] if formats else ""
    step = activations.step(tokens, picture, shapes, compute_bytes)
    return ModelFacts(
        weights=[
            Weight(p.name, p.values, p.memory_bytes(compute_bytes), p.placed_bytes(compute_bytes)) for p in denoiser
        ],
        other_bytes=sum(p.memory_bytes(compute_bytes) for p in checkpoint.parameters.values() if p.part != DENOISER)
        + sum(part.bytes for part in beside),
        wide=any(p.wide for p in denoiser if p.is_layer and p.format == most),
        activation_bytes=step.used_bytes,
        compute_bytes=compute_bytes,
        held_bytes=step.held_bytes,
        is_unet=tokens.is_unet,
        not_counted=kind_names(unknown),
    )


def not_in_file(checkpoint: Checkpoint) -> list[str]:
    """Returns the parts that an image needs and that the model file lacks, in whole or in part."""
    return [
        part for part in (TEXT, VAE) if not checkpoint.of_part(part) or (part == TEXT and encoders_missing(checkpoint))
    ]


def not_counted(unknown: Sequence[str]) -> list[str]:
    """Returns the parts of the model that `unknown` kinds belong to."""
    parts = [TEXT] if any(kind != VAE_KIND for kind in unknown) else []
    return [*parts, *([VAE] if VAE_KIND in unknown else [])]


def encoders_missing(checkpoint: Checkpoint) -> list[str]:
    """Returns the kinds of text encoders, of `models.text`, that an image needs and that the model file lacks."""
    return missing_encoders(checkpoint.architecture, find_encoders(checkpoint.shapes).values())


MOST_UNMATCHED = 12
"""Forge drops a LoRA that has more keys left over than this."""


def _beside(checkpoint: Checkpoint, stack: Stack) -> list[Message]:
    """Returns warnings that the numbers do not show."""
    lines = []
    for lora in stack.loras:
        name = lora.facts.name
        if lora.fit.refused:
            lines.append(Message("advice.cannot_be_used", {"name": name, "why": lora.fit.refused}))
        if lora.unknown_to_forge:
            lines.append(Message("advice.unknown_to_forge", {"kinds": ", ".join(lora.unknown_to_forge), "name": name}))
        if lora.fit.lost:
            lines.append(Message("advice.lost", {"name": name, "count": len(lora.fit.lost)}))
        if len(lora.fit.skipped) > MOST_UNMATCHED and not lora.fit.refused:
            facts = {"name": name, "count": len(lora.fit.skipped), "most": MOST_UNMATCHED}
            lines.append(Message("advice.unmatched", facts))
    if checkpoint.is_scaled_fp8:
        lines.append(Message("advice.scaled_fp8"))
    if checkpoint.architecture is None:
        lines.append(Message("advice.unknown_architecture"))
    return lines
