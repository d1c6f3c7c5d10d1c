"""Predicts the outcome of a field report with the guard. Uses the functions that the guard plans with; nothing is
measured. Pure, without torch.

Simulates one image with a new prompt: the text encoder is loaded, the denoiser, the VAE's decoder.
`eviction.plan_eviction` makes room. A step needs what `activations.step` predicts (at least the slider's rest) and the
LoRAs' factors. Weights that do not fit are swapped by the rule of `on_card`. Factors lie beside the weights (bypass),
so there is no backup and no merge. RAM is counted as in `predict`. For the same image `host` simulates Forge: a failure
counts only if this arithmetic explains it.

Not included: single layers, so that sizes on the card are up to one layer off; the page file, which no report mentions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from ..messages import Message
from ..planning import activations
from ..planning.activations import Activations
from ..planning.eviction import Coming, Resident, plan_eviction
from ..planning.host_memory import PROCESS_LOADING_BYTES, PROCESS_RUNNING_BYTES, Latent, swap_budget_bytes
from ..planning.limits import RAM_FLOOR_BYTES
from ..planning.on_card import swapping_bytes, weights_on_card_bytes
from ..planning.rates import PAGEABLE_TO_GPU
from ..planning.tokens import tokens_for
from ..units import FP32_BYTES, GB, MB
from . import forge_memory as forge
from .field_cases import FieldCase, Outcome
from .forge_memory import Request
from .guard_readings import ELSEWHERE, MISSING, NO_VRAM, Reading, readings
from .replay import GuardOutcome

SLOW_COPY_BYTES = int(PAGEABLE_TO_GPU)
"""A step that copies more weights counts as slow: a second of copying."""
TEXT_ENCODER_PASSES, VAE_PASSES = 2, 1
"""As in `hosts.forge.memory`."""
WIDE_BYTES = 2
BADNESS = {Outcome.OK: 0, Outcome.SLOW: 1, Outcome.REFUSED: 2, Outcome.OOM: 2}


@dataclass(frozen=True)
class Placed:
    """One way to run one image."""

    on_card_bytes: int
    copied_bytes: int
    """Weights copied in a step."""
    left_bytes: int
    """VRAM beside the denoiser's weights during a step."""
    peak_bytes: int
    """VRAM used at the peak of a step."""
    ram_bytes: int
    """RAM needed."""
    calls: int = 1
    """Calls of the denoiser in a step."""
    moved_bytes: int = 0
    """Bytes over the bus for a new prompt, until the denoiser is whole again."""


def guard_outcome(case: FieldCase) -> GuardOutcome | None:
    """Returns the outcome with the guard; None if too little is known, or if this arithmetic does not give the reported
    failure (`missing` says which).
    """
    if case.number in ELSEWHERE:
        return GuardOutcome(case.outcome, f"unchanged: {ELSEWHERE[case.number]}")
    judged = []
    for reading in readings(case):
        cause = explained(case.outcome, reading)
        if cause is not None:
            judged.append((reading, cause, *judge(reading, died_of_ram=_died_of_ram(case.outcome))))
    if not judged:
        return None
    reading, cause, outcome, placed = max(judged, key=lambda one: (BADNESS[one[2]], one[0].denoiser_bytes))
    words = _why(reading, cause, outcome, placed)
    if len(readings(case)) > 1:
        found = ", ".join(f"{one[0].storage} {one[2].value}" for one in judged)
        words += f"; the exact storage is not named, and of those that give this failure the worst counts ({found})"
    return GuardOutcome(outcome, words, _numbers(reading, placed))


def missing(case: FieldCase) -> str | None:
    """Returns the reason why there is no outcome; None if there is one."""
    if guard_outcome(case) is not None:
        return None
    if case.number in MISSING:
        return MISSING[case.number]
    found = readings(case)
    if not found:
        return NO_VRAM
    if _died_of_ram(case.outcome) and found[0].ram_bytes is None:
        return "the RAM that ran out is not known"
    return "by this arithmetic Forge has enough memory too: what went wrong is not known"


