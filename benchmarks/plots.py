"""The pictures and tables of docs/benchmarks.md, made from the JSON files in benchmarks/results/.

    python benchmarks/plots.py    # writes docs/cost-*.svg and the marked parts of docs/benchmarks.md

Needs Python alone. A new file in the folder is taken without a change here: its points replace those of older files in the pictures,
and it gets a table of its own. A file holds `commit`, `date` (and time), `device`, `torch`, `triton`, `script`, perhaps a `note`, and `rows`:

    what      "step", "linear layers", "whole image" or "layer OUT x IN"
    storage   as in the tables: fp8, nf4, Q8_0
    kind      lora, dora, loha, lokr
    ranks     of each LoRA, in a list; for a LoKr the blocks a side
    tokens    of the image
    ms        milliseconds: `host` without a LoRA, `guard` with the kernels, `plain` in plain torch; one of the two may be missing
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
DRAWN = ("fp8", "nf4", "Q8_0", "Q4_K", "bf16")
"""The storages in the pictures."""
NAMES = {
    "step": "Linear layers and attention of a step",
    "linear layers": "All linear layers of a step",
    "whole image": "Steps of whole images, Forge Neo",
}
WAYS = {"guard": "with kernels", "plain": "plain torch"}
GOALS = (
    ("fp8", "lora", (64,), "guard", 1.00), ("nf4", "lora", (32, 32, 32), "guard", 1.00), ("Q8_0", "lora", (16,), "guard", 1.02),
    ("fp8", "lora", (16,), "guard", 0.98), ("nf4", "lora", (16,), "guard", 0.98), ("Q4_0", "lora", (16,), "guard", 1.02),
    ("Q4_K", "lora", (16,), "guard", 1.02), ("fp8", "lora", (64,), "plain", 1.06), ("nf4", "lora", (32, 32, 32), "plain", 1.06),
    ("Q8_0", "lora", (16,), "plain", 1.06), ("fp8", "loha", (8,), "guard", 1.05), ("fp8", "loha", (16,), "guard", 1.05),
    ("fp8", "lokr", (8,), "guard", 1.05), ("fp8", "dora", (16,), "guard", 1.05),
)  # fmt: skip
"""Storage, kind, ranks, way, and the time of a step over the host's without a LoRA that it may take."""

HEIGHT, LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT, LABELS = 340, 55, 62, 300, 210, 135
COLOURS = {
    "fp8": ("#b45309", "#f59e0b"), "nf4": ("#1d4ed8", "#60a5fa"), "Q8_0": ("#15803d", "#4ade80"), "Q4_K": ("#a21caf", "#e879f9"),
    "bf16": ("#4b5563", "#9ca3af"),
}  # fmt: skip
"""By storage: on a light page, and on a dark one."""
LIGHT = ".page{fill:#fff}text{fill:#1f2937}.grid{stroke:#d1d5db}.even{stroke:#6b7280}"
DARK = ".page{fill:#0d1117}text{fill:#e5e7eb}.grid{stroke:#30363d}.even{stroke:#9ca3af}"
SHAPES = (
    "text{font-family:sans-serif;font-size:12px}.small{font-size:11px}.title{font-weight:bold}.even{stroke-width:2}"
    "polyline{fill:none;stroke-width:2}.plain{stroke-dasharray:5 4}"
)


def style() -> str:
    """Returns the style sheet: a reader's browser says if the page is dark."""

    def lines(column: int) -> str:
        return "".join(
            f".{name} polyline{{stroke:{colours[column]}}}.{name} circle,.{name} text{{fill:{colours[column]}}}"
            for name, colours in COLOURS.items()
        )

    return f"<style>{SHAPES}{LIGHT}{lines(0)}@media(prefers-color-scheme:dark){{{DARK}{lines(1)}}}</style>"


class Row(NamedTuple):
    """One measured case."""

    file: int
    what: str
    storage: str
    kind: str
    ranks: tuple[int, ...]
    tokens: int
    ms: Mapping[str, float]

    def ratio(self, way: str) -> float | None:
        """The time over the host's without a LoRA; None where the way was not measured."""
        return self.ms[way] / self.ms["host"] if way in self.ms else None


class Axis(NamedTuple):
    """What one picture shows its lines over.

    Attributes:
        title: Under the axis.
        of: The number of a row.
        takes: True for rows that may be in it.
        one: What all rows of one line have alike.
    """

    title: str
    of: Callable[[Row], int]
    takes: Callable[[Row], bool]
    one: Callable[[Row], object]


AXES = {
    "rank": Axis("rank of all LoRAs together", lambda row: sum(row.ranks), lambda row: row.what[:5] != "layer", lambda row: row.tokens),
    "count": Axis(
        "LoRAs of rank 16", lambda row: len(row.ranks), lambda row: set(row.ranks) == {16}, lambda row: row.tokens
    ),
    "tokens": Axis("tokens of the image", lambda row: row.tokens, lambda row: row.ranks == (16,), lambda row: row.ranks),
}  # fmt: skip


