"""Things under the names of the guard's own files that are none of them."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "private.in_the_way": (
        "in {folder}, {count} things have the names of LoRA Guard's own files and are none that it can read ({name}: {found}); "
        "they are left alone, move them away",
        "{folder} 中有 {count} 个项目占用了 LoRA Guard 自身文件的名称，却无法作为其文件读取（{name}：{found}）；不会改动它们，请将其移走",
    ),
    "private.no_file": ("expected a file, found {found}", "应为文件，实际为{found}"),
    "private.folder": ("a folder", "文件夹"),
    "private.pipe": ("a pipe", "管道"),
    "private.socket": ("a socket", "套接字"),
    "private.device": ("a device", "设备"),
    "private.dangling_link": ("a link to nothing", "失效的链接"),
    "private.unreadable": ("a file of another user", "其他用户的文件"),
}
