"""`lora-guard doctor`: what it says of a machine, of what was measured, and of a process that died; and what it forgets."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from lib_lora_guard import cli
from lib_lora_guard.commands import doctor
from lib_lora_guard.memory import calibration_report, links_file, snapshot
from lib_lora_guard.memory.calibration import FILE_NAME, Calibration, Key, Kind, stack_signature
from lib_lora_guard.memory.calibration_file import VERSION
from lib_lora_guard.memory.file_lock import locked
from lib_lora_guard.recorder.crash import last_crash
from lib_lora_guard.recorder.flight_recorder import RAM_AVAILABLE, FlightRecorder, Phase
from lib_lora_guard.version import __version__

MB, GB = 1 << 20, 1 << 30
ROOT = Path(doctor.__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def english(monkeypatch):
    monkeypatch.setenv("LANGUAGE", "en")
    # No line is broken in the middle of what is looked for.
    monkeypatch.setenv("COLUMNS", "400")


def run(capsys, *words):
    assert cli.main(["doctor", *map(str, words)]) == 0
    return capsys.readouterr().out


def document(capsys, *words):
    return json.loads(run(capsys, *words, "--json"))


def measured(folder, card="RTX 3060"):
    """Three corrections: +200, -100 and none."""
    kept = Calibration(folder / FILE_NAME, card, "2.3.1")
    kept.record(Key(Kind.STEP, "Flux", "nf4", 4, 2, stack_signature(["LoRA"])), 1000 * MB, 1200 * MB)
    for _ in range(5):
        kept.record(Key(Kind.LOAD, "JointTextEncoder 4900M", "fp8_e4m3fn"), 4000 * MB, 3900 * MB)
    kept.record(Key(Kind.DECODE, "IntegratedAutoencoderKL 16", "bf16", 9), 3000 * MB, 2000 * MB)
    return kept


def test_a_machine_without_a_card_and_nothing_learned(tmp_path, capsys):
    shown = run(capsys, "--data", tmp_path / "none")
    lines = shown.splitlines()
    assert lines[0].startswith(
        f"LoRA Guard {__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}, "
    )
    assert lines[1] == "Card: none that torch can use for CUDA"
    ram = next(line for line in lines if line.startswith("  RAM: "))
    assert ram.endswith(" GB (operating system)")
    assert float(ram.split()[1]) > 0.5
    missing = [line for line in lines if "only CUDA and ROCm cards tell" in line]
    assert len(missing) == 1, "one reason is said once"
    assert missing[0].startswith("  VRAM, VRAM free, VRAM held by torch, ")
    assert f"What the guard keeps: nothing yet in {tmp_path / 'none'}" in lines
    assert "No memory estimate is corrected: nothing was measured yet" in lines
    assert "No earlier process died while it was at work, as far as is known" in lines
    assert not (tmp_path / "none").exists(), "asking makes no folder"


def test_the_document_says_the_same(tmp_path, capsys):
    found = document(capsys, "--data", tmp_path)
    assert list(found) == [
        "schema", "version", "python", "torch", "system", "card", "memory", "usable_vram_bytes", "alive_ram_bytes",
        "allocator", "data", "corrections", "largest_corrections", "crash",
    ]  # fmt: skip
    assert (found["schema"], found["version"], found["card"]) == ("lora-guard/doctor/1", __version__, None)
    assert found["memory"]["ram_total"]["source"] == "operating system"
    assert found["memory"]["ram_total"]["bytes"] > GB // 2
    assert found["memory"]["vram_total"]["bytes"] is None
    assert "only CUDA" in found["memory"]["vram_total"]["missing"]
    assert found["alive_ram_bytes"] > 0
    assert (found["corrections"], found["largest_corrections"], found["crash"]) == (0, [], None)
    assert found["data"] == str(tmp_path)


def test_a_card_and_where_each_number_is_from(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "RTX\x1b 3060")
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * GB, 12 * GB))
    held = {"reserved_bytes": {"all": {"current": 3 * GB}}, "active_bytes": {"all": {"current": 2 * GB}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: held)
    monkeypatch.setattr(torch.cuda, "host_memory_stats_as_nested_dict", lambda: {}, raising=False)
    properties = namedtuple("Properties", "uuid")("one")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    lines = run(capsys, "--data", tmp_path).splitlines()
    assert lines[1] == "Card: RTX? 3060"
    assert "  VRAM: 12.00 GB (graphics driver, through torch)" in lines
    assert "  VRAM used by torch: 2.00 GB (torch's CUDA allocator)" in lines
    assert "  VRAM that models can still take: 8.00 GB" in lines
    assert any(line.startswith("  VRAM free, second opinion: not known (NVML") for line in lines)
    assert "CUDA allocator: native; PYTORCH_CUDA_ALLOC_CONF in this console: max_split_size_mb:512" in lines
    assert any(line.endswith(": can be set") and "max_split_size_mb" in line for line in lines)


def test_a_card_that_does_not_answer_stops_nothing(tmp_path, capsys, monkeypatch):
    def refuse():
        raise RuntimeError("CUDA error: out of memory\nand much more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    assert "Card: CUDA does not start (CUDA error: out of memory)" in run(capsys, "--data", tmp_path).splitlines()
    assert document(capsys, "--data", tmp_path)["card"] is None


def test_the_largest_corrections_in_words(tmp_path, capsys):
    measured(tmp_path)
    lines = run(capsys, "--data", tmp_path).splitlines()
    place = lines.index("3 memory estimates were measured; the largest corrections:")
    assert lines[place + 1 : place + 3] == [
        "  a step of Flux (nf4) with LoRAs and 2 rows of up to 1.05 megapixels, on RTX 3060: predicted 1000 MB, measured "
        "1200 MB; the next prediction is changed by +200 MB",
        "  loading JointTextEncoder 4900M (fp8_e4m3fn), on RTX 3060: predicted 4000 MB, measured 3900 MB; the next "
        "prediction is changed by -100 MB",
    ]
    assert not any("decoding" in line for line in lines), "one measurement lowers nothing, so there is nothing to say"
    found = document(capsys, "--data", tmp_path)
    assert found["corrections"] == 3
    first = found["largest_corrections"][0]
    assert first["key"] == {
        "kind": "step", "architecture": "Flux", "storage": "nf4", "resolution": 4, "batch": 2,
        "stack": stack_signature(["LoRA"]),
    }  # fmt: skip
    numbers = [first[f"{name}_bytes"] // MB for name in ("predicted", "measured", "correction")]
    assert (numbers, first["measurements"], first["card"]) == ([1000, 1200, 200], 1, "RTX 3060")


def test_nothing_to_correct(tmp_path, capsys):
    kept = Calibration(tmp_path / FILE_NAME, "card", "2.3.1")
    kept.record(Key(Kind.APPLY, "Flux", "nf4"), 1000, 990)
    assert "1 memory estimates were measured; none needs a correction" in run(capsys, "--data", tmp_path)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (Key(Kind.APPLY, "Flux", "nf4", stack="a1"), "LoRA factors for Flux (nf4)"),
        (Key(Kind.STEP, "SDXL", "", 1, 4), "a step of SDXL (?) with 4 rows of up to 0.26 megapixels"),
        (Key(Kind.DECODE, "VAE\x1b[31m", "fp32", 4), "decoding up to 1.05 megapixels with VAE?[31m (fp32)"),
    ],
)
def test_kept_corrections_say_what_was_measured(tmp_path, key, what):
    Calibration(tmp_path / FILE_NAME, "card", "2").record(key, 1000, 1100)
    (kept,) = calibration_report.kept_in(tmp_path / FILE_NAME)
    assert kept.what == what
    assert kept.line.text("zh") != kept.line.text("en")


def test_corrections_of_another_version_are_counted(tmp_path, capsys):
    entry = {"key": ["card", "2", "encode", "x", "y", "?", "1", ""], "count": 1, "predicted": 10 * MB, "errors": [MB]}
    (tmp_path / FILE_NAME).write_text(json.dumps({"version": VERSION, "entries": [entry]}), encoding="utf-8")
    assert "  something of another version, on card: predicted 10 MB, measured 11 MB" in run(capsys, "--data", tmp_path)
    assert document(capsys, "--data", tmp_path)["largest_corrections"][0]["key"] is None


# -- resetting


def test_reset_forgets_and_says_how_many(tmp_path, capsys):
    kept = measured(tmp_path)
    shown = run(capsys, "--reset", "--data", tmp_path)
    assert shown == f"3 corrections of memory estimates forgotten ({tmp_path / FILE_NAME})\n"
    assert not (tmp_path / FILE_NAME).exists()
    assert document(capsys, "--reset", "--data", tmp_path) == {
        "schema": "lora-guard/doctor/1",
        "version": __version__,
        "data": str(tmp_path),
        "corrections_forgotten": 0,
        "links_forgotten": 0,
    }
    # A Forge that runs meanwhile begins anew with its next picture.
    kept.record(Key(Kind.STEP, "Flux", "nf4", 1), 1000, 1100)
    assert kept.measurements(Key(Kind.LOAD, "JointTextEncoder 4900M", "fp8_e4m3fn")) == 0


@pytest.mark.parametrize("as_document", [False, True])
def test_reset_forgets_the_links_too(as_document, tmp_path, capsys):
    for card in ("one", "two"):
        links_file.keep(tmp_path, card, links_file.Measured(7e9, 2e9, 12e9, time.time()))
    file = tmp_path / links_file.FILE_NAME
    if as_document:
        assert document(capsys, "--reset", "--data", tmp_path)["links_forgotten"] == 2
    else:
        line = run(capsys, "--reset", "--data", tmp_path).splitlines()[1]
        assert line.startswith(f"speeds between RAM and the card forgotten for 2 cards ({file})")
    assert not file.exists()


def test_reset_where_there_is_nothing(tmp_path, capsys):
    assert run(capsys, "--reset", "--data", tmp_path / "none").startswith("0 corrections of memory estimates forgotten")
    assert not (tmp_path / "none").exists()


def test_reset_that_cannot_be_says_why(tmp_path, capsys, monkeypatch):
    from lib_lora_guard.memory import calibration_file

    measured(tmp_path)
    monkeypatch.setattr(calibration_file, "WAIT_SECONDS", 0.05)
    with locked(tmp_path / f"{FILE_NAME}.lock", 1):
        assert cli.main(["doctor", "--reset", "--data", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"lora-guard: {FILE_NAME}.lock is in use\n"
    assert len(calibration_report.kept_in(tmp_path / FILE_NAME)) == 3


# -- a process that died

DIES = """
import os, sys
from pathlib import Path
from lib_lora_guard.recorder.flight_recorder import RAM_AVAILABLE, FlightRecorder, Phase
recorder = FlightRecorder.open(Path(sys.argv[1]))
with recorder.enter(Phase.MERGE, model="flux1-dev", storage="bf16", loras=["style"], memory={RAM_AVAILABLE: 300 << 20}):
    os._exit(9)
