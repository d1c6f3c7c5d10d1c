"""What the commands say at their end: the result of the demo, and what the system refuses."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "demo.result": (
        "On {format} a change of the LoRA takes {guard_seconds:.3f} s instead of {merging_seconds:.1f} s and {guard_mb:.0f} MB of RAM instead "
        "of {merging_mb:.0f} MB, and {guard_percent:.0f} % of the LoRA reach the model instead of {merging_percent:.0f} %.",
        "在 {format} 上，更改 LoRA 用时 {guard_seconds:.3f} 秒（合并需 {merging_seconds:.1f} 秒），占用内存 {guard_mb:.0f} MB"
        "（合并需 {merging_mb:.0f} MB），LoRA 效果保留 {guard_percent:.0f} %（合并后只剩 {merging_percent:.0f} %）。",
    ),
    "command.disk_full": (
        "{file}: the disk is full; free space on it, or choose another folder",
        "{file}：磁盘已满；请腾出空间，或改用别的文件夹",
    ),
    "command.not_permitted": (
        "{file}: may not be written ({error}); choose another folder, or close the program that holds the file",
        "{file}：没有写入权限（{error}）；请改用别的文件夹，或关闭占用该文件的程序",
    ),
}
