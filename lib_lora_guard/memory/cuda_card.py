"""Identifies the physical card of a torch device. Indices do not: CUDA_VISIBLE_DEVICES changes them, and CUDA sorts by
speed while the driver sorts by slot.

Sources: torch.cuda.get_device_properties (`uuid` since torch 2.4, pull request 125083); CUDA driver API,
cuDeviceGetPCIBusId.
"""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from typing import Any

from ..errors import LoraGuardError
from ..lazy_torch import torch

_PCI_ID_BYTES = 32
"""The driver writes 13 bytes with the final zero; longer domains need more."""


@dataclass(frozen=True)
class Card:
    """A physical card. One of the two names is enough; "" if unknown."""

    uuid: str = ""
    """Without the prefix ("GPU-", "MIG-")."""
    pci_bus_id: str = ""
    """domain:bus:device.function in hexadecimal."""


def which_card(device: torch.device, cuda_driver: Any = None) -> Card:
    """Returns the card of a CUDA device.

    Args:
        device: The CUDA device.
        cuda_driver: The driver's library, for tests.

    Raises:
        LoraGuardError: `device` is no CUDA device, its card is unknown, or CUDA is not initialized (asking would do
            that).
    """
    if device.type != "cuda":
        raise LoraGuardError.of("readings.not_cuda", device=device.type)
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own
        raise LoraGuardError.of("readings.cuda_not_started")
    try:
        index = torch.cuda.current_device() if device.index is None else device.index
        uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError for an index that does not exist
        raise LoraGuardError.of("readings.card_unknown", error=str(error)) from error
    return Card(uuid=uuid) if uuid else Card(pci_bus_id=_pci_bus_id(index, cuda_driver))


def _pci_bus_id(index: int, library: Any) -> str:
    """Asks the driver. torch and the driver use the same indices: both obey CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER."""
    name = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    try:
        library = library or ctypes.CDLL(name)
        text = ctypes.create_string_buffer(_PCI_ID_BYTES)
        code = library.cuDeviceGetPCIBusId(text, _PCI_ID_BYTES, index)
    except (OSError, AttributeError) as error:
        raise LoraGuardError.of("readings.card_unknown", error=str(error)) from error
    if code != 0:
        raise LoraGuardError.of("readings.card_unknown", error=f"cuDeviceGetPCIBusId: CUDA {code}")
    return text.value.decode("ascii", "replace")
