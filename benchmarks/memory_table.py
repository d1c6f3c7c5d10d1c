"""Writes the tables "Predicted and measured peaks", "Memory that really ends" and "One setting on three cards" of
docs/gpu.md.

    python benchmarks/memory_table.py [--matrix m.jsonl ...] [--oom o.jsonl ...] [--pictures p.jsonl ...] [--write]

The files are written by memory_matrix.py, real_oom.py and one_setting.py. If a case occurs twice, the last row counts.
A table without files stays as it is. If the page has no markers for a table yet, its section is inserted before "To
repeat it".
"""

import argparse
import re
from pathlib import Path

from daily_table import table
from gpu_rig import read_lines
from memory_cases import GOAL_SHARE, GOAL_UNDER_MB, scored

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu.md"
BEFORE = "## To repeat it\n"

SECTIONS = {
    "memory matrix": """## Predicted and measured peaks

`benchmarks/memory_matrix.py`: Flux, SDXL and SD 1.5 in Forge's own classes with random weights, one factor varied at a time: one
load, apply and two steps with the stated VRAM free. "Promised" is what the running guard plans with (weights where they are
placed, a step of this size, the largest layer's cast, factors), before anything is loaded; "plan" what `lora-guard plan` says;
"measured" the peak of torch's allocator. "Room" is what the guard keeps free for a step, less what torch took from the card
beside the weights: below zero it took that much more, "load" where the load itself had more of the card than the steps. "Idle" is
VRAM that stayed free even at the peak although weights were swapped.
""",
    "real oom": """## Memory that really ends

`benchmarks/real_oom.py`: a Flux of few blocks of the real width, calculated in fp32. A second process takes the VRAM away before a
LoRA is applied, changed, taken off, before the model is unloaded, another one comes, or a step runs, and everything inside a
step right before a layer's LoRA is added. Afterwards, with memory again, outputs and all weights are compared.
""",
    "one setting": """## One setting on three cards

`benchmarks/one_setting.py`: the same noise, steps and LoRAs with 24, 12 and 8 GB free, decoded by Flux's VAE to 8-bit pixels.
""",
}


def signed(number, digits=0):
    return "" if number is None else f"{number:+,.{digits}f}"


def percent(share):
    return "" if share is None else f"{100 * share:+.1f} %"


def machines(rows):
    found = {
        f"{row['gpu']}, driver {row['driver']}, torch {row['torch']}, CUDA {row['cuda']}, LoRA Guard {row['commit']}"
        for row in rows
    }
    return "Measured: " + "; ".join(sorted(found)) + "."


def last_of_each(rows, key):
    """Returns the last row of each key, in the order of the first ones."""
    found = {}
    for row in rows:
        found[key(row)] = row
    return list(found.values())


def case_cell(row):
    stack = f"{row['loras']} x rank {row['rank']}" if row["loras"] else "no LoRA"
    return f"{row['model']} {row['storage']}, {row['cap_gb']:g} GB, {stack}, {row['size_px']} px, {row['mode']}"


def matrix(rows):
    rows = last_of_each(rows, lambda row: (row["case"], row["commit"]))
    # Score by the present rules, whatever they were when the row was written.
    rows = [row | (scored(row["predicted"], row["measured"]) if row.get("measured") else {}) for row in rows]
    body = [["case", "promised MB", "plan MB", "measured MB", "promised off", "plan off", "room MB", "idle MB", "goal"]]
    for row in rows:
        measured, predicted = row.get("measured"), row.get("predicted")
        if not measured:
            why = "out of memory" if "out_of_memory" in row else "error: " + row.get("error", "?")[:80]
            promised = f"{predicted['promised_mb']:,.0f}" if predicted else ""
            body.append([case_cell(row), promised, "", why, *[""] * 4, "NO"])
            continue
        ends = {None: "not measured", True: "met", False: "NO"}
        body.append(
            [
                case_cell(row),
                f"{predicted['promised_mb']:,.0f}",
                f"{predicted['plan_mb']:,.0f}",
                f"{measured['allocated_mb']:,.0f}",
                percent(row["promised"]["share"]),
                percent(row["plan"]["share"]),
                signed(row["room_mb"]) or ("load" if measured["allocated_mb"] else ""),
                "" if row["idle_mb"] is None else f"{row['idle_mb']:,.0f}",
                ends[row["ok"]],
            ]
        )
    return f"{table(body)}\n\n{matrix_sum(rows)} {machines(rows)}"


