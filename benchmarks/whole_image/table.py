"""Tables of the whole-image benchmark, from its JSON lines.

    python table.py results.jsonl [more.jsonl ...]

First the guard's promises, met or missed by how much; then, for each machine setting and part of a plan, a table of images and one
of all ratios. Only ways of one call of run.py are compared: the machine may be another one next time. Where an image was made
more than once in a call, the last one counts.
"""

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SETTING = ("run", "host", "storage", "free_gb", "size", "slow_link_gb_s")
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
    if row.get("alloc_retries"):
        parts.append(f"{row['alloc_retries']} times without room")
    if row.get("collector_s"):
        parts.append(f"{row['collector_s']:.2f} s of it Python's collector")
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
    """The images of one way in one part of a plan, by case.

    Args:
        rows: Of the part.
        of_the_run: Of all parts of the same call of run.py.
    """

    def __init__(self, rows, of_the_run=None):
        self.rows = rows
        self.run = rows if of_the_run is None else of_the_run
        self.by_case = {row["case"]: row for row in rows if "error" not in row}

    def get(self, name, field="seconds"):
        return self.by_case.get(name, {}).get(field)

    def changed(self):
        """The images whose stack is another one than before."""
        return [row for row in self.by_case.values() if row["changes"] and row["steps"] == row["plan_steps"]]

    def with_lora(self):
        return [row for row in self.by_case.values() if row["loras"] and row["steps"] == row["plan_steps"]]

    def plain_rate(self):
        """Steps a second without a LoRA: of this part, else of the run's others."""
        for rows in (self.rows, self.run):
            rates = [steps_a_second(row) for row in rows if row["case"] == "no LoRA" and "error" not in row]
            if rates := [rate for rate in rates if rate]:
                return median(rates)
        return None

    def plain_ram(self):
        """The peak of RAM before the run's first LoRA, in MB."""
        before = itertools.takewhile(lambda row: not row["loras"], self.run)
        return most(row.get("own_ram_mb") for row in before)

    def ram(self):
        """The peak of RAM in the run, in MB."""
        return most(row.get("own_ram_mb") for row in self.run)


class Part(NamedTuple):
    """What a promise may depend on."""

    host: str
    storage: str
    steps: int
    day: str


class Ratio(NamedTuple):
    """One line of the table of ratios.

    Attributes:
        label: What is divided by what.
        measure: Takes a way of the guard, stock and stock's fp16 LoRA; returns the value or None.
        goal: Takes the part; returns the most that the value may be, or None where nothing is promised.
        at_least: The goal is the least instead.
        noise: How much the goal may be missed by before that means something.
        is_of_run: It says the same in each part of a run.
    """

    label: str
    measure: Callable
    goal: Callable = lambda _: None
    at_least: bool = False
    noise: float = 0.0
    is_of_run: bool = False

    def missed_by(self, value, goal):
        """Returns by how much a value misses a goal; 0 if it is met."""
        short = goal - value if self.at_least else value - goal
        return 0.0 if short <= self.noise + ROUNDING else short

    def goal_text(self, goal):
        if goal is None:
            return "-"
        noise = f", {self.noise:g} of noise" if self.noise else ""
        return f"{'>=' if self.at_least else '<='} {goal:.2f}{noise}"


ROUNDING = 1e-9


def divided(value, by):
    return value / by if value and by else None


def most(values):
    return max((value for value in values if value is not None), default=None)


def least(values):
    return min((value for value in values if value is not None), default=None)


def plain_rate(stock, fp16):
    """Stock's steps a second without a LoRA: both of its settings calculate the same there."""
    return stock.plain_rate() or fp16.plain_rate()


def ram_beyond(guard, stock, fp16):
    """Returns the guard's peak beyond stock's without a LoRA and the LoRA's own bytes, in MB."""
    allowed, peak = most((stock.plain_ram(), fp16.plain_ram())), guard.ram()
    loras = most(row.get("lora_mb") for row in guard.run)
    return None if allowed is None or peak is None else peak - allowed - (loras or 0)


def change(guard, *_):
    # An image without a LoRA is measured by its like: its steps are other ones.
    again = {True: guard.get("same again"), False: guard.get("no LoRA")}
    return most(divided(row["seconds"], again[row["loras"] > 0]) for row in guard.changed())


