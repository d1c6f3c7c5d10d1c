"""The plan as a page of text. Names from files are printed as plain `Text`, never as markup."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..checkpoints.lora_header import counted
from ..files import shown
from ..messages import Message
from ..messages.catalogue import ENGLISH
from ..planning.mode import Wish
from ..planning.predict import INFERENCE_BYTES, Prediction
from ..planning.rates import CPU_MERGE_VALUES, EFFICIENCY, GIGA, GpuRates
from ..units import GB, MB
from .answer import answer, counted_beside
from .page import MESSAGE_CHARACTERS, say
from .plan import PlanResult, not_in_file
from .plan_json import part_bytes
from .stack import StackedLora

ANSWER_CHARACTERS = 600
"""Characters shown of the answer."""

_PARTS = {"denoiser": "U-Net or transformer", "text_encoders": "text encoders", "vae": "VAE", "other": "other"}

_ROWS: tuple[tuple[str, Callable[[Prediction], str]], ...] = (
    ("VRAM peak while sampling", lambda p: _gb(p.vram_peak_bytes)),
    ("model on the GPU", lambda p: _gb(p.weights_on_gpu_bytes)),
    ("model swapped to RAM", lambda p: _gb(p.swapped_bytes)),
    ("LoRA on the GPU", lambda p: _gb(p.factor_bytes)),
    ("RAM peak", lambda p: _gb(p.ram_peak_bytes)),
    ("of it backups", lambda p: _gb(p.backup_bytes)),
    ("time to apply", lambda p: f"{p.apply_seconds:.1f} s"),
    ("time to change a strength", lambda p: f"{p.change_seconds:.1f} s"),
    ("extra time per step", lambda p: f"{p.extra_step_seconds:.3f} s"),
    ("of the LoRA is left", lambda p: p.effect.value),
)


def print_plan(console: Console, result: PlanResult, notes: Sequence[Message] = (), language: str = ENGLISH) -> None:
    """Prints the answer in one line, then the page.

    Args:
        console: The console.
        result: The plan.
        notes: What was read from the machine or taken for what was asked.
        language: Of the answer and the notes.
    """
    say(console, shown(answer(result).text(language), ANSWER_CHARACTERS), "bold")
    for note in (counted_beside(result), *notes):
        if note is not None:
            say(console, note.text(language))
    say(console, "")
    _print_model(console, result)
    for lora in result.stack.loras:
        _print_lora(console, lora)
    if not result.predictions:
        return
    request = result.request
    say(
        console,
        f"\nPredicted for {request.rates.name}, {_gb(request.vram_bytes)} VRAM free, {_gb(request.ram_bytes)} RAM; "
        f"{request.picture.width}x{request.picture.height}, batch {request.picture.batch}",
        "bold",
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("predicted")
    for prediction in result.predictions:
        table.add_column(prediction.way.value, justify="right")
    for name, cell in _ROWS:
        table.add_row(name, *(cell(prediction) for prediction in result.predictions))
    missing = result.model.not_counted
    table.add_row("fits", *(_fits(prediction, missing) for prediction in result.predictions))
    console.print(table)
    if missing:
        say(
            console,
            f"Not counted, because nothing is known of it: {', '.join(missing)}. Whether all of it fits is open.",
        )
    say(console, _assumed(request.rates))
    if request.wish is not Wish.AUTO:
        say(console, f"LoRA Guard was asked for mode {request.wish.value}; nothing is asked of Forge.")
    say(console, "")
    for line in result.advice:
        say(console, f"- {shown(line, MESSAGE_CHARACTERS)}")


def _print_model(console: Console, result: PlanResult) -> None:
    checkpoint = result.checkpoint
    architecture = checkpoint.architecture.value if checkpoint.architecture else "architecture not known"
    name = shown(checkpoint.header.path.name)
    say(console, f"{name}: {architecture}, {checkpoint.header.container}, {_gb(checkpoint.header.bytes)}", "bold")
    sizes = part_bytes(checkpoint)
    there = ", ".join(f"{_PARTS[part]} {_gb(size)}" for part, size in sizes.items() if size)
    missing = " and ".join(_PARTS[part] for part in not_in_file(checkpoint))
    say(console, f"  {there}" + (f"; {missing} not or not all in this file" if missing else ""))
    formats = checkpoint.formats()
    whole = sum(formats.values()) or 1  # a file of empty tensors
    shares = ", ".join(f"{form} {100 * values / whole:.0f} %" for form, values in formats.most_common(4))
    grown = sum(
        weight.bytes - weight.placed_bytes for weight in result.model.weights if weight.placed_bytes is not None
    )
    growth = f", {_mb(grown)} larger once Forge has loaded it" if grown else ""
    say(console, f"  stored as {shares}" + (" (scaled)" if checkpoint.is_scaled_fp8 else "") + growth)
    say(
        console,
        f"  a step needs {_gb(result.model.activation_bytes)} beside weights (Forge's own estimate: "
        f"{_gb(result.forge_activation_bytes)}, of which its placement sees {_gb(INFERENCE_BYTES)})",
    )


def _print_lora(console: Console, lora: StackedLora) -> None:
    facts = lora.facts
    made_for = (
        f"made for {facts.made_for.value}" if facts.made_for else "made for an architecture that it does not show"
    )
    say(console, f"\n{facts.name}, strength {lora.strength:g}: {made_for}, {_mb(facts.header.bytes)}", "bold")
    ranks = f", rank {counted(facts.ranks)}" if facts.ranks else ""
    dora = f", DoRA on {facts.dora_modules}" if facts.dora_modules else ""
    say(console, f"  {counted(facts.kinds)}{dora}{ranks}, {counted(facts.dtypes)}, {_mb(facts.bytes)} of tensors")
    if lora.fit.refused is not None:
        say(console, f"  CANNOT BE USED: {shown(lora.fit.refused, MESSAGE_CHARACTERS)}", "red")
        return
    say(console, f"  {lora.fit.used} modules used, {len(lora.fit.skipped)} keys skipped, {len(lora.fit.lost)} lost")
    for word, keys in (("skipped", [facts.file.spelled(key) for key in lora.fit.skipped[:1]]), ("lost", lora.fit.lost)):
        if keys:
            say(console, f"  first {word}: {shown(keys[0], MESSAGE_CHARACTERS)}", "yellow" if word == "lost" else "")
    left = lora.fit.left_out
    if left.modules:
        say(console, f"  left out: {left.modules} of {left.of} modules", "yellow" if left.is_much else "")
    for mode, share in sorted(lora.modes.items()):
        say(console, f"  {mode} on {share.count} weights ({', '.join(sorted(share.reasons))}): {_mb(share.bytes)}")


def _fits(prediction: Prediction, missing: Sequence[str]) -> str:
    if not prediction.fits:
        return "NO"
    return "open" if missing else "yes"


def _assumed(rates: GpuRates) -> str:
    return (
        f"Assumed for {rates.name}: memory {rates.memory_bytes_per_second / GIGA:.0f} GB/s, 16-bit matrices {rates.matrix_flops / 1e12:.0f} "
        f"TFLOPS of which {100 * EFFICIENCY:.0f} % are reached, PCIe {rates.pinned / GIGA:.0f} GB/s pinned, {rates.pageable_to_gpu / GIGA:.1f} "
        f"from and {rates.pageable_to_ram / GIGA:.1f} to ordinary RAM, {CPU_MERGE_VALUES / GIGA:g} G weights/s merged on the CPU. "
        "GB are 2^30 bytes except in rates. Times are good to a factor of 2 or 3, and know no page file."
    )


def _gb(count: int) -> str:
    """Returns "9.5 GB", "146 MB" or "0"."""
    if not count:
        return "0"
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / MB:.0f} MB"


def _mb(count: int) -> str:
    return f"{count / MB:.1f} MB"
