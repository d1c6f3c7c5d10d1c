"""The tab "LoRA Guard": labels (sent to the browser without their prefix) and sentences."""

from __future__ import annotations

LABELS = "panel.label."
"""Prefix of the keys of all texts that the browser inserts itself. The browser fills in their `{...}`."""

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "panel.label.loaded": ("Loaded now", "当前已加载"),
    "panel.label.nothing": (
        "No LoRA has been applied yet. Put one into the prompt and generate an image.",
        "尚未应用任何 LoRA。在提示词中加入 LoRA 并生成一张图片即可。",
    ),
    "panel.label.no_lora": ("no LoRA on this model now", "该模型当前没有 LoRA"),
    "panel.label.model_line": (
        "{device_mb} on {device}, {ram_mb} of RAM, last change {ms}",
        "{device} 占用 {device_mb}，内存占用 {ram_mb}，上次更改耗时 {ms}",
    ),
    "panel.label.lora": ("LoRA", "LoRA"),
    "panel.label.strength": ("Strength", "强度"),
    "panel.label.used": ("Keys used", "已用键"),
    "panel.label.skipped": ("Skipped", "已跳过"),
    "panel.label.how": ("How", "方式"),
    "panel.label.size": ("Size", "大小"),
    "panel.label.not_applied": ("not applied: {reason}", "未应用：{reason}"),
    "panel.label.lost": ("{count} keys of the model could not be patched", "模型中有 {count} 个键无法修补"),
    "panel.label.in_force": ("In force", "当前生效"),
    "panel.label.mode": ("LoRA mode", "LoRA 模式"),
    "panel.label.allocator": ("CUDA allocator", "CUDA 分配器"),
    "panel.label.log": ("Log", "日志"),
    "panel.label.level": ("Show", "显示"),
    "panel.label.level_debug": ("everything", "全部"),
    "panel.label.level_info": ("info and above", "信息及以上"),
    "panel.label.level_warning": ("warnings and errors", "警告和错误"),
    "panel.label.level_error": ("errors only", "仅错误"),
    "panel.label.pause": ("Pause", "暂停"),
    "panel.label.resume": ("Resume", "继续"),
    "panel.label.copy": ("Copy", "复制"),
    "panel.label.copied": ("Copied", "已复制"),
    "panel.label.copy_failed": ("The browser does not allow copying; use Download", "浏览器不允许复制，请使用“下载”"),
    "panel.label.download": ("Download", "下载"),
    "panel.label.newest": ("To the newest line", "跳到最新一行"),
    "panel.label.live": ("live", "实时"),
    "panel.label.paused": ("paused", "已暂停"),
    "panel.label.waiting": ("no answer, trying again", "没有响应，正在重试"),
    "panel.label.log_in": ("not logged in; reload the page", "未登录，请刷新页面"),
    "panel.label.restarted": ("Forge was started again", "Forge 已重新启动"),
    "panel.label.warning": ("warning", "警告"),
    "panel.label.error": ("error", "错误"),
    "panel.label.debug": ("debug", "调试"),
    "panel.mode": ("{name}: {what}", "{name}：{what}"),
    "panel.mode.low_bits": (
        "{name}, as chosen under “Diffusion in Low Bits”: {what}",
        "{name}（由“Diffusion in Low Bits”选定）：{what}",
    ),
    "panel.mode.off": (
        "switched off; Forge's own LoRA patcher is at work",
        "已关闭；由 Forge 自带的 LoRA 补丁程序处理",
    ),
    "panel.not_in_place": (
        "LoRA Guard is not in place here; the console says why.",
        "LoRA Guard 在此处未生效，原因请见控制台。",
    ),
    "panel.allocator.option": ("{name}: {state}", "{name}：{state}"),
    "panel.weights": ("{count} {mode}", "{mode} {count}"),
}
