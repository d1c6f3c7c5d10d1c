"""Backups: exact copies of the parameters that merges replace, in the best place there is: spare VRAM, RAM, a file.

A parameter that lies in RAM already is its own backup: no second copy, and the model gets back the very object.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import torch

from ..errors import Joined, Message, ModeError, RestoreError, about, reason
from ..inference_mode import outside_inference
from ..memory.out_of_memory import is_out_of_memory
from ..memory.probe import BackupBudget, default_spool_dir
from ..units import MB
from ..weights.storage import is_plain
from .spool import Region, Spool


class Where(str, Enum):
    """A kind of memory that a backup lies in. The value is what logs and reports show."""

    VRAM = "vram"
    RAM = "ram"
    DISK = "disk"
    FILE = "file"
    """The checkpoint file: see `file_backup.py`."""


@dataclass(frozen=True)
class Place:
    """The memory that a backup lies in, and why it lies there."""

    where: Where
    reason: str


def choose_place(size_bytes: int, budget: BackupBudget) -> Place:
    """Chooses the best place with room for `size_bytes`.

    Raises:
        ModeError: There is none.
    """
    for where, spare, why in (
        (Where.VRAM, budget.vram_spare_bytes, "spare VRAM"),
        (Where.RAM, budget.ram_spare_bytes, "no spare VRAM"),
        (Where.DISK, budget.disk_spare_bytes, "neither spare VRAM nor spare RAM"),
    ):
        if size_bytes <= spare:
            return Place(where, why)
    raise ModeError.of("memory.no_backup_place", size_mb=size_bytes / MB, spare=_spare(budget))


class Backup(ABC):
    """One original parameter, held until `release`."""

    def __init__(self, key: str, size_bytes: int, place: Place) -> None:
        self.key, self.bytes, self.place = key, size_bytes, place

    @abstractmethod
    def parameter(self, device: torch.device) -> torch.nn.Parameter:
        """Returns the original bit for bit on `device`: the very object if that is kept and lies there.

        Raises:
            RestoreError: It is lost.
        """

    @abstractmethod
    def release(self) -> None:
        """Frees its memory. Idempotent."""

    @property
    @abstractmethod
    def is_released(self) -> bool:
        """True after `release`."""


class HeldBackup(Backup):
    """The Parameter object itself, in VRAM or RAM."""

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
    """The original's bytes in the spool file. `parameter` reads them anew at each call."""

    def __init__(self, key: str, spool: Spool, region: Region, place: Place, requires_grad: bool) -> None:
        super().__init__(key, region.bytes, place)
        self._spool, self._region, self._requires_grad = spool, region, requires_grad
        # A backup that is dropped without `release` must not keep the file.
        self._free = weakref.finalize(self, spool.free, region)

    @outside_inference
    def parameter(self, device: torch.device) -> torch.nn.Parameter:
        data = self._spool.read(self.key, self._region, device)
        return torch.nn.Parameter(data, requires_grad=self._requires_grad)

    def release(self) -> None:
        self._free()

    @property
    def is_released(self) -> bool:
        return not self._free.alive


