"""Applying LoRAs in Forge Neo."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "neo.in_place": ("{version} in place of Forge Neo's LoRA patcher", "{version} 已接管 Forge Neo 的 LoRA 补丁功能"),
    "neo.nunchaku": (
        "this is a nunchaku model, whose LoRAs nunchaku's own code applies; LoRA Guard leaves them alone",
        "这是 nunchaku 模型，其 LoRA 由 nunchaku 自身的代码应用；LoRA Guard 不作处理",
    ),
    "neo.on_the_fly": ("Forge's (fp16 LoRA) way", " Forge 的 (fp16 LoRA) 方式"),
    "neo.both_ways": (
        "Forge's (fp16 LoRA) way, and its merge on 16-bit weights",
        " Forge 的 (fp16 LoRA) 方式，16 位权重则用合并方式",
    ),
}