class Line(NamedTuple):
    """Points of one storage and way, with the file that they are from."""

    file: int
    storage: str
    way: str
    points: list[tuple[int, float]]


def load(folder: Path) -> tuple[list[dict[str, Any]], list[Row]]:
    """Returns the heads of the files, the newest first, and their rows."""
    files = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"), reverse=True)]
    files.sort(key=lambda file: file["date"], reverse=True)
    rows = [
        Row(n, row["what"], row["storage"], row["kind"], tuple(row["ranks"]), row["tokens"], row["ms"])
        for n, file in enumerate(files)
        for row in file["rows"]
    ]
    return files, rows


def panels(rows: Iterable[Row], axis: Axis) -> dict[str, list[Line]]:
    """Returns the lines of each measure that has some of two points and more: of each the newest file's, two measures at most."""
    found: dict[tuple[str, str, str, object, int], dict[int, float]] = {}
    for row in rows:
        if row.kind == "lora" and row.storage in DRAWN and axis.takes(row):
            for way in WAYS:
                if (ratio := row.ratio(way)) is not None:
                    line = found.setdefault((row.what, row.storage, way, axis.one(row), row.file), {})
                    line.setdefault(axis.of(row), ratio)
    made: dict[str, dict[tuple[str, str], Line]] = {}
    for (what, storage, way, _, file), points in sorted(found.items(), key=lambda item: (item[0][4], -len(item[1]))):
        if len(points) > 1:
            made.setdefault(what, {}).setdefault((storage, way), Line(file, storage, way, sorted(points.items())))
    return {what: list(lines.values()) for what, lines in list(made.items())[:2]}


def picture(made: Mapping[str, Sequence[Line]], axis: Axis, files: Sequence[Mapping[str, Any]]) -> str:
    """Returns the SVG of one axis: a panel for each measure."""
    width = max(len(made), 1) * (LEFT + PLOT_WIDTH + LABELS) + LEFT
    used = sorted({line.file for lines in made.values() for line in lines})
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}">',
        style(),
        f'<rect class="page" width="{width}" height="{HEIGHT}"/>',
        f'<text x="{LEFT}" y="22">Time with LoRAs / the host\'s time without. Solid: with kernels. Dashed: plain torch.</text>',
    ]
    for place, (what, lines) in enumerate(made.items()):
        parts += panel(lines, axis, LEFT + place * (LEFT + PLOT_WIDTH + LABELS), NAMES.get(what, f"One {what}"))
    source = "; ".join(f"{files[n]['device']}, commit {files[n]['commit']}" for n in used)
    return "\n".join([*parts, f'<text class="small" x="{LEFT}" y="{HEIGHT - 12}">{source}</text>', "</svg>", ""])


def panel(lines: Sequence[Line], axis: Axis, left: int, title: str) -> list[str]:
    """Returns the elements of one panel."""
    numbers = sorted({x for line in lines for x, _ in line.points})
    values = [y for line in lines for _, y in line.points]
    low, high = min(0.9, *values) - 0.02, max(1.1, *values) + 0.02
    step = next(step for step in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 1e9) if (high - low) / step <= 8)
    span = math.log2(numbers[-1] / numbers[0])

    def across(x: int) -> float:
        return round(left + PLOT_WIDTH * math.log2(x / numbers[0]) / span, 1)

    def down(y: float) -> float:
        return round(TOP + PLOT_HEIGHT * (high - y) / (high - low), 1)

    parts = [f'<text class="title" x="{left}" y="{TOP - 16}">{title}</text>']
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        y, kind = down(number * step), "even" if abs(number * step - 1) < 1e-9 else "grid"
        parts.append(f'<line class="{kind}" x1="{left}" x2="{left + PLOT_WIDTH}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="small" text-anchor="end" x="{left - 6}" y="{y + 4}">{number * step:.2f}</text>')
    for x in numbers:
        parts.append(
            f'<text class="small" text-anchor="middle" x="{across(x)}" y="{TOP + PLOT_HEIGHT + 18}">{x}</text>'
        )
    parts.append(f'<text class="small" x="{left}" y="{TOP + PLOT_HEIGHT + 36}">{axis.title}</text>')
    lowest = 0.0
    for line in sorted(lines, key=lambda line: -line.points[-1][1]):
        points = " ".join(f"{across(x)},{down(y)}" for x, y in line.points)
        parts.append(f'<g class="{line.storage}"><polyline class="{line.way}" points="{points}"/>')
        parts += [f'<circle cx="{across(x)}" cy="{down(y)}" r="3"/>' for x, y in line.points]
        # Below the one before it.
        lowest = max(lowest + 14, down(line.points[-1][1]) + 4)
        words = f"{line.storage}, {WAYS[line.way]}"
        parts.append(f'<text class="small" x="{left + PLOT_WIDTH + 8}" y="{lowest:.1f}">{words}</text></g>')
    return parts


def loras(kind: str, ranks: Sequence[int]) -> str:
    """Returns the words for a stack."""
    name = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}[kind]
    if kind == "lokr":
        return f"{name}, {ranks[0]} blocks a side"
    if len(ranks) == 1:
        return f"{name}, rank {ranks[0]}"
    return f"{len(ranks)} {name}s, ranks {', '.join(map(str, ranks))}"


