"""Advice for the user, derived from the predictions. Pure. One sentence per line, the most important first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..units import GB, MB
from .limits import RAM_FLOOR_BYTES
from .predict import Effect, ModelFacts, Patch, Prediction, Way

SLIDER_MB = 64
"""Advice for "GPU Weights" is rounded up to multiples of this."""


def advice(model: ModelFacts, patches: Sequence[Patch], predictions: Sequence[Prediction]) -> list[str]:
    """Returns the advice as lines of text.

    Args:
        model: The model.
        patches: The weights with LoRAs.
        predictions: As `predict` returns them: the guard first.
    """
    guard, merge, on_the_fly = predictions
    return [*_guard(model, guard), *_merging(model, patches, merge, guard), *_on_the_fly(model, on_the_fly, guard)]


def _guard(model: ModelFacts, guard: Prediction) -> Iterator[str]:
    if guard.problem:
        yield f"{guard.problem}, and the guard works inside it: use the model in another quantisation."
        return
    if guard.fits:
        numbers = (
            f"{_gb(guard.vram_peak_bytes)} of VRAM and {_gb(guard.ram_peak_bytes)} of RAM at the peak, applied in "
            f"{_seconds(guard.apply_seconds)}"
        )
        if model.not_counted:
            missing = " and ".join(model.not_counted)
            yield (
                f"LoRA Guard needs {numbers}, without {missing}: not in this file and not counted. Add the size of their files "
                "to the RAM, and compare with what is there."
            )
        else:
            yield f"LoRA Guard fits: {numbers}."
    yield from _memory(guard)
    if guard.swapped_bytes:
        smaller = "fp8, NF4 or GGUF" if model.wide else "NF4 or GGUF Q4"
        yield f"{_gb(guard.swapped_bytes)} of the model are swapped and copied in every step: {smaller} would be faster."


def _memory(prediction: Prediction) -> Iterator[str]:
    if prediction.excess_bytes:
        lower = -(-prediction.excess_bytes // (SLIDER_MB * MB)) * SLIDER_MB
        if prediction.weights_on_gpu_bytes >= lower * MB:
            yield f"{prediction.way.value}: lower GPU Weights by {lower} MB, or the peak will not fit into VRAM."
        else:
            yield f"{prediction.way.value}: VRAM too small even without weights on the GPU: draw a smaller picture."
    if prediction.ram_short_bytes and not prediction.backup_bytes:
        yield (
            f"{prediction.way.value}: RAM too small: it would need {_gb(prediction.ram_peak_bytes)} and {_gb(RAM_FLOOR_BYTES)} for "
            "the system; use a smaller model file, or expect the page file to be used."
        )


def _merging(model: ModelFacts, patches: Sequence[Patch], merge: Prediction, guard: Prediction) -> Iterator[str]:
    if merge.problem:
        if merge.problem != guard.problem:
            yield f"{merge.problem}. Use LoRA Guard or 'Automatic (fp16 LoRA)'."
        return
    formats = ", ".join(sorted({patch.format for patch in patches if not patch.wide}))
    if merge.effect is Effect.MOSTLY_LOST:
        yield (
            f"This LoRA has little or no effect when merged into {formats} (Forge's 'Automatic'), which rounds it away: use LoRA Guard "
            "or 'Automatic (fp16 LoRA)'."
        )
    if merge.ram_short_bytes:
        yield (
            f"RAM too small for Forge's backup ({_gb(merge.backup_bytes)}): 'Automatic' would need {_gb(merge.ram_peak_bytes)} and "
            f"{_gb(RAM_FLOOR_BYTES)} for the system. Without them it takes minutes in the page file, or the process dies."
        )
    yield from (line for line in _memory(merge) if merge.excess_bytes > guard.excess_bytes)
    if model.wide:
        yield (
            f"Forge merges into 16-bit models whatever is chosen, and keeps the backup of {_gb(merge.backup_bytes)} in RAM while "
            "the model is on the GPU."
        )


def _on_the_fly(model: ModelFacts, on_the_fly: Prediction, guard: Prediction) -> Iterator[str]:
    if model.wide or on_the_fly.problem:
        return
    if on_the_fly.excess_bytes > guard.excess_bytes:
        yield from _memory(on_the_fly)
    if guard.extra_step_seconds > 0 and on_the_fly.extra_step_seconds > 2 * guard.extra_step_seconds:
        times = on_the_fly.extra_step_seconds / guard.extra_step_seconds
        yield f"{Way.FORGE_ON_THE_FLY.value} costs about {times:.0f} times as much extra time per step as the guard."


def _gb(count: int) -> str:
    return f"{count / GB:.1f} GB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s"
