"""The plan as a page of text. Names from files are printed as plain `Text`, never as markup."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..checkpoints.lora_header import counted
from ..files import shown
from ..messages import Joined, Message
from ..messages.catalogue import ENGLISH
from ..planning.mode import Wish
from ..planning.predict import INFERENCE_BYTES, Prediction
from ..planning.rates import CPU_MERGE_VALUES, EFFICIENCY, GIGA, GpuRates
from ..units import GB, MB
from .answer import answer, counted_beside
from .page import MESSAGE_CHARACTERS, Page
from .plan import PlanResult, not_in_file
from .plan_json import part_bytes
from .stack import StackedLora

ANSWER_CHARACTERS = 600
"""Characters shown of the answer."""

_ROWS: tuple[tuple[str, Callable[[Prediction], str]], ...] = (
    ("vram", lambda p: _gb(p.vram_peak_bytes)),
    ("on_gpu", lambda p: _gb(p.weights_on_gpu_bytes)),
    ("swapped", lambda p: _gb(p.swapped_bytes)),
    ("lora", lambda p: _gb(p.factor_bytes)),
    ("ram", lambda p: _gb(p.ram_peak_bytes)),
    ("backups", lambda p: _gb(p.backup_bytes)),
    ("apply", lambda p: Message("plan.seconds", {"seconds": f"{p.apply_seconds:.1f}"})),
    ("change", lambda p: Message("plan.seconds", {"seconds": f"{p.change_seconds:.1f}"})),
    ("step", lambda p: Message("plan.seconds", {"seconds": f"{p.extra_step_seconds:.3f}"})),
    ("left", lambda p: Message(f"plan.effect.{p.effect.value.replace(' ', '_')}")),
)
_WITHOUT_LORAS = ("vram", "on_gpu", "swapped", "ram")
"""Rows of a plan that was asked for a model alone."""


def print_plan(console: Console, result: PlanResult, notes: Sequence[Message] = (), language: str = ENGLISH) -> None:
    """Prints the answer in one line, then the page.

    Args:
        console: The console.
        result: The plan.
        notes: What was read from the machine or taken for what was asked.
        language: Of the page.
    """
    page = Page(console, language)
    page.say(answer(result), "bold", limit=ANSWER_CHARACTERS)
    for note in (counted_beside(result), *notes):
        if note is not None:
            page.say(note)
    page.gap()
    _print_model(page, result)
    for lora in result.stack.loras:
        page.gap()
        _print_lora(page, lora)
    if result.predictions:
        page.gap()
        _print_predictions(page, result)


def _print_predictions(page: Page, result: PlanResult) -> None:
    request = result.request
    sizes = {"vram": _gb(request.vram_bytes), "ram": _gb(request.ram_bytes)}
    picture = {"width": request.picture.width, "height": request.picture.height, "batch": request.picture.batch}
    page.say(Message("plan.predicted", {"card": request.rates.name, **sizes, **picture}), "bold")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(page.text(Message("plan.row.head")))
    for prediction in result.predictions:
        table.add_column(prediction.way.value, justify="right")
    for name, cell in _ROWS:
        if not result.stack.loras and name not in _WITHOUT_LORAS:
            continue
        cells = (page.text(cell(prediction)) for prediction in result.predictions)
        table.add_row(page.text(Message(f"plan.row.{name}")), *cells)
    missing = result.model.not_counted
    fits = (page.text(_fits(prediction, missing)) for prediction in result.predictions)
    table.add_row(page.text(Message("plan.row.fits")), *fits)
    page.console.print(table)
    if missing:
        page.say(Message("plan.not_counted", {"parts": Joined(missing, "list.names")}))
    page.say(_assumed(request.rates))
    if request.wish is not Wish.AUTO:
        page.say(Message("plan.asked_mode", {"mode": Message(f"mode.{request.wish.value}")}))
    page.gap()
    for line in result.advice:
        page.say(Message("plan.advice", {"line": line}), limit=MESSAGE_CHARACTERS)


def _print_model(page: Page, result: PlanResult) -> None:
    checkpoint = result.checkpoint
    known = checkpoint.architecture
    facts = {"name": shown(checkpoint.header.path.name), "container": checkpoint.header.container}
    architecture = known.value if known else Message("plan.unknown_architecture")
    size = _gb(checkpoint.header.bytes)
    page.say(Message("plan.model", {**facts, "architecture": architecture, "size": size}), "bold")
    there = Joined(
        (
            Message("plan.part_size", {"part": Message(f"plan.part.{part}"), "size": _gb(size)})
            for part, size in part_bytes(checkpoint).items()
            if size
        ),
        "list.names",
    )
    missing = Joined((Message(f"plan.part.{part}") for part in not_in_file(checkpoint)), "list.and")
    if missing:
        page.say(Message("plan.parts_missing", {"parts": there, "missing": missing}))
    else:
        page.say(Message("plan.parts", {"parts": there}))
    formats = checkpoint.formats()
    whole = sum(formats.values()) or 1  # a file of empty tensors
    shares = Joined((f"{form} {100 * values / whole:.0f} %" for form, values in formats.most_common(4)), "list.names")
    grown = sum(
        weight.bytes - weight.placed_bytes for weight in result.model.weights if weight.placed_bytes is not None
    )
    form = Message("plan.stored_scaled" if checkpoint.is_scaled_fp8 else "plan.stored", {"shares": shares})
    page.say(Message("plan.grown", {"stored": form, "size": _mb(grown)}) if grown else form)
    needs = {"size": _gb(result.model.activation_bytes), "forge": _gb(result.forge_activation_bytes)}
    page.say(Message("plan.step", {**needs, "seen": _gb(INFERENCE_BYTES)}))


def _print_lora(page: Page, lora: StackedLora) -> None:
    facts = lora.facts
    made_for = Message("plan.made_for_unknown")
    if facts.made_for:
        made_for = Message("plan.made_for", {"architecture": facts.made_for.value})
    head = {"name": facts.name, "strength": f"{lora.strength:g}", "made_for": made_for, "size": _mb(facts.header.bytes)}
    page.say(Message("plan.lora", head), "bold")
    kinds: list[str] = [counted(facts.kinds)]
    if facts.dora_modules:
        kinds.append(Message("plan.dora", {"count": facts.dora_modules}))
    if facts.ranks:
        kinds.append(Message("plan.rank", {"ranks": counted(facts.ranks)}))
    page.say(Message("plan.kinds", {"facts": Joined([*kinds, counted(facts.dtypes)]), "size": _mb(facts.bytes)}))
    if lora.fit.refused is not None:
        page.say(Message("plan.refused", {"why": lora.fit.refused}), "red", limit=MESSAGE_CHARACTERS)
        return
    if lora.strength == 0:
        page.say(Message("plan.no_strength"), "yellow")
    keys = {"skipped": len(lora.fit.skipped), "lost": len(lora.fit.lost)}
    page.say(Message("plan.used", {"used": lora.fit.used, **keys}))
    for key in lora.fit.skipped[:1]:
        page.say(Message("plan.first_skipped", {"key": facts.file.spelled(key)}), limit=MESSAGE_CHARACTERS)
    for lost in lora.fit.lost[:1]:
        page.say(Message("plan.first_lost", {"key": lost}), "yellow", limit=MESSAGE_CHARACTERS)
    left = lora.fit.left_out
    if left.modules:
        said = Message("plan.left_out", {"modules": left.modules, "of": left.of})
        page.say(said, "yellow" if left.is_much else "")
    for mode, share in sorted(lora.modes.items()):
        reasons = Joined(sorted(share.reasons), "list.names")
        carried = {"mode": Message(f"mode.{mode}"), "count": share.count, "reasons": reasons, "size": _mb(share.bytes)}
        page.say(Message("plan.mode", carried))


def _fits(prediction: Prediction, missing: Sequence[str]) -> Message:
    if not prediction.fits:
        return Message("plan.fits.no")
    return Message("plan.fits.open" if missing else "plan.fits.yes")


def _assumed(rates: GpuRates) -> Message:
    card = {"card": rates.name, "stream": rates.memory_bytes_per_second / GIGA, "tflops": rates.matrix_flops / 1e12}
    moves = {"pinned": rates.pinned, "to_gpu": rates.pageable_to_gpu, "to_ram": rates.pageable_to_ram}
    per_second = {name: rate / GIGA for name, rate in moves.items()}
    return Message(
        "plan.assumed", {**card, **per_second, "percent": 100 * EFFICIENCY, "merged": CPU_MERGE_VALUES / GIGA}
    )


def _gb(count: int) -> str:
    """Returns "9.5 GB", "146 MB" or "0"."""
    if not count:
        return "0"
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / MB:.0f} MB"


def _mb(count: int) -> str:
    return f"{count / MB:.1f} MB"
