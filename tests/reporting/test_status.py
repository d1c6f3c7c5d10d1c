"""The facts told to the panel: numbers that any JSON reader takes, texts in the reader's language, nothing but text."""

import dataclasses
import json
from collections import Counter

from lib_lora_guard.messages import Message
from lib_lora_guard.reporting.report import ApplyReport, LoraReport
from lib_lora_guard.reporting.status import (
    Amount,
    MemoryFigure,
    OtherPrograms,
    PanelStatus,
    StepNeed,
    as_json,
    model_status,
)
from lib_lora_guard.units import MB


def report():
    style = LoraReport("style", 0.8, 3 * MB, 304, ["a", "b"], ["b"], modes=Counter(bypass=290, merge=14))
    style.reasons = {"bypass": {Message("reason.low_rank"), Message("reason.cheap")}, "merge": {"because"}}
    pose = LoraReport("pose", 1.0, refused=Message("host.updated", {"version": "9"}))
    return ApplyReport("KModel", [style, pose], 5 * MB, 7 * MB, 21.44, "cuda:0")


def test_a_report_becomes_the_panels_numbers():
    told = as_json(PanelStatus("mode", True, "1", (model_status(report()),)))
    assert told["models"] == [
        {
            "name": "KModel",
            "device": "cuda:0",
            "device_mb": 5.0,
            "ram_mb": 7.0,
            "milliseconds": 21.4,
            "loras": [
                {
                    "name": "style",
                    "strength": 0.8,
                    "used": 304,
                    "skipped": 2,
                    "lost": 1,
                    "mb": 3.0,
                    "modes": [
                        {"text": "290 bypass", "why": "cheap through the layer's call, low rank"},
                        {"text": "14 merge", "why": "because"},
                    ],
                    "refused": None,
                },
                {
                    "name": "pose",
                    "strength": 1.0,
                    "used": 0,
                    "skipped": 0,
                    "lost": 0,
                    "mb": 0.0,
                    "modes": [],
                    "refused": "LoRA Guard was updated; restart Forge to use the new version (9 is still running)",
                },
            ],
        }
    ]


def test_every_text_comes_in_the_readers_language():
    nvml = Message("readings.nvml")
    amount = Amount(Message("panel.part.ours"), 2, nvml)
    unknown = Amount(Message("panel.beside.swap"), None, nvml, Message("readings.not_counted"))
    source = Message("panel.source", {"sources": nvml})
    figure = MemoryFigure("VRAM", 1, 3, (amount,), (unknown,), (amount, unknown), source)
    problem = Message("panel.not_in_place")
    status = PanelStatus(
        mode=Message("panel.mode.off"),
        enabled=False,
        version="1",
        models=(model_status(report()),),
        left_out=(("xl", problem),),
        memory=(figure,),
        step=StepNeed("KModel", 5, (amount,), 1),
        programs=OtherPrograms(300, (unknown,), more=True),
        allocator=(problem,),
        problem=problem,
    )
    told = as_json(status, "zh")
    lora = told["models"][0]["loras"][0]
    assert lora["modes"][0] == {"text": "旁路 290", "why": "经层调用开销小，低秩"}
    assert "更新" in told["models"][0]["loras"][1]["refused"]
    (memory,) = told["memory"]
    assert memory["source"] == "数据来源：NVIDIA 管理库（NVML）"
    ours = {"name": "本 Forge", "mb": 2.0, "source": "NVIDIA 管理库（NVML）", "missing": None}
    assert memory["used"] == told["step"]["parts"] == [ours]
    assert (
        memory["beside"]
        == told["programs"]["largest"]
        == [{"name": "交换空间剩余", "mb": None, "source": "NVIDIA 管理库（NVML）", "missing": "此处没有对其进行统计"}]
    )
    assert memory["numbers"] == memory["used"] + memory["beside"]
    assert (told["step"]["model"], told["step"]["mb"], told["step"]["copied_mb"]) == ("KModel", 5.0, 1.0)
    assert (told["programs"]["mb"], told["programs"]["more"]) == (300.0, True)
    for text in (told["mode"], told["problem"], told["left_out"][0]["why"], *told["allocator"]):
        assert any("\u4e00" <= c <= "\u9fff" for c in text)


def test_the_report_is_read_and_not_kept():
    source = report()
    kept = model_status(source)
    source.loras[0].modes["bypass"] = 1
    source.loras.clear()
    assert kept.loras[0].modes == {"bypass": 290, "merge": 14}


def test_hostile_names_and_numbers_come_as_harmless_text():
    name = "\u202e<b>\x1b[31m\n" + "x" * 5000
    lora = LoraReport(name, float("nan"), 1, 1, modes={name: 1}, reasons={name: {name}}, refused=name)
    worst = ApplyReport(name, [lora], 0, 0, float("inf"), name)
    told = as_json(PanelStatus(name, True, "1", (model_status(worst),), ((name, name),)))
    model = told["models"][0]
    assert model["milliseconds"] is None
    assert model["loras"][0]["strength"] is None
    text = json.dumps(told, allow_nan=False, ensure_ascii=False)
    assert text.isprintable()
    assert model["name"].startswith("?<b>?[31m?xxx")
    assert len(text) < 5000


def test_a_machine_without_a_gpu():
    none = MemoryFigure("VRAM", missing=Message("readings.not_cuda", {"device": "cpu"}))
    told = as_json(PanelStatus("m", True, "1", memory=(none,)))
    assert (told["step"], told["programs"]) == (None, None)
    (vram,) = told["memory"]
    assert vram["missing"].startswith("images are made on cpu; only CUDA")
    assert {name: vram[name] for name in ("free_mb", "total_mb", "used", "beside", "numbers", "source")} == {
        "free_mb": None, "total_mb": None, "used": [], "beside": [], "numbers": [], "source": "",
    }  # fmt: skip


def test_hostile_names_of_programs_and_models_are_text_too():
    name = "\u202e<b>\x1b[31m\n" + "x" * 5000
    amount = Amount(name, float("inf"), name, name)
    figure = MemoryFigure(name, 1, 2, (amount,), (amount,), (amount,), name, name)
    status = PanelStatus("m", True, "1", memory=(figure,), step=StepNeed(name, 1, (amount,)))
    told = as_json(dataclasses.replace(status, programs=OtherPrograms(1, (amount,))))
    text = json.dumps(told, allow_nan=False, ensure_ascii=False)
    assert text.isprintable()
    assert len(text) < 16000
    assert told["programs"]["largest"][0]["mb"] is None
