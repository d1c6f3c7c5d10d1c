"""Damages sound LoRA files at random, and holds the product to the rules of `fuzz_files.py` with each of them. Run by hand:

    python tests/fuzz_damage.py [--seed 1] [--first 0] [--count 1000] [--seconds 540] [--keep DIR] [--json FILE]

A file is made from the seed and its number alone, so a run can be split: `--first 0 --count 1000`, `--first 1000 --count 1000`, and so on.
Ends with 1 where a rule does not hold.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from fuzz.damage import Maker  # noqa: E402
from fuzz_files import run, tell  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = run(options.count, options.seed, options.first, options.seconds, options.keep, maker=Maker)
    return tell(found, options.json)


if __name__ == "__main__":
    sys.exit(main())
