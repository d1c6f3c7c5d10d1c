"""The accordion in txt2img and img2img: its fields, the badge on its name, and what it says when it is opened."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "accordion.mode": ("LoRA mode for this image", "这张图片的 LoRA 模式"),
    "accordion.mode.info": (
        "the images made from this page; the usual mode is in Settings > LoRA Guard",
        "只对在此页面生成的图片有效；常用模式在 设置 > LoRA Guard 中选择",
    ),
    "accordion.as_set": ("as in Settings", "与设置相同"),
    "accordion.set": ("Mode in Settings: {mode}.", "设置中的模式：{mode}。"),
    "accordion.active": ("Applied now: {names}.", "当前已应用：{names}。"),
    "accordion.nothing": ("No LoRA is applied now.", "当前没有应用 LoRA。"),
    "accordion.left_out": ("{name} was left out: {why}", "{name} 未应用：{why}"),
    "accordion.off": (
        "Off: the WebUI's own LoRA patcher is at work. Settings > LoRA Guard > Use LoRA Guard switches the guard on.",
        "已关闭：由 WebUI 自带的 LoRA 补丁功能处理。可在 设置 > LoRA Guard > 启用 LoRA Guard 中开启。",
    ),
    "accordion.no_such_mode": (
        "there is no LoRA mode {mode}; the image has the mode of the settings. There are {modes}",
        "没有名为 {mode} 的 LoRA 模式；这张图片使用设置中的模式。可用的模式：{modes}",
    ),
    "accordion.badge.active": ("active", "已应用"),
    "accordion.badge.left_out": ("left out", "有 LoRA 未应用"),
    "accordion.badge.otherwise": ("active, see below the image", "已应用，详见图片下方"),
    "accordion.badge.off": ("off", "已关闭"),
}
