"""The tab "LoRA Guard": the log and its tools."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "panel.label.log": ("Log", "日志"),
    "panel.label.level": ("Show", "显示"),
    "panel.label.level_debug": ("everything", "全部"),
    "panel.label.level_info": ("info and above", "信息及以上"),
    "panel.label.level_warning": ("warnings and errors", "警告和错误"),
    "panel.label.level_error": ("errors only", "仅错误"),
    "panel.label.search": ("Search", "搜索"),
    "panel.label.why": ("why?", "为什么？"),
    "panel.label.image": ("image {number}", "第 {number} 张图片"),
    "panel.label.pause": ("Pause", "暂停"),
    "panel.label.resume": ("Resume", "继续"),
    "panel.label.copy": ("Copy", "复制"),
    "panel.label.copied": ("Copied", "已复制"),
    "panel.label.copy_failed": ("The browser does not allow copying; use Download", "浏览器不允许复制，请使用“下载”"),
    "panel.label.download": ("Download", "下载"),
    "panel.label.newest": ("To the newest line", "跳到最新一行"),
    "panel.label.live": ("live", "实时"),
    "panel.label.paused": ("paused", "已暂停"),
    "panel.label.warning": ("warning", "警告"),
    "panel.label.error": ("error", "错误"),
    "panel.label.debug": ("debug", "调试"),
}
