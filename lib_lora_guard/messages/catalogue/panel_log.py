"""The tab "LoRA Guard": the log and its tools."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "panel.label.log": ("Log", "日志"),
    "panel.label.level": ("Show", "显示"),
    "panel.label.tip_level": (
        "The least level of the lines shown here. The log itself stays whole.",
        "此处显示的最低级别，日志本身保持完整。",
    ),
    "panel.label.level_debug": ("everything", "全部"),
    "panel.label.level_info": ("info and above", "信息及以上"),
    "panel.label.level_warning": ("warnings and errors", "警告和错误"),
    "panel.label.level_error": ("errors only", "仅错误"),
    "panel.label.search": ("Search", "搜索"),
    "panel.label.tip_search": (
        "Shows only the lines with this text. An empty field shows all of them again.",
        "仅显示包含此文字的行。清空后恢复全部显示。",
    ),
    "panel.label.tip_why": (
        "Says what this line means and what can be done, with its own numbers.",
        "结合这一行的数值，说明其含义和可采取的措施。",
    ),
    "panel.label.why": ("why?", "为什么？"),
    "panel.label.image": ("image {number}", "第 {number} 张图片"),
    "panel.label.pause": ("Pause", "暂停"),
    "panel.label.tip_pause": (
        "Stops asking the server, and goes on when pressed again. No line is lost by a short pause.",
        "停止向服务器请求，再次点击后继续。短暂停顿不会丢失日志。",
    ),
    "panel.label.resume": ("Resume", "继续"),
    "panel.label.copy": ("Copy", "复制"),
    "panel.label.tip_copy": (
        "Copies the lines that are shown, with their times.",
        "复制当前显示的行及其时间。",
    ),
    "panel.label.copied": ("Copied", "已复制"),
    "panel.label.copy_failed": ("The browser does not allow copying; use Download", "浏览器不允许复制，请使用“下载”"),
    "panel.label.download": ("Download", "下载"),
    "panel.label.tip_download": (
        "Saves the lines that are shown as a text file.",
        "将当前显示的行保存为文本文件。",
    ),
    "panel.label.newest": ("To the newest line", "跳到最新一行"),
    "panel.label.tip_newest": (
        "Goes to the end of the log and follows it again.",
        "跳到日志末尾，并继续跟随新内容。",
    ),
    "panel.label.live": ("live", "实时"),
    "panel.label.paused": ("paused", "已暂停"),
    "panel.label.warning": ("warning", "警告"),
    "panel.label.error": ("error", "错误"),
    "panel.label.debug": ("debug", "调试"),
}
