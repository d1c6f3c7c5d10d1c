"""`lora-guard inspect`: describes a LoRA file, and what of it fits a model, from the headers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.lora_header import LoraFacts, counted, metadata_of_interest, read_facts, trained_words
from ..errors import LoraMismatchError, about
from ..files import shown
from ..messages import Joined, Message
from ..messages.catalogue import ENGLISH
from ..units import MB
from ..version import __version__
from .page import MESSAGE_CHARACTERS, SHOWN_KEYS, Page, counts, say

if TYPE_CHECKING:
    from rich.console import Console

    from ..checkpoints.model_header import Checkpoint
    from ..models.fit import Fit

SCHEMA = "lora-guard/inspect/1"


def inspect(path: Path, model: Path | None) -> tuple[LoraFacts, Checkpoint | None, Fit | None]:
    """Reads the headers.

    Args:
        path: The LoRA file.
        model: A checkpoint to compare it with; None for none.

    Returns:
        The LoRA's facts; with a model also the checkpoint, and what of the LoRA fits it.

    Raises:
        LoraFileError: The first file is no LoRA.
        FileFormatError: The second file is no model.
    """
    facts = read_facts(path)
    if model is None:
        return facts, None, None
    # Imported here: a LoRA file alone needs none of this.
    from ..checkpoints.model_header import read_checkpoint
    from ..planning.mode import Wish
    from ..planning.tokens import Picture, tokens_for
    from .stack import plan_stack

    checkpoint = read_checkpoint(model)
    tokens = tokens_for(checkpoint.architecture, Picture(1024, 1024))
    return facts, checkpoint, plan_stack(checkpoint, [(facts, 1.0)], Wish.AUTO, tokens, 2).loras[0].fit


def inspect_document(facts: LoraFacts, checkpoint: Checkpoint | None, fit: Fit | None) -> dict[str, Any]:
    """Returns the facts as one JSON document."""
    unknown = facts.file.unknown_keys
    return {
        "schema": SCHEMA,
        "version": __version__,
        "file": facts.name,
        "container": facts.header.container,
        "file_bytes": facts.header.bytes,
        "tensor_bytes": facts.bytes,
        "tensors": len(facts.header.tensors),
        "modules": len(facts.file.adapters),
        "made_for": facts.made_for.value if facts.made_for else None,
        "parts": counts(facts.parts),
        "kinds": counts(facts.kinds),
        "dora_modules": facts.dora_modules,
        "ranks": counts(facts.ranks),
        "alphas": counts(facts.alphas),
        "scales": counts(facts.scales),
        "dtypes": counts(facts.dtypes),
        "unknown_keys": len(unknown),
        "first_unknown": [shown(key) for key in unknown[:SHOWN_KEYS]],
        "metadata": metadata_of_interest(facts.file.metadata),
        "trained_words": trained_words(facts.file.metadata),
        "answer": shown(answer(facts, checkpoint, fit), ANSWER_CHARACTERS),
        "fit": None if fit is None or checkpoint is None else _fit(facts, checkpoint, fit),
    }


def _fit(facts: LoraFacts, checkpoint: Checkpoint, fit: Fit) -> dict[str, Any]:
    return {
        "model": shown(checkpoint.header.path.name),
        "architecture": checkpoint.architecture.value if checkpoint.architecture else None,
        "is_usable": fit.refused is None,
        "refused": None if fit.refused is None else shown(fit.refused, MESSAGE_CHARACTERS),
        "modules_used": fit.used if fit.refused is None else 0,
        "keys_skipped": len(fit.skipped),
        "first_skipped": [shown(facts.file.spelled(key)) for key in fit.skipped[:SHOWN_KEYS]],
        "keys_lost": len(fit.lost),
        "first_lost": [shown(key, MESSAGE_CHARACTERS) for key in fit.lost[:SHOWN_KEYS]],
    }


def check_fits(facts: LoraFacts, checkpoint: Checkpoint | None, fit: Fit | None) -> None:
    """Checks that the model can use the LoRA; without a model there is nothing to check.

    Raises:
        LoraMismatchError: The model can use nothing of it.
    """
    if fit is not None and checkpoint is not None and fit.refused is not None:
        raise LoraMismatchError(about(facts.name, fit.refused))


def answer(facts: LoraFacts, checkpoint: Checkpoint | None, fit: Fit | None) -> Message:
    """Returns the answer in one sentence: fits, does not fit, or what the file is."""
    if fit is not None and checkpoint is not None:
        model = shown(checkpoint.header.path.name)
        if fit.refused is not None:
            return Message("inspect.misfit", {"model": model, "why": fit.refused})
        return Message("inspect.fits", {"model": model, "used": fit.used, "of": len(facts.file.adapters)})
    made_for = facts.made_for.value if facts.made_for else Message("inspect.not_shown")
    return Message("inspect.is", {"name": facts.name, "made_for": made_for})


def print_facts(
    console: Console, facts: LoraFacts, checkpoint: Checkpoint | None, fit: Fit | None, language: str = ENGLISH
) -> None:
    """Prints the answer in one line, then the facts as a page of text."""
    page = Page(console, language)
    page.say(answer(facts, checkpoint, fit), "bold", limit=ANSWER_CHARACTERS)
    if fit is not None:
        page.say(answer(facts, None, None), "bold")
    for name, value in _rows(facts):
        # A Chinese character is as wide as two others.
        label = page.text(name)
        width = NAME_WIDTH - sum(not c.isascii() for c in label)
        say(console, f"  {label + ':':<{width}} {page.text(value)}")
    if fit is not None and checkpoint is not None:
        _print_fit(page, facts, checkpoint, fit)


NAME_WIDTH = 24
"""Columns of the names of the facts."""
ANSWER_CHARACTERS = 600


def _rows(facts: LoraFacts) -> list[tuple[str, str]]:
    size = {"size": _mb(facts.header.bytes), "count": len(facts.header.tensors)}
    kinds = counted(facts.kinds)
    parts = (Message("inspect.part", {"part": part, "count": count}) for part, count in facts.parts.most_common())
    scale: str = "1"
    if facts.scales:
        scale = Message("inspect.scale", {"scales": counted(facts.scales)})
    rows: list[tuple[str, str]] = [
        (Message("inspect.row.file"), Message("inspect.file", {"container": facts.header.container, **size})),
        (
            Message("inspect.row.kinds"),
            Message("inspect.dora", {"kinds": kinds, "count": facts.dora_modules})
            if facts.dora_modules
            else Message("inspect.no_dora", {"kinds": kinds}),
        ),
        (Message("inspect.row.parts"), Joined(parts, "list.names")),
        (Message("inspect.row.rank"), counted(facts.ranks) if facts.ranks else Message("inspect.none")),
        (Message("inspect.row.alpha"), counted(facts.alphas) if facts.alphas else Message("inspect.none_in_file")),
        (Message("inspect.row.scale"), scale),
        (Message("inspect.row.dtype"), counted(facts.dtypes)),
    ]
    unknown = facts.file.unknown_keys
    if unknown:
        first = {"count": len(unknown), "first": Joined((shown(key) for key in unknown[:3]), "list.names")}
        rows.append((Message("inspect.row.unknown"), Message("inspect.unknown", first)))
    lost = list(facts.file.lost.items())[:SHOWN_KEYS]
    rows += [(Message("inspect.row.lost"), about(shown(key), why)) for key, why in lost]
    rows += [(Message("inspect.row.note"), note) for note in facts.file.notes]
    rows += metadata_of_interest(facts.file.metadata).items()
    if words := trained_words(facts.file.metadata):
        rows.append((Message("inspect.row.words"), Joined(words, "list.names")))
    return rows


def _print_fit(page: Page, facts: LoraFacts, checkpoint: Checkpoint, fit: Fit) -> None:
    known = checkpoint.architecture
    architecture = known.value if known else Message("plan.unknown_architecture")
    on = {"model": shown(checkpoint.header.path.name), "architecture": architecture}
    page.say(Message("inspect.on", on), "bold")
    if fit.refused is not None:
        page.say(Message("inspect.does_not_fit", {"why": fit.refused}), "red", limit=MESSAGE_CHARACTERS)
        return
    counts = {"used": fit.used, "skipped": len(fit.skipped), "lost": len(fit.lost)}
    page.say(Message("inspect.does_fit", counts))
    for skipped in fit.skipped[:3]:
        page.say(Message("inspect.skipped", {"key": facts.file.spelled(skipped)}), limit=MESSAGE_CHARACTERS)
    for lost in fit.lost[:3]:
        page.say(Message("inspect.lost", {"key": lost}), limit=MESSAGE_CHARACTERS)
    if fit.left_out.modules:
        share = fit.left_out
        said = Message("plan.left_out", {"modules": share.modules, "of": share.of})
        page.say(said, "yellow" if share.is_much else "")


def _mb(count: int) -> str:
    return f"{count / MB:.1f} MB"
