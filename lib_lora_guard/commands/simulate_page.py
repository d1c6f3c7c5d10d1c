"""The replay as the page docs/replay.md. It names no date and no commit of this project, so that it does not age."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..planning.host_memory import MB, RAM_FLOOR_BYTES
from ..replay.elsewhere import SENTINEL_THREAD, elsewhere
from ..replay.field_cases import Outcome
from ..replay.guard_case import SLOW_COPY_BYTES
from ..replay.guard_readings import LORA_RANK, OTHERS_MB, SDXL_LORA_MB
from ..replay.lines import Implied, Seen
from ..replay.replay import GuardOutcome, Replay
from ..version import __version__
from .simulate import (
    FORGE_COMMIT,
    SENTINEL_MEANING,
    changed,
    sentinel_line,
    shown_guard,
    shown_machine,
    shown_number,
    shown_off,
    shown_result,
    summary,
)

COMMAND = "lora-guard simulate --markdown --write docs/replay.md"


def page(replays: tuple[Replay, ...]) -> str:
    """Returns the whole page, ending in a line break."""
    reasons = Counter(one.reason_if_none for one in replays if one.reason_if_none)
    parts = [
        "# Field reports, recomputed",
        f"Made by `{COMMAND}`, LoRA Guard {__version__}, from the {len(replays)} configurations in "
        f"`lib_lora_guard/replay/field_cases.py` and the memory arithmetic of Stable Diffusion WebUI Forge `{FORGE_COMMIT}` in "
        "`lib_lora_guard/replay/forge_memory.py`. Not written by hand: a test compares this page with the command.",
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
        *_with_guard(replays),
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
            *([shown_guard(one)] if with_guard else []),
        ]
        for one in replays
    ]
    return _table([*head, *(["with the guard (predicted, not measured)"] if with_guard else [])], rows)


def _with_guard(replays: tuple[Replay, ...]) -> list[str]:
    """Returns the assumptions and numbers of the predictions; nothing if there are none."""
    computed = [one for one in replays if one.guard is not None and one.guard.numbers]
    if not computed:
        return []
    names = list(dict.fromkeys(name for one in computed if one.guard for name in one.guard.numbers))
    rows = [
        [
            str(one.case.number),
            *(f"{one.guard.numbers[name]:.0f}" if name in one.guard.numbers else "not known" for name in names),
        ]
        for one in computed
        if one.guard
    ]
    return [
        "## With the guard: predicted, not measured",
        f'As if each configuration ran on Forge `{FORGE_COMMIT}` with the guard in its mode "Automatic": computed by '
        "`lib_lora_guard/replay/guard_case.py` from the functions that the guard plans with (`planning/activations.py`, "
        "`planning/eviction.py`, `planning/on_card.py`) and from sizes of published models. An outcome stands only where the same arithmetic gives what "
        "the user saw without the guard, or where the log itself names the merge; elsewhere the column says why there is none. "
        f'"Slow" is more than {SLOW_COPY_BYTES / MB:.0f} MB of weights copied in a step: a second, as measured with ordinary RAM. '
        f'"{Outcome.REFUSED.value}" is rule LG-R08, with no page file counted, because no report has its size: where the process had '
        "died of RAM nothing is taken for granted; elsewhere the page file had carried the same files before.",
        f"Assumed where a report is silent: {OTHERS_MB} MB of the card taken by the desktop and CUDA; a LoRA of rank {LORA_RANK} on "
        f"every linear layer of Flux, in 16 bit, or of {SDXL_LORA_MB} MB for SDXL, its text encoder's part in it; 896x1152 for Flux, "
        f"1024x1024 for SDXL; T5 in fp8 beside NF4 and fp8 and in fp16 beside Q8_0 and bf16; {RAM_FLOOR_BYTES / MB:.0f} MB of RAM left "
        "to the system; Windows, where the guard leaves 256 MB more for swapping than elsewhere: 512 MB for Flux in 16 bit, 704 MB for "
        "SDXL. What a step holds was measured on one GPU in a fresh process. Seconds are not predicted. MB:",
        _section("replay guard", _table(["of", *names], rows)),
        *_about_rows(computed),
    ]


def _about_rows(computed: Sequence[Replay]) -> list[str]:
    """Returns remarks that the table does not show by itself."""
    judged = [(str(one.case.number), one.guard) for one in computed if one.guard is not None]
    more = [row for row, guard in judged if _copies_more_mb(guard) > 0]
    close = [row for row, guard in judged if 0 < _short_of_ram_mb(guard) < CLOSE_MB]
    lines = []
    if more:
        lines.append(
            f"In {', '.join(more)} the guard copies more weights a step than Forge: it keeps what a step holds and the factors free."
        )
    if close:
        lines.append(
            f"Close calls: in {', '.join(close)} Forge lacks less than {CLOSE_MB} MB of RAM by this arithmetic."
        )
    lines += [
        f"Row {row} in other units: {guard.numbers['RAM needed']:.0f} MB are the {guard.numbers['RAM needed'] / 1024:.1f} GB (of "
        "1024 MB) that `lora-guard plan` says for such files in the README. With T5 and CLIP-L in the model file itself `plan` says so "
        "too. The 16.7 GB that it said there before counted T5's token table as stored (376 MB less than in fp32) and no VAE (160 MB)."
        for row, guard in judged
        if row == README_ROW
    ]
    return lines


CLOSE_MB = 512
README_ROW = "1"
"""The configuration that the README's example of `plan` takes up."""


def _copies_more_mb(outcome: GuardOutcome) -> float:
    found = outcome.numbers
    return found.get("copied a step", 0) - found.get("Forge: copied a step", 0)


def _short_of_ram_mb(outcome: GuardOutcome) -> float:
    """Returns the RAM that Forge lacks; 0 if unknown."""
    found = outcome.numbers
    return found["Forge: RAM needed"] - found["RAM there"] if "RAM there" in found else 0


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
    """Puts a table between the marks that tests/test_docs.py looks for."""
    return f"<!-- {name} -->\n{table}\n<!-- end of {name} -->"


_HOSTS = {
    "stable-diffusion-webui-forge": "Forge",
    "sd-webui-forge-classic": "Neo and Classic",
    "stable-diffusion-webui-reForge": "reForge",
}


def _short(url: str) -> str:
    """Returns "Forge 1261" for an address."""
    parts = url.split("/")
    return f"{_HOSTS.get(parts[4], parts[4])} {parts[-1]}"
