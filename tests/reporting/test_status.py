"""The facts told to the panel: numbers that any JSON reader takes, texts in the reader's language, nothing but text."""

import dataclasses
import json
from collections import Counter

import pytest

from lib_lora_guard.messages import Message
from lib_lora_guard.reporting.headline import BAD, GOOD, WARNING, Headline, Scene, headline, problems
from lib_lora_guard.reporting.lora_rows import FileSheet, lora_rows, model_name
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
from lib_lora_guard.reporting.timeline import STEP, Image, Now
from lib_lora_guard.units import MB


def report():
    style = LoraReport("style", 0.8, 3 * MB, 304, ["a", "b"], ["b"], modes=Counter(bypass=290, merge=14))
    style.reasons = {"bypass": {Message("reason.low_rank"), Message("reason.cheap")}, "merge": {"because"}}
    pose = LoraReport("pose", 1.0, refused=Message("host.updated", {"version": "9"}))
    return ApplyReport("KModel", [style, pose], 5 * MB, 7 * MB, 21.44, "cuda:0")


def of(*reports, left_out=None, sheets=None):
    rows = lora_rows(reports, left_out or {}, sheets or {})
    return PanelStatus("mode", True, "1", models=tuple(model_status(one) for one in reports), loras=rows)


def test_a_report_becomes_the_panels_numbers():
    told = as_json(of(report()))
    assert told["models"] == [
        {
            "name": "image model",
            "class": "KModel",
            "device": "cuda:0",
            "device_mb": 5.0,
            "ram_mb": 7.0,
            "milliseconds": 21.4,
        }
    ]
    unknown = {"base": None, "ranks": [], "kinds": [], "file_mb": None}
    assert told["loras"] == [
        {
            "name": "style",
            **unknown,
            "strengths": [0.8],
            "share": 0.9967,
            "cost_mb": 3.0,
            "cost_ms": 21.4,
            "refused": None,
            "models": [
                {
                    "name": "image model",
                    "strength": 0.8,
                    "used": 304,
                    "skipped": 2,
                    "lost": 1,
                    "modes": [
                        {
                            "way": "bypass",
                            "text": "290 beside the layer (bypass)",
                            "why": "cheap through the layer's call, low rank",
                        },
                        {"way": "merge", "text": "14 written into the weight (merge)", "why": "because"},
                    ],
                    "refused": None,
                }
            ],
        },
        {
            "name": "pose",
            **unknown,
            "strengths": [1.0],
            "share": 0.0,
            "cost_mb": 0.0,
            "cost_ms": None,
            "refused": "LoRA Guard was updated; restart Forge to use the new version (9 is still running)",
            "models": [
                {
                    "name": "image model",
                    "strength": 1.0,
                    "used": 0,
                    "skipped": 0,
                    "lost": 0,
                    "modes": [],
                    "refused": "LoRA Guard was updated; restart Forge to use the new version (9 is still running)",
                }
            ],
        },
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
        headline=Headline(WARNING, problem),
        problems=problems({"xl": problem}),
        models=(model_status(report()),),
        loras=lora_rows([report()], {"xl": problem}, {}),
        memory=(figure,),
        step=StepNeed("KModel", 5, (amount,), 1),
        programs=OtherPrograms(300, (unknown,), more=True),
        allocator=(problem,),
    )
    told = as_json(status, "zh")
    (on_model,) = told["loras"][0]["models"]
    assert on_model["name"] == told["models"][0]["name"] == "图像模型"
    assert on_model["modes"][0] == {"way": "bypass", "text": "层旁计算（旁路） 290", "why": "经层调用开销小、低秩"}
    assert "更新" in told["loras"][1]["refused"]
    (memory,) = told["memory"]
    assert memory["source"] == "数据来源：NVIDIA 管理库（NVML）"
    ours = {"name": "当前 Forge", "mb": 2.0, "source": "NVIDIA 管理库（NVML）", "missing": None}
    ours["about"] = "当前 Forge 占用的部分：模型、LoRA 和正在生成的图片。"
    assert memory["used"] == told["step"]["parts"] == [ours]
    assert (
        memory["beside"]
        == told["programs"]["largest"]
        == [
            {
                "name": "页面文件（交换空间）剩余",
                "about": "磁盘上代替内存的空间。放在其中的模型读取很慢。",
                "mb": None,
                "source": "NVIDIA 管理库（NVML）",
                "missing": "此处没有对其进行统计",
            }
        ]
    )
    assert memory["numbers"] == memory["used"] + memory["beside"]
    assert (told["step"]["model"], told["step"]["mb"], told["step"]["copied_mb"]) == ("图像模型", 5.0, 1.0)
    assert (told["programs"]["mb"], told["programs"]["more"]) == (300.0, True)
    left_out = [problem["text"] for problem in told["problems"]]
    for text in (told["mode"], told["headline"]["text"], told["loras"][2]["refused"], *left_out, *told["allocator"]):
        assert any("\u4e00" <= c <= "\u9fff" for c in text)


