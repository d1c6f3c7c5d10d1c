"""What the commands say when the system refuses them."""

from __future__ import annotations

# English, Simplified Chinese.
TEXTS: dict[str, tuple[str, str]] = {
    "command.disk_full": (
        "{file}: the disk is full; free space on it, or choose another folder",
        "{file}：磁盘已满；请腾出空间，或改用别的文件夹",
    ),
    "command.not_permitted": (
        "{file}: may not be written ({error}); choose another folder, or close the program that holds the file",
        "{file}：没有写入权限（{error}）；请改用别的文件夹，或关闭占用该文件的程序",
    ),
}
