"""Advice for the user, derived from the predictions. Pure. One sentence per line, the most important first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..messages import Joined, Message
from ..units import GB, MB
from .limits import RAM_FLOOR_BYTES
from .predict import Effect, ModelFacts, Patch, Prediction, Way

SLIDER_MB = 64
"""Advice for "GPU Weights" is rounded up to multiples of this."""


def advice(model: ModelFacts, patches: Sequence[Patch], predictions: Sequence[Prediction]) -> list[Message]:
    """Returns the advice as sentences.

    Args:
        model: The model.
        patches: The weights with LoRAs; without any, nothing is said of Forge's ways to apply them.
        predictions: As `predict` returns them: the guard first.
    """
    guard, merge, on_the_fly = predictions
    lines = [*_guard(model, guard, has_loras=bool(patches))]
    return (
        [*lines, *_merging(model, patches, merge, guard), *_on_the_fly(model, on_the_fly, guard)] if patches else lines
    )


def _guard(model: ModelFacts, guard: Prediction, *, has_loras: bool) -> Iterator[Message]:
    if guard.problem:
        yield Message("advice.other_quantisation", {"problem": guard.problem})
        return
    if guard.fits:
        gb = {"vram": guard.vram_peak_bytes / GB, "ram": guard.ram_peak_bytes / GB}
        peak = Message("advice.peak_alone", gb)
        if has_loras:
            peak = Message("advice.peak", {**gb, "seconds": guard.apply_seconds})
        if model.not_counted:
            yield Message("advice.needs", {"peak": peak, "missing": Joined(model.not_counted, "list.and")})
        else:
            yield Message("advice.fits", {"peak": peak})
    yield from _memory(guard)
    if guard.swapped_bytes:
        smaller = Message("advice.smaller_wide" if model.wide else "advice.smaller")
        yield Message("advice.swapped", {"gb": guard.swapped_bytes / GB, "smaller": smaller})


def _memory(prediction: Prediction) -> Iterator[Message]:
    way = prediction.way.value
    if prediction.excess_bytes:
        lower = -(-prediction.excess_bytes // (SLIDER_MB * MB)) * SLIDER_MB
        if prediction.weights_on_gpu_bytes >= lower * MB:
            yield Message("advice.lower", {"way": way, "mb": lower})
        else:
            yield Message("advice.smaller_picture", {"way": way})
    if prediction.ram_short_bytes and not prediction.backup_bytes:
        gb = {"needed": prediction.ram_peak_bytes / GB, "system": RAM_FLOOR_BYTES / GB}
        yield Message("advice.ram", {"way": way, **gb})


def _merging(model: ModelFacts, patches: Sequence[Patch], merge: Prediction, guard: Prediction) -> Iterator[Message]:
    if merge.problem:
        if merge.problem != guard.problem:
            yield Message("advice.not_merged", {"problem": merge.problem})
        return
    formats = ", ".join(sorted({patch.format for patch in patches if not patch.wide}))
    if merge.effect is Effect.MOSTLY_LOST:
        yield Message("advice.rounded", {"formats": formats})
    backup = merge.backup_bytes / GB
    if merge.ram_short_bytes and merge.backup_bytes:
        gb = {"needed": merge.ram_peak_bytes / GB, "system": RAM_FLOOR_BYTES / GB}
        yield Message("advice.backup", {"backup": backup, **gb})
    yield from (line for line in _memory(merge) if merge.excess_bytes > guard.excess_bytes)
    if model.wide:
        yield Message("advice.always_merged", {"backup": backup})


def _on_the_fly(model: ModelFacts, on_the_fly: Prediction, guard: Prediction) -> Iterator[Message]:
    if model.wide or on_the_fly.problem:
        return
    if on_the_fly.excess_bytes > guard.excess_bytes:
        yield from _memory(on_the_fly)
    if guard.extra_step_seconds > 0 and on_the_fly.extra_step_seconds > 2 * guard.extra_step_seconds:
        times = on_the_fly.extra_step_seconds / guard.extra_step_seconds
        yield Message("advice.slower", {"way": Way.FORGE_ON_THE_FLY.value, "times": times})
