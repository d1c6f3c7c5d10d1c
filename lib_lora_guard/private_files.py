"""Files and folders that their owner alone may read, opened only where a plain file is.

On Windows the rights stay as they are: Python's mode bits mean "read-only" there and nothing else, and files take the access
list of their folder. Both folders of the guard lie in places of the user: beside the program, and in the user's own temporary
files.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import BinaryIO, cast

from .messages import Message

_FILE_MODE, _FOLDER_MODE, _OTHERS = 0o600, 0o700, 0o077
_KINDS = (
    (stat.S_ISDIR, Message("private.folder")),
    (stat.S_ISFIFO, Message("private.pipe")),
    (stat.S_ISSOCK, Message("private.socket")),
)


def make_private_folder(folder: Path, is_own: bool = True) -> None:
    """Makes a folder with its parents, for its owner alone; takes the rights of others from one that is there.

    A folder that the user has chosen, by a link or by name, is left as it is: it may serve more than this.

    Args:
        folder: The folder.
        is_own: False if the user has named it.

    Raises:
        OSError: It cannot be made, or something else has its name.
    """
    folder.mkdir(_FOLDER_MODE, parents=True, exist_ok=True)
    if os.name != "posix" or not is_own:
        return
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and status.st_mode & _OTHERS:
        # Some file systems have no rights.
        with contextlib.suppress(OSError):
            folder.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS)


def open_private(path: Path, mode: str) -> BinaryIO:
    """Opens a plain file; a new one is for its owner alone.

    A pipe under the file's name would hold the program until something writes to it, and a link would have another program's
    file overwritten.

    Args:
        path: The file.
        mode: As for `open`, binary. Only "rb" follows a link.

    Raises:
        OSError: It cannot be opened, or is no plain file.
    """
    found = other_than_file(path)
    if found is not None:
        raise OSError(Message("private.no_file", {"found": found}))
    flags = _flags("O_NONBLOCK") | (0 if mode == "rb" else _flags("O_NOFOLLOW"))
    file = open(path, mode, opener=lambda name, others: private_opener(name, others | flags))  # noqa: SIM115
    return cast(BinaryIO, file)


def private_opener(path: str, flags: int) -> int:
    """Opens as `open` does; a new file is for its owner alone."""
    return os.open(path, flags, _FILE_MODE)


def other_than_file(path: Path) -> Message | None:
    """Returns the kind of a thing that is no plain file; None for a file, and where there is nothing."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return Message("private.dangling_link") if path.is_symlink() else None
    if stat.S_ISREG(mode):
        return None
    return next((kind for has, kind in _KINDS if has(mode)), Message("private.device"))


def _flags(name: str) -> int:
    # Windows has neither.
    return int(getattr(os, name, 0))
