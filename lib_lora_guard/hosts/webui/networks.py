"""Chooses the LoRA files of the coming image, in place of `networks.load_networks`.

Forge's own function stops at the first name it does not find: then none of the prompt's LoRAs is applied, and those of the last
image stay. It takes a stack of the same names for the same stack, whatever has become of the files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from ...files import shown
from ...messages import Message, say
from ...runtime.hooks import R, Row
from .lora_files import LoraFiles

log = logging.getLogger(__name__)

STALE = "lora guard: read again"
"""A `current_lora_hash` that no stack has."""


class NetworkOnDisk(Protocol):
    """A file in the WebUI's list of LoRAs."""

    filename: str


class LoraStack:
    def __init__(self, networks: ModuleType, files: LoraFiles, on_changed_files: Callable[[], None]) -> None:
        """
        Args:
            networks: the WebUI's.
            files: reads LoRA files.
            on_changed_files: called if a file of the stack is another than when it was last used.
        """
        self._networks, self.files, self._on_changed_files = networks, files, on_changed_files
        self._versions: dict[str, tuple[int, int]] = {}
        self._read_by: bool | None = None

    def load_networks(
        self,
        original: Callable[..., R],
        names: Sequence[str],
        te_multipliers: Sequence[float] | None = None,
        unet_multipliers: Sequence[float] | None = None,
        dyn_dims: Sequence[int | None] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> R:
        """Stands in place of `load_networks`: passes on the names that can be used."""
        self._look_for(name for name in names if self._file(name) is None)
        found = {name: self._file(name) for name in names}
        missing = {name: Message("everyday.no_such_lora") for name, file in found.items() if file is None}
        for name, why in missing.items():
            say(log, logging.WARNING, "host.left_out", name=shown(name), why=why)
            # What Forge writes under the picture.
            errors = getattr(getattr(self._networks, "extra_network_lora", None), "errors", None)
            if isinstance(errors, dict):
                errors[name] = 1
        used = [i for i, name in enumerate(names) if found[name] is not None]
        self._notice_changes([file for file in found.values() if file is not None])
        lists = [te_multipliers, unet_multipliers, dyn_dims]
        kept = [None if values is None else [values[i] for i in used] for values in lists]
        with self.files.announced_stack(missing, is_empty=not used):
            return original([names[i] for i in used], *kept, *args, **kwargs)

    def _file(self, name: str) -> Path | None:
        """The file of a LoRA by the name in the prompt; None where there is none in the host's list."""
        entry = self._entry(name)
        if entry is None or not Path(entry.filename).is_file():
            return None
        return Path(entry.filename)

    def _look_for(self, names: Iterable[str]) -> None:
        """Lets the host look for files that are new, or that have moved; the whole list once, however many are missing."""
        unknown = list(names)
        if unknown:
            self._networks.update_available_networks_by_names(unknown)
        if any(self._file(name) is None for name in unknown):
            self._networks.list_available_networks()

    def _entry(self, name: str) -> NetworkOnDisk | None:
        networks = self._networks
        is_ambiguous = name.lower() in networks.forbidden_network_aliases
        known = networks.available_networks if is_ambiguous else networks.available_network_aliases
        entry: NetworkOnDisk | None = known.get(name)
        return entry

    def _notice_changes(self, files: Sequence[Path]) -> None:
        """Makes the host build its stack anew where the same names mean something else than last time."""
        is_changed = False
        for file in files:
            try:
                status = file.stat()
            except OSError:
                # Gone since it was looked up: reading it says so.
                continue
            version = (status.st_mtime_ns, status.st_size)
            is_changed |= self._versions.get(str(file), version) != version
            self._versions[str(file)] = version
        # Read by the host itself, the same files make other patches.
        reading, before = self.files.is_host_reading(), self._read_by
        self._read_by = reading
        if is_changed:
            self._on_changed_files()
        model = self._networks.sd_models.model_data.get_sd_model()
        if model is not None and (is_changed or reading != before):
            model.current_lora_hash = STALE


ROWS: tuple[Row[LoraStack], ...] = (
    Row("networks", "load_lora_state_dict", lambda stack: (stack.files.load_state,)),
    Row("networks", "load_lora_for_models", lambda stack: (stack.files.load_for_models,)),
    Row("networks", "load_networks", lambda stack: (stack.load_networks,)),
)