def judge(reading: Reading, died_of_ram: bool = False) -> tuple[Outcome, Placed]:
    """Returns the outcome and the placement with the guard.

    `died_of_ram`: the page file was too small for Forge's need, so that no other use of it is assumed.
    """
    placed = guard(reading)
    pages = reading.ram_bytes is not None and placed.ram_bytes > _fast_ram_bytes(reading.ram_bytes)
    if pages and died_of_ram:
        return Outcome.REFUSED, placed
    if placed.peak_bytes > reading.free_bytes:
        return Outcome.OOM, placed
    # Other users have read the same files there, so there is a page file for them.
    return (Outcome.SLOW if pages or placed.copied_bytes > SLOW_COPY_BYTES else Outcome.OK), placed


def explained(outcome: Outcome, reading: Reading) -> str | None:
    """Returns the behaviour of Forge that ends in `outcome`; None if this arithmetic gives no reason for it.

    A failed merge is named in the log. Without a failure there is nothing to explain.
    """
    if outcome is Outcome.OK:
        return "Forge does it"
    merges = reading.loras > 0 and not reading.online
    if outcome is Outcome.OOM_IN_MERGE:
        peak = forge.merge_peak_bytes(reading.largest_values) / MB
        return (
            f"Forge merges with {peak:.0f} MB of fp32 copies of a layer, which no estimate counts" if merges else None
        )
    stock, step = host(reading), _step(reading)
    if outcome is Outcome.OOM:
        if stock.peak_bytes <= reading.free_bytes:
            return None
        needed = (stock.peak_bytes - reading.free_bytes + stock.left_bytes) / MB
        return f"Forge leaves {stock.left_bytes / MB:.0f} MB beside the weights for a step that uses {needed:.0f}"
    if reading.ram_bytes is not None and stock.ram_bytes > _fast_ram_bytes(reading.ram_bytes):
        of = "the models and copies of all weights with a LoRA" if merges else "the models"
        return f"Forge needs {stock.ram_bytes / MB:.0f} MB of RAM for {of}"
    if outcome is not Outcome.SLOW:
        return None
    if stock.left_bytes < step.held_bytes:
        left, held = stock.left_bytes / MB, step.held_bytes / MB
        return f"Forge leaves {left:.0f} MB beside the weights for a step that holds {held:.0f}"
    if stock.copied_bytes > SLOW_COPY_BYTES:
        return f"Forge copies {stock.copied_bytes / MB:.0f} MB of weights in every step"
    if merges and stock.copied_bytes:
        return f"Forge merges {stock.copied_bytes / MB:.0f} MB of swapped weights on the processor"
    return "Forge merges into every temporary weight in every step" if reading.online else None


def guard(reading: Reading) -> Placed:
    """Places the image by the guard's own plan."""
    step, factors = _step(reading), reading.lora_bytes
    need = max(reading.inference_bytes, step.held_bytes + _cast_bytes(reading)) + factors
    text, vae, free = reading.text_bytes, reading.vae_bytes, reading.free_bytes
    # The first image: the text encoder on an empty card, then the denoiser.
    text_away = plan_eviction(Coming(text, text, TEXT_ENCODER_PASSES), reading.inference_bytes, free, []).swapped_bytes
    there = text - text_away
    plan = plan_eviction(Coming(reading.denoiser_bytes, 0, None), need, free - there, [Resident(there, there, False)])
    there -= plan.leaving_bytes[0]
    budget = functools.partial(weights_on_card_bytes, swapping=_swapping_bytes(reading))
    on_card = _on_card(reading.denoiser_bytes, free - there, need, budget)
    outside = [text - there + reading.denoiser_bytes - on_card + vae]
    denoiser = Resident(on_card, on_card, returns=True)
    # The decoder, and the next prompt.
    for size, passes, wanted, resting in (
        (vae, VAE_PASSES, activations.decode(_latent(reading), _vae_value_bytes(reading)).held_bytes, there),
        (text, TEXT_ENCODER_PASSES, 0, 0),
    ):
        wanted = max(reading.inference_bytes, min(wanted, free))
        residents = [Resident(resting, resting, False), denoiser]
        plan = plan_eviction(Coming(size, size, passes), wanted, free - on_card - resting - factors, residents)
        there_then = resting + on_card - sum(plan.leaving_bytes) + size - plan.swapped_bytes
        outside.append(reading.file_bytes - there_then)
    running = PROCESS_RUNNING_BYTES + max(outside) + factors
    peak, calls = _peak(reading, on_card, step)
    return Placed(
        on_card,
        calls * (reading.denoiser_bytes - on_card),
        free - on_card - factors,
        peak,
        max(PROCESS_LOADING_BYTES + reading.file_bytes, running),
        calls,
        plan.moved_bytes,
    )


