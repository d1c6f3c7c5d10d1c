"""Runs tests/faults with the models on the card, where moving a weight is an allocation too.

    python benchmarks/faults_gpu.py --out faults.jsonl [--seconds 200]

Uses plain pytest without plugins and without the project's configuration: GPU machines lack hypothesis and
pytest-timeout, which these tests do not need. They run in the double of the WebUI, so no Forge is needed.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_rig

LINES = 3
"""Lines kept of an error: a sweep reports many failures, mostly with the same text."""

FILES = "test_single.py,test_forward.py,test_cpu_rung.py,test_engine.py,test_host.py"


def run(options):
    """Runs the tests with the models on the card and writes one row."""
    import torch

    root = gpu_rig.HERE.parent
    device = "cuda" if torch.cuda.is_available() else "cpu"
    paths = [str(root / "tests"), str(root), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "LORA_GUARD_FAULTS_DEVICE": device,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("FORGE_ROOT", None)
    command = [*bare_pytest(root / "tests"), "--maxfail=40"]
    files = [str(root / "tests" / "faults" / name) for name in options.files.split(",")]
    text = ""
    try:
        done = subprocess.run(
            [*command, *files],
            env=environment,
            cwd=root,
            capture_output=True,
            text=True,
            timeout=options.seconds,
            check=False,
        )
        text, ended = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        # Some systems return bytes even for text=True.
        found = error.stdout or ""
        text, ended = found if isinstance(found, str) else found.decode("utf-8", "replace"), "out of time"
    print(text[-6000:], flush=True)
    row = gpu_rig.header(torch) | {"faults": options.files, "device": device, "ended": ended, **outcomes(text)}
    gpu_rig.write_line(options.out, row)
    return ended != 0


def bare_pytest(root):
    """Returns pytest's command without the project's configuration, with the output that `outcomes` parses."""
    shown = ("-p", "no:cacheprovider", "-q", "-rf", "--tb=short", "--show-capture=no")
    return [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={root}", *shown]


def outcomes(text):
    """Counts passed and failed tests in pytest's output; by its dots if it was stopped before its last line."""
    last = next((line for line in reversed(text.splitlines()) if re.search(r"\b(passed|failed|error)", line)), "")
    found = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)}
    if not found:
        dots = "".join(re.findall(r"^([.FEsx]+)(?: +\[ *\d+%\])?$", text, flags=re.MULTILINE))
        found = {"passed": dots.count("."), "failed": dots.count("F") + dots.count("E")}
    failures = [line[:200] for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    counts = {"passed": found.get("passed", 0), "failed": found.get("failed", 0)}
    return {**counts, "failures": failures[:40], "errors": errors(text)}


def errors(text):
    """Parses pytest's tracebacks (`--tb=short`): by test, the place where it ended and the first lines of the error."""
    found, name = {}, None
    for line in text.partition("= short test summary")[0].splitlines():
        heading = re.fullmatch(r"_{3,} (.+?) _{3,}", line)
        if heading:
            name, place = heading[1], ""
        elif name is not None and re.match(r"\S.*:\d+: ", line):
            place = line
        elif name is not None and line.startswith("E  "):
            lines = found.setdefault(name, [place[:200]])
            if len(lines) <= LINES:
                lines.append(line[1:].strip()[:300])
    return dict(list(found.items())[:40])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--files", default=FILES)
    parser.add_argument("--seconds", type=float, default=300.0, help="what has passed until then is counted")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
