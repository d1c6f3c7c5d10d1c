"""Runs the contract suite against a real Forge and writes the record that CI checks.

    FORGE_ROOT=... FORGE_PYTHON=... python tests/contract/run_real.py

FORGE_ROOT is a Forge checkout with huggingface_guess in repositories/; FORGE_PYTHON is a Python with Forge's
requirements, pytest and pytest-timeout.
"""

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
        "hosts": sorted((ROOT / "lib_lora_guard" / "hosts").glob("*.py")),
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
    forge = Path(os.environ["FORGE_ROOT"])
    python = os.environ.get("FORGE_PYTHON", sys.executable)
    before = hashes()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        env = {**os.environ, "LORA_GUARD_CONTRACT_REAL": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
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
            *sys.argv[1:],
        ]
        code = subprocess.run(command, cwd=ROOT, env=env).returncode
        if code:
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