def change_beside_its_own(guard, *_):
    """The same for two LoRAs, beside the same two again: more LoRAs cost more in each image."""
    return divided(guard.get("two LoRAs"), guard.get("two again"))


def steps_after_change(guard, stock, fp16):
    return divided(least(steps_a_second(row) for row in guard.changed()), plain_rate(stock, fp16))


def steps_with_lora(guard, stock, fp16):
    return divided(least(steps_a_second(row) for row in guard.with_lora()), plain_rate(stock, fp16))


def change_beside_fp16(guard, _, fp16):
    return most(divided(row["seconds"], fp16.get(row["case"])) for row in guard.changed())


def first_step_beyond(guard, *_, names=None):
    """Returns the seconds until the first step has ended, beyond those of an unchanged image with a usual step.

    Args:
        guard: The way.
        names: Of the images to look at; None takes all that a LoRA or a strength was changed for.
    """
    again = guard.by_case.get("same again", {})
    if "usual_step_s" not in again:
        return None
    usual = again["to_first_step_s"] + again["usual_step_s"]
    rows = [row for row in applied(guard) if "first_step_s" in row and (names is None or row["case"] in names)]
    ends = (row["to_first_step_s"] + row["first_step_s"] for row in rows)
    return most(end - usual for end in ends)


def applied(guard):
    """The images that a LoRA or a strength was changed for."""
    return [row for row in guard.changed() if row["loras"]]


def step_beyond(guard, *_):
    """Returns the seconds of the first step beyond a usual one of the same image."""
    rows = [row for row in applied(guard) if "usual_step_s" in row]
    return most(row["first_step_s"] - row["usual_step_s"] for row in rows)


def from_fp16(guard, _, fp16):
    """Returns the largest mean difference from the pictures with a LoRA of stock's exact way, in grey levels.

    The way that came later has noted it.
    """
    found = [row.get("from_ways", {}).get("fp16") for row in guard.with_lora()]
    names = {row["way"] for row in guard.rows}
    found += [row.get("from_ways", {}).get(name) for row in fp16.with_lora() for name in names]
    return most(apart.get("mean_levels") for apart in found if apart)


def at_steps(steps, goal):
    """Returns a goal for parts with so many steps."""
    return lambda part: goal if part.steps == steps else None


def always(goal):
    return lambda _: goal


def of_three_on_nf4(part):
    return 0.15 if (part.storage, part.day) == ("nf4", "three") else None


def most_of_a_change(part):
    if part.host == "neo":
        return 1.2
    return 1.1 if part.steps == 4 else None


RATIOS = (
    Ratio("image after a change / same again", change, most_of_a_change),
    Ratio("two LoRAs / two again", change_beside_its_own, most_of_a_change),
    Ratio("steps/s after any change / stock's without LoRA", steps_after_change, always(0.92), at_least=True),
    Ratio("steps/s with a LoRA / stock's without LoRA", steps_with_lora, always(0.92), at_least=True),
    Ratio("image after a change / stock fp16's", change_beside_fp16, at_steps(20, 0.5)),
    Ratio(
        "same again / stock fp16's",
        lambda guard, _, fp16: divided(guard.get("same again"), fp16.get("same again")),
        at_steps(50, 0.8),
    ),
    Ratio(
        "no LoRA / stock's",
        lambda guard, stock, fp16: divided(guard.get("no LoRA"), stock.get("no LoRA") or fp16.get("no LoRA")),
        at_steps(50, 1.0),
        noise=0.02,
    ),
    Ratio(
        "moves, applying and first step beyond a usual one, s",
        first_step_beyond,
        of_three_on_nf4,
    ),
    Ratio(
        "the same, files that were used before, s",
        functools.partial(first_step_beyond, names=("strength", "other strengths")),
        of_three_on_nf4,
    ),
    Ratio("first step beyond a usual one, s", step_beyond),
    Ratio(
        "RAM beyond stock's without LoRA + the LoRA's, MB",
        ram_beyond,
        lambda part: ALLOWED_RAM_MB if part.host == "neo" else None,
        is_of_run=True,
    ),
    Ratio(
        "RAM peak / stock fp16's",
        lambda guard, _, fp16: divided(guard.ram(), fp16.ram()),
        always(1.0),
        is_of_run=True,
    ),
    Ratio(
        "same prompt again: levels apart", lambda guard, *_: most(r.get("max_levels") for r in guard.rows), always(0)
    ),
    Ratio("with a LoRA: mean levels from stock fp16's picture", from_fp16),
)