def matrix_sum(rows):
    """Summarizes all cases: how many meet the goal, and the worst ones in both directions."""
    known = [row for row in rows if row.get("promised", {}).get("share") is not None]
    if not known:
        return f"{len(rows)} cases, nothing measured."
    met = sum(row["ok"] for row in known)
    over = [row["promised"]["over_mb"] for row in known]
    plan = sum(row["plan"]["ok"] for row in known)
    idle = [row["idle_mb"] for row in known if row["measured"]["swapped_mb"]]
    swapped = f" Idle where weights were swapped: {min(idle):,.0f} to {max(idle):,.0f} MB." if idle else ""
    short = [row["room_mb"] for row in known if row["room_mb"] is not None and row["room_mb"] < 0]
    least = f" (least {min(short):+,.0f} MB)" if short else ""
    collected = sum(row["measured"].get("retries", 0) > 0 for row in known)
    return (
        f"{len(rows)} cases; promised within {GOAL_SHARE:.0%} and not under by more than {GOAL_UNDER_MB:g} MB in {met} of "
        f"{len(known)}, plan in {plan}; promised less measured from {min(over):+,.0f} to {max(over):+,.0f} MB."
        f" Room below zero in {len(short)}{least}; torch had to collect in {collected}.{swapped}"
    )


def oom(rows):
    attempts = [row for row in rows if "operation" in row]
    body = [
        [
            "storage, mode",
            "attempts",
            "images",
            "of them with the CPU",
            "words",
            "host's own",
            "wrong states",
            "wrong values",
        ]
    ]
    variants = {}
    for row in attempts:
        variants.setdefault(f"{row['storage']}, {row['mode']}", []).append(row)
    for name, found in (*variants.items(), ("all", attempts)):
        body.append([name, *map(str, counted(found))])
    total = counted(attempts)
    text = table(body)
    text += f"\n\n{total[0]} attempts, {total[1]} images made, {total[3]} clear messages, {total[5]} wrong states, {total[6]} wrong values."
    text += f" {total[4]} ended in an out of memory of the host's own, in a layer or a move without a LoRA."
    for row in [row for row in rows if "faults" in row][-1:]:
        text += f"\nWith the models of tests/faults on the card ({row['device']}): {row['passed']} tests passed, {row['failed']} failed"
        text += "." if row["ended"] in (0, 1) else f" (ended: {row['ended']})."
    return f"{text}\n\n{machines(rows)}"


def counted(rows):
    ends = [row["end"] for row in rows]
    return (
        len(rows),
        ends.count("image"),
        sum(row["end"] == "image" and row["on_the_cpu"] > 0 for row in rows),
        ends.count("words"),
        ends.count("host"),
        sum(bool(row["wrong_states"]) for row in rows),
        sum(bool(row["wrong_values"]) for row in rows),
    )


def pictures(rows):
    rows = last_of_each(rows, lambda row: (row["storage"], row["size_px"], row["commit"]))
    body = [["storage", "GB free", "swapped MB", "largest difference from the first", "values that differ"]]
    for row in rows:
        for run in row["runs"]:
            cap = f"{run['cap_gb']:g}"
            found = row["against_first"].get(cap) if run["with_loras"] else row["without_lora"]
            cells = ["", ""] if found is None else [f"{found['largest']}", f"{found['share_that_differs']:.4%}"]
            name = cap if run["with_loras"] else f"{cap}, without LoRAs"
            body.append([row["storage"], name, f"{run['swapped_mb']:,.0f}", *cells])
    goal = "met" if all(row["ok"] for row in rows) else "NOT met"
    steps = ", ".join(sorted({f"{row['size_px']} px and {row['steps']} steps" for row in rows}))
    return f"{table(body)}\n\nGrey levels of 256; {steps}. The goal, one level at most while the LoRA is seen: {goal}. {machines(rows)}"


def put(page, name, text):
    """Returns the page with the table in place; inserts a missing section."""
    marked = f"<!-- {name} table -->\n{text}\n<!-- end of {name} table -->"
    between = rf"<!-- {name} table -->\n.*?<!-- end of {name} table -->"
    page, found = re.subn(between, lambda _: marked, page, flags=re.DOTALL)
    if found:
        return page
    assert page.count(BEFORE) == 1, f"the page has no place for the {name} table"
    return page.replace(BEFORE, f"{SECTIONS[name]}\n{marked}\n\n{BEFORE}")


def main(arguments=None, file=PAGE):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", type=Path, nargs="+", default=[])
    parser.add_argument("--oom", type=Path, nargs="+", default=[])
    parser.add_argument("--pictures", type=Path, nargs="+", default=[])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/gpu.md")
    options = parser.parse_args(arguments)
    page = file.read_text(encoding="utf-8")
    for name, make, files in (
        ("memory matrix", matrix, options.matrix),
        ("real oom", oom, options.oom),
        ("one setting", pictures, options.pictures),
    ):
        rows = read_lines(*files)
        if rows:
            text = make(rows)
            print(f"\n{name}\n{text}")
            page = put(page, name, text)
    if options.write:
        file.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
