"""Tables of the whole-image benchmark, from its JSON lines.

    python table.py results.jsonl [more.jsonl ...]

For each machine setting one table of images, and one of the ratios that the guard's promises are about. Where an image was made
more than once, the last one counts.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SETTING = ("host", "storage", "free_gb", "size", "slow_link_gb_s")
ALLOWED_RAM_MB = 64
"""What the guard may need of RAM beside stock's own and the LoRA's."""

median = statistics.median


def read(files):
    """Returns the rows of files of JSON lines. A line that a killed run left half written is dropped."""
    rows = []
    for file in files:
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def images(rows):
    """Returns the rows of images, the last one of each."""
    found = {}
    for row in rows:
        if "case" in row:
            key = tuple(row.get(name) for name in (*SETTING, "way", "day", "plan_steps", "case"))
            found.pop(key, None)
            found[key] = row
    return list(found.values())


def groups(rows, *names):
    """Returns `{values of names: rows}`, in the order of the rows."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return found


def steps_a_second(row):
    """Returns the rate of all steps but the first, which has the work of applying in it; None where there was one step."""
    usual = row.get("usual_step_s")
    return 1 / usual if usual else None


def line(row):
    """Returns one image as one line of the console."""
    if "error" in row:
        return f"{row['way']} {row['steps']} steps, {row['case']}: {row['error']}"
    parts = [f"{row['seconds']:.2f} s"]
    if steps_a_second(row):
        parts.append(f"{steps_a_second(row):.2f} steps/s, first after {row['to_first_step_s']:.2f} s")
    parts += [
        f"{row[name] / 1000:.1f} GB {label}"
        for name, label in (("vram_mb", "VRAM"), ("own_ram_mb", "RAM"))
        if name in row
    ]
    if "max_levels" in row:
        parts.append(f"{row['max_levels']} levels from {row['same_as']!r}")
    return f"{row['way']} {row['steps']} steps, {row['case']}: " + ", ".join(parts)


def number(value, digits=2):
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(rows):
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def image_table(rows):
    """Returns the table of one setting and one part of a plan: one row an image, one column a way."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    cells = {(row["case"], row["way"]): cell(row) for row in rows}
    cases = list(dict.fromkeys(row["case"] for row in rows))
    head = ["s; steps/s; GB of RAM; levels from its like", *ways]
    peaks = [number(max(row.get("own_ram_mb", 0) for row in rows if row["way"] == way) / 1000, 1) for way in ways]
    return markdown(
        [head, *([case, *(cells.get((case, way), "-") for way in ways)] for case in cases), ["peak of RAM, GB", *peaks]]
    )


def cell(row):
    if "error" in row:
        return f"**{row['error'][:60]}**"
    ram = row.get("own_ram_mb")
    parts = [number(row["seconds"], 1), number(steps_a_second(row)), number(ram and ram / 1000, 1)]
    if "max_levels" in row:
        parts.append(f"{row['max_levels']} / {row['mean_levels']:g}")
    return "; ".join(parts)


class Way:
    """The images of one way in one part of a plan, by case."""

    def __init__(self, rows):
        self.rows = rows
        self.by_case = {row["case"]: row for row in rows if "error" not in row}

    def get(self, name, field="seconds"):
        return self.by_case.get(name, {}).get(field)

    def changed(self):
        """The images whose stack is another one than before."""
        return [row for row in self.by_case.values() if row["changes"] and row["steps"] == row["plan_steps"]]

    def with_lora(self):
        return [row for row in self.by_case.values() if row["loras"] and row["steps"] == row["plan_steps"]]


class Ratio(NamedTuple):
    """One line of the table of ratios.

    Attributes:
        label: What is divided by what.
        goal: The most or the least that it should be, as text.
        measure: Takes a way of the guard, stock and stock's fp16 LoRA; returns the value or None.
        holds: Takes the value; None where nothing is promised.
    """

    label: str
    goal: str
    measure: Callable
    holds: Callable | None = None


def divided(value, by):
    return value / by if value and by else None


def most(values):
    return max((value for value in values if value is not None), default=None)


def least(values):
    return min((value for value in values if value is not None), default=None)


def plain_rate(stock, fp16):
    """Stock's steps a second without a LoRA: both of its settings calculate the same there."""
    for way in (stock, fp16):
        if row := way.by_case.get("no LoRA"):
            return steps_a_second(row)
    return None


def plain_ram(stock, fp16):
    """Stock's peak of RAM up to its second image without a LoRA, in MB."""
    for way in (stock, fp16):
        before = [row.get("own_ram_mb") for name, row in way.by_case.items() if name in ("cold, no LoRA", "no LoRA")]
        if any(before):
            return most(before)
    return None


def ram_beyond(guard, stock, fp16):
    """Returns the guard's peak beyond stock's without a LoRA and the LoRA's own bytes, in MB."""
    allowed, peak = plain_ram(stock, fp16), most(row.get("own_ram_mb") for row in guard.rows)
    loras = most(row.get("lora_mb") for row in guard.rows)
    return None if allowed is None or peak is None else peak - allowed - (loras or 0)


