"""Runs the contract suite against a real Forge and writes the record that CI checks.

    FORGE_ROOT=... FORGE_PYTHON=... python tests/contract/run_real.py [--no-record] [what pytest takes]

FORGE_ROOT is a Forge checkout with huggingface_guess in repositories/; FORGE_PYTHON is a Python with Forge's
requirements, pytest and pytest-timeout. `--no-record` is for other hosts: the record stays that of the one Forge.
PYTHONPATH may name further folders that the host imports from.
"""

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RECORD = HERE / "record.json"


def hashes():
    """Hashes of what the record vouches for: the host adapters, the suite, the double. Line ends do not count."""
    groups = {
        "hosts": sorted(
            file for folder in ("hosts", "runtime") for file in (ROOT / "lib_lora_guard" / folder).rglob("*.py")
        ),
        "suite": sorted([*HERE.glob("*.py"), *(ROOT / "tests" / "support").glob("*.py")]),
        "double": sorted((ROOT / "tests" / "forge_double").rglob("*.py")),
    }
    result = {}
    for name, files in groups.items():
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.relative_to(ROOT).as_posix().encode())
            digest.update(file.read_bytes().replace(b"\r\n", b"\n"))
        result[name] = digest.hexdigest()
    return result


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--no-record", action="store_true", help="leave tests/contract/record.json as it is")
    options, pytest_arguments = parser.parse_known_args()
    forge = Path(os.environ["FORGE_ROOT"])
    python = os.environ.get("FORGE_PYTHON", sys.executable)
    before = hashes()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "LORA_GUARD_CONTRACT_REAL": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        # Forge's own dependencies warn in many voices; warnings are errors on the double only.
        command = [
            python,
            "-m",
            "pytest",
            "-q",
            str(HERE),
            "-p",
            "no:cacheprovider",
            "-W",
            "default",
            f"--junitxml={report}",
            *pytest_arguments,
        ]
        code = subprocess.run(command, cwd=ROOT, env=env).returncode
        if code or options.no_record:
            return code
        suite = ElementTree.parse(report).getroot().find("testsuite")
    versions = subprocess.run(
        [python, "-c", "import torch, sys; print(torch.__version__, sys.version.split()[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    commit = subprocess.run(
        ["git", "rev-parse", "--short=8", "HEAD"], cwd=forge, capture_output=True, text=True, check=True
    ).stdout.strip()
    if before != hashes():
        return 1
    record = {
        "hashes": before,
        "host": {"name": "stable-diffusion-webui-forge", "commit": commit},
        "torch": versions[0],
        "python": versions[1],
        "tests": {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")},
        "date": datetime.date.today().isoformat(),
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
