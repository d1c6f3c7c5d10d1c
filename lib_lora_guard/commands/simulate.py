"""`lora-guard simulate`: recomputes the numbers in users' logs with the host's own arithmetic."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..replay.elsewhere import elsewhere, everything_line
from ..replay.guard_case import missing
from ..replay.lines import Implied, Line, Seen
from ..replay.replay import Guard, GuardOutcome, Replay, replay, replay_all
from ..units import MB
from ..version import __version__

SCHEMA = "lora-guard/simulate/1"
FORGE_COMMIT = "dfdcbab6"
"""The commit whose arithmetic `replay.forge_memory` holds."""
SENTINEL_MEANING = (
    "asks for 1e30 bytes and means: unload everything. It is no miscalculation. Forge writes \"all memory\" instead since "
    "2024-08-21."
)  # fmt: skip


def simulate(row: int | None = None, guard: Guard | None = None) -> tuple[Replay, ...]:
    """Recomputes the configurations.

    Args:
        row: The number of one configuration; None for all.
        guard: Predicts the guard's outcome of a configuration; None predicts nothing.
    """
    if row is None:
        return replay_all(guard)
    return tuple(replay(one.case, guard) for one in replay_all() if one.case.number == row)


def sentinel_line() -> str:
    """Returns the line as old versions of Forge printed it, from the formula."""
    line = everything_line()
    return f"{line.name} {line.computed:.2f} MB"


def summary(replays: tuple[Replay, ...]) -> str:
    """Returns a sentence on how many numbers come out."""
    recomputed = [one for one in replays if one.seen]
    numbers = sum(len(one.seen) for one in recomputed)
    right = sum(one.reproduced for one in recomputed)
    return (
        f"{len(replays)} configurations, {len(recomputed)} of them with numbers and a known formula: {right} of {numbers} "
        f"numbers come out, all of them in {sum(one.is_reproduced for one in recomputed)} configurations."
    )


def changed(replays: tuple[Replay, ...]) -> str | None:
    """Returns a sentence that counts the predicted outcomes, and those that differ from the reported ones; None if
    there are no predictions."""
    judged = [one for one in replays if one.guard is not None]
    if not judged:
        return None
    # An outcome without numbers was not computed: its cause lies elsewhere.
    computed = sum(bool(one.guard and one.guard.numbers) for one in judged)
    turns = Counter(
        f"{one.case.outcome.value} to {one.guard.outcome.value}" for one in judged if one.guard and one.is_changed
    )
    turned = ", ".join(f"{turn} {count}" for turn, count in sorted(turns.items(), key=lambda item: (-item[1], item[0])))
    return (
        f"With the guard, predicted, not measured: {len(judged)} of {len(replays)} have an outcome, {computed} of them computed "
        f"and {len(judged) - computed} unchanged because the cause lies elsewhere; {turns.total()} end otherwise"
        + (f" ({turned})." if turned else ".")
    )


def simulate_document(replays: tuple[Replay, ...]) -> dict[str, Any]:
    """Returns one JSON document. Its names are stable: additions get new names."""
    return {
        "schema": SCHEMA,
        "version": __version__,
        "host_commit": FORGE_COMMIT,
        "configurations": [_replay(one) for one in replays],
        "reproduced_configurations": sum(one.is_reproduced for one in replays),
        "reproduced_numbers": sum(one.reproduced for one in replays),
        "numbers": sum(len(one.seen) for one in replays),
        "elsewhere": [{"thread": thread, **_line(line)} for thread, line in elsewhere()],
        "sentinel": {"line": sentinel_line(), "bytes": everything_line().computed * MB, "meaning": "unload everything"},
    }


def _replay(one: Replay) -> dict[str, Any]:
    case = one.case
    return {
        "row": case.number,
        "gpu": case.gpu or None,
        "vram_total_mb": case.vram_total_mb,
        "vram_free_mb": case.vram_free_mb,
        "ram_mb": case.ram_mb,
        "system": case.system or None,
        "torch": case.torch or None,
        "host": case.host,
        "model": case.model or None,
        "loras": case.loras or None,
        "outcome": case.outcome.value,
        "threads": list(case.urls),
        "logged": dict(case.numbers),
        "is_reproduced": one.is_reproduced,
        "lines": [_line(line) for line in one.seen] + [_line(line) for line in one.implied],
        "reason_if_none": one.reason_if_none,
        "guard": None if one.guard is None else _guard(one.guard),
        "guard_reason_if_none": None if one.guard is not None else missing(case),
    }


def _line(line: Line) -> dict[str, Any]:
    if isinstance(line, Implied):
        return {"implied": line.name, "solved": round(line.solved, 4), "unit": line.unit, "formula": line.formula,
                "reading": line.reading}  # fmt: skip
    return {
        "name": line.name,
        "seen": line.seen,
        "computed": round(line.computed, 4),
        "unit": line.unit,
        "is_reproduced": line.is_reproduced,
        "formula": line.formula,
        "assumed": line.assumed or None,
    }


def _guard(outcome: GuardOutcome) -> dict[str, Any]:
    return {"outcome": outcome.outcome.value, "why": outcome.why, "numbers": dict(outcome.numbers)}


def shown_number(line: Seen, value: float) -> str:
    """Returns a number as logs print it: two places of a size, none of a count."""
    return f"{value:.0f}" if line.unit == "weights" else f"{value:.2f}"


def shown_off(line: Seen) -> str:
    """Returns "as logged", "within rounding" or the difference."""
    if shown_number(line, line.computed) == shown_number(line, line.seen):
        return "as logged"
    return "within rounding" if line.is_reproduced else f"off by {shown_number(line, line.off)} {line.unit}"


def shown_result(one: Replay) -> str:
    """Returns a cell: how many numbers come out, or why there is none."""
    if one.reason_if_none is not None:
        return one.reason_if_none
    return f"{one.reproduced} of {len(one.seen)} numbers come out"


def shown_guard(one: Replay) -> str:
    """Returns a cell: the predicted outcome with its sentence, or why there is none."""
    if one.guard is not None:
        return f"{one.guard.outcome.value}: {one.guard.why}"
    return f"not predicted: {missing(one.case) or 'not asked'}"


def shown_machine(one: Replay) -> str:
    """Returns card, VRAM and RAM in one cell: "RTX 3060 12 GB, RAM 32 GB"."""
    case = one.case
    vram = "" if case.vram_total_mb is None else f"{case.vram_total_mb / 1024:.0f} GB"
    card = " ".join(part for part in (case.gpu, "" if vram and vram in case.gpu else vram) if part)
    ram = "" if case.ram_mb is None else f"RAM {case.ram_mb / 1024:.0f} GB"
    return ", ".join(part for part in (card or "not named", ram) if part)
