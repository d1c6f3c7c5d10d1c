"""Predicts the cost of a stack of LoRAs before anything is loaded: by the guard, and by Forge in its two ways. Pure.

The model is deliberately simple. Sources: Forge dfdcbab6 (`backend/memory_management.py`, `backend/patcher/lora.py`)
for what happens; measurements on an H100 and an H200 with Flux-dev's shapes (docs/gpu.md) for the constants here and in
`rates`.

- Placement is Forge's. Everything goes to the GPU if weights, inference memory and factors fit into the free VRAM.
  Inference memory is 1 GiB (the guard: the need of a step, if larger). Else small weights go first, until max(rest /
  1.3, rest - 1.25 GiB) is full (the guard: `on_card`). The others are swapped: they lie in RAM and are copied, not
  pinned, in every step. The denoiser alone is on the GPU then; text encoders and VAE are in RAM.
- GGUF weights count with their size after baking (`gguf_baked`). Forge places them by their size in the file, the guard
  by the size after baking.
- VRAM peak of sampling = weights on the GPU + activations + the copy of the largest layer for casting or dequantizing +
  factors + workspace of the way. Merging needs three fp32 copies of the largest layer that it patches on the GPU.
- RAM peak = the larger of loading and running. Loading: the file and PROCESS_LOADING_BYTES. Running:
  PROCESS_RUNNING_BYTES, weights not on the GPU, LoRAs, backups, patched copies of swapped weights, and three fp32
  copies of the largest of them.
- The time of a merge is that of moving its backups to RAM, plus merging swapped weights on the CPU. A change moves the
  backups back first. Factors are copied once. FIXED_SECONDS covers the visit of every layer.
- A step takes longer by the larger of operations and traffic of each patched layer, and by the weights that factors
  displace from the GPU.

Accuracy against the measured rows (tests/planning/test_predict.py): RAM within 15 %. VRAM within 10 %, and its part
beside weights within 17 %. Seconds to apply within a factor of 2, to change within 3, both give or take half a second.
Extra per step within 3, give or take 0.02 s. Loading from disk, VAE and text encoding are not included, nor an active
page file, which takes minutes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from ..messages import Message
from ..units import FP32_BYTES
from ..units import GB as GB
from ..units import MB as MB
from .costs import Cost
from .host_memory import PROCESS_LOADING_BYTES, PROCESS_RUNNING_BYTES, swap_budget_bytes
from .limits import RAM_FLOOR_BYTES
from .mode import Mode
from .on_card import swapping_bytes, weights_on_card_bytes
from .rates import CPU_MERGE_VALUES, GpuRates

INFERENCE_BYTES = GB
"""Forge's default: "GPU Weights" is the card's memory less 1024 MB."""
FIXED_SECONDS = 0.1
"""Measured: 0.07 to 0.2 s for a change that moves almost nothing on a model of 57 blocks."""
MERGE_BYTES_PER_VALUE = 34
"""Traffic of Forge's merge in fp32: cast, product, times alpha, added, cast back."""

