"""Makes LoRA files at random and holds the product to its rules with each of them. Run by hand:

    python tests/fuzz_files.py [--files 1000] [--seed 0] [--start 0] [--seconds 540] [--keep DIR] [--json FILE]
    python tests/fuzz_files.py --bombs [WORD]

A file is made from the seed and its number alone: `--start 4711 --files 1` makes that one again. What does not hold is printed with
the file's number, and the file is kept in DIR. Ends with 1 where a rule does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from fuzz import checks, files, models  # noqa: E402


def run(
    count: int, seed: int = 0, start: int = 0, seconds: float = 1e9, keep: Path | None = None, say=print, maker=None
) -> dict:
    """Checks files `start` to `start + count`; returns the counts and the findings.

    `maker(seed, folder)` returns a function that makes one file in a folder, from a random number; None takes `files.make_file`.
    """
    torch.set_num_threads(1)
    begun, facts, outcomes, findings, most, over = time.monotonic(), Counter(), Counter(), [], 0.0, 0
    done = 0
    with tempfile.TemporaryDirectory() as folder, checks.quiet() as log, warnings.catch_warnings():
        warnings.simplefilter("error")
        root = Path(folder)
        hosts = checks.Hosts(root)
        checkpoints = {
            name: checks.write_checkpoint(root / f"model-{name}.safetensors", name)
            for name in sorted(set(models.MODELS))
        }
        warm_up(root, checkpoints["flux"])
        make = files.make_file if maker is None else maker(seed, root / "sound")
        for number in range(start, start + count):
            if time.monotonic() - begun > seconds:
                break
            rng, seen = random.Random(f"{seed} {number}"), checks.Seen()
            own = root / "file"
            own.mkdir()
            file = make(own, rng)
            log.bad.clear()
            log.tracebacks.clear()
            torch.default_generator.manual_seed(0)
            checks.check_plain(file, rng, seen)
            if rng.random() < 0.25:
                checks.check_command_line(file, rng, seen, checkpoints[file.model])
            if rng.random() < 0.1:
                checks.check_stored(file, seen)
            if rng.random() < (0.7 if file.model == "blocks" else 0.12):
                checks.check_forge(file, rng, seen, hosts)
            seen.findings += [checks.Finding("not printable", repr(text[:600])) for text in log.bad[:1]]
            seen.findings += [checks.Finding("traceback in the log", text) for text in log.tracebacks[:1]]
            facts.update(file.facts)
            outcomes.update(seen.outcomes)
            most, over, done = max(most, seen.most_seconds), max(over, seen.over_bytes), done + 1
            for finding in seen.findings:
                findings.append(
                    {
                        "number": number,
                        "rule": finding.rule,
                        "detail": finding.detail,
                        "model": f"{file.model} {file.storage}",
                        "file": files.describe(file.path),
                    }
                )
                say(f"{number} {file.model} {file.storage} {finding.rule}: {finding.detail}")
            if seen.findings and keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                shutil.copytree(own, keep / f"{seed}-{number}", dirs_exist_ok=True)
            shutil.rmtree(own)
        hosts.close()
    return {
        "files": done, "next": start + done, "seconds": time.monotonic() - begun, "facts": facts, "outcomes": outcomes, "findings": findings,
        "most_cpu_seconds": most, "over_bytes": over,
    }  # fmt: skip


def warm_up(folder: Path, checkpoint: Path) -> None:
    """Imports what commands import when they run first: that memory is no file's."""
    sound = files.good_file(folder / "sound.safetensors", "flux")
    for words in (
        ["inspect", str(sound), "--model", str(checkpoint)],
        ["plan", str(checkpoint), str(sound), *checks.SIZES],
        ["bake", str(checkpoint), str(sound), "-o", str(folder / "baked.safetensors")],
    ):
        with contextlib.redirect_stdout(io.StringIO()):
            checks.cli.main(words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--bombs",
        nargs="?",
        const="",
        metavar="WORD",
        help="instead: files that would take memory, those with WORD in their name",
    )
    options = parser.parse_args()
    if options.bombs is not None:
        # Forks: not on Windows.
        from fuzz import bombs

        with tempfile.TemporaryDirectory() as folder:
            return 1 if any(one["fault"] for one in bombs.run(Path(folder), options.bombs).values()) else 0
    found = run(options.files, options.seed, options.start, options.seconds, options.keep)
    return tell(found, options.json)


def tell(found: dict, document: Path | None) -> int:
    """Prints the counts of a run and writes them as JSON; returns the exit code."""
    if document:
        document.write_text(json.dumps(found))
    print(
        f"{found['files']} files in {found['seconds']:.0f} s, next {found['next']}; at most {found['most_cpu_seconds']:.2f} s of CPU in one step, {found['over_bytes'] / 1e6:.0f} MB above tensors and 8 headers"
    )
    for name in ("facts", "outcomes"):
        print(name, dict(sorted(found[name].items())))
    print("findings", dict(Counter(one["rule"] for one in found["findings"])))
    return 1 if found["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
