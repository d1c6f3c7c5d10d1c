"""What is said while Forge works with LoRAs."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "host.updated": (
        "LoRA Guard was updated; restart Forge to use the new version ({version} is still running)",
        "LoRA Guard 已更新；请重启 Forge 以使用新版本（当前运行的仍是 {version}）",
    ),
}
