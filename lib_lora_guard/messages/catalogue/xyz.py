"""What the axes of the X/Y/Z plot refuse."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "xyz.unknown_mode": (
        "Unknown LoRA mode: {mode}; there are {known}",
        "未知的 LoRA 模式：{mode}；可用的有：{known}",
    ),
    "xyz.strength": (
        "LoRA strength: {factor} is no number from -{largest} to {largest}",
        "LoRA 强度：{factor} 不是 -{largest} 到 {largest} 之间的数字",
    ),
    "xyz.off": (
        "LoRA Guard is switched off: Settings > LoRA Guard > Use LoRA Guard",
        "LoRA Guard 已停用：请在“设置 > LoRA Guard > 启用 LoRA Guard”中启用",
    ),
}
