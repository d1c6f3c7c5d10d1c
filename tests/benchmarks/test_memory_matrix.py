"""The parts of the memory matrix that need no GPU: its cases, its scores, what is left to do, and the page it makes."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import gpu_rig
import memory_table
import pytest
from memory_cases import CASES, FACTORS, FLUX, SMALL_CASES, as_row, fits_in, idle_mb, score, scored, still_to_do

from lib_lora_guard.checkpoints.model_header import DENOISER, Parameter

HEADER = {
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "torch": "2.11.0",
    "cuda": "13.0",
    "python": "3.12.3",
    "commit": "abc1234",
}


@pytest.mark.parametrize("factor", FACTORS)
def test_every_factor_has_three_levels_with_all_else_equal(factor):
    levels = {}
    for case in CASES:
        rest = tuple(value for name, value in dataclasses.asdict(case).items() if name != factor)
        levels.setdefault(rest, set()).add(getattr(case, factor))
    assert max(len(found) for found in levels.values()) >= 3


def test_the_factors_of_the_issue_are_varied_around_one_case():
    around = [c for c in CASES if sum(getattr(c, f) != getattr(FLUX, f) for f in FACTORS) <= 1 and c.model == "Flux"]
    assert {c.cap_gb for c in around} == {24, 16, 12, 8}
    assert {c.storage for c in around} == {"fp8", "nf4", "Q4_K", "Q8_0", "bf16"}
    assert {c.rank for c in around} == {16, 64, 128}
    assert {c.loras for c in around} == {0, 1, 3, 6}
    assert {c.size_px for c in around} == {512, 768, 1024, 1536}
    assert {c.mode for c in around} == {"Automatic", "fp16 LoRA", "Merge"}
    assert {c.model for c in CASES} == {"Flux", "SDXL", "SD 1.x"}


def test_there_are_about_thirty_cases_and_no_model_is_built_twice():
    assert 30 <= len(CASES) <= 40
    assert len({case.name for case in CASES}) == len(CASES)
    builds = [case.built_as for case in CASES]
    changes = [build for build, before in zip(builds, [None, *builds], strict=False) if build != before]
    assert len(changes) == len(set(builds)) == 7


@pytest.mark.parametrize(
    ("predicted", "measured", "over", "ok"),
    [
        (10_000, 10_000, 0, True),
        (10_500, 10_000, 500, True),
        (10_501, 10_000, 501, False),  # 5 % is the goal
        (9_872, 10_000, -128, True),
        (9_871.9, 10_000, -128.1, False),  # within 5 %, and still too little
        (960, 1_000, -40, True),
        (949, 1_000, -51, False),
    ],
)
def test_a_score_has_two_bounds(predicted, measured, over, ok):
    found = score(predicted, measured)
    assert found["over_mb"] == pytest.approx(over)
    assert found["share"] == pytest.approx(over / measured, abs=1e-4)
    assert found["ok"] is ok


def test_a_case_without_a_measurement_has_no_score():
    assert score(100, 0.0) == {"over_mb": None, "share": None, "ok": None}


def test_idle_vram_counts_only_up_to_the_swapped_weights():
    assert idle_mb(12_000, 11_000, 3_000) == 1_000
    assert idle_mb(12_000, 9_000, 500) == 500  # no more weights are swapped
    assert idle_mb(12_000, 11_000, 0) == 0
    assert idle_mb(12_000, 12_100, 3_000) == 0


def measured_row(case=FLUX, promised=9_900, plan=9_500, allocated=10_000, load_reserved=9_100, **more):
    predicted = {"promised_mb": promised, "plan_mb": plan, "weights_mb": 9_000, "kept_free_mb": 1_500}
    measured = {
        "allocated_mb": allocated,
        "reserved_mb": 10_600,
        "load_reserved_mb": load_reserved,
        "retries": 0,
        "weights_mb": 8_900,
        "swapped_mb": 2_800,
        "free_before_mb": 12_288,
    }
    row = HEADER | as_row(case) | {"predicted": predicted, "measured": measured} | scored(predicted, measured)
    return row | {"ok": row["promised"]["ok"]} | more


def test_a_row_is_scored_by_promise_plan_room_and_idle():
    row = measured_row()
    assert row["promised"] == {"over_mb": -100, "share": -0.01, "ok": True}
    assert row["plan"] == {"over_mb": -500, "share": -0.05, "ok": False}
    assert row["weights"]["over_mb"] == 100
    assert row["room_mb"] == 1_500 - (10_600 - 8_900)
    assert row["idle_mb"] == 12_288 - 10_600
    # What the load had of the card says nothing about the step.
    assert measured_row(load_reserved=10_600)["room_mb"] is None


def test_a_case_that_is_there_is_not_run_again(tmp_path):
    file = tmp_path / "m.jsonl"
    first, second, third = CASES[:3]
    gpu_rig.write_line(file, measured_row(first))
    gpu_rig.write_line(file, HEADER | as_row(second) | {"error": "RuntimeError: broken", "ok": False})
    gpu_rig.write_line(file, HEADER | as_row(third) | {"out_of_memory": "no", "ok": False})
    rows = gpu_rig.read_lines(file, tmp_path / "not there.jsonl", None)
    assert [case.name for case in still_to_do(CASES[:4], rows, "abc1234")] == [second.name, CASES[3].name]
    assert still_to_do(CASES[:4], rows, "another") == CASES[:4]


def test_a_case_that_may_not_end_in_time_is_not_begun():
    assert fits_in(25, True, [], [])
    assert not fits_in(24, True, [], [])
    assert not fits_in(54, False, [], [])
    assert fits_in(12, True, [10, 12], [])
    assert not fits_in(31, False, [10, 12], [20])
    assert fits_in(32, False, [10, 12], [20])


PAGE = "# GPU\n\ntext\n\n## To repeat it\n\nhow\n"


def test_the_table_gets_a_section_once_and_is_replaced_then(tmp_path):
    page, rows = tmp_path / "gpu.md", tmp_path / "m.jsonl"
    page.write_text(PAGE, encoding="utf-8")
    fails = HEADER | as_row(CASES[2]) | {"predicted": {"promised_mb": 8_000}, "out_of_memory": "Tried", "ok": False}
    lines = [measured_row(promised=1), measured_row(), measured_row(CASES[1], promised=11_000), fails]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    memory_table.main(["--matrix", str(rows)], page)
    assert page.read_text(encoding="utf-8") == PAGE  # nothing without --write
    memory_table.main(["--matrix", str(rows), "--write"], page)
    text = page.read_text(encoding="utf-8")
    assert (
        "| Flux fp8, 12 GB, 1 x rank 16, 1024 px, Automatic | 9,900 | 9,500 | 10,000 | -1.0 % | -5.0 % | -200 | 1,688 | met |"
        in text
    )
    assert "| +10.0 % | -5.0 % | -200 | 1,688 | NO |" in text
    assert "| 8,000 |  | out of memory |" in text
    assert (
        "3 cases; promised within 5% and not under by more than 128 MB in 1 of 2, plan in 0; promised less measured from "
        "-100 to +1,000 MB. Room below zero in 2 (least -200 MB); torch had to collect in 0. Idle where weights were swapped: 1,688 to 1,688 MB. Measured: NVIDIA H200, "
        "driver 580.1, torch 2.11.0, CUDA 13.0, LoRA Guard abc1234." in text
    )
    assert (
        text.index("## Predicted and measured peaks") < text.index("<!-- memory matrix table -->") < text.index("## To")
    )
    memory_table.main(["--matrix", str(rows), "--write"], page)
    assert page.read_text(encoding="utf-8") == text


def test_the_real_page_has_a_place_for_every_table():
    page = memory_table.PAGE.read_text(encoding="utf-8")
    for name in memory_table.SECTIONS:
        text = memory_table.put(page, name, "THE TABLE")
        assert f"<!-- {name} table -->\nTHE TABLE\n<!-- end of {name} table -->" in text


def test_the_facts_of_a_model_are_those_of_the_plan():
    """A Flux of 11.9 G values, in fp8 but for what lies outside the blocks; `plan` reads the same from a file."""
    import memory_matrix
    from reading import flux_shapes

    stored = {}
    for name, shape in flux_shapes().items():
        is_low = len(shape) == 2 and "blocks." in name
        size = math.prod(shape) * (1 if is_low else 2)
        kind = "F8_E4M3" if is_low else "BF16"
        full = f"diffusion_model.{name}"
        stored[full] = Parameter(full, shape, kind, size, not is_low, DENOISER)
    tokens, facts = memory_matrix.facts_of(stored, FLUX, 2)
    assert facts.denoiser_bytes == sum(parameter.bytes for parameter in stored.values())
    assert (facts.is_unet, facts.wide, tokens.rows) == (False, False, 1)
    assert max(weight.values for weight in facts.weights) == 21504 * 3072
    with pytest.raises(AssertionError, match="takes this model for Flux"):
        memory_matrix.facts_of(stored, dataclasses.replace(FLUX, model="SDXL"), 2)


FORGE_PYTHON, FORGE_ROOT = os.environ.get("FORGE_PYTHON"), os.environ.get("FORGE_ROOT")
SCRIPTS = {
    "memory_matrix.py": ["--cases", "Flux fp8,Flux bf16"],
    "real_oom.py": ["--storages", "fp8", "--seconds", "240"],
    "one_setting.py": ["--caps", "12,8"],
}


@pytest.mark.real_forge
@pytest.mark.skipif(not (FORGE_PYTHON and FORGE_ROOT), reason="needs FORGE_ROOT and FORGE_PYTHON")
@pytest.mark.parametrize("script", SCRIPTS)
def test_small_runs_to_the_end_in_forges_backend(script, tmp_path):
    out = tmp_path / "out.jsonl"
    root = Path(memory_table.__file__).parent
    done = subprocess.run(
        [FORGE_PYTHON, str(root / script), "--small", "--out", str(out), *SCRIPTS[script]],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    rows = gpu_rig.read_lines(out)
    assert rows, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.returncode == 0, done.stderr[-2000:]
    if script == "memory_matrix.py":
        assert [row["case"] for row in rows] == [SMALL_CASES[0].name, SMALL_CASES[1].name]
        assert [row["measured"]["loras_applied"] for row in rows] == [1, 3]
    elif script == "real_oom.py":
        assert rows[-1]["summary"] == "all"
        assert (rows[-1]["images"], rows[-1]["wrong_states"], rows[-1]["wrong_values"]) == (14, 0, 0)
    else:
        assert rows[-1]["ok"]
        assert rows[-1]["largest_difference"] == 0


def test_the_list_needs_neither_torch_nor_forge():
    script = Path(memory_table.__file__).parent / "memory_matrix.py"
    done = subprocess.run(
        [sys.executable, str(script), "--list"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == [case.name for case in CASES]