class BackupStore:
    """The backups of one model.

    Args:
        budget: Returns the memory that is spare at that moment; called before every backup.
        spool_dir: The folder for backups on disk; None for the default one.
    """

    def __init__(self, budget: Callable[[], BackupBudget], spool_dir: Path | None = None) -> None:
        self._budget = budget
        self._spool = Spool(spool_dir or default_spool_dir())
        self._backups: weakref.WeakSet[Backup] = weakref.WeakSet()

    @outside_inference
    def keep(self, key: str, parameter: torch.nn.Parameter, offloaded: torch.Tensor | None = None) -> Backup:
        """Backs `parameter` up, which stays as it is.

        Args:
            key: The parameter's name, for errors.
            parameter: The parameter.
            offloaded: The same values in RAM, from before the host moved them to its device. They become the backup,
                and nothing is copied.

        Raises:
            ModeError: There is no room for it anywhere.
        """
        backup = self._keep(key, parameter, offloaded)
        self._backups.add(backup)
        return backup

    def add(self, backup: Backup) -> None:
        """Counts a backup that was made elsewhere among those of the model."""
        self._backups.add(backup)

    @property
    def is_empty(self) -> bool:
        """True if no backup was made, or none is left."""
        return not self._backups

    def release_all_but(self, needed: Iterable[Backup]) -> None:
        """Releases every backup that is not in `needed`."""
        keep = {id(backup) for backup in needed}
        for backup in list(self._backups):
            if id(backup) not in keep:
                backup.release()

    def bytes(self, where: Where | None = None) -> int:
        """Returns the bytes of the originals that are kept, in one place or in all."""
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
            # The attributes of a host's parameter class are not among its bytes.
            budget = replace(budget, disk_spare_bytes=0)
        place = _choose(key, size, budget)
        if place.where is Where.RAM:
            try:
                return HeldBackup(key, moved(parameter, torch.device("cpu")), place)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # There was less RAM than the budget said.
            place = _choose(key, size, replace(budget, vram_spare_bytes=0, ram_spare_bytes=0))
        if place.where is Where.VRAM:
            return HeldBackup(key, parameter, place)
        return SpooledBackup(key, self._spool, self._spool.write(key, parameter), place, parameter.requires_grad)


REMEASURE_BYTES = 256 * MB
"""Backups of this size later the spare memory is measured again. A measurement takes milliseconds, and a model has
hundreds of norms and biases."""


class Budget:
    """The memory that backups of the present change may take.

    It is measured once, and again after REMEASURE_BYTES of backups. (An object of its own, so that engine and store form
    no reference cycle.)
    """

    def __init__(self) -> None:
        self._measure: Callable[[], BackupBudget] = lambda: BackupBudget(0, 0, 0)
        self._measured: BackupBudget | None = None
        self._taken_bytes = 0

    def start(self, measure: Callable[[], BackupBudget]) -> None:
        """Begins a change of a model whose spare memory `measure` returns."""
        self._measure, self._measured, self._taken_bytes = measure, None, 0

    def take(self, backup: Backup) -> None:
        """Counts a backup that was made since the last measurement."""
        self._taken_bytes += backup.bytes

    def __call__(self) -> BackupBudget:
        if self._measured is None or self._taken_bytes > REMEASURE_BYTES:
            self._measured, self._taken_bytes = self._measure(), 0
        # Each backup since counts against every place: that errs on the safe side.
        vram, ram, disk = (
            max(0, spare - self._taken_bytes)
            for spare in (
                self._measured.vram_spare_bytes,
                self._measured.ram_spare_bytes,
                self._measured.disk_spare_bytes,
            )
        )
        return BackupBudget(vram, ram, disk)


class Originals(Mapping[str, torch.nn.Parameter]):
    """The unpatched parameters of everything merged, by name. Each is read from its backup when it is asked for."""

    def __init__(self, backups: Mapping[str, Backup]) -> None:
        self._backups = backups

    def __getitem__(self, key: str) -> torch.nn.Parameter:
        return self._backups[key].parameter(torch.device("cpu"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._backups)

    def __len__(self) -> int:
        return len(self._backups)


_PLAIN = (torch.nn.Parameter, torch.Tensor)


def parameter_bytes(parameter: torch.Tensor) -> int:
    """Returns the bytes of the data as stored: of packed blocks, not of the weights in them."""
    # Of a plain one without a tensor for it: a change asks several times for each of hundreds of weights.
    data = parameter if type(parameter) in _PLAIN else parameter.data
    return data.numel() * data.element_size()


def lies_in_ram(parameter: torch.Tensor) -> bool:
    """Returns True for a tensor in the memory of the CPU."""
    return parameter.device.type == "cpu"


def _is_like(offloaded: torch.Tensor, parameter: torch.nn.Parameter) -> bool:
    return offloaded.shape == parameter.shape and offloaded.dtype == parameter.dtype and offloaded.device.type == "cpu"


def moved(parameter: torch.nn.Parameter, device: torch.device) -> torch.nn.Parameter:
    """Returns `parameter` on `device`: the very object if it lies there already. A host's own classes move themselves."""
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