def change(guard, *_):
    again = guard.get("same again")
    return most(divided(row["seconds"], again) for row in guard.changed())


def steps_after_change(guard, stock, fp16):
    return divided(least(steps_a_second(row) for row in guard.changed()), plain_rate(stock, fp16))


def steps_with_lora(guard, stock, fp16):
    return divided(least(steps_a_second(row) for row in guard.with_lora()), plain_rate(stock, fp16))


def change_beside_fp16(guard, _, fp16):
    return most(divided(row["seconds"], fp16.get(row["case"])) for row in guard.changed())


def first_step_beyond(guard, *_):
    """Returns the seconds of the first step beyond a usual one, and of what comes before it beyond an unchanged image's."""
    again = guard.by_case.get("same again", {})
    if "usual_step_s" not in again:
        return None
    usual = again["to_first_step_s"] + again["usual_step_s"]
    return most(
        row["to_first_step_s"] + row["first_step_s"] - usual for row in guard.changed() if "first_step_s" in row
    )


def from_fp16(guard, *_):
    """Returns the largest mean difference from the pictures with a LoRA of stock's exact way, in grey levels."""
    return most(row.get("from_ways", {}).get("fp16", {}).get("mean_levels") for row in guard.with_lora())


RATIOS = (
    Ratio("image after a change / same again", "<= 1.10 (Neo 1.2)", change, lambda v: v <= 1.1),
    Ratio("steps/s after any change / stock's without LoRA", ">= 0.92", steps_after_change, lambda v: v >= 0.92),
    Ratio("steps/s with a LoRA / stock's without LoRA", ">= 0.92", steps_with_lora, lambda v: v >= 0.92),
    Ratio("image after a change / stock fp16's", "<= 0.5 (20 steps)", change_beside_fp16, lambda v: v <= 0.5),
    Ratio(
        "same again / stock fp16's",
        "<= 0.8 (50 steps)",
        lambda guard, _, fp16: divided(guard.get("same again"), fp16.get("same again")),
        lambda v: v <= 0.8,
    ),
    Ratio(
        "no LoRA / stock's",
        "<= 1.00",
        lambda guard, stock, fp16: divided(guard.get("no LoRA"), stock.get("no LoRA") or fp16.get("no LoRA")),
        lambda v: v <= 1.02,
    ),
    Ratio("moves, applying and first step beyond a usual one, s", "<= 0.15 (NF4, three)", first_step_beyond),
    Ratio("RAM beyond stock's without LoRA + the LoRA's, MB", f"<= {ALLOWED_RAM_MB}", ram_beyond, lambda v: v <= 64),
    Ratio(
        "RAM peak / stock fp16's",
        "< 1",
        lambda guard, _, fp16: divided(
            most(row.get("own_ram_mb") for row in guard.rows), most(row.get("own_ram_mb") for row in fp16.rows)
        ),
        lambda v: v < 1,
    ),
    Ratio(
        "same prompt again: levels apart",
        "0",
        lambda guard, *_: most(row.get("max_levels") for row in guard.rows),
        lambda v: v == 0,
    ),
    Ratio("with a LoRA: mean levels from stock fp16's picture", "small", from_fp16),
)


def ratios(rows):
    """Returns the ratios of one setting and part of a plan: `{way of the guard: {label: value or None}}`."""
    ways = {name: Way(found) for (name,), found in groups(rows, "way").items()}
    stock, fp16 = ways.get("stock", Way([])), ways.get("fp16", Way([]))
    return {
        name: {ratio.label: ratio.measure(way, stock, fp16) for ratio in RATIOS}
        for name, way in ways.items()
        if name not in ("stock", "fp16")
    }


def ratio_table(rows):
    """Returns the table of ratios, or nothing where no way is the guard's. Bold: missed."""
    found = ratios(rows)
    if not found:
        return ""
    body = []
    for ratio in RATIOS:
        values = [ways[ratio.label] for ways in found.values()]
        if any(value is not None for value in values):
            body.append([ratio.label, ratio.goal, *(shown(value, ratio) for value in values)])
    return markdown([["", "goal", *found], *body]) if body else ""


def shown(value, ratio):
    text = number(value)
    return f"**{text}**" if value is not None and ratio.holds and not ratio.holds(value) else text


def page(rows):
    """Returns all tables."""
    parts = []
    for setting, found in groups(images(rows), *SETTING).items():
        host, storage, free_gb, size, link = setting
        slowed = f", copies slowed to {link:g} GB/s" if link else ""
        for (steps, day), part in groups(found, "plan_steps", "day").items():
            title = f"{host}, {storage}, {free_gb:g} GB free, {size} px, {steps} steps ({day}){slowed}"
            commits = {row["way"]: row["commit"] for row in part if row.get("commit")}
            built = "; ".join(f"{way} {commit}" for way, commit in commits.items())
            about = f"{part[0].get('gpu', '')}, torch {part[0].get('torch', '')}{'; ' + built if built else ''}."
            parts += [f"**{title}**\n\n{about}", image_table(part), ratio_table(part)]
    return "\n\n".join(part for part in parts if part) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    print(page(read(parser.parse_args().files)))


if __name__ == "__main__":
    main()