def host(reading: Reading) -> Placed:
    """Places the image by Forge's rules. The slider alone decides the placement, a merge keeps a backup of every
    weight, and models are only evicted whole.
    """
    hard = reading.lora_bytes if reading.online else 0
    free, denoiser = reading.free_bytes, reading.denoiser_bytes
    on_card = _on_card(denoiser, free, reading.inference_bytes + hard, swap_budget_bytes)
    left = free - on_card - hard
    rest = reading.inference_bytes
    text = forge.request_bytes(Request(reading.text_bytes, slider_rest_bytes=rest))
    decode = forge.vae_decode_bytes(_latent(reading), _vae_value_bytes(reading))
    vae = forge.request_bytes(Request(reading.vae_bytes, slider_rest_bytes=rest, estimate_bytes=decode))
    leaves = max(text, vae) > left
    merges = reading.loras > 0 and not reading.online
    backup = forge.backup_ram_bytes(on_card, denoiser - on_card) if merges else forge.BackupRam(0, on_card)
    weights = denoiser - on_card + (backup.offloaded_bytes if leaves else backup.placed_bytes)
    running = PROCESS_RUNNING_BYTES + weights + reading.text_bytes + reading.vae_bytes + reading.lora_bytes
    peak, calls = _peak(reading, on_card, _step(reading), hard)
    ram = max(PROCESS_LOADING_BYTES + reading.file_bytes, int(running))
    return Placed(on_card, calls * (denoiser - on_card), left, peak, ram, calls)


def _on_card(size: int, free: int, need: int, budget_bytes: Callable[[float, float], int]) -> int:
    is_whole = forge.place(free, size, 0, need).swap_budget_bytes is None
    return size if is_whole else min(size, budget_bytes(free, need))


