"""What the panel is told: numbers that any JSON reader takes, texts in the reader's language, nothing but text."""

import json
from collections import Counter

from lib_lora_guard.reporting.messages import Message
from lib_lora_guard.reporting.report import ApplyReport, LoraReport
from lib_lora_guard.reporting.status import MemoryFigure, PanelStatus, as_json, model_status
from lib_lora_guard.weights.storage import MB


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
    figure = MemoryFigure("VRAM", 1, 2, 3, Message("panel.source.cuda", {"device": "A100"}))
    problem = Message("panel.not_in_place")
    status = PanelStatus(
        mode=Message("panel.mode.off"),
        enabled=False,
        version="1",
        models=(model_status(report()),),
        left_out=(("xl", problem),),
        memory=(figure,),
        allocator=(problem,),
        problem=problem,
    )
    told = as_json(status, "zh")
    lora = told["models"][0]["loras"][0]
    assert lora["modes"][0] == {"text": "旁路 290", "why": "经层调用开销小，低秩"}
    assert "更新" in told["models"][0]["loras"][1]["refused"]
    assert told["memory"][0]["source"] == "A100，由驱动程序报告"
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
    none = MemoryFigure("VRAM", 0, 0, 0, Message("panel.source.no_vram"))
    assert as_json(PanelStatus("m", True, "1", memory=(none,)))["memory"] == [
        {"name": "VRAM", "free_mb": 0, "used_mb": 0, "total_mb": 0, "source": "no CUDA device is in use here"}
    ]