def test_the_report_is_read_and_not_kept():
    source = report()
    kept = of(source)
    source.loras[0].modes["bypass"] = 1
    source.loras.clear()
    assert kept.loras[0].models[0].modes == {"bypass": 290, "merge": 14}


def test_hostile_names_and_numbers_come_as_harmless_text():
    name = "\u202e<b>\x1b[31m\n" + "x" * 5000
    lora = LoraReport(name, float("nan"), 1, 1, modes={name: 1}, reasons={name: {name}}, refused=name)
    worst = ApplyReport(name, [lora], 0, 0, float("inf"), name)
    sheets = {name: FileSheet(name, tuple(range(999)), (name,) * 9, float("inf"), float("nan"))}
    told = as_json(of(worst, left_out={name + "2": name}, sheets=sheets))
    model, row = told["models"][0], told["loras"][0]
    assert model["milliseconds"] is None
    assert row["strengths"] == [None]
    assert (row["file_mb"], row["ranks"], len(row["kinds"])) == (None, [0, 1, 2, 3], 4)
    text = json.dumps(told, allow_nan=False, ensure_ascii=False)
    assert text.isprintable()
    assert model["class"].startswith("?<b>?[31m?xxx")
    assert row["name"].startswith("?<b>?[31m?xxx")
    assert len(text) < 6000


def test_one_row_a_file_with_both_models_together():
    image = ApplyReport("KModel", [LoraReport("a", 0.8, 30 * MB, 300), LoraReport("b", 1.0, MB, 100)], 0, 0, 40.0)
    text = ApplyReport("JointTextEncoder", [LoraReport("a", 0.5, 4 * MB, 50)], 0, 0, 3.0)
    rows = lora_rows([image, text], {"c": "why"}, {"a": FileSheet("Flux", (16,), ("LoRA",), 34.0, 0.02)})
    assert [(row.name, row.strengths, row.share, row.cost_mb, row.cost_ms, row.refused) for row in rows] == [
        ("a", (0.8, 0.5), 0.98, 34.0, 33.0, None),
        ("b", (1.0,), 1.0, 1.0, 10.0, None),
        ("c", (), 0.0, 0.0, None, "why"),
    ]
    assert [str(model_name(name)) for name in ("KModel", "JointTextEncoder", "T5", "Mine")] == [
        "image model", "text encoder", "text encoder", "Mine"
    ]  # fmt: skip


def test_a_file_that_one_model_refuses_is_applied_on_the_other():
    image = ApplyReport("KModel", [LoraReport("a", 1.0, refused="why")], 0, 0, 1.0)
    text = ApplyReport("JointTextEncoder", [LoraReport("a", 1.0, MB, 5)], 0, 0, 1.0)
    (row,) = lora_rows([image, text], {}, {})
    assert (row.refused, row.cost_mb, row.models[0].refused) == (None, 1.0, "why")


def test_problems_keep_their_names_and_the_worst_comes_first():
    left = {"a": Message("panel.mode.off")}
    first, again = problems(left), problems(left, ["it died", "so"], "7")
    assert [(one.id, one.level) for one in again] == [("crash-7", BAD), (first[0].id, WARNING)]
    assert again[0].text == "it died; so"
    assert problems({"b": left["a"]})[0].id != first[0].id


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (Scene(), "Ready. No model is loaded yet; the first image loads it."),
        (Scene(model="flux", loras=2), "flux is loaded, LoRAs on it: 2"),
        (
            Scene(model="flux", last=Image(3, 10.0, 22.34)),
            "flux is loaded, LoRAs on it: 0; the last image took 12.3 s",
        ),
        (Scene(Now("move_to_gpu", 1), model="flux"), "flux: loading and making room"),
        (Scene(Now("", 1)), "The model: an image is being made"),
        (Scene(Now(STEP, 1, 3)), "The model: making the image"),
        (Scene(Now(STEP, 1, 7), (6, 30), "flux"), "flux: step 7 of 30"),
        (Scene(Now(STEP, 1, 7, 1.9), (6, 30), "flux"), "flux: step 7 of 30, 1.9 s each"),
        (Scene(Now(STEP, 1, 13, 1.0), (6, 30), "flux"), "flux: step 7 of 30, 2.0 s each"),
        (Scene(Now(STEP, 1, 30, 1.0), (30, 30), "flux"), "flux: step 30 of 30, 1.0 s each"),
    ],
)
def test_the_strip_says_what_is_going_on(scene, text):
    assert headline(scene) == Headline(GOOD, text)


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
