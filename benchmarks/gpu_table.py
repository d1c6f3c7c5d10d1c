"""Writes the tables of docs/gpu.md from the JSON lines of forge_gpu.py.

python benchmarks/gpu_table.py results.jsonl ... [--write]
"""

import argparse
import json
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
HEADER = [
    "free VRAM, storage, swap",
    "way",
    "apply s",
    "change s",
    "remove s",
    "step s without → with",
    "VRAM peak GB",
    "RAM growth GB",
    "LoRA present at 1 / 0.8",
    "error per layer",
    "weights back",
    "commit",
]


def settled_seconds(phase):
    """Returns the seconds to load plus the extra time of the first step, in which the guard copies its factors."""
    return phase["seconds"] + phase["steps"][0] - min(phase["steps"])


def rows(results):
    for result in results:
        label = f"{result['free_gb']:g} GB {result['storage']}, {result['swap']}" + (
            f", {result['kind']}" if result["kind"] != "lora" else ""
        )
        for way in sorted(
            result["ways"], key=lambda w: ["guard", "guard, merged", "fp16 LoRA", "automatic"].index(w["way"])
        ):
            if "out_of_memory" in way:
                yield [label, way["way"], "out of memory", *[""] * 8, result["commit"]]
                continue
            growth = [way[phase].get("rss_growth_gb") for phase in ("apply", "change")]
            yield [
                label,
                way["way"],
                *(f"{settled_seconds(way[phase]):.2f}" for phase in ("apply", "change", "remove")),
                f"{way['without']['step']:.3f} → {way['apply']['step']:.3f}",
                f"{max(way['apply']['vram_peak_gb'], way['change']['vram_peak_gb']):.2f}",
                "not measured" if None in growth else f"{max(growth):.2f}",
                f"{100 * way['share']:.1f} % / {100 * way['share_at_0.8']:.1f} %",
                f"{way['error']:.3f}",
                "all"
                if way["changed_weights_after_removal"] == 0 and way["output_back"]
                else f"{way['changed_weights_after_removal']} changed",
                result["commit"],
            ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="put the table into docs/gpu.md")
    options = parser.parse_args()
    results = [json.loads(line) for file in options.files for line in file.read_text(encoding="utf-8").splitlines()]
    guards = [way for result in results for way in result["ways"] if way["way"].startswith("guard") and "share" in way]
    machines = sorted({f"{r['gpu']}, torch {r['torch']}" for r in results})
    table = [HEADER, ["---"] * len(HEADER), *rows(results)]
    text = "\n".join("| " + " | ".join(row) + " |" for row in table)
    text += f"\n\n{'; '.join(machines)}. LoRA of rank {results[0]['rank']} on 304 layers, {results[0]['lora_mb']:.0f} MB; steps at 1024x1024.\n"
    left = max(abs(way["mb_left_on_gpu_after_unload"]) for way in guards)
    same = sum(way["same_output_after_reload"] for way in guards)
    text += f"\nGuard, unload and reload in between: {same} of {len(guards)} outputs bit for bit the same; at most {left:.1f} MB more on the GPU after unloading than before (cuBLAS workspaces included)."
    if not options.write:
        print(text)
        return
    page = DOCS / "gpu.md"
    old = page.read_text(encoding="utf-8")
    page.write_text(
        re.sub(
            r"(<!-- gpu table -->\n).*?(<!-- end of gpu table -->)",
            lambda m: m[1] + text + "\n" + m[2],
            old,
            flags=re.DOTALL,
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
