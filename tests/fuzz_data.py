"""Makes folders `data/` at random, most of them damaged, and starts the guard in each of them as a host does. Run by hand:

    python tests/fuzz_data.py [--seed 1] [--first 0] [--count 5000] [--seconds 540]

A folder is made from the seed and its number alone. Rules: no raw error, nothing that waits, every line one line and said once a start,
nothing outside the folder written, what is none of the guard's files left where it is, corrections right in the process. Not on Windows.
Ends with 1 where a rule does not hold.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from fuzz import data_folders  # noqa: E402
from fuzz.checks import Seen  # noqa: E402


def run(count: int, seed: int = 1, first: int = 0, seconds: float = 1e9, say=print) -> dict:
    """Checks folders `first` to `first + count`; returns the counts and the findings."""
    begun, facts, outcomes, findings, done = time.monotonic(), Counter(), Counter(), [], 0
    with tempfile.TemporaryDirectory() as place:
        for number in range(first, first + count):
            if time.monotonic() - begun > seconds:
                break
            root, seen = Path(place) / str(number), Seen()
            root.mkdir()
            scene = data_folders.Scene(root, random.Random(f"{seed} {number}"))
            data_folders.check(scene, seen)
            data_folders.remove(root)
            done += 1
            facts.update(scene.facts)
            outcomes.update(seen.outcomes)
            for finding in seen.findings:
                findings.append({"number": number, "rule": finding.rule, "detail": finding.detail})
                say(f"{number} {finding.rule}: {finding.detail}")
    return {
        "folders": done,
        "seconds": time.monotonic() - begun,
        "facts": facts,
        "outcomes": outcomes,
        "findings": findings,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=540.0)
    options = parser.parse_args()
    found = run(options.count, options.seed, options.first, options.seconds)
    print(f"{found['folders']} folders in {found['seconds']:.0f} s, next {options.first + found['folders']}")
    for name in ("facts", "outcomes"):
        print(name, dict(sorted(found[name].items())))
    print("findings", dict(Counter(one["rule"] for one in found["findings"])))
    return 1 if found["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
