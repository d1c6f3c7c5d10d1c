"""A crash in words and numbers, and what the next run does otherwise."""

import time

import pytest

from lib_lora_guard.recorder.crash import Crash
from lib_lora_guard.recorder.crash_report import Precaution, avoid, crash_report, page_file_gb, ran_out_of_ram
from lib_lora_guard.recorder.flight_recorder import Phase
from lib_lora_guard.units import GB

CRASH = Crash(
    phase=Phase.MERGE,
    phases=(Phase.APPLY_LORA, Phase.MERGE),
    since=1.7e9,
    time=1.7e9,
    pid=7,
    model="flux.safetensors",
    architecture="Flux",
    storage="bf16",
    loras=("a", "b"),
    lora_count=3,
    memory={"ram_available": 1 * GB, "ram_total": 16 * GB, "swap_free": GB, "swap_total": 2 * GB, "rss": 12 * GB},
    plan={"ram": 6 * GB, "vram": 3 * GB},
)


def changed(**facts):
    return Crash(**{**CRASH.__dict__, **facts})


def test_the_report_in_words():
    said = crash_report(CRASH, "Windows")
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1.7e9))
    assert [str(line) for line in said] == [
        f"the last run was cut off while LoRAs were being merged into the model (last sign of life: {when})",
        "in use then: model flux.safetensors (Flux bf16)",
        "in use then: 3 LoRA(s): a, b, ...",
        "last measured: RAM 1.0 of 16.0 GB available, page file 1.0 of 2.0 GB free, 12.0 GB of RAM used by this program",
        "what it was doing was to take 6.0 GB of RAM, 3.0 GB of VRAM",
        "likely reason: the system ran out of memory; 6.0 GB of RAM were needed and 2.0 GB were left, page file included",
        "set the page file to 8 GB or more (Windows: System > About > Advanced system settings > Performance > Advanced > "
        "Virtual memory), on a disk with that much space",
        "use fewer LoRAs at once (3 were in use)",
        "use the model in a smaller file format: fp8, NF4, GGUF Q8, GGUF Q4",
    ]
    assert crash_report(CRASH, "Linux")[6] == "make the swap space 8 GB or larger"
    assert "内存耗尽" in said[5].text("zh")


@pytest.mark.parametrize(
    ("memory", "plan", "short"),
    [
        ({}, {"ram": 6 * GB}, None),
        ({"ram_available": 6 * GB}, {"ram": 6 * GB}, True),
        ({"ram_available": 6 * GB, "swap_free": GB}, {"ram": 6 * GB}, False),
        ({"ram_available": 60 * GB, "alive": GB}, {"ram": 6 * GB}, True),
        ({"ram_available": GB // 4}, {}, True),
        ({"ram_available": GB}, {}, False),
    ],
)
def test_the_reason_follows_the_numbers(memory, plan, short):
    crash = changed(memory=memory, plan=plan)
    assert ran_out_of_ram(crash) is short
    keys = [line.key for line in crash_report(crash, "Linux")]
    wanted = {None: "unknown", False: "enough", True: "ram" if plan else "little"}[short]
    assert [key for key in keys if key.startswith("flight.reason")] == [f"flight.reason_{wanted}"]
    assert ("flight.swap_file" in keys) == bool(short), "no advice against what did not happen"


def test_the_page_file_is_what_there_is_and_what_was_missing():
    # 2 there, 6 needed, 2 left: 4 missing and 1 for the system.
    assert page_file_gb(CRASH) == 8
    assert page_file_gb(changed(plan={"ram": 30 * GB})) == 32
    assert page_file_gb(changed(plan={}, memory={"alive": 0})) == 8


@pytest.mark.parametrize(
    ("storage", "formats"), [("nf4", None), ("Q4_K_S", None), ("fp8 e4m3fn", "NF4, GGUF Q4"), ("Q8_0", "NF4, GGUF Q4")]
)
def test_a_smaller_format_is_one_that_is_smaller(storage, formats):
    advice = [line for line in crash_report(changed(storage=storage), "Linux") if line.key == "flight.smaller_format"]
    assert [line.facts["formats"] for line in advice] == ([formats] if formats else [])


@pytest.mark.parametrize(
    ("phases", "wanted"),
    [
        ((Phase.APPLY_LORA, Phase.BACKUP), {Precaution.NO_MERGE, Precaution.DROP_CACHES}),
        ((Phase.MERGE,), {Precaution.NO_MERGE}),
        ((Phase.VAE_DECODE, Phase.UNLOAD), {Precaution.TILED_VAE, Precaution.PARTIAL_UNLOAD}),
        ((Phase.VAE_ENCODE,), {Precaution.TILED_ENCODE}),
        ((Phase.LOAD_TEXT_ENCODER,), {Precaution.DROP_CACHES}),
        ((Phase.SAMPLING_STEP,), set()),
    ],
)
def test_precautions_after_a_crash_are_those_of_its_phases(phases, wanted):
    crash = changed(phase=phases[-1], phases=phases)
    assert avoid(crash, "/models/flux.safetensors", "bf16") == wanted
    other = wanted - {Precaution.NO_MERGE}
    assert avoid(crash, "other.safetensors", "bf16") == avoid(crash, "flux.safetensors", "fp8") == other
    assert avoid(None, "flux.safetensors", "bf16") == frozenset()
    assert all(precaution.message.text("zh") != precaution.message for precaution in wanted)
