"""The report of an applied stack, in both languages."""

from lib_lora_guard.messages import Message
from lib_lora_guard.planning.mode import Mode
from lib_lora_guard.reporting.report import ApplyReport, LoraReport, clean_text


def stack():
    style = LoraReport("style.safetensors", 0.8, skipped=["a", "b"], lost=["b: what\x1b[0m"])
    for mode, why in ((Mode.BYPASS, "reason.low_rank"), (Mode.BYPASS, "reason.asked"), (Mode.MERGE, "reason.small")):
        style.count(mode, Message(why))
    bad = LoraReport("bad.safetensors", 1.0, refused=Message("lora.made_for", {"lora": "SDXL", "model": "Flux"}))
    return ApplyReport("Net", [style, bad], 3 << 19, 1 << 20, 12.34, "cuda:0")


def test_the_line_in_english():
    assert stack().line() == (
        "Net: style.safetensors strength 0.8: 3 keys used, 2 skipped, 2 bypass (asked for, low rank), "
        "1 merge (small parameter), 1 LOST (b: what?[0m) | bad.safetensors NOT applied (made for SDXL, this is Flux; "
        "use a LoRA for Flux, or load a SDXL model) | 1.5 MB on cuda:0, 1.0 MB RAM, 12.3 ms"
    )
    assert str(stack()) == (
        "Net: 1.5 MB on cuda:0 while running, 1.0 MB in RAM, 12.3 ms\n"
        "  style.safetensors strength 0.8: 3 keys used, 2 skipped, 2 bypass (asked for, low rank), "
        "1 merge (small parameter), 1 LOST (b: what?[0m)\n"
        "  bad.safetensors NOT applied (made for SDXL, this is Flux; use a LoRA for Flux, or load a SDXL model)"
    )


def test_the_line_in_chinese():
    assert stack().line().text("zh") == (
        "Net：style.safetensors 强度 0.8：使用 3 个键，跳过 2 个，旁路 2 个（按设置、低秩），合并 1 个（小参数），"
        "无法应用 1 个（b: what?[0m） | bad.safetensors 未应用（此 LoRA 用于 SDXL，当前模型是 Flux；"
        "请使用适用于 Flux 的 LoRA，或加载 SDXL 模型） | cuda:0 占用 1.5 MB，内存 1.0 MB，耗时 12.3 毫秒"
    )


def test_an_empty_stack():
    report = ApplyReport("Net", [], 0, 0, 1.0, "cpu")
    assert report.line() == "Net: no LoRA"
    assert report.line().text("zh") == "Net：没有 LoRA"
    report = ApplyReport("Net", [], 0, 3 << 20, 1.0, "cpu")
    assert report.line() == "Net: no LoRA | 0.0 MB on cpu, 3.0 MB RAM, 1.0 ms"


def test_cleaning_keeps_the_languages():
    message = clean_text(Message("lora.other_model", {"key": "a\x07" + "b" * 1000, "why": Message("lora.not_finite")}))
    assert message.isprintable()
    assert len(message) < 600
    assert message.text("zh").startswith("此 LoRA 用于其他模型：a?b")
    assert "NaN" in message.text("zh")
    assert clean_text("a\nb") == "a?b"
