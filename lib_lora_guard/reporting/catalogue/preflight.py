"""What is said before something large is read or moved."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "preflight.reading": ("reading {files}", "读取 {files} "),
    "preflight.moving": ("moving {model} off the card", "将 {model} 移出显卡"),
    "preflight.dropped": (
        "RAM is short: {size_mb:.0f} MB of LoRA files and remembered prompts are given back",
        "内存不足：已释放 {size_mb:.0f} MB 的 LoRA 文件和提示词缓存",
    ),
}
