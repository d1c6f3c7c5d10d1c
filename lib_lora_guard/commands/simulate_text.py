"""The replay as pages on a console."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..replay.guard_case import missing
from ..replay.replay import Replay
from .page import say
from .simulate import (
    SENTINEL_MEANING,
    changed,
    sentinel_line,
    shown_machine,
    shown_number,
    shown_off,
    shown_result,
    summary,
)


def print_overview(console: Console, replays: tuple[Replay, ...]) -> None:
    """Prints all configurations as one table."""
    with_guard = any(one.guard is not None for one in replays)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    longest = max((len(word) for one in replays for word in one.case.model.split()), default=0)
    for name in ("machine", "model", "outcome", "recomputed", *(["with the guard"] if with_guard else [])):
        # Wide enough for the longest word of a model's name.
        table.add_column(name, min_width=longest if name == "model" else None)
    for one in replays:
        cells = [str(one.case.number), shown_machine(one), one.case.model, one.case.outcome.value, shown_result(one)]
        table.add_row(*cells, *([one.guard.outcome.value if one.guard else ""] if with_guard else []))
    console.print(table, highlight=False, markup=False)
    say(console, summary(replays))
    if guard := changed(replays):
        say(console, guard)
    say(console, f'The line "{sentinel_line()}" {SENTINEL_MEANING}')
    say(console, "--row N shows one configuration with its numbers.")


def print_detail(console: Console, one: Replay) -> None:
    """Prints one configuration with its numbers."""
    case = one.case
    say(console, f"{case.number}: {shown_machine(one)}, {case.host}, {case.model or 'model not named'}", "bold")
    known = {"LoRAs": case.loras, "system": case.system, "torch": case.torch, "outcome": case.outcome.value}
    for name, value in known.items():
        if value:
            say(console, f"  {name}: {value}")
    for url in case.urls:
        say(console, f"  {url}")
    if one.reason_if_none is not None:
        say(console, f"\nNothing to recompute: {one.reason_if_none}.")
        for name, number in case.numbers.items():
            say(console, f"  {name}: {number:g}")
    for line in one.seen:
        say(
            console,
            f"\n{line.name} {shown_number(line, line.seen)} {line.unit}; the formula gives "
            f"{shown_number(line, line.computed)}: {shown_off(line)}",
            "" if line.is_reproduced else "yellow",
        )
        say(console, f"  {line.formula}" + (f"; assumed: {line.assumed}" if line.assumed else ""))
    for implied in one.implied:
        say(
            console,
            f"\n{implied.name}: {implied.solved:.2f} {implied.unit}, so {implied.reading} (solved for, not counted)",
        )
        say(console, f"  {implied.formula}")
    if one.guard is not None:
        say(console, f"\nWith the guard (predicted): {one.guard.outcome.value}. {one.guard.why}", "bold")
        for name, number in one.guard.numbers.items():
            say(console, f"  {name}: {number:.2f} MB")
    elif (reason := missing(case)) is not None:
        say(console, f"\nWith the guard: not predicted: {reason}.")
