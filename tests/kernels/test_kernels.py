"""Every kernel gives its twin's values (by Triton's interpreter, on the CPU), and compiles for cards that are not here."""

import contextlib
import importlib.metadata
import json
import os
from pathlib import Path

import pytest
from support import warm

FIRST = (3, 3)
"""The first Triton that compiles all kernels as this test does. Where an older one cannot, plain torch is used."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Returns what the checks of one process have found: "" for each, or how it failed. The two processes run beside each other."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("there is no Triton")
    if tuple(int(part) for part in version.split(".")[:2]) < FIRST:
        pytest.skip(f"Triton {version} cannot compile the kernels")
    script = str(Path(__file__).parent / "without_a_card.py")
    code = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    with contextlib.ExitStack() as processes:
        started = {}
        for interpreted in (True, False):
            folder = tmp_path_factory.mktemp("kernels")
            environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": str(int(interpreted))}
            process = processes.enter_context(warm.start(code, script, folder / "found.json", env=environment))
            started[interpreted] = process, folder / "found.json"

        def ended(interpreted):
            process, file = started[interpreted]
            _, error = process.communicate()
            assert process.returncode == 0, error[-2000:]
            return json.loads(file.read_text(encoding="utf-8"))

        yield ended


def test_kernels_give_their_twins_values_and_planted_faults_are_seen(found):
    checks = found(interpreted=True)
    faults = {name.removeprefix("fault: "): failure for name, failure in checks.items() if name.startswith("fault: ")}
    assert (len(checks) > 30, len(faults) > 28) == (True, True)
    assert {name: failure for name, failure in checks.items() if failure and not name.startswith("fault: ")} == {}
    assert [name for name, failure in faults.items() if not failure] == []
    assert "the first at row 0, column 64: 0.0 instead of" in faults["a block skipped"]
    assert faults["NaN lost"] == "NaN in other places than the twin has it"


def test_kernels_compile_for_cards_that_are_not_here(found):
    assert found(interpreted=False) == {
        "sm_75, fp8 e4m3": "",
        "sm_86, nf4 64 nested256 by fp16": "",
        "sm_90, Q4_K baked by bf16": "",
        "sm_120, nf4 64 by bf16": "",
        "sm_89, loha fp8 e4m3": "",
        "sm_80, int8 scaled": "",
        "sm_75, lokr fp8 e4m3": "",
        "sm_80, lokr int8 scaled": "",
        "sm_86, lokr nf4 64 by bf16": "",
        "sm_89, lokr fp8 e4m3 scaled": "",
        "sm_90, lokr Q8_0 baked by bf16": "",
        "sm_120, lokr Q4_K baked by bf16": "",
        "sm_86, dora nf4 64 by bf16": "",
        "sm_75, dora lokr fp8 e4m3": "",
        "sm_75, token nf4 64 by fp16": "",
        "sm_86, token nf4 64 by bf16": "",
        "sm_120, token fp4 64 nested256 by bf16": "",
        "sm_80, fragments of nf4 64 by bf16": "",
        "sm_86, fragments of nf4 64 by fp16": "",
        "sm_89, fragments of nf4 128 by bf16": "",
        "sm_90, fragments of nf4 64 by bf16": "",
        "sm_120, fragments of fp4 64 nested256 by bf16": "",
    }
