"""Writes the tables "From Generate to the first step", "Fifty changes", "Ten prompts" and "The allocator" of
docs/gpu.md.

    python benchmarks/daily_table.py --first-step s.jsonl --changes c.jsonl --alternating a.jsonl --allocator allocator.jsonl ... [--write]

The files are written by first_step.py and allocator_gpu.py. If an allocator case occurs twice, the last row counts.
"""

import argparse
import json
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu.md"


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def table(rows):
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def measured_on(header, settings=""):
    return f"{header['gpu']}, torch {header['torch']}, LoRA Guard {header['commit']}{settings}."


def first_step(results):
    ways = [result["way"] for result in results]
    by_event = {}
    for result in results:
        for entry in result["result"]:
            by_event.setdefault(entry["event"], {})[result["way"]] = entry
    rows = [["event", *(f"{way}: s, GB moved, prompts encoded" for way in ways)]]
    for event, entries in by_event.items():
        cells = []
        for way in ways:
            entry = entries[way]
            moved = f"{entry['moved_before_step_gb']:.2f}" if "moved_before_step_gb" in entry else "not counted"
            seconds = entry["to_first_step_s"]
            cells.append(f"{'left out' if seconds is None else f'{seconds:.2f}'}, {moved}, {entry['encoded']}")
        rows.append([event, *cells])
    header = results[0]
    return f"{table(rows)}\n\n" + measured_on(header, f"; {header['free_gb']:g} GB free, {header['storage']}")


def changes(results):
    """Returns a table with one column for each way."""
    found = [result["result"] for result in results]
    rows = [["", *(result["way"] for result in results)]]
    rows.append(["changes", *(str(one["changes"]) for one in found)])
    for label, when in (("MB on the GPU at first", "first"), ("at last", "last"), ("least", "least")):
        rows.append([label, *(f"{one[f'on_gpu_{when}_mb']:.1f}" for one in found)])
    rows.append(["seconds a change (median)", *(f"{one['median_change_s']:.3f}" for one in found)])
    header = results[0]
    return f"{table(rows)}\n\n" + measured_on(header, f"; {header['free_gb']:g} GB free, {header['storage']}")


def alternating(results):
    """Returns the table of ten images with a new prompt each, one column for each way: its last measurement."""
    results = list({result["way"]: result for result in results}.values())
    found = [result["result"] for result in results]
    rows = [["", *(result["way"] for result in results)], ["commit", *(result["commit"] for result in results)]]
    rows.append(["images", *(str(one["images"]) for one in found)])
    rows.append(["GB over the bus", *(f"{one['moved_gb']:.1f}" for one in found)])
    rows.append(["seconds, counting included", *(f"{one['seconds']:.1f}" for one in found)])
    rows.append(["the first image, which loads all: GB, s", *(first(one["first_image"]) for one in found)])
    rows.append(
        ["GB of the model on the GPU after the last decode", *(f"{one['rows'][-1]['on_gpu_gb']:.2f}" for one in found)]
    )
    header = results[0]
    machine = f"{header['gpu']}, torch {header['torch']}; {header['free_gb']:g} GB free, {header['storage']}."
    return f"{table(rows)}\n\n{machine}"


def first(image):
    return f"{image['moved_gb']:.1f}, {image['seconds']:.1f}"


def allocator(files):
    cases, headers = {}, []
    for rows in files:
        headers.append(rows[0])
        cases |= {row["case"]: (row, rows[0]["commit"]) for row in rows[1:]}
    body = [["case", "as it should be", "what was seen", "commit"]]
    for name, (row, commit) in cases.items():
        body.append([name, "yes" if row["passed"] else "NO: " + ", ".join(row["failed"]), seen(row), commit])
    return f"{table(body)}\n\n{headers[0]['gpu']}, torch {headers[0]['torch']}, CUDA {headers[0]['cuda']}."


def seen(row):
    """Joins the checks that hold and the measured numbers."""
    parts = []
    for name, value in row.items():
        if name in ("case", "passed", "failed", "says", "notes", "text", "environment", "refused", "torch has"):
            continue
        if value is True:
            parts.append(name)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            parts.append(f"{name} {value:g}")
        elif isinstance(value, list):
            parts.append(f"{name} {', '.join(f'{number:g}' for number in value)}")
    return "; ".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-step", type=Path, required=True)
    parser.add_argument("--changes", type=Path, required=True)
    parser.add_argument("--allocator", type=Path, nargs="+", required=True)
    parser.add_argument("--alternating", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/gpu.md")
    options = parser.parse_args()
    texts = {
        "first step": first_step(lines(options.first_step)),
        "changes": changes(lines(options.changes)),
        "alternating": alternating(lines(options.alternating)),
        "allocator": allocator([lines(file) for file in options.allocator]),
    }
    page = PAGE.read_text(encoding="utf-8")
    for name, text in texts.items():
        print(f"\n{name}\n{text}")
        between = rf"(<!-- {name} table -->\n).*?(<!-- end of {name} table -->)"
        page, found = re.subn(between, lambda m, text=text: m[1] + text + "\n" + m[2], page, flags=re.DOTALL)
        assert found == 1, f"gpu.md has no markers for the {name} table"
    if options.write:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
