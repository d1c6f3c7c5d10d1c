"""Backups that take no RAM: the checkpoint file itself, where its bytes are proven to be those that were loaded.

**The proof** is a comparison of every bit, on the card, when a weight is merged for the first time: the file comes through
the ring of `file_reader.py` once. Hosts load with libraries that map the file, so there is no moment at loading where the bytes
pass by; a sum made later in the background would take the disk from the user, also where no LoRA is ever merged. The proof
takes as long as the link needs for the weights, which is what every change of strength takes too. Where the file and the weights
were compared before in this process, their checksums suffice, and nothing is read.

**Restoring** reads the rows again and compares their checksums with those of the proof. A file whose bytes have changed is
told from the right one for each 256 KB; then the weight keeps its LoRA, and the error says to reload the checkpoint. It is never
filled with other values.

The name of a tensor in the file only says where to look. A file in another dtype, with fused or renamed tensors, in GGUF or in
a pickle proves nothing; neither does one that is read slowly. Those weights get the backups of `backup.py`.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import FileFormatError, Message, RestoreError, about, reason
from ..files import FileHeader, FileState, TensorEntry, open_header, shown, state_of
from ..files.safetensors_file import FORMATS
from ..inference_mode import outside_inference
from ..memory.out_of_memory import is_out_of_memory
from ..messages import say
from ..models.names import DENOISER_PREFIXES
from ..units import MB
from ..weights.storage import WIDE_DTYPES, is_plain
from .backup import Backup, Place, Where, lies_in_ram, parameter_bytes
from .file_reader import FileReader, Piece
from .file_sums import BLOCK_BYTES, alike, checksums, factors_on, row_words, words_of

log = logging.getLogger(__name__)

LEAST_BYTES = 32 * MB
"""Of all weights of a change: a backup of less is no burden, and no reason to open a file."""
SMALLEST_BYTES = MB // 16
"""Of one weight. Smaller ones (norms, biases) are some MB together, and are read one by one."""
LEAST_BYTES_PER_SECOND = 500 * MB
"""A slower file makes a user wait for each change of strength; a copy in RAM or a bypass does not. A SATA SSD reads 530 MB/s."""
JUDGED_BYTES = 64 * MB
"""Read before the speed counts: opening a file takes its time."""
MOST_DIFFERENT = 8
"""Weights that differ before the file counts as another one."""
READS = 3
"""Of a weight that cannot be read, or has wrong checksums: a share may miss a beat."""


@dataclass(frozen=True, eq=False)
class Region:
    """One tensor of the file, with the checksums of the bytes that were loaded from it."""

    part: Piece
    shape: tuple[int, ...]
    dtype: torch.dtype
    sums: torch.Tensor
    """int64, in RAM: one for each 256 KB."""


class FileBackup(Backup):
    """The original's bytes in the checkpoint file. `parameter` reads them anew at each call."""

    def __init__(self, key: str, file: WeightFile, region: Region, requires_grad: bool) -> None:
        super().__init__(key, region.part.bytes, Place(Where.FILE, "the file it was loaded from has the same bytes"))
        self.file, self.region, self._requires_grad = file, region, requires_grad
        file.hold(region)
        self._free = weakref.finalize(self, file.free, region)

    @outside_inference
    def parameter(self, device: torch.device) -> torch.nn.Parameter:
        if self.is_released:
            raise RestoreError(about(self.key, Message("memory.backup_released")))
        return torch.nn.Parameter(self.file.read(self.key, self.region, device), requires_grad=self._requires_grad)

    @outside_inference
    def unchecked(self, device: torch.device) -> tuple[torch.nn.Parameter, torch.Tensor]:
        """Returns what the file has now, on a device with memory of its own, and the checksums of that, which lie there too.

        It is the original if they equal `sums`.

        Raises:
            OSError: It cannot be read.
            RestoreError: It was released.
        """
        if self.is_released:
            raise RestoreError(about(self.key, Message("memory.backup_released")))
        data, sums = self.file.read_unchecked(self.region, device)
        return torch.nn.Parameter(data, requires_grad=self._requires_grad), sums

    @property
    def sums(self) -> torch.Tensor:
        """The checksums of the original, in RAM."""
        return self.region.sums

    def release(self) -> None:
        self._free()

    @property
    def is_released(self) -> bool:
        return not self._free.alive


