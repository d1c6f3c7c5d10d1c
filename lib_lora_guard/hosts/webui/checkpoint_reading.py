"""Looks at RAM before Forge or Forge Neo reads a checkpoint, and plans what it takes, for the journal. Remembers the files:
a merge may leave the original weights to them (`patching/file_backup.py`).

Sources: `backend/loader.py` (`forge_loader`, which gets file names), `backend/args.py` (`dynamic_args`), `modules/sd_models.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ...errors import MemoryShortError
from ...files import shown
from ...messages import Joined, Message
from ...recorder.flight_recorder import RAM_NEED
from ...runtime.hooks import P, R
from ...runtime.journal import Plan
from ...runtime.preflight import Preflight

MOST_FILES = 8
"""That are remembered: a model comes from one file, or a few."""

_FP8_NAMES = ("float8",)


class CheckpointReading:
    """Stands in place of `forge_loader`."""

    def __init__(self, preflight: Preflight, advise: Callable[[Sequence[Path], int], Sequence[Message]]) -> None:
        """
        Args:
            preflight: refuses files that RAM and page file cannot take.
            advise: takes the files and the bytes that they may fill; returns what would help.
        """
        self._preflight, self._advise = preflight, advise
        self.files: tuple[Path, ...] = ()
        """The files that were read last, the latest first."""

    def before_reading(self, original: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Stands in place of `forge_loader(sd, additional_state_dicts)`.

        Raises:
            MemoryShortError: RAM and page file together cannot take the files.
        """
        files = [path for path in _files(args, kwargs) if path.is_file()]
        self.files = tuple(dict.fromkeys((*files, *self.files)))[:MOST_FILES]
        what = Message("preflight.reading", {"files": Joined((shown(path.name) for path in files), "list.names")})
        with self._preflight.careful("reading"):
            try:
                self._preflight.check(sum(_bytes_in_ram(path) for path in files), what)
            except MemoryShortError as error:
                advice = self._advise(files, self._preflight.alive_bytes() or 0)
                if not advice:
                    raise
                refused = {"why": error, "advice": Joined(advice, "list.semicolon")}
                raise MemoryShortError(Message("preflight.refused", refused)) from None
            return original(*args, **kwargs)


def _files(args: Sequence[object], kwargs: Mapping[str, object]) -> Iterator[Path]:
    state = args[0] if args else kwargs.get("sd")
    others = args[1] if len(args) > 1 else kwargs.get("additional_state_dicts")
    for one in (state, *(others if isinstance(others, (list, tuple)) else ())):
        if isinstance(one, (str, Path)):
            yield Path(one)


def _bytes_in_ram(path: Path) -> int:
    """Returns what the tensors of a file take once they are in a model.

    A model that Forge shall hold in fp8 is cast as it is read, so it takes half of a 16-bit file. How the file stores it is in
    its header; to refuse wrongly is worse than to refuse late.
    """
    size = path.stat().st_size
    return size // 2 if any(name in _wished_dtype() for name in _FP8_NAMES) else size


def _wished_dtype() -> str:
    """Returns what "Diffusion in Low Bits" asks for."""
    arguments = sys.modules.get("backend.args")
    return str(getattr(arguments, "dynamic_args", {}).get("forge_unet_storage_dtype"))


def reading_plan(state: object, additional_state_dicts: Sequence[object] | None = None) -> Plan:
    """Plans for `forge_loader`, which gets file names: it reads whole files."""
    files = [Path(one) for one in (state, *(additional_state_dicts or ())) if isinstance(one, (str, Path))]
    return {RAM_NEED: sum(file.stat().st_size for file in files if file.is_file())}


def text_encoder_plan(
    guess: object,
    component_name: str,
    lib_name: str,
    cls_name: str,
    repo_path: str,
    state_dict: Mapping[str, object] | None,
) -> Plan | None:
    """Plans for `load_huggingface_component`, which makes all parts of a model.

    A text encoder gets memory of its own, beside what was read.

    Returns:
        None for the other parts.
    """
    if not component_name.startswith("text_encoder"):
        return None
    tensors = [one for one in (state_dict or {}).values() if isinstance(one, torch.Tensor)]
    return {RAM_NEED: sum(tensor.nbytes for tensor in tensors)}
