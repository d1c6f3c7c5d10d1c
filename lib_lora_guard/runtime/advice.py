"""Says what would help, with numbers: beside a refusal, or after an image that ended for lack of memory."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..errors import FileFormatError
from ..files import open_header
from ..memory import Nvml
from ..messages import Joined, Message
from ..planning.formats import smaller_picture, that_fit, to_leave_out
from ..reporting.report import ApplyReport
from ..weights.storage import MB, storage_of
from .host import TotalMemory

GB = 1 << 30
OTHERS_BYTES = 256 * MB
"""Less than this in other programs is a desktop, and not worth closing it."""
LORA_BYTES = 64 * MB
SHARE = 4
"""A smaller picture is worth advising if a step takes one part in SHARE less; used where the missing bytes are
unknown."""
_PLAIN = ("F16", "BF16", "F32", "F8_E4M3", "F8_E5M2")
"""Formats of safetensors whose shapes are the weights' own."""


class Advice:
    def __init__(
        self, memory: TotalMemory, reports: Callable[[], Sequence[ApplyReport]], nvml: Callable[[], Nvml] = Nvml
    ) -> None:
        """
        Args:
            memory: the host's size of each device.
            reports: returns what lies on each model.
            nvml: opens the driver's library.
        """
        self._memory, self._reports, self._nvml = memory, reports, nvml

    def for_files(self, files: Sequence[Path], room_bytes: int) -> list[Message]:
        """Advises on files that RAM cannot take: names the formats in which the largest would fit.

        Args:
            files: model files that are read together.
            room_bytes: RAM that can be had.
        """
        largest = max(files, key=lambda path: path.stat().st_size, default=None)
        if largest is None:
            return []
        try:
            header = open_header(largest)
        except FileFormatError:
            return []
        if any(len(one.shape) == 2 and one.format not in _PLAIN for one in header.tensors.values()):
            return []
        shapes = {name: one.shape for name, one in header.tensors.items()}
        beside = sum(path.stat().st_size for path in files) - header.bytes
        return _formats(shapes, header.bytes, beside, room_bytes)

    def for_image(
        self, model: torch.nn.Module, device: torch.device, needs: Callable[[int, int], int], size: tuple[int, int]
    ) -> list[Message]:
        """Advises on an image that ended for lack of memory.

        Args:
            model: the denoiser.
            device: where it ran.
            needs: returns the bytes that a step takes for a width and a height.
            size: width and height of the image in pixels.
        """
        said = []
        step = needs(*size)
        smaller = smaller_picture(*size, needs, step // SHARE)
        if smaller is not None:
            facts = {"width": smaller.width, "height": smaller.height, "saved_gb": smaller.saved_bytes / GB}
            said.append(Message("preflight.smaller_picture", facts))
        names, saved = to_leave_out(self._loras(), 1)
        if saved >= LORA_BYTES:
            said.append(Message("preflight.leave_out", {"names": Joined(names, "list.names"), "saved_gb": saved / GB}))
        if device.type == "cuda":
            storages = {name: storage_of(parameter) for name, parameter in model.named_parameters()}
            shapes = {name: one.shape for name, one in storages.items()}
            now, total = sum(one.bytes for one in storages.values()), int(self._memory.get_total_memory(device))
            said += _formats(shapes, now, step, total)
            said += self._others(device)
        return said

    def _loras(self) -> Mapping[str, int]:
        """Bytes of each LoRA, over all models that it lies on."""
        sizes: dict[str, int] = {}
        for report in self._reports():
            for lora in report.loras:
                sizes[lora.label] = sizes.get(lora.label, 0) + lora.bytes
        return sizes

    def _others(self, device: torch.device) -> list[Message]:
        """Programs that hold VRAM. Windows' driver tells which, but not how much."""
        nvml = self._nvml()
        found = nvml.other_processes(device).processes
        nvml.close()
        names = Joined(dict.fromkeys(one.name for one in found if one.name), "list.names")
        known = sum(one.bytes or 0 for one in found)
        if known > OTHERS_BYTES:
            return [Message("preflight.others_hold", {"names": names, "size_mb": known / MB})]
        unknown = platform.system() == "Windows" and names and any(one.bytes is None for one in found)
        return [Message("preflight.others_use", {"names": names})] if unknown else []


def _formats(
    shapes: Mapping[str, tuple[int, ...]], now_bytes: int, beside_bytes: int, total_bytes: int
) -> list[Message]:
    """The closest to 16 bit and the smallest of those that fit."""
    fits = that_fit(shapes, now_bytes, beside_bytes, total_bytes)
    chosen = dict.fromkeys([*fits[:1], *fits[-1:]])
    numbers = [Message("preflight.format", {"format": one.format, "need_gb": one.need_bytes / GB}) for one in chosen]
    return (
        [Message("preflight.formats", {"formats": Joined(numbers, "list.names"), "total_gb": total_bytes / GB})]
        if numbers
        else []
    )
