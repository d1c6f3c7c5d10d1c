"""The bars at the top of README.md and README.zh-CN.md, drawn from the first table of docs/gpu.md.

    python benchmarks/bars.py    # writes docs/bars.svg and docs/bars-zh.svg

Every number is read from the table: the first row of each storage with 12 GB free, once with the guard and once with Forge's
"Automatic".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parent.parent / "docs"
STORAGES = {"fp8": "12 GB fp8, queue", "NF4": "12 GB nf4, queue", "GGUF Q8_0": "12 GB Q8_0, queue"}
"""Name in the picture, and in the table's first column."""
WAYS = ("automatic", "guard")

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "share": ("Share of the LoRA that arrives, %", "LoRA 实际生效的比例（%）"),
    "change": ("Another strength, seconds", "更改强度用时（秒）"),
    "ram": ("RAM on top of the model, GB", "模型之外增加的内存（GB）"),
    "automatic": ("Forge, “Automatic”", "Forge “Automatic”"),
    "guard": ("LoRA Guard", "LoRA Guard"),
    "source": (
        "Flux-dev's shapes, LoRA of rank 16 on 304 layers, 12 GB of VRAM free on one NVIDIA H200: first table of docs/gpu.md",
        "Flux-dev 的结构，304 层的秩 16 LoRA，一块 NVIDIA H200 上留出 12 GB 显存：见 docs/gpu.md 的第一张表",
    ),
}
FILES = {"bars.svg": 0, "bars-zh.svg": 1}
"""File in docs/ -> column of `TEXTS`."""

COLUMN_WIDTH, BAR_WIDTH, BAR_HEIGHT, LEFT, TOP = 300, 190, 15, 20, 70
COLOURS = {"automatic": "#b45309", "guard": "#15803d"}


class Row(NamedTuple):
    """One row of the table, as its words stand there: percent, seconds, GB."""

    share: str
    change: str
    ram: str


def rows(page: str) -> dict[tuple[str, str], Row]:
    """Returns the first row of each (setting, way) of the table in `page`, the text of docs/gpu.md."""
    table = re.search(r"<!-- gpu table -->\n(.*?)<!-- end of gpu table -->", page, re.DOTALL)
    if table is None:
        raise ValueError("docs/gpu.md has no gpu table")
    found: dict[tuple[str, str], Row] = {}
    for line in table[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 12:
            share = cells[8].partition(" / ")[0].removesuffix(" %")
            found.setdefault((cells[0], cells[1]), Row(share=share, change=cells[3], ram=cells[7]))
    return found


def picture(table: Mapping[tuple[str, str], Row], language: int) -> str:
    """Returns the SVG: a panel for each quantity, in it two bars for each storage."""
    height = TOP + len(STORAGES) * 58 + 40
    width = LEFT + COLUMN_WIDTH * len(Row._fields)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13" fill="#1f2937">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for place, way in enumerate(reversed(WAYS)):
        x = LEFT + place * 130
        parts.append(f'<rect x="{x}" y="14" width="12" height="12" fill="{COLOURS[way]}"/>')
        parts.append(f'<text x="{x + 18}" y="25">{TEXTS[way][language]}</text>')
    for column, field in enumerate(Row._fields):
        parts += panel(table, field, LEFT + column * COLUMN_WIDTH, TEXTS[field][language])
    parts.append(f'<text x="{LEFT}" y="{height - 14}" font-size="11">{TEXTS["source"][language]}</text>')
    return "\n".join([*parts, "</svg>", ""])


def panel(table: Mapping[tuple[str, str], Row], field: str, x: int, title: str) -> list[str]:
    """Returns the elements of one quantity; its longest bar is `BAR_WIDTH` wide."""
    words = {(name, way): getattr(table[setting, way], field) for name, setting in STORAGES.items() for way in WAYS}
    most = max(map(float, words.values()))
    parts = [f'<text x="{x}" y="{TOP - 16}" font-weight="bold">{title}</text>']
    for place, name in enumerate(STORAGES):
        y = TOP + place * 58
        parts.append(f'<text x="{x}" y="{y + 11}" font-size="12">{name}</text>')
        for below, way in enumerate(reversed(WAYS)):
            top, word = y + 16 + below * (BAR_HEIGHT + 2), words[name, way]
            length = max(1, round(BAR_WIDTH * float(word) / most))
            parts.append(f'<rect x="{x}" y="{top}" width="{length}" height="{BAR_HEIGHT}" fill="{COLOURS[way]}"/>')
            parts.append(f'<text x="{x + length + 6}" y="{top + 12}">{word}</text>')
    return parts


def main() -> None:
    """Writes the pictures of all languages."""
    table = rows((DOCS / "gpu.md").read_text(encoding="utf-8"))
    for name, language in FILES.items():
        (DOCS / name).write_text(picture(table, language), encoding="utf-8")


if __name__ == "__main__":
    main()
