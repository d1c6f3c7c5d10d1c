"""Runs the contract suite against a real Forge, or a real Forge Neo, and writes the record that CI checks.

    FORGE_ROOT=... FORGE_PYTHON=... python tests/contract/run_real.py [--host neo] [--no-record] [what pytest takes]

FORGE_ROOT is a Forge checkout with huggingface_guess in repositories/, or Neo's folder; FORGE_PYTHON is a Python with its
requirements, pytest and pytest-timeout. `--no-record` is for other hosts: the records stay those of the one Forge and the one Neo.
PYTHONPATH may name further folders that the host imports from; FORGE_COMMIT names the commit of a copy without git.
"""

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Suite:
    """A host's contract. `other` is the host whose adapter it says nothing of."""

    host: str
    folder: str
    double: str
    other: str
    record: Path


SUITES = {
    "forge": Suite("stable-diffusion-webui-forge", "contract", "forge_double", "neo", HERE / "record.json"),
    "neo": Suite("sd-webui-forge-neo", "contract_neo", "neo_double", "forge", HERE / "record_neo.json"),
}


def hashes(suite):
    """Hashes of what a record vouches for: the host adapter, the suite, the double. Line ends do not count."""
    package, tests = ROOT / "lib_lora_guard", ROOT / "tests"
    other = package / "hosts" / suite.other
    adapters = [file for folder in ("hosts", "runtime") for file in (package / folder).rglob("*.py")]
    groups = {
        "hosts": sorted(file for file in adapters if other not in file.parents),
        "suite": sorted([*(tests / suite.folder).glob("*.py"), *(tests / "support").glob("*.py")]),
        "double": sorted((tests / suite.double).rglob("*.py")),
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
    parser.add_argument("--no-record", action="store_true", help="leave the record in tests/contract as it is")
    parser.add_argument("--host", choices=SUITES, default="forge")
    options, pytest_arguments = parser.parse_known_args()
    suite = SUITES[options.host]
    forge = Path(os.environ["FORGE_ROOT"])
    python = os.environ.get("FORGE_PYTHON", sys.executable)
    before = hashes(suite)
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
            str(HERE.parent / suite.folder),
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
        counts = ElementTree.parse(report).getroot().find("testsuite")
    versions = subprocess.run(
        [python, "-c", "import torch, sys; print(torch.__version__, sys.version.split()[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    ask = ["git", "rev-parse", "--short=8", "HEAD"]
    commit = (
        os.environ.get("FORGE_COMMIT")
        or subprocess.run(ask, cwd=forge, capture_output=True, text=True, check=True).stdout.strip()
    )
    if before != hashes(suite):
        return 1
    record = {
        "hashes": before,
        "host": {"name": suite.host, "commit": commit},
        "torch": versions[0],
        "python": versions[1],
        "tests": {k: int(counts.get(k)) for k in ("tests", "failures", "errors", "skipped")},
        "date": datetime.date.today().isoformat(),
    }
    suite.record.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