class FileUnfitError(Exception):
    """The file is not used, for a reason that is the error's text."""


class WeightFile:
    """A checkpoint file. It is open while it holds the original of a merged weight.

    Args:
        header: Of a safetensors file, with its state.
    """

    def __init__(self, header: FileHeader) -> None:
        self.path, self.state = header.path, header.state
        self.refused: Message | None = None
        """The reason why the file is not used, once it is known."""
        self._entries = header.tensors
        self._live: set[Region] = set()
        self._known: dict[str, torch.Tensor] = {}
        """The checksums of tensors that have been compared with the file, by their names in it."""
        self._reader: FileReader | None = None
        self._factors: dict[torch.device, torch.Tensor] = {}

    def find(self, key: str, parameter: torch.nn.Parameter) -> TensorEntry | None:
        """Returns the tensor that a parameter may have been loaded from, by name, shape and dtype."""
        inner = key.removeprefix("diffusion_model.")
        for prefix in DENOISER_PREFIXES:
            entry = self._entries.get(prefix + inner)
            if entry is not None and entry.shape == tuple(parameter.shape) and _dtype_of(entry) is parameter.dtype:
                return entry
        return None

    @outside_inference
    def prove(self, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, FileBackup]:
        """Compares parameters on a device with the file; returns the backups of those that are equal.

        Args:
            parameters: By name, contiguous, on one device.

        Raises:
            OSError: The file cannot be read, or is another one by now.
            FileUnfitError: It is too slow, or holds other weights.
        """
        try:
            return self._prove(parameters, BLOCK_BYTES)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Each alone may take less.
        return self._prove(parameters, 0)

    def _prove(self, parameters: Mapping[str, torch.nn.Parameter], together_bytes: int) -> dict[str, FileBackup]:
        """Does it, with so many bytes of weights of one size at once."""
        found = {key: entry for key, one in parameters.items() if (entry := self.find(key, one)) is not None}
        if not found:
            return {}
        proven: dict[str, FileBackup] = {}
        try:
            self._open(next(iter(parameters.values())).device)
            known = {key: sums for key, entry in found.items() if (sums := self._known.get(entry.name)) is not None}
            for key, now in self._checksums_of({key: parameters[key] for key in known}, together_bytes).items():
                if torch.equal(now, known[key]):
                    proven[key] = self._backup(key, parameters[key], found[key], known[key])
            unknown = [key for key in found if key not in proven]
            unknown.sort(key=lambda key: found[key].start)
            pairs = {key: (found[key], parameters[key]) for key in unknown}
            for key, sums in self._read_and_compare(pairs, together_bytes).items():
                self._known[found[key].name] = sums
                proven[key] = self._backup(key, parameters[key], found[key], sums)
        except BaseException:
            for backup in proven.values():
                backup.release()
            raise
        finally:
            self._close_if_unused()
        return proven

    def read(self, key: str, region: Region, device: torch.device) -> torch.Tensor:
        """Reads a weight into a new tensor on `device`. `key` names it in errors.

        Raises:
            RestoreError: The file no longer has its bits.
        """
        flat = torch.empty(region.part.bytes, dtype=torch.uint8, device=device)
        problem = ""
        for _ in range(READS):
            try:
                reader = self._reader
                if reader is None:
                    raise OSError("it was closed")
                sums = self._read_into(reader, region.part, flat)
            except (OSError, ValueError) as error:
                problem = str(error)
                continue
            if torch.equal(sums, region.sums):
                return flat.view(region.dtype).view(region.shape)
            problem = reason(OSError(Message("file.rewritten")))
        facts = {"path": str(self.path), "error": problem}
        raise RestoreError(about(key, Message("memory.file_lost", facts)))

    def read_unchecked(self, region: Region, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads a weight once into a new tensor on a device with memory of its own; returns it with its checksums there.

        Raises:
            OSError: It cannot be read.
        """
        reader = self._reader
        if reader is None:
            raise OSError("it was closed")
        flat = torch.empty(region.part.bytes, dtype=torch.uint8, device=device)
        reader.read([region.part], flat)
        return flat.view(region.dtype).view(region.shape), self._checksums_there(flat)

    def _read_into(self, reader: FileReader, part: Piece, flat: torch.Tensor) -> torch.Tensor:
        """Fills `flat` and returns its checksums in RAM."""
        if lies_in_ram(flat):
            factors = self._factors_for(flat)
            return torch.cat(reader.read_to_ram(part, flat, lambda piece: checksums(piece, factors)))
        reader.read([part], flat)
        return self._checksums_there(flat).cpu()

    def expect(self, regions: Iterable[Region]) -> None:
        """Begins to read weights ahead, which will be asked for next, in this order, to a device."""
        if self._reader is not None:
            self._reader.expect([region.part] for region in regions)

    def hold(self, region: Region) -> None:
        """Keeps the file open until the region is freed."""
        self._live.add(region)

    def free(self, region: Region) -> None:
        """Lets the file go with its last region. Idempotent."""
        self._live.discard(region)
        self._close_if_unused()

    @property
    def is_open(self) -> bool:
        """True while a weight needs the file."""
        return self._reader is not None

    def _open(self, device: torch.device) -> None:
        if self._reader is None:
            self._reader = FileReader(self.path, self.state)
        # Held as long as a weight may have to be restored: memory that is missing then would cost the model.
        self._reader.reserve(device)

    def _close_if_unused(self) -> None:
        if not self._live and self._reader is not None:
            self._reader.close()
            self._reader, self._factors = None, {}

    def _backup(self, key: str, parameter: torch.nn.Parameter, entry: TensorEntry, sums: torch.Tensor) -> FileBackup:
        region = Region(Piece(entry.start, entry.bytes), tuple(parameter.shape), parameter.dtype, sums)
        return FileBackup(key, self, region, parameter.requires_grad)

    def _read_and_compare(
        self, pairs: Mapping[str, tuple[TensorEntry, torch.nn.Parameter]], together_bytes: int
    ) -> dict[str, torch.Tensor]:
        """Returns the checksums of the parameters that have the file's bytes, by name.

        Until one is equal the card is asked about each, in the order of the file: it may be another file, or one of which all
        weights of a size differ. Then about all of them at once: each question makes the link wait.
        """
        assert self._reader is not None
        groups = deque([key] for key in pairs)
        read_bytes, different, started = 0, 0, time.perf_counter()
        keys: list[str] = []
        sums, differ = [], []
        while groups:
            group = groups.popleft()
            own, differs = self._compare([pairs[key] for key in group])
            if not keys:
                if bool(differs):
                    different += 1
                    if different == MOST_DIFFERENT:
                        raise FileUnfitError(Message("memory.file_differs", {"count": different}))
                    continue
                left = [key for (key,) in groups]
                sizes = [pairs[key][0].bytes for key in left]
                groups = deque([left[place] for place in group] for group in alike(sizes, together_bytes))
                self._reader.expect(
                    [Piece(pairs[key][0].start, pairs[key][0].bytes) for key in group] for group in groups
                )
            keys += group
            sums += own
            differ.append(differs)
            read_bytes += sum(pairs[key][0].bytes for key in group)
            rate = read_bytes / max(time.perf_counter() - started, 1e-9)
            if read_bytes >= JUDGED_BYTES and rate < LEAST_BYTES_PER_SECOND:
                facts = {"rate": rate / MB, "least": LEAST_BYTES_PER_SECOND / MB}
                raise FileUnfitError(Message("memory.file_slow", facts))
        if not keys:
            return {}
        others = torch.cat(differ).tolist()
        return {key: own for key, own, is_other in zip(keys, _in_ram(sums), others, strict=True) if not is_other}

    def _compare(
        self, group: Sequence[tuple[TensorEntry, torch.nn.Parameter]]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Returns the checksums of parameters, and a truth value for each, "it differs from the file", all where they lie.

        Args:
            group: One, or several of `alike`, with where they are in the file.
        """
        assert self._reader is not None
        if len(group) > 1:
            here = bytes_of_all([parameter for _, parameter in group])
            there = torch.empty_like(here)
            self._reader.read([Piece(entry.start, entry.bytes) for entry, _ in group], there)
            differs = (words_of(there) != words_of(here)).view(len(group), -1).any(1)
            # The sums take as much, and more.
            del there
            return self._of_alike(here, len(group)), differs
        ((entry, parameter),) = group
        here = bytes_of(parameter)
        scratch = torch.empty(min(BLOCK_BYTES, entry.bytes), dtype=torch.uint8, device=here.device)
        factors = self._factors_for(here)
        differ, sums = [], []
        for start in range(0, entry.bytes, BLOCK_BYTES):
            size = min(BLOCK_BYTES, entry.bytes - start)
            part, there = here.narrow(0, start, size), scratch[:size]
            self._reader.read([Piece(entry.start + start, size)], there)
            differ.append((words_of(there) != words_of(part)).any())
            sums.append(checksums(part, factors))
        if len(sums) == 1:
            return sums, differ[0].view(1)
        return [torch.cat(sums)], torch.stack(differ).any().view(1)

    def _checksums_of(
        self, parameters: Mapping[str, torch.nn.Parameter], together_bytes: int
    ) -> dict[str, torch.Tensor]:
        """Returns the checksums in RAM of parameters on a device; the card is asked for all of them at once."""
        names, sums = list(parameters), dict[str, torch.Tensor]()
        for group in alike([parameter_bytes(one) for one in parameters.values()], together_bytes):
            found = self._of_alike(bytes_of_all([parameters[names[place]] for place in group]), len(group))
            sums |= zip((names[place] for place in group), found, strict=True)
        return dict(zip(sums, _in_ram(list(sums.values())), strict=True))

    def _of_alike(self, flat: torch.Tensor, count: int) -> list[torch.Tensor]:
        """Returns the checksums of so many tensors of `alike`, which lie one behind the other, where they lie."""
        if count == 1:
            return [self._checksums_there(flat)]
        return list(checksums(flat, self._factors_of(flat.device, flat.numel() // count)).view(count, -1))

    def _checksums_there(self, flat: torch.Tensor) -> torch.Tensor:
        return checksums(flat, self._factors_for(flat))

    def _factors_for(self, flat: torch.Tensor) -> torch.Tensor:
        return self._factors_of(flat.device, flat.numel())

    def _factors_of(self, device: torch.device, size_bytes: int) -> torch.Tensor:
        factors = self._factors.get(device)
        if factors is None:
            factors = self._factors[device] = factors_on(device)
        return factors[: row_words(size_bytes)]


class FileBackups:
    """The files that one model's weights are restored from.

    Args:
        paths: Returns the files that the host has read last, which the model may have come from; the likeliest first.
    """

    def __init__(self, paths: Callable[[], Sequence[Path]]) -> None:
        self._paths = paths
        self._files: dict[tuple[Path, FileState], WeightFile] = {}

    def prove(self, parameters: Mapping[str, torch.nn.Parameter], model: str) -> dict[str, FileBackup]:
        """Returns backups for the parameters whose bytes a file is proven to have. The others need ordinary ones.

        Args:
            parameters: That are about to be merged, by name.
            model: The model's name, for the log.
        """
        left = {key: one for key, one in parameters.items() if _is_provable(one)}
        if sum(map(parameter_bytes, left.values())) < LEAST_BYTES:
            return {}
        found: dict[str, FileBackup] = {}
        for path in self._paths():
            file = self._file(path)
            if file is None or file.refused is not None or not left:
                continue
            started = time.perf_counter()
            try:
                proven = file.prove(left)
            except FileUnfitError as error:
                file.refused = Message("memory.file_unfit", {"name": shown(path.name), "why": reason(error)})
                say(log, logging.INFO, "memory.file_unused", model=model, why=file.refused)
                continue
            except Exception as error:
                # No backup at all is the only thing that must not come of it.
                why = Message("memory.file_unfit", {"name": shown(path.name), "why": reason(error)})
                say(log, logging.WARNING, "memory.file_unused", model=model, why=why)
                log.debug("the proof failed", exc_info=True)
                continue
            if proven:
                found |= proven
                left = {key: one for key, one in left.items() if key not in proven}
                _tell(model, path, proven, time.perf_counter() - started)
        return found

    def expect(self, backups: Iterable[Backup]) -> None:
        """Begins to read the originals ahead that a change will ask for, in this order, to a device."""
        regions: dict[int, tuple[WeightFile, list[Region]]] = {}
        for one in backups:
            if isinstance(one, FileBackup):
                regions.setdefault(id(one.file), (one.file, []))[1].append(one.region)
        for file, expected in regions.values():
            file.expect(expected)

    def _file(self, path: Path) -> WeightFile | None:
        """Returns the file as it is now, if it is a safetensors file."""
        state = state_of(path)
        if state is None or path.suffix != ".safetensors":
            return None
        known = self._files.get((path, state))
        if known is None:
            try:
                known = WeightFile(open_header(path))
            except FileFormatError as error:
                log.debug("%s", error)
                return None
            paths = [one for one in self._paths() if one != path]
            self._files = {key: file for key, file in self._files.items() if file.is_open or key[0] in paths}
            self._files[path, state] = known
        return known


def bytes_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Returns the memory of a contiguous parameter as flat bytes. To be called without gradients."""
    return parameter.view(-1).view(torch.uint8)


def bytes_of_all(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Returns the memory of contiguous parameters, a copy of it if there are several, one behind the other as flat bytes."""
    if len({one.dtype for one in parameters}) == 1 and parameters[0].dtype in WIDE_DTYPES:
        # One call of torch for hundreds of weights. Not every torch joins fp8.
        flat: torch.Tensor = torch._C._nn.flatten_dense_tensors(list(parameters))
        return flat.view(torch.uint8)
    return torch.cat([bytes_of(one) for one in parameters])


def _in_ram(sums: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns checksums in RAM; the card is asked for all of them at once."""
    if not sums:
        return []
    # Cloned: a part would keep the whole for as long as its weight lives.
    return [one.clone() for one in torch.split(torch.cat(list(sums)).cpu(), [one.numel() for one in sums])]


def _is_provable(parameter: torch.nn.Parameter) -> bool:
    return (
        not lies_in_ram(parameter)
        and is_plain(parameter)
        and parameter.is_contiguous()
        and parameter_bytes(parameter) >= SMALLEST_BYTES
    )


def _dtype_of(entry: TensorEntry) -> torch.dtype | None:
    # GGUF has formats of its own.
    found = getattr(torch, FORMATS.get(entry.format, (0, None))[1] or "", None)
    return found if isinstance(found, torch.dtype) else None


def _tell(model: str, path: Path, proven: Mapping[str, FileBackup], seconds: float) -> None:
    size = sum(one.bytes for one in proven.values())
    say(
        log,
        logging.INFO,
        "memory.file_used",
        model=model,
        count=len(proven),
        size_mb=size / MB,
        name=shown(path.name),
        seconds=seconds,
    )
