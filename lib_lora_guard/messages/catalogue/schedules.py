"""Strengths that change over the steps of an image."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "schedules.malformed": (
        "its strength '{text}' is neither a number nor a schedule such as 0@0,1@0.5,0@1",
        "强度“{text}”既不是数字，也不是 0@0,1@0.5,0@1 这样的强度变化写法",
    ),
    "schedules.left_out": (
        "{name} NOT applied: {why}; correct it in the prompt",
        "未应用 {name}：{why}；请在提示词中改正",
    ),
    "schedules.follows": (
        "strengths follow the prompt over {steps} steps: {loras}. The prompt is encoded once, so the text encoder keeps the first strength",
        "强度将在 {steps} 步中按提示词变化：{loras}。提示词只编码一次，因此文本编码器始终使用起始强度",
    ),
    "schedules.whole_refresh": (
        "strengths could not be changed in place; all LoRAs are applied again in each step, which is slower",
        "无法就地修改强度；每一步都会重新应用全部 LoRA，速度会变慢",
    ),
}