"""


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory):
    folder = tmp_path_factory.mktemp("died")
    assert subprocess.run([sys.executable, "-c", DIES, str(folder)], cwd=ROOT).returncode == 9
    return folder


@pytest.fixture
def died(left_behind, tmp_path):
    """What one killed process has left, for a test of its own."""
    return Path(shutil.copytree(left_behind, tmp_path, dirs_exist_ok=True))


def test_how_the_last_process_died(died, capsys):
    lines = run(capsys, "--data", died).splitlines()
    place = lines.index("The last process that died")
    assert lines[place + 1].startswith(
        "  the last run was cut off while LoRAs were being merged into the model (last sign"
    )
    assert "  in use then: model flux1-dev (bf16)" in lines[place:]
    assert any("likely reason: the system ran out of memory; 0.3 GB were left" in line for line in lines[place:])
    found = document(capsys, "--data", died)["crash"]
    assert (found["phase"], found["model"], found["storage"], found["loras"]) == ("merge", "flux1-dev", "bf16", 1)
    assert abs(found["time"] - time.time()) < 60
    assert found["lines"][0].startswith("the last run was cut off")


def test_forge_is_told_of_it_all_the_same(died, capsys):
    before = {file.name: file.read_bytes() for file in died.iterdir()}
    run(capsys, "--data", died)
    run(capsys, "--data", died)
    assert {file.name: file.read_bytes() for file in died.iterdir()} == before
    assert last_crash(died).phase is Phase.MERGE
    # And what Forge has told is known here still.
    assert doctor.known_crash(died).phase is Phase.MERGE
    assert last_crash(died) is None


def test_a_process_at_work_has_not_died(tmp_path):
    recorder = FlightRecorder.open(tmp_path)
    with recorder.enter(Phase.SAMPLING_STEP, memory={RAM_AVAILABLE: GB}):
        assert doctor.known_crash(tmp_path) is None
    recorder.close()


# -- the rest


def test_in_the_readers_language(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    measured(tmp_path)
    shown = run(capsys, "--data", tmp_path)
    assert "显卡：没有可供 torch 使用的 CUDA 显卡" in shown
    assert "Flux（nf4）带 LoRA 的一步采样，2 行" in shown
    assert "已清除 3 项对显存与内存估算值的修正" in run(capsys, "--reset", "--data", tmp_path)


def test_every_reading_has_a_name():
    found = snapshot.take_snapshot(torch.device("cpu"))
    names = [doctor._title(name) for name, _ in found.readings()]
    assert len(set(names)) == len(names) > 15


def test_forges_folder_is_the_default():
    from lib_lora_guard.hosts.start import JOURNAL_FOLDER

    assert doctor.DATA == JOURNAL_FOLDER


def test_wrong_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--data"])
    assert ended.value.code == 2
    assert "--data" in capsys.readouterr().err
    assert os.environ["LANGUAGE"] == "en"