def cell(row: Row, way: str) -> str:
    """Returns a time with its ratio, for a table."""
    ratio = row.ratio(way)
    return "not measured" if ratio is None else f"{row.ms[way]:.4g} (x{ratio:.3f})"


def tables(files: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    """Returns a table for each file."""
    parts = []
    for number, file in enumerate(files):
        versions = f"torch {file['torch']}" + (f", Triton {file['triton']}" if file["triton"] else "")
        note = f" {file['note'][0].upper()}{file['note'][1:]}." if file.get("note") else ""
        parts += [
            f"**`{file['script']}`, commit {file['commit']}, {file['date'][:10]}.** {file['device']}, {versions}.{note}", "",
            "| measured | storage | LoRAs | tokens | host without, ms | with kernels, ms | plain torch, ms |", "| --- | --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for row in (row for row in rows if row.file == number):
            words = f"{row.what} | {row.storage} | {loras(row.kind, row.ranks)} | {row.tokens} | {row.ms['host']:.4g}"
            parts.append(f"| {words} | {cell(row, 'guard')} | {cell(row, 'plain')} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def found_for(rows: Iterable[Row], storage: str, kind: str, ranks: Sequence[int], way: str) -> Row | None:
    """Returns the newest case of a whole step: 1024 x 1024, and not of one layer."""
    fitting = (
        row for row in rows if (row.storage, row.kind, row.ranks) == (storage, kind, tuple(ranks)) and way in row.ms
    )
    return next(
        (row for row in fitting if row.tokens == 4096 and row.what in NAMES and row.what != "whole image"), None
    )


def goals(files: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    """Returns the table of the goals, with the newest measurement of each."""
    lines = [
        "| step with LoRAs / the host's without | way | goal | found | measured | commit |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for storage, kind, ranks, way, goal in GOALS:
        row = found_for(rows, storage, kind, ranks, way)
        what = f"| {storage}: {loras(kind, ranks)} | {WAYS[way]} | <= x{goal:.2f} |"
        if row is None:
            lines.append(f"{what} not measured | | |")
            continue
        ratio = row.ratio(way)
        assert ratio is not None
        word = f"x{ratio:.3f}, met" if round(ratio, 3) <= goal else f"**x{ratio:.3f}, missed by {ratio - goal:.3f}**"
        lines.append(f"{what} {word} | {row.what} | {files[row.file]['commit']} |")
    return "\n".join(lines)


def answers(rows: Sequence[Row]) -> str:
    """Returns the sentences about a step, with the newest numbers."""
    asked = (
        ("one LoRA of rank 16", "lora", (16,), ("fp8", "nf4", "Q8_0", "Q4_0", "Q4_K", "int8")),
        ("one of rank 64", "lora", (64,), ("fp8", "nf4", "Q8_0")),
        ("one of rank 128", "lora", (128,), ("fp8", "nf4", "Q4_K")),
        ("three of rank 32", "lora", (32, 32, 32), ("nf4",)),
        ("a DoRA of rank 16", "dora", (16,), ("fp8", "nf4")),
        ("a LoHa of rank 8", "loha", (8,), ("fp8", "nf4")),
        ("a LoKr", "lokr", (8,), ("fp8", "nf4")),
    )
    lines = [
        "| What does a step with ... take of the host's step without? | with the kernels | in plain torch |",
        "| --- | --- | --- |",
    ]
    for words, kind, ranks, storages in asked:
        cells = []
        for way in WAYS:
            found = {storage: found_for(rows, storage, kind, ranks, way) for storage in storages}
            numbers = [f"{name} x{row.ms[way] / row.ms['host']:.2f}" for name, row in found.items() if row is not None]
            cells.append(", ".join(numbers) or "not measured")
        if set(cells) != {"not measured"}:
            lines.append(f"| {words} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def with_part(page: str, name: str, made: str) -> str:
    """Returns the page with the text between the two marks of a part replaced.

    Raises:
        ValueError: It has no such marks.
    """
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not marks.search(page):
        raise ValueError(f"{PAGE.name} has no part '{name}'")
    return marks.sub(lambda match: f"{match[1]}{made}\n{match[2]}", page)


def made_of(folder: Path, page: str) -> tuple[dict[str, str], str]:
    """Returns the pictures by their files' names, and the page with its parts anew."""
    files, rows = load(folder)
    pictures = {f"cost-{name}.svg": picture(panels(rows, axis), axis, files) for name, axis in AXES.items()}
    for name, text in (("answers", answers(rows)), ("goals", goals(files, rows)), ("tables", tables(files, rows))):
        page = with_part(page, name, text)
    return pictures, page


def main() -> None:
    """Writes the pictures and the page."""
    pictures, page = made_of(RESULTS, PAGE.read_text(encoding="utf-8"))
    for name, text in pictures.items():
        (PAGE.parent / name).write_text(text, encoding="utf-8")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
