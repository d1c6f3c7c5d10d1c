"""Chooses the LoRA files of the coming image, in place of `networks.load_networks`.

Forge's own function stops at the first name it does not find: then none of the prompt's LoRAs is applied, and those of the last
image stay. It takes a stack of the same names for the same stack, whatever has become of the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

from ...files import shown
from ...messages import Message
from ...runtime.hooks import R, Row
from .lora_files import LoraFiles

T = TypeVar("T")

STALE = "lora guard: read again"
"""A `current_lora_hash` that no stack has."""


class NetworkOnDisk(Protocol):
    """A file in the WebUI's list of LoRAs."""

    filename: str
    hash: str | None
    """Empty until the file was read for it: by the host, when it is first in a stack."""


class LoraStack:
    def __init__(self, networks: ModuleType, files: LoraFiles, on_changed_files: Callable[[], None]) -> None:
        """
        Args:
            networks: the WebUI's.
            files: reads LoRA files.
            on_changed_files: called if a file of the stack is another than when it was last used.
        """
        self._networks, self.files, self._on_changed_files = networks, files, on_changed_files
        self._words = files.words
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
            self._words.tell(Message("host.left_out", {"name": shown(name), "why": why}))
            # What Forge writes under the picture: only where the sentence itself does not stand there.
            errors = getattr(getattr(self._networks, "extra_network_lora", None), "errors", None)
            if isinstance(errors, dict) and not self._words.is_shown:
                errors[name] = 1
        used = [i for i, name in enumerate(names) if found[name] is not None]
        self._notice_changes([file for file in found.values() if file is not None])
        text, unet = _at(te_multipliers, used), _at(unet_multipliers, used)
        unhashed = [found[names[i]] for i in used if not self._has_hash(names[i])]
        with (
            self.files.announced_stack(missing, is_empty=not used),
            self.files.read_ahead(file for file in unhashed if file is not None),
        ):
            # Forge Neo knows no ranks of DyLoRAs.
            ranks = () if dyn_dims is None else (_at(dyn_dims, used),)
            result = original([names[i] for i in used], text, unet, *ranks, *args, **kwargs)
        if self._words.is_open:
            self.files.tell_again()
        sides = (("host.unet", unet), ("host.text_encoder", text)) if self.files.patchers.counts_once else ()
        for message in same_twice([(names[i], found[names[i]]) for i in used], sides):
            self._words.tell(message)
        return result

    def _file(self, name: str) -> Path | None:
        """The file of a LoRA by the name in the prompt; None where there is none in the host's list."""
        entry = self._entry(name)
        if entry is None or not Path(entry.filename).is_file():
            return None
        return Path(entry.filename)

    def _has_hash(self, name: str) -> bool:
        return bool(getattr(self._entry(name), "hash", True))

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
        if model is not None and (is_changed or reading != before or any(map(self.files.has_failed, files))):
            model.current_lora_hash = STALE


def _at(values: Sequence[T] | None, places: Sequence[int]) -> list[T] | None:
    return None if values is None else [values[place] for place in places]


def same_twice(
    loras: Sequence[tuple[str, Path | None]], sides: Iterable[tuple[str, Sequence[float] | None]]
) -> list[Message]:
    """Returns a sentence for each file that stands in a prompt several times with one strength: the host keeps a stack by
    file and strength, so it counts once. With different strengths they add up.

    Args:
        loras: The names in the prompt with their files.
        sides: The catalogue's name of each part of the model, and the strengths there.

    Returns:
        One sentence for a file, for the first part that it counts once for.
    """
    said: dict[Path, Message] = {}
    for side, strengths in sides:
        if strengths is None:
            continue
        counted = Counter((file, strength) for (_, file), strength in zip(loras, strengths, strict=True))
        for (name, file), strength in zip(loras, strengths, strict=True):
            count = counted[file, strength]
            if file is None or count < 2 or file in said:
                continue
            facts = {"name": shown(name), "count": count, "strength": strength}
            said[file] = Message("schedules.same_twice", {**facts, "side": Message(side)})
    return list(said.values())


ROWS: tuple[Row[LoraStack], ...] = (
    Row("networks", "load_lora_state_dict", lambda stack: (stack.files.load_state,)),
    Row("networks", "load_lora_for_models", lambda stack: (stack.files.load_for_models,)),
    Row("networks", "load_networks", lambda stack: (stack.load_networks,)),
)
