"""Exact copies of the parameters that merges replace, in the best place there is: spare VRAM, RAM, a file.

A parameter that lies in RAM already is its own backup: no second copy, and the model gets back the very object.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import torch

from ..errors import Joined, Message, ModeError, RestoreError, about, reason
from ..memory.out_of_memory import is_out_of_memory
from ..memory.probe import BackupBudget, default_spool_dir
from ..weights.storage import MB
from .spool import Region, Spool


class Where(str, Enum):
    """The value is what logs and reports show."""

    VRAM = "vram"
    RAM = "ram"
    DISK = "disk"


@dataclass(frozen=True)
class Place:
    where: Where
    reason: str


def choose_place(size_bytes: int, budget: BackupBudget) -> Place:
    """The best place with room for `size_bytes`. Raises ModeError where there is none."""
    for where, spare, why in (
        (Where.VRAM, budget.vram_spare_bytes, "spare VRAM"),
        (Where.RAM, budget.ram_spare_bytes, "no spare VRAM"),
        (Where.DISK, budget.disk_spare_bytes, "neither spare VRAM nor spare RAM"),
    ):
        if size_bytes <= spare:
            return Place(where, why)
    raise ModeError.of("memory.no_backup_place", size_mb=size_bytes / MB, spare=_spare(budget))


class Backup(ABC):
    """One original, held until `release`."""

    def __init__(self, key: str, size_bytes: int, place: Place) -> None:
        self.key, self.bytes, self.place = key, size_bytes, place

    @abstractmethod
    def parameter(self, device: torch.device) -> torch.nn.Parameter:
        """The original bit for bit on `device`; the very object where that is kept and lies there.

        Raises RestoreError where it is lost.
        """

    @abstractmethod
    def release(self) -> None:
        """Gives the room back. Idempotent."""

    @property
    @abstractmethod
    def is_released(self) -> bool: ...


class HeldBackup(Backup):
    """The object itself, in VRAM or RAM."""

    def __init__(self, key: str, original: torch.nn.Parameter, place: Place) -> None:
        super().__init__(key, parameter_bytes(original), place)
        self._original: torch.nn.Parameter | None = original

    def parameter(self, device: torch.device) -> torch.nn.Parameter:
        if self._original is None:
            raise RestoreError(about(self.key, Message("memory.backup_released")))
        return moved(self._original, device)

    def release(self) -> None:
        self._original = None

    @property
    def is_released(self) -> bool:
        return self._original is None


class SpooledBackup(Backup):
    """The bytes in the spool file; read anew for every call."""

    def __init__(self, key: str, spool: Spool, region: Region, place: Place, requires_grad: bool) -> None:
        super().__init__(key, region.bytes, place)
        self._spool, self._region, self._requires_grad = spool, region, requires_grad
        # A backup that is dropped without a word must not keep the file.
        self._free = weakref.finalize(self, spool.free, region)

    def parameter(self, device: torch.device) -> torch.nn.Parameter:
        with torch.inference_mode(False), torch.no_grad():
            data = self._spool.read(self.key, self._region, device)
            return torch.nn.Parameter(data, requires_grad=self._requires_grad)

    def release(self) -> None:
        self._free()

    @property
    def is_released(self) -> bool:
        return not self._free.alive


class BackupStore:
    """The backups of one model. `budget` is asked before every backup and says what is spare at that moment."""

    def __init__(self, budget: Callable[[], BackupBudget], spool_dir: Path | None = None) -> None:
        self._budget = budget
        self._spool = Spool(spool_dir or default_spool_dir())
        self._backups: weakref.WeakSet[Backup] = weakref.WeakSet()

    def keep(self, key: str, parameter: torch.nn.Parameter, offloaded: torch.Tensor | None = None) -> Backup:
        """A backup of `parameter`, which stays as it is. `offloaded`: the same values in RAM, from before the host moved
        them; then nothing is copied. Raises ModeError where it can be kept nowhere."""
        with torch.inference_mode(False), torch.no_grad():
            backup = self._keep(key, parameter, offloaded)
        self._backups.add(backup)
        return backup

    def release_all_but(self, needed: Iterable[Backup]) -> None:
        """Gives back the room of all backups that are not `needed`."""
        keep = {id(backup) for backup in needed}
        for backup in list(self._backups):
            if id(backup) not in keep:
                backup.release()

    def bytes(self, where: Where | None = None) -> int:
        """Bytes of the originals that are kept, in one place or in all."""
        live = [backup for backup in self._backups if not backup.is_released]
        return sum(backup.bytes for backup in live if where in (None, backup.place.where))

    def _keep(self, key: str, parameter: torch.nn.Parameter, offloaded: torch.Tensor | None) -> Backup:
        if lies_in_ram(parameter):
            return HeldBackup(key, parameter, Place(Where.RAM, "lies in RAM already"))
        if offloaded is not None and is_plain(parameter) and _is_like(offloaded, parameter):
            original = torch.nn.Parameter(offloaded, requires_grad=parameter.requires_grad)
            return HeldBackup(key, original, Place(Where.RAM, "the copy the host loaded it from"))
        size, budget = parameter_bytes(parameter), self._budget()
        if not is_plain(parameter):
            # Attributes of another program's class are not among the bytes.
            budget = replace(budget, disk_spare_bytes=0)
        place = _choose(key, size, budget)
        if place.where is Where.RAM:
            try:
                return HeldBackup(key, moved(parameter, torch.device("cpu")), place)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Less was there than the budget said.
            place = _choose(key, size, replace(budget, vram_spare_bytes=0, ram_spare_bytes=0))
        if place.where is Where.VRAM:
            return HeldBackup(key, parameter, place)
        return SpooledBackup(key, self._spool, self._spool.write(key, parameter), place, parameter.requires_grad)


def parameter_bytes(parameter: torch.Tensor) -> int:
    """Of the data as it lies there: blocks count, not the weights in them."""
    return parameter.data.numel() * parameter.data.element_size()


def lies_in_ram(parameter: torch.Tensor) -> bool:
    return parameter.device.type == "cpu"


def is_plain(parameter: torch.nn.Parameter) -> bool:
    """True where shape, dtype and bytes are all there is to it."""
    return type(parameter) is torch.nn.Parameter and not vars(parameter)


def _is_like(offloaded: torch.Tensor, parameter: torch.nn.Parameter) -> bool:
    return offloaded.shape == parameter.shape and offloaded.dtype == parameter.dtype and offloaded.device.type == "cpu"


def moved(parameter: torch.nn.Parameter, device: torch.device) -> torch.nn.Parameter:
    """`parameter` on `device`: the very object where it lies there already. Classes of other programs move themselves."""
    if parameter.device == device:
        return parameter
    data = parameter.to(device)
    if isinstance(data, torch.nn.Parameter):
        return data
    new = torch.nn.Parameter(data.detach(), requires_grad=parameter.requires_grad)
    vars(new).update(vars(parameter))
    return new


def _choose(key: str, size_bytes: int, budget: BackupBudget) -> Place:
    try:
        return choose_place(size_bytes, budget)
    except ModeError as error:
        raise ModeError(about(key, reason(error))) from None


def _spare(budget: BackupBudget) -> Joined:
    places = (
        (Message("memory.vram"), budget.vram_spare_bytes),
        (Message("memory.ram"), budget.ram_spare_bytes),
        (Message("memory.disk"), budget.disk_spare_bytes),
    )
    return Joined(Message("memory.spare", {"place": place, "size_mb": spare / MB}) for place, spare in places)