def _peak(reading: Reading, on_card: int, step: Activations, factors: int | None = None) -> tuple[int, int]:
    """Returns `(bytes, calls)`. Prompt and negative prompt run one after the other if both at once do not fit."""
    factors = reading.lora_bytes if factors is None else factors
    beside = on_card + factors + _cast_bytes(reading, is_swapped=on_card < reading.denoiser_bytes)
    rows = tokens_for(reading.architecture, reading.picture).rows
    if beside + step.used_bytes <= reading.free_bytes or rows == 1:
        return beside + step.used_bytes, 1
    return beside + -(-step.used_bytes // rows), rows


def _step(reading: Reading) -> Activations:
    return activations.step(
        tokens_for(reading.architecture, reading.picture), reading.picture, {}, reading.compute_bytes
    )


def _swapping_bytes(reading: Reading) -> int:
    """Returns what the guard leaves for swapping, on Windows: most reports name no system, and there it is the most."""
    is_unet = tokens_for(reading.architecture, reading.picture).is_unet
    return swapping_bytes(reading.largest_values * reading.compute_bytes, is_unet, spills=True)


def _cast_bytes(reading: Reading, is_swapped: bool = False) -> int:
    """Returns the size of the copy of the largest layer that casting, dequantizing or swapping makes."""
    is_cast = not reading.is_wide or reading.compute_bytes != WIDE_BYTES
    return reading.largest_values * reading.compute_bytes if is_swapped or is_cast else 0


def _more_products(reading: Reading) -> float:
    """Returns the multiplications of the factors in 16 bit relative to those of the weights: both process the same
    tokens.
    """
    return reading.lora_bytes / 2 / reading.values


def _latent(reading: Reading) -> Latent:
    return Latent.of(reading.picture.width, reading.picture.height, reading.picture.batch)


def _vae_value_bytes(reading: Reading) -> int:
    return FP32_BYTES if reading.architecture == "SDXL" else 2


def _fast_ram_bytes(ram_bytes: int) -> int:
    return max(0, ram_bytes - RAM_FLOOR_BYTES)


def _died_of_ram(outcome: Outcome) -> bool:
    return outcome in (Outcome.RAM_DEATH, Outcome.CRASH)


def _why(reading: Reading, cause: str, outcome: Outcome, placed: Placed) -> str:
    """Describes the outcome in one sentence."""
    fast = None if reading.ram_bytes is None else _fast_ram_bytes(reading.ram_bytes)
    if outcome is Outcome.REFUSED:
        return (
            f'{cause}; unless the page file is larger the guard says instead "{_refusal(reading, placed, fast or 0)}"'
        )
    said = []
    if reading.loras:
        said.append(f"{reading.lora_bytes / MB:.0f} MB of factors run beside the weights")
    if reading.online:
        said.append(f"with {_more_products(reading):.1%} more multiplications a step")
    held = _step(reading).held_bytes
    if held > reading.inference_bytes:
        said.append(f"{min(held, reading.free_bytes) / MB:.0f} MB are kept free for a step")
    if outcome is Outcome.OOM:
        short = (placed.peak_bytes - reading.free_bytes) / MB
        said.append(f"{short:.0f} MB of VRAM are still missing, so draw a smaller picture")
    elif placed.copied_bytes:
        calls = f" in {placed.calls} calls" if placed.calls > 1 else ""
        said.append(f"{placed.copied_bytes / MB:.0f} MB of weights are copied a step{calls}")
    else:
        said.append("the whole model is on the card in every step")
    ram = placed.ram_bytes / MB
    if fast is None:
        said.append(
            f"{ram:.0f} MB of RAM are needed (Forge: {host(reading).ram_bytes / MB:.0f}), how many there are is not known"
        )
    elif placed.ram_bytes > fast:
        said.append(f"{ram:.0f} MB of RAM are needed, {ram - fast / MB:.0f} MB of them from the page file")
    else:
        said.append(f"{ram:.0f} MB of RAM are enough")
    return f"{cause}; with the guard {', '.join(said)}"


def _refusal(reading: Reading, placed: Placed, fast_bytes: int) -> Message:
    """Returns the message of rule LG-R08 before files are read, or, if these fit, before a model is moved, without a
    page file. Memory that the process already holds does not count again.
    """
    loading = PROCESS_LOADING_BYTES + reading.file_bytes
    if loading > fast_bytes:
        what = Message("preflight.reading", {"files": "the model's files"})
        needed, there = reading.file_bytes, fast_bytes - PROCESS_LOADING_BYTES
    else:
        what = Message("preflight.moving", {"model": "the denoiser"})
        needed, there = placed.ram_bytes - PROCESS_RUNNING_BYTES, fast_bytes - PROCESS_RUNNING_BYTES
    facts = {
        "what": what,
        "needed_mb": needed / MB,
        "fast_mb": there / MB,
        "alive_mb": there / MB,
        "more_gb": -(-(needed - there) // GB),
    }
    return Message("rule.line", {"rule": "LG-R08", "says": Message("rule.ram_refused", facts)})


def _numbers(reading: Reading, placed: Placed) -> dict[str, float]:
    stock = host(reading)
    found: dict[str, float | None] = {
        "VRAM free": reading.free_bytes,
        "model": reading.denoiser_bytes,
        "LoRA factors": reading.lora_bytes,
        "a step uses": _step(reading).used_bytes,
        "a step holds": _step(reading).held_bytes,
        "on the card": placed.on_card_bytes,
        "copied a step": placed.copied_bytes,
        "VRAM peak": placed.peak_bytes,
        "moved for a prompt": placed.moved_bytes,
        "RAM needed": placed.ram_bytes,
        "RAM there": None if reading.ram_bytes is None else _fast_ram_bytes(reading.ram_bytes),
        "Forge: copied a step": stock.copied_bytes,
        "Forge: RAM needed": stock.ram_bytes,
    }
    return {name: round(value / MB, 2) for name, value in found.items() if value is not None}
