"""Which physical card a torch device is. Numbers of devices do not say: CUDA_VISIBLE_DEVICES changes them, and CUDA counts
from the fastest card while the driver counts slots.

Sources: torch.cuda.get_device_properties (`uuid` since torch 2.4, pull request 125083); CUDA driver API, cuDeviceGetPCIBusId.
"""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LoraGuardError

_PCI_ID_BYTES = 32
"""The driver writes 13 with the final zero; domains of more digits are longer."""


@dataclass(frozen=True)
class Card:
    """Either name is enough; "" where it is not known."""

    uuid: str = ""
    """Without the kind ("GPU-", "MIG-") in front."""
    pci_bus_id: str = ""
    """domain:bus:device.function in hexadecimal."""


def which_card(device: torch.device, cuda_driver: Any = None) -> Card:
    """The card of a CUDA device. `cuda_driver`: the library, for tests. Raises LoraGuardError with the reason where nothing
    says it, and where CUDA has not been started, which asking would do."""
    if device.type != "cuda":
        raise LoraGuardError.of("readings.not_cuda", device=device.type)
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own
        raise LoraGuardError.of("readings.cuda_not_started")
    try:
        index = torch.cuda.current_device() if device.index is None else device.index
        uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
    except (RuntimeError, AssertionError) as error:  # torch says the latter of a number that is not there
        raise LoraGuardError.of("readings.card_unknown", error=str(error)) from error
    return Card(uuid=uuid) if uuid else Card(pci_bus_id=_pci_bus_id(index, cuda_driver))


def _pci_bus_id(index: int, library: Any) -> str:
    """torch and the driver number devices alike: both obey CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER."""
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
