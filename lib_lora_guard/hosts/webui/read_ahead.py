"""Reads LoRA files in a thread while the host calculates their hashes for the infotext.

The host does that before it asks for the tensors, once for each file whose trainer has written no hash into it. Either takes a
quarter of a second for a Flux LoRA of 340 MB on a present CPU, and neither needs the other. `LORA_GUARD_READ_AHEAD=0` in the
environment takes the thread away, for bug reports.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ...adapters.files import LoraFile, read_lora_file
from ...files import FileState
from ...patching.room_to_read import room_now_bytes

log = logging.getLogger(__name__)

FileKey = tuple[str, FileState]
"""The path and the state on disk."""


class ReadAhead:
    """The files that are being read for the stack that the host is about to load."""

    def __init__(self) -> None:
        self._files: dict[FileKey, Future[LoraFile]] = {}

    @contextlib.contextmanager
    def of(self, keys: Iterable[FileKey]) -> Iterator[None]:
        """Reads the files, one after the other, while the caller goes on. What was not taken by the end is dropped."""
        wanted = dict.fromkeys(keys)
        if not wanted or os.environ.get("LORA_GUARD_READ_AHEAD") == "0":
            yield
            return
        with ThreadPoolExecutor(1, "lora-guard-read-ahead") as pool:
            self._files = {key: pool.submit(_read, Path(key[0])) for key in wanted}
            try:
                yield
            finally:
                left, self._files = self._files, {}
                for future in left.values():
                    future.cancel()

    def take(self, key: FileKey) -> LoraFile | None:
        """Returns a file when it is read.

        None if it was not asked for, or could not be read: then the caller reads it, and says what is wrong.
        """
        future = self._files.pop(key, None)
        if future is None:
            return None
        try:
            return future.result()
        except Exception:
            log.debug("%s is read again", key[0], exc_info=True)
            return None


def _read(path: Path) -> LoraFile:
    return read_lora_file(path, room=room_now_bytes, values_may_follow=True)
