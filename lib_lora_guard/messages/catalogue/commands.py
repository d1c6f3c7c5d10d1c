"""What the commands say of what was typed, and at their end: the result of the demo, and what the system refuses."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "demo.result": (
        "On {format} a change of the LoRA takes {guard_seconds:.3f} s instead of {merging_seconds:.1f} s and {guard_mb:.0f} MB of RAM instead "
        "of {merging_mb:.0f} MB, and {guard_percent:.0f} % of the LoRA reach the model instead of {merging_percent:.0f} %.",
        "在 {format} 上，更改 LoRA 用时 {guard_seconds:.3f} 秒（合并需 {merging_seconds:.1f} 秒），占用内存 {guard_mb:.0f} MB"
        "（合并需 {merging_mb:.0f} MB），LoRA 效果保留 {guard_percent:.0f} %（合并后只剩 {merging_percent:.0f} %）。",
    ),
    # What was typed.
    "command.usage": (
        "{program}: error: {what}; {program} --help lists what it takes",
        "{program}：错误：{what}；用法见 {program} --help（英文）",
    ),
    "command.argument": ("argument {name}: {what}", "参数 {name}：{what}"),
    "command.required": ("the following arguments are required: {names}", "缺少以下参数：{names}"),
    "command.unrecognized": ("unrecognized arguments: {names}", "无法识别的参数：{names}"),
    "command.size": (
        "expected a size such as 12GB or 8192MB, found {found}",
        "应为大小，例如 12GB 或 8192MB，实际为 {found}",
    ),
    "command.size_unit": (
        "expected a size such as 12GB or 8192MB, found {found}: write {number}MB ({gb:.1f} GB), or {number}GB if it is that",
        "应为大小，例如 12GB 或 8192MB，实际为 {found}：请写成 {number}MB（{gb:.1f} GB）；如果确实是 GB，请写成 {number}GB",
    ),
    "command.strength_after": (
        "expected a strength such as 0.8 after {file}, found {found}",
        "{file} 之后应为强度，例如 0.8，实际为 {found}",
    ),
    "command.strength": ("expected a strength such as 0.8, found {found}", "应为强度，例如 0.8，实际为 {found}"),
    "command.resolution": (
        "expected a size in pixels such as 1024x1024, found {found}",
        "应为图片的像素尺寸，例如 1024x1024，实际为 {found}",
    ),
    "command.batch": (
        "expected a number of pictures from 1 to 64, found {found}",
        "应为图片数量，1 到 64，实际为 {found}",
    ),
    "command.row": (
        "expected the number of a configuration from 1 to {most}, found {found}",
        "应为配置的编号，1 到 {most}，实际为 {found}",
    ),
    "command.page_flag": ("argument --write: give --markdown with it", "参数 --write：需同时给出 --markdown"),
    "command.whole_page": (
        "argument --markdown: the page is whole, leave --row and --json out",
        "参数 --markdown：输出的是整页，请去掉 --row 与 --json",
    ),
    # What the system refuses.
    "command.disk_full": (
        "{file}: the disk is full; free space on it, or choose another folder",
        "{file}：磁盘已满；请腾出空间，或改用别的文件夹",
    ),
    "command.not_permitted": (
        "{file}: may not be written ({error}); choose another folder, or close the program that holds the file",
        "{file}：没有写入权限（{error}）；请改用别的文件夹，或关闭占用该文件的程序",
    ),
}
