"""The log's own additions to other sentences."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "log.repeated": ("{message} (x{count})", "{message}（×{count}）"),
    "log.alike": ("{message} (and {count} more of this kind)", "{message}（另有 {count} 条同类消息）"),
    "log.with_error": ("{message} ({error})", "{message}（{error}）"),
    "log.unreadable": ("a log line could not be kept ({kind})", "有一条日志无法保存（{kind}）"),
    "about.one": ("{subject}: {what}", "{subject}：{what}"),
    "list.comma": (", ", "，"),
    "list.names": (", ", "、"),
    "list.semicolon": ("; ", "；"),
    "list.bar": (" | ", " | "),
    "list.and": (" and ", "和"),
}