FORGE_QUANTISES = ("Q4_0", "Q5_0", "Q8_0")
"""GGUF types that Forge can write. It can read the K-types and the others below, but raises when it merges into them.
"""
FORGE_READS = (*FORGE_QUANTISES, "Q4_1", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


class Way(str, Enum):
    """A way to apply LoRAs. The value is shown in tables."""

    GUARD = "LoRA Guard"
    FORGE_MERGE = "Forge Automatic"
    FORGE_ON_THE_FLY = "Forge fp16 LoRA"


class Effect(str, Enum):
    """The part of the LoRA that remains visible in the image."""

    WHOLE = "whole"
    NEARLY_WHOLE = "nearly whole"
    MOSTLY_LOST = "mostly lost"
    NONE = "none"


@dataclass(frozen=True)
class Weight:
    """One parameter of the denoiser, in memory and with its scales."""

    key: str
    values: int
    bytes: int
    placed_bytes: int | None = None
    """The size that Forge places by at the first load; None if equal to `bytes` (see `gguf_baked`)."""


@dataclass(frozen=True)
class ModelFacts:
    """The model file."""

    weights: Sequence[Weight]
    other_bytes: int
    """Text encoders, VAE and the rest, which are in RAM while the denoiser is on the GPU."""
    wide: bool
    activation_bytes: int
    """Used by a step (`activations.step`)."""
    compute_bytes: int
    held_bytes: int = 0
    """Held by torch for a step (`activations.step`)."""
    is_unet: bool = False
    not_counted: Sequence[str] = ()
    """Names of the parts that an image needs and that are not in the file: their size is in no number."""

    @property
    def denoiser_bytes(self) -> int:
        """All weights of the denoiser."""
        return sum(weight.bytes for weight in self.weights)


@dataclass(frozen=True)
class Patch:
    """One parameter with LoRAs."""

    key: str
    values: int
    bytes: int
    format: str
    wide: bool
    in_denoiser: bool
    mode: Mode
    file_bytes: int
    guard: Cost
    """Cost of applying them without a merge, by the guard."""
    forge: Cost
    """The same by Forge."""
    has_norms: bool = False
    """A DoRA: the guard reads the whole weight once for its norms."""


@dataclass(frozen=True)
class Prediction:
    """The predicted costs of one way."""

    way: Way
    effect: Effect
    problem: str | None
    """The reason if this way does not work at all; the numbers are those it would have needed."""
    weights_on_gpu_bytes: int
    swapped_bytes: int
    factor_bytes: int
    vram_peak_bytes: int
    excess_bytes: int
    """VRAM missing at the peak."""
    backup_bytes: int
    ram_peak_bytes: int
    ram_short_bytes: int
    """RAM missing at the peak if RAM_FLOOR_BYTES stay free."""
    apply_seconds: float
    change_seconds: float
    extra_step_seconds: float

    @property
    def fits(self) -> bool:
        """True if the way works and no memory is missing."""
        return not (self.excess_bytes or self.ram_short_bytes or self.problem)


def predict(
    model: ModelFacts,
    patches: Sequence[Patch],
    vram_bytes: int,
    ram_bytes: int,
    rates: GpuRates,
    spills: bool = False,
) -> tuple[Prediction, Prediction, Prediction]:
    """Predicts the guard, Forge "Automatic" and Forge "fp16 LoRA", in this order.

    Args:
        model: The model file.
        patches: The weights with LoRAs.
        vram_bytes: VRAM that Forge finds free.
        ram_bytes: Installed RAM.
        rates: The card's speeds.
        spills: The driver goes on in RAM where VRAM ends, as on Windows.
    """
    room = _Room(model, patches, vram_bytes, ram_bytes, rates, spills)
    # Forge merges into 16-bit weights in either mode.
    on_the_fly = room.forge_merge(Way.FORGE_ON_THE_FLY) if model.wide else room.forge_on_the_fly()
    return room.guard(), room.forge_merge(Way.FORGE_MERGE), on_the_fly


def swapped_keys(
    weights: Iterable[Weight],
    vram_bytes: int,
    inference_bytes: int,
    budget_bytes: Callable[[float, float], int] = swap_budget_bytes,
) -> frozenset[str]:
    """Returns the weights that stay in RAM.

    Args:
        weights: The denoiser's weights.
        vram_bytes: Free VRAM.
        inference_bytes: The slider's rest and reserved bytes.
        budget_bytes: The placement rule; Forge's own by default.
    """
    by_size = sorted(weights, key=lambda weight: weight.bytes)
    rest = vram_bytes - inference_bytes
    if sum(weight.bytes for weight in by_size) <= rest:
        return frozenset()
    budget = budget_bytes(vram_bytes, inference_bytes)
    placed, swapped = 0, set()
    for weight in by_size:
        if placed + weight.bytes < budget:
            placed += weight.bytes
        else:
            swapped.add(weight.key)
    return frozenset(swapped)


class _Room:
    """One model on one machine."""

    def __init__(
        self,
        model: ModelFacts,
        patches: Sequence[Patch],
        vram_bytes: int,
        ram_bytes: int,
        rates: GpuRates,
        spills: bool = False,
    ) -> None:
        self.model, self.patches, self.rates, self.spills = model, patches, rates, spills
        self.vram_bytes, self.ram_bytes = vram_bytes, ram_bytes
        self.file_bytes = sum(patch.file_bytes for patch in patches)
        self.guards_inference_bytes = max(INFERENCE_BYTES, model.held_bytes + self._cast_bytes(is_swapped=False))
        """The guard reserves the need of a step if the slider leaves less (LG-R05), with a LoRA and without."""
        self.as_stored = [w if w.placed_bytes is None else replace(w, bytes=w.placed_bytes) for w in model.weights]
        """Sizes that Forge places by; the guard uses the sizes after baking."""

    def guard(self) -> Prediction:
        problem = self._unreadable()
        carried = [patch for patch in self.patches if patch.mode is not Mode.MERGE]
        merged = [patch for patch in self.patches if patch.mode is Mode.MERGE]
        factors = sum(patch.guard.resident_bytes for patch in carried if patch.in_denoiser)
        swapped = self._swapped_by_guard(factors)
        backup = sum(patch.bytes for patch in merged)
        workspace = max((patch.guard.workspace_bytes for patch in carried if patch.in_denoiser), default=0)
        # Swapped weights are merged on the GPU too: there and back.
        merging = backup / self.rates.pageable_to_ram + sum(
            patch.bytes / self.rates.pageable_to_gpu for patch in merged if patch.key in swapped
        )
        norms = sum(
            patch.values * FP32_BYTES / self.rates.stream
            + (patch.bytes / self.rates.pageable_to_gpu if patch.key in swapped else 0.0)
            for patch in carried
            if patch.has_norms
        )
        return self._prediction(
            Way.GUARD,
            Effect.NONE if problem else Effect.WHOLE,
            problem,
            swapped,
            factors,
            during_step=workspace,
            backup=backup,
            ram=backup,
            apply_seconds=factors / self.rates.pageable_to_gpu + merging + norms,
            change_seconds=merging + backup / self.rates.pageable_to_gpu,
            step_seconds=sum(self._step_seconds(patch.guard) for patch in carried),
            without=self._swapped_by_guard(0),
        )

    def forge_on_the_fly(self) -> Prediction:
        factors = sum(patch.forge.resident_bytes for patch in self.patches if patch.in_denoiser)
        problem = self._unreadable()
        moved = factors / self.rates.pageable_to_gpu
        return self._prediction(
            Way.FORGE_ON_THE_FLY,
            Effect.NONE if problem else Effect.WHOLE,
            problem,
            self._swapped(factors),
            factors,
            during_step=max((patch.forge.workspace_bytes for patch in self.patches if patch.in_denoiser), default=0),
            backup=0,
            ram=0,
            apply_seconds=moved,
            change_seconds=moved,
            step_seconds=sum(self._step_seconds(patch.forge) for patch in self.patches),
        )

    def forge_merge(self, way: Way) -> Prediction:
        swapped = self._swapped(0)
        on_gpu = [patch for patch in self.patches if patch.key not in swapped]
        on_cpu = [patch for patch in self.patches if patch.key in swapped]
        backup = sum(patch.bytes for patch in self.patches)
        on_gpu_bytes = sum(patch.bytes for patch in on_gpu)
        # A low-bit weight is dequantised to the compute dtype first.
        merging = max(
            (
                patch.values * (3 * FP32_BYTES + (0 if patch.wide else self.model.compute_bytes))
                for patch in on_gpu
                if patch.in_denoiser
            ),
            default=0,
        )
        apply_seconds = (
            on_gpu_bytes / self.rates.pageable_to_ram
            + sum(patch.values for patch in on_gpu) * MERGE_BYTES_PER_VALUE / self.rates.stream
            + sum(patch.values for patch in on_cpu) / CPU_MERGE_VALUES
        )
        problem = self._unreadable() or self._unwritable()
        return self._prediction(
            way,
            Effect.NONE if problem else self._effect_of_merging(),
            problem,
            swapped,
            0,
            during_step=0,
            during_merge=merging,
            backup=backup,
            # The backup of a swapped weight is the weight itself; only its patched copy is new.
            ram=backup + 3 * FP32_BYTES * max((patch.values for patch in on_cpu), default=0),
            apply_seconds=apply_seconds,
            change_seconds=apply_seconds + on_gpu_bytes / self.rates.pageable_to_gpu,
            step_seconds=0.0,
        )

    def _prediction(
        self,
        way: Way,
        effect: Effect,
        problem: str | None,
        swapped: frozenset[str],
        factors: int,
        *,
        during_step: int,
        backup: int,
        ram: int,
        apply_seconds: float,
        change_seconds: float,
        step_seconds: float,
        during_merge: int = 0,
        without: frozenset[str] | None = None,
    ) -> Prediction:
        """Assembles a prediction. `without`: the swapped weights without a LoRA; None uses Forge's rule."""
        model = self.model
        swapped_bytes = self._swapped_bytes(swapped)
        on_gpu = model.denoiser_bytes - swapped_bytes
        cast = self._cast_bytes(is_swapped=bool(swapped))
        vram = on_gpu + max(model.activation_bytes + cast + factors + during_step, during_merge)
        running = PROCESS_RUNNING_BYTES + model.other_bytes + swapped_bytes + self.file_bytes + ram
        ram_peak = max(PROCESS_LOADING_BYTES + model.other_bytes + model.denoiser_bytes, running)
        if without is None:
            without = self._swapped(0)
        more_swapped = max(0, swapped_bytes - self._swapped_bytes(without))
        return Prediction(
            way=way,
            effect=effect,
            problem=problem,
            weights_on_gpu_bytes=on_gpu,
            swapped_bytes=swapped_bytes,
            factor_bytes=factors,
            vram_peak_bytes=vram,
            excess_bytes=max(0, vram - self.vram_bytes),
            backup_bytes=backup,
            ram_peak_bytes=ram_peak,
            ram_short_bytes=max(0, ram_peak + RAM_FLOOR_BYTES - self.ram_bytes),
            apply_seconds=FIXED_SECONDS + apply_seconds,
            change_seconds=FIXED_SECONDS + change_seconds,
            extra_step_seconds=step_seconds + more_swapped / self.rates.pageable_to_gpu,
        )

    def _swapped(self, reserved_bytes: int) -> frozenset[str]:
        return swapped_keys(self.as_stored, self.vram_bytes, INFERENCE_BYTES + reserved_bytes)

    def _swapped_by_guard(self, reserved_bytes: int) -> frozenset[str]:
        inference = self.guards_inference_bytes + reserved_bytes
        largest = max((weight.values for weight in self.model.weights), default=0) * self.model.compute_bytes
        left = swapping_bytes(largest, self.model.is_unet, self.spills)
        rule = functools.partial(weights_on_card_bytes, swapping=left)
        return swapped_keys(self.model.weights, self.vram_bytes, inference, rule)

    def _cast_bytes(self, is_swapped: bool) -> int:
        """Returns the size of the copy of the largest layer that casting, dequantizing or swapping makes."""
        value_bytes = self.model.compute_bytes
        cast = (w.values for w in self.model.weights if is_swapped or w.bytes != w.values * value_bytes)
        return max(cast, default=0) * value_bytes

    def _swapped_bytes(self, keys: frozenset[str]) -> int:
        return sum(weight.bytes for weight in self.model.weights if weight.key in keys)

    def _step_seconds(self, cost: Cost) -> float:
        return max(cost.step_flops / self.rates.flops, cost.step_bytes / self.rates.stream)

    def _unreadable(self) -> str | None:
        """Returns the problem if Forge treats a GGUF type as plain bytes."""
        odd = sorted({p.format for p in self.patches if p.format[:2] in ("IQ", "TQ") or p.format in ("MXFP4", "NVFP4")})
        return Message("advice.unreadable", {"formats": ", ".join(odd)}) if odd else None

    def _unwritable(self) -> str | None:
        odd = sorted({p.format for p in self.patches if p.format in FORGE_READS and p.format not in FORGE_QUANTISES})
        return Message("advice.unwritable", {"formats": ", ".join(odd)}) if odd else None

    def _effect_of_merging(self) -> Effect:
        """Measured: layers show 0.1 % of a LoRA merged into fp8, 1.5 % in NF4, 95 % in Q8_0, all of it in 16 bit."""
        formats = {patch.format for patch in self.patches if not patch.wide}
        if not formats:
            return Effect.WHOLE
        return Effect.NEARLY_WHOLE if formats == {"Q8_0"} else Effect.MOSTLY_LOST
