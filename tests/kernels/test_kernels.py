"""Every kernel gives its twin's values (by Triton's interpreter, on the CPU), and compiles for cards that are not here."""

import importlib.metadata
import json
import os
from pathlib import Path

import pytest
from support import warm

FIRST = (3, 3)
"""The first Triton that compiles all kernels as this test does. Where an older one cannot, plain torch is used."""


def found(folder, interpreted):
    """Returns what the checks of one process have found: "" for each, or how it failed."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("there is no Triton")
    if tuple(int(part) for part in version.split(".")[:2]) < FIRST:
        pytest.skip(f"Triton {version} cannot compile the kernels")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "1" if interpreted else "0"}
    script = str(Path(__file__).parent / "without_a_card.py")
    code = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    run = warm.run(code, script, folder / "found.json", env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def test_kernels_give_their_twins_values_and_planted_faults_are_seen(tmp_path):
    checks = found(tmp_path, interpreted=True)
    faults = {name.removeprefix("fault: "): failure for name, failure in checks.items() if name.startswith("fault: ")}
    assert (len(checks) > 30, len(faults) > 8) == (True, True)
    assert {name: failure for name, failure in checks.items() if failure and not name.startswith("fault: ")} == {}
    assert [name for name, failure in faults.items() if not failure] == []
    assert "the first at row 0, column 64: 0.0 instead of" in faults["a block skipped"]
    assert faults["NaN lost"] == "NaN in other places than the twin has it"


def test_kernels_compile_for_cards_that_are_not_here(tmp_path):
    assert found(tmp_path, interpreted=False) == {
        "sm_75, fp8 e4m3": "",
        "sm_86, nf4 64 nested256 by fp16": "",
        "sm_90, Q4_K baked by bf16": "",
        "sm_120, nf4 64 by bf16": "",
        "sm_89, loha fp8 e4m3": "",
        "sm_80, int8 scaled": "",
    }