def ratios(rows, of_the_run=None):
    """Returns the ratios of one setting and part of a plan: `{way of the guard: {label: value or None}}`.

    Args:
        rows: Of the part.
        of_the_run: Of all parts of the same call of run.py.
    """
    run = groups(rows if of_the_run is None else of_the_run, "way")
    ways = {name: Way(found, run[name,]) for (name,), found in groups(rows, "way").items()}
    # A way that did not play this part can still say what it did without a LoRA.
    stock, fp16 = (ways.get(name) or Way([], run.get((name,), [])) for name in ("stock", "fp16"))
    return {
        name: {ratio.label: ratio.measure(way, stock, fp16) for ratio in RATIOS}
        for name, way in ways.items()
        if name not in ("stock", "fp16")
    }


def ratio_table(rows, of_the_run=None):
    """Returns the table of ratios, or nothing where no way is the guard's. Bold: missed."""
    found = ratios(rows, of_the_run)
    if not found:
        return ""
    part, body = part_of(rows[0]), []
    for ratio in RATIOS:
        values, goal = [ways[ratio.label] for ways in found.values()], ratio.goal(part)
        if any(value is not None for value in values):
            body.append([ratio.label, ratio.goal_text(goal), *(shown(value, ratio, goal) for value in values)])
    return markdown([["", "goal", *found], *body]) if body else ""


def part_of(row):
    return Part(row["host"], row["storage"], row["plan_steps"], row["day"])


def shown(value, ratio, goal):
    text = number(value)
    if value is None or goal is None:
        return text
    missed = ratio.missed_by(value, goal)
    return f"**{text}, missed by {number(missed)}**" if missed else f"{text}, met"


def promises(settings):
    """Returns the table of all promises that a run says something about.

    Args:
        settings: `[(setting, rows of the setting)]`.
    """
    body = []
    for setting, found in settings:
        said = set()
        for part, rows in groups(found, "plan_steps", "day").items():
            for way, values in ratios(rows, found).items():
                for ratio in RATIOS:
                    value, goal = values[ratio.label], ratio.goal(part_of(rows[0]))
                    if value is None or goal is None or (ratio.label, way) in said:
                        continue
                    if ratio.is_of_run:
                        said.add((ratio.label, way))
                    where = f"{title(setting, None if ratio.is_of_run else part)}: {way}"
                    body.append([ratio.label, where, ratio.goal_text(goal), shown(value, ratio, goal)])
    body.sort(key=lambda row: [ratio.label for ratio in RATIOS].index(row[0]))
    return markdown([["promise", "where", "goal", "found"], *body]) if body else ""


def title(setting, part=None):
    """Returns the name of a setting, or of a part of its plan: `(steps, day)`."""
    _, host, storage, free_gb, size, link = setting
    slowed = f", copies slowed to {link:g} GB/s" if link else ""
    steps = f", {part[0]} steps ({part[1]})" if part else ""
    return f"{host}, {storage}, {free_gb:g} GB free, {size} px{steps}{slowed}"


def page(rows):
    """Returns all tables."""
    settings = list(groups(images(rows), *SETTING).items())
    parts = [promises(settings)]
    for setting, found in settings:
        for (steps, day), part in groups(found, "plan_steps", "day").items():
            commits = {row["way"]: row["commit"] for row in part if row.get("commit")}
            built = "; ".join(f"{way} {commit}" for way, commit in commits.items())
            about = f"{part[0].get('gpu', '')}, torch {part[0].get('torch', '')}{'; ' + built if built else ''}."
            if setting[-1]:
                waits = most(row.get("waited_s") for row in part)
                about += f" The benchmark waits around each copy between RAM and card: at most {number(waits, 1)} s an image."
            parts += [f"**{title(setting, (steps, day))}**\n\n{about}", image_table(part), ratio_table(part, found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    print(page(read(parser.parse_args().files)))


if __name__ == "__main__":
    main()
