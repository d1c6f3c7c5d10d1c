"""The replay as the page docs/replay.md. It holds no date and no commit of our own, so that it stays what the command gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..planning.replay import Replay
from ..planning.replay_elsewhere import SENTINEL_THREAD, elsewhere
from ..planning.replay_lines import Implied, Seen
from ..version import __version__
from .simulate import (
    FORGE_COMMIT,
    SENTINEL_MEANING,
    changed,
    sentinel_line,
    shown_machine,
    shown_number,
    shown_off,
    shown_result,
    summary,
)

COMMAND = "lora-guard simulate --markdown --write docs/replay.md"


def page(replays: tuple[Replay, ...]) -> str:
    """The whole page, ending in a line break."""
    reasons = Counter(one.reason_if_none for one in replays if one.reason_if_none)
    parts = [
        "# Field reports, recomputed",
        f"Made by `{COMMAND}`, LoRA Guard {__version__}, from the {len(replays)} configurations in "
        f"`lib_lora_guard/planning/field_cases.py` and the memory arithmetic of Stable Diffusion WebUI Forge `{FORGE_COMMIT}` in "
        "`lib_lora_guard/planning/host_memory.py`. Not written by hand: a test compares this page with the command.",
        summary(replays) + (f" {line}" if (line := changed(replays)) else ""),
        "A number counts as reproduced where the formula gives it to the last printed place, or within 0.02 MB where several "
        "printed numbers, each rounded, go into it. Nothing is its own proof: what goes into a formula is another line of the "
        "log, a published shape, or a setting. Sizes are MB of 2^20.",
        f'## "{sentinel_line()}"',
        f"This line, seen in [{_short(SENTINEL_THREAD)}]({SENTINEL_THREAD}), {SENTINEL_MEANING} The number is what 1e30 bytes are "
        "in MB; what is unloaded comes back with the next image. Any other request above the card's memory does the same: every "
        "model goes that is not needed for the step itself.",
        "## The configurations",
        _section("replay configurations", _configurations(replays)),
        "Why nothing was recomputed: " + "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common()) + ".",
        "## The numbers",
        _section("replay numbers", _numbers((str(one.case.number), line) for one in replays for line in one.seen)),
        "## Inputs that were solved for",
        "Where one input is in no log, it was solved for. A whole number that makes a sensible picture speaks for the formula "
        "and does not prove it: these lines are not counted above.",
        _section("replay implied", _implied(_all_implied(replays))),
        "## Lines from other threads",
        _section(
            "replay elsewhere",
            _numbers((f"[{_short(url)}]({url})", line) for url, line in elsewhere() if isinstance(line, Seen)),
        ),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _configurations(replays: tuple[Replay, ...]) -> str:
    with_guard = any(one.guard is not None for one in replays)
    head = ["#", "machine", "host", "model", "LoRAs", "outcome", "recomputed", "thread"]
    rows = [
        [
            str(one.case.number),
            shown_machine(one),
            one.case.host,
            one.case.model,
            one.case.loras,
            one.case.outcome.value,
            shown_result(one),
            " ".join(f"[{_short(url)}]({url})" for url in one.case.urls),
            *([f"{one.guard.outcome.value}: {one.guard.why}" if one.guard else ""] if with_guard else []),
        ]
        for one in replays
    ]
    return _table([*head, *(["with the guard"] if with_guard else [])], rows)


def _numbers(found: Iterable[tuple[str, Seen]]) -> str:
    rows = [
        [
            where,
            line.name,
            f"{shown_number(line, line.seen)} {line.unit}",
            shown_number(line, line.computed),
            shown_off(line),
            line.formula + (f". Assumed: {line.assumed}" if line.assumed else ""),
        ]
        for where, line in found
    ]
    return _table(["of", "line", "log", "formula", "", "from"], rows)


def _all_implied(replays: tuple[Replay, ...]) -> list[tuple[str, Implied]]:
    rows = [(str(one.case.number), line) for one in replays for line in one.implied]
    rows += [(f"[{_short(url)}]({url})", line) for url, line in elsewhere() if isinstance(line, Implied)]
    return rows


def _implied(found: list[tuple[str, Implied]]) -> str:
    rows = [[where, line.name, f"{line.solved:.2f} {line.unit}", line.reading, line.formula] for where, line in found]
    return _table(["of", "input", "solved", "reading", "from"], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _section(name: str, table: str) -> str:
    """Between the marks that tests/test_docs.py looks for."""
    return f"<!-- {name} -->\n{table}\n<!-- end of {name} -->"


_HOSTS = {
    "stable-diffusion-webui-forge": "Forge",
    "sd-webui-forge-classic": "Neo and Classic",
    "stable-diffusion-webui-reForge": "reForge",
}


def _short(url: str) -> str:
    """ "Forge 1261"."""
    parts = url.split("/")
    return f"{_HOSTS.get(parts[4], parts[4])} {parts[-1]}"
