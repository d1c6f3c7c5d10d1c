"""The page of `lora-guard inspect` below its answer."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "inspect.row.file": ("file", "文件"),
    "inspect.row.kinds": ("kinds", "类型"),
    "inspect.row.parts": ("parts", "部分"),
    "inspect.row.rank": ("rank", "秩"),
    "inspect.row.alpha": ("alpha", "alpha 值"),
    "inspect.row.scale": ("scale", "缩放"),
    "inspect.row.dtype": ("dtype", "数据类型"),
    "inspect.row.unknown": ("not known", "无法识别"),
    "inspect.row.lost": ("not applied", "未应用"),
    "inspect.row.note": ("note", "说明"),
    "inspect.row.words": ("trained words", "训练词"),
    "inspect.file": ("{container}, {size}, {count} tensors", "{container}，{size}，{count} 个张量"),
    "inspect.dora": ("{kinds}, DoRA on {count}", "{kinds}，其中 {count} 个为 DoRA"),
    "inspect.no_dora": ("{kinds}, no DoRA", "{kinds}，没有 DoRA"),
    "inspect.part": ("{part} ({count} modules)", "{part}（{count} 个模块）"),
    "inspect.none": ("none", "无"),
    "inspect.none_in_file": ("none in the file", "文件中没有"),
    "inspect.scale": ("{scales} (alpha / rank)", "{scales}（alpha / 秩）"),
    "inspect.unknown": ("{count} keys, first: {first}", "{count} 个键，前几个：{first}"),
    "inspect.on": ("On {model} ({architecture})", "用于 {model}（{architecture}）"),
    "inspect.does_fit": (
        "  fits: {used} modules used, {skipped} keys skipped, {lost} lost",
        "  适合：使用 {used} 个模块，跳过 {skipped} 个键，无法应用 {lost} 个键",
    ),
    "inspect.does_not_fit": ("  does NOT fit: {why}", "  不适合：{why}"),
    "inspect.skipped": ("  skipped: {key}", "  跳过：{key}"),
    "inspect.lost": ("  lost: {key}", "  无法应用：{key}"),
}
