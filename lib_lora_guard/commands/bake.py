"""`lora-guard bake`: merges a stack of LoRAs into a new checkpoint file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ..adapters.files import LoraFile, read_lora_file
from ..baking import BakedLora, BakeReport, bake, check_output, match_stack
from ..baking.output import metadata_for, sha256_of
from ..baking.unfinished import remove_abandoned
from ..checkpoints.model_header import read_checkpoint
from ..demo.measure import Measured, measured
from ..errors import LoraFileError, about
from ..files import read_unchanged, shown
from ..messages import Joined, Message
from ..messages.catalogue import ENGLISH
from ..patching.room_to_read import room_now_bytes
from ..units import GB, MB
from ..version import __version__
from .page import MESSAGE_CHARACTERS, Page, in_users_language, say

SCHEMA = "lora-guard/bake/1"
FAITHFUL = 0.95
"""Below this cosine between the change written and the LoRAs' own, a third of the change is noise."""
SHOWN_KEYS = 10


@dataclass(frozen=True)
class BakeRequest:
    """The user's request. With `dtype` None each tensor keeps its own dtype."""

    model: Path
    loras: Sequence[tuple[Path, float]]
    output: Path
    dtype: torch.dtype | None
    force: bool = False


@dataclass(frozen=True)
class BakeResult:
    """The result of `bake`. `factor_bytes` counts the tensors of the LoRA files."""

    request: BakeRequest
    loras: list[BakedLora]
    report: BakeReport
    cost: Measured
    factor_bytes: int

    def advice(self) -> list[Message]:
        """Returns advice on numbers that the new file could not hold."""
        lines = []
        coarse = [form for form, cosine in self.report.cosines.items() if not cosine >= FAITHFUL]
        if any(form.startswith("fp8") for form in coarse):
            lines.append(Message("bake.too_coarse_fp8"))
        elif coarse:
            lines.append(Message("bake.too_coarse"))
        if self.report.beyond:
            lines.append(Message("bake.beyond", {"count": self.report.beyond}))
        return lines


def make_baked(request: BakeRequest, console: Console) -> BakeResult:
    """Writes the new file and shows the progress. No file is left after an error.

    Args:
        request: The user's request.
        console: Shows the progress bar; a console that is no terminal shows none.

    Raises:
        FileFormatError: The model file cannot be read.
        LoraFileError: A LoRA file cannot be read.
        LoraMismatchError: A LoRA does not fit the model.
        OSError: The new file cannot be written.
    """
    check_output(request.output, [request.model, *(path for path, _ in request.loras)], request.force)
    count, size = remove_abandoned(request.output.parent)
    if count:
        say(console, in_users_language(Message("bake.removed_unfinished", {"count": count, "size": _size(size)})))
    with measured() as cost:
        checkpoint = read_checkpoint(request.model)
        loras = [(path, strength, *_read(path)) for path, strength in request.loras]
        files = [(file, strength) for _, strength, file, _ in loras]
        factor_bytes = sum(adapter.bytes for file, _ in files for adapter in file.adapters.values())
        stack = match_stack(checkpoint, files)
        metadata = metadata_for(checkpoint.header, [(path, strength, digest) for path, strength, _, digest in loras])
        with _progress(console) as bar:
            task = bar.add_task(shown(request.output.name), total=None)
            report = bake(
                checkpoint,
                stack,
                request.output,
                request.dtype,
                metadata,
                lambda done, total: bar.update(task, completed=done, total=total),
                request.force,
            )
    return BakeResult(request, stack.loras, report, cost, factor_bytes)


def _read(path: Path) -> tuple[LoraFile, str]:
    """Reads a LoRA file, and its SHA-256 from the same bytes.

    Raises:
        LoraFileError: The file cannot be read.
        FileFormatError: It is written to all the time.
    """

    def both() -> tuple[LoraFile, str]:
        file = read_lora_file(path, room=room_now_bytes)
        try:
            return file, sha256_of(path)
        except OSError as error:
            raise LoraFileError(about(shown(path.name), Message("bake.lora_gone", {"error": error}))) from error

    return read_unchanged(path, both)


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(True), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def bake_document(result: BakeResult) -> dict[str, Any]:
    """Returns the result as one JSON document."""
    report = result.report
    return {
        "schema": SCHEMA,
        "version": __version__,
        "file": shown(result.request.output.name),
        "file_bytes": report.bytes,
        "tensors_baked": report.baked,
        "tensors_copied": report.copied,
        "tensors_converted": report.converted,
        "dtypes_of_baked_values": dict(report.formats),
        "values_beyond_range": report.beyond,
        "cosine": report.cosine,
        "cosine_by_dtype": report.cosines,
        "loras": [
            {
                "file": lora.name,
                "strength": lora.strength,
                "modules_used": lora.fit.used,
                "skipped": [shown(key) for key in lora.fit.skipped],
                "lost": [shown(key, MESSAGE_CHARACTERS) for key in lora.fit.lost],
            }
            for lora in result.loras
        ],
        "advice": [str(line) for line in result.advice()],
        "seconds": round(result.cost.seconds, 3),
        "ram_peak_bytes": int(result.cost.ram_peak_mb * MB),
        "largest_weight_fp32_bytes": report.largest_bytes,
        "lora_bytes": result.factor_bytes,
    }


def print_baked(console: Console, result: BakeResult, language: str = ENGLISH) -> None:
    """Prints the result as a page of text."""
    page, report = Page(console, language), result.report
    for lora in result.loras:
        facts = {"name": lora.name, "strength": f"{lora.strength:g}", "used": lora.fit.used}
        page.say(Message("bake.lora", {**facts, "skipped": len(lora.fit.skipped), "lost": len(lora.fit.lost)}))
        for sentence, keys in (("bake.skipped", lora.fit.skipped), ("bake.lost", lora.fit.lost)):
            for key in keys[:SHOWN_KEYS]:
                said = shown(page.text(Message(sentence, {"key": key})), MESSAGE_CHARACTERS)
                page.say(f"  {said}")
            if len(keys) > SHOWN_KEYS:
                page.say(f"  {page.text(Message('bake.more', {'count': len(keys) - SHOWN_KEYS}))}")
    whole = sum(report.formats.values())
    formats = (f"{form} {100 * values / whole:.0f} %" for form, values in report.formats.most_common())
    facts = {
        "name": shown(result.request.output.name),
        "size": _size(report.bytes),
        "baked": report.baked,
        "copied": report.copied,
        "converted": report.converted,
        "formats": Joined(formats, "list.names"),
    }
    page.say(Message("bake.written", facts), "bold")
    if report.cosine is None:
        page.say(Message("bake.no_effect"), "yellow")
    else:
        by_dtype = [f"{form} {cosine:.4f}" for form, cosine in report.cosines.items()]
        cosine = f"{report.cosine:.4f}" + (f" ({', '.join(by_dtype)})" if len(by_dtype) > 1 else "")
        page.say(Message("bake.effect", {"cosine": cosine}))
    for line in result.advice():
        page.say(line, "yellow")
    cost = {
        "seconds": f"{result.cost.seconds:.1f}",
        "peak": _size(int(result.cost.ram_peak_mb * MB)),
        "largest": _size(report.largest_bytes),
        "factors": _size(result.factor_bytes),
    }
    page.say(Message("bake.cost", cost))


def _size(count: int) -> str:
    return f"{count / GB:.2f} GB" if count >= GB else f"{count / MB:.1f} MB"
