"""The result of applying a stack of LoRAs."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "report.line": (
        "{model}: {loras} | {device_mb:.1f} MB on {device}, {ram_mb:.1f} MB RAM, {milliseconds:.1f} ms",
        "{model}：{loras} | {device} 占用 {device_mb:.1f} MB，内存 {ram_mb:.1f} MB，耗时 {milliseconds:.1f} 毫秒",
    ),
    "report.head": (
        "{model}: {device_mb:.1f} MB on {device} while running, {ram_mb:.1f} MB in RAM, {milliseconds:.1f} ms",
        "{model}：运行时 {device} 占用 {device_mb:.1f} MB，内存 {ram_mb:.1f} MB，耗时 {milliseconds:.1f} 毫秒",
    ),
    "report.empty": ("{model}: {loras}", "{model}：{loras}"),
    "report.nothing": ("no LoRA", "没有 LoRA"),
    "report.lora": (
        "{name} strength {strength:g}: {used} keys used, {skipped} skipped",
        "{name} 强度 {strength:g}：使用 {used} 个键，跳过 {skipped} 个",
    ),
    "report.mode": ("{count} {mode} ({reasons})", "{mode} {count} 个（{reasons}）"),
    "report.lost": ("{count} LOST ({first})", "无法应用 {count} 个（{first}）"),
    "report.refused": ("{name} NOT applied ({why})", "{name} 未应用（{why}）"),
}
