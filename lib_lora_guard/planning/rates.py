"""Assumed speeds of graphics cards, for predictions: public specifications and a few measured rates.

Per card: memory bandwidth, lanes and generation of PCIe, and the dense matrix rate of torch in 16 bit (fp32
accumulation). On GeForce that is half of the usually advertised number, and since the 30 series twice the fp32 rate.
The numbers are the manufacturer's, at boost clock. A card with several variants has those of the first one. AMD and
Intel cards are left out: nothing was measured on them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..units import GB

GIGA = 1e9

EFFICIENCY = 0.5
"""Share of the matrix rate that large layers reach. Measured 0.42 to 0.47: Flux-dev in bf16 at 1024x1024 is 74 TFLOP
and takes 0.16 to 0.18 s on an H100 or H200.
"""
BANDWIDTH_EFFICIENCY = 0.8
"""Share of the memory bandwidth that elementwise kernels reach; assumed. It predicts the step times measured on H100
and H200 (docs/gpu.md) within a factor of 2.
"""
PCIE_EFFICIENCY = 0.8
"""Share of PCIe's raw rate that copies from pinned memory reach (measured: 50 of 63 GB/s on an H100)."""
PAGEABLE_TO_GPU = 7.0 * GIGA
"""Pageable RAM to the GPU: the CPU copies into a pinned buffer first. Measured 6.3 to 8 GB/s (H100, H200: swapped
weights per step, and removing a merged LoRA).
"""
PAGEABLE_TO_RAM = 1.6 * GIGA
"""GPU to newly allocated RAM: each page is zeroed first. Measured 1.3 to 1.6 GB/s (the same machines: 22 GiB of backups
in 15 to 19 s).
"""
CPU_MERGE_VALUES = 0.55 * GIGA
"""Weight values per second that Forge merges on the CPU, in fp32 with new allocations. Measured 0.5 to 0.58 (16 cores).
"""


@dataclass(frozen=True)
class GpuRates:
    """Rates of one card, in bytes or operations per second."""

    name: str
    memory_bytes_per_second: float
    matrix_flops: float
    pcie_bytes_per_second: float
    compute_bytes: int = 2
    """Bytes per activation value. Forge computes in fp32 on GTX 16xx, whose fp16 is broken."""

    @property
    def flops(self) -> float:
        """Operations per second that large layers reach."""
        return self.matrix_flops * EFFICIENCY

    @property
    def stream(self) -> float:
        """Bytes per second of the card's own memory."""
        return self.memory_bytes_per_second * BANDWIDTH_EFFICIENCY

    @property
    def pinned(self) -> float:
        """Bytes per second from pinned RAM."""
        return self.pcie_bytes_per_second * PCIE_EFFICIENCY

    @property
    def pageable_to_gpu(self) -> float:
        """Bytes per second from pageable RAM to the GPU."""
        return min(PAGEABLE_TO_GPU, self.pinned)

    @property
    def pageable_to_ram(self) -> float:
        """Bytes per second from the GPU to new RAM."""
        return min(PAGEABLE_TO_RAM, self.pinned)


_LANE = {3: 0.985, 4: 1.969, 5: 3.938}
"""GB/s of one lane in one direction, by generation of PCIe."""

_CARDS: tuple[tuple[str, float, float, int, int], ...] = (
    # name, memory GB/s, TFLOPS, PCIe generation, lanes
    ("GTX 1060", 192, 4.4, 3, 16),  # no matrix units: the fp32 rate
    ("GTX 1650", 128, 3.0, 3, 16),
    ("GTX 1660", 192, 5.0, 3, 16),
    ("RTX 2060", 336, 25.8, 3, 16),
    ("RTX 2070", 448, 29.9, 3, 16),
    ("RTX 2080", 448, 40.3, 3, 16),
    ("RTX 2080 Ti", 616, 53.8, 3, 16),
    ("RTX 3050", 224, 18.2, 4, 8),
    ("RTX 3060", 360, 25.5, 4, 16),
    ("RTX 3060 Ti", 448, 32.4, 4, 16),
    ("RTX 3070", 448, 40.6, 4, 16),
    ("RTX 3080", 760, 59.5, 4, 16),
    ("RTX 3090", 936, 71.0, 4, 16),
    ("RTX 4060", 272, 30.2, 4, 8),
    ("RTX 4060 Ti", 288, 44.1, 4, 8),
    ("RTX 4070", 504, 58.3, 4, 16),
    ("RTX 4070 Ti", 504, 80.2, 4, 16),
    ("RTX 4080", 717, 97.5, 4, 16),
    ("RTX 4090", 1008, 165.2, 4, 16),
    ("RTX 5060", 448, 38.4, 5, 8),
    ("RTX 5060 Ti", 448, 47.4, 5, 8),
    ("RTX 5070", 672, 61.7, 5, 16),
    ("RTX 5070 Ti", 896, 87.9, 5, 16),
    ("RTX 5080", 960, 112.6, 5, 16),
    ("RTX 5090", 1792, 209.5, 5, 16),
    ("H100", 3350, 989.0, 5, 16),
    ("H200", 4800, 989.0, 5, 16),
)

RATES: dict[str, GpuRates] = {
    name: GpuRates(
        name,
        memory * GIGA,
        tflops * 1e12,
        _LANE[generation] * lanes * GIGA,
        compute_bytes=4 if name.startswith("GTX 16") else 2,
    )
    for name, memory, tflops, generation, lanes in _CARDS
}
DEFAULT_GPU = "RTX 3060"


_RELATIVES = {
    "a100": "RTX 5090", "a6000": "RTX 3090", "a5000": "RTX 3080", "a4000": "RTX 3070", "a2000": "RTX 3060", "a40": "RTX 3090",
    "a10": "RTX 3080", "l40": "RTX 4090", "l4": "RTX 4060", "t4": "RTX 2070", "v100": "RTX 2080 Ti", "p40": "GTX 1060",
    "titanrtx": "RTX 2080 Ti", "6000ada": "RTX 4090", "pro6000": "RTX 5090", "h800": "H100", "h100": "H100", "h200": "H200",
}  # fmt: skip
"""Cards for computers of another kind, with the listed card whose memory is about as fast."""
_MODEL = re.compile(r"(rtx|gtx)?(\d{3,4})(ti)?")
_MEMORY_SIZE = re.compile(r"\d+\s*gb", re.IGNORECASE)
_USUAL_BY_GB = (
    (6, "RTX 2060"),
    (8, "RTX 4060"),
    (12, "RTX 3060"),
    (16, "RTX 4060 Ti"),
    (24, "RTX 3090"),
    (32, "RTX 5090"),
)
"""The slower of the cards that many people have, by memory: a name that says nothing promises no speed."""
_LARGEST = "H100"


def rates_of(name: str) -> GpuRates:
    """Returns the rates of a card in any spelling ("NVIDIA GeForce RTX 3060", "3060ti").

    Raises:
        ValueError: The card is unknown; the message lists the known ones.
    """
    wanted = _short(name)
    for card in RATES.values():
        if wanted and wanted in (_short(card.name), _short(card.name).removeprefix("rtx").removeprefix("gtx")):
            return card
    raise ValueError(f"expected one of {', '.join(RATES)}, found {name!r}; take the one nearest to yours")


def nearest_rates(name: str, vram_bytes: int | None = None) -> GpuRates:
    """Returns the rates of a card, or of the known card nearest to it: "RTX 4070 Super" is counted as "RTX 4070".

    A name that tells no relative, such as that of another maker's card, is counted as a usual card with as much memory.

    Args:
        name: The card, in any spelling.
        vram_bytes: Memory of it that is free; None: not known, and the default card is taken.

    Raises:
        ValueError: The name is none: it has no letters, and is no model number either.
    """
    try:
        return rates_of(name)
    except ValueError:
        if (near := relative_of(name)) is not None:
            return near
        if not any(letter.isalpha() for letter in name):
            raise
        return RATES[_by_memory(vram_bytes)]


def relative_of(name: str) -> GpuRates | None:
    """Returns the rates of the known card that the name of another shows to be near: same maker, nearest number."""
    short = _short(_MEMORY_SIZE.sub("", name))
    near = _relative(short) or _by_number(short)
    return RATES[near] if near else None


def _by_memory(vram_bytes: int | None) -> str:
    if vram_bytes is None:
        return DEFAULT_GPU
    return next((card for gb, card in _USUAL_BY_GB if vram_bytes <= gb * GB), _LARGEST)


def _relative(short: str) -> str | None:
    return next((card for word, card in _RELATIVES.items() if re.search(rf"{word}(?![0-9])", short)), None)


def _by_number(short: str) -> str | None:
    found = _MODEL.match(short)
    if found is None:
        return None
    line, (series, place), is_ti = found[1], divmod(int(found[2]), 100), bool(found[3])
    if place == 0 or (line is None and not _is_series(series)):
        # "RTX 6000" is a card for workstations, which are not numbered by series; "123" is no card.
        return None
    # A GTX and an RTX with one number are no relatives; without the letters the number tells.
    line = line or ("gtx" if series < 20 else "rtx")

    def distance(card: str) -> tuple[int, int, bool]:
        known_series, known_place = divmod(int(card[4:8]), 100)
        return abs(series - known_series), abs(place - known_place), card.endswith(" Ti") is not is_ti

    return min((card for card in RATES if card[:4].lower() == f"{line} "), key=distance)


def _is_series(series: int) -> bool:
    return any(card[4:6] == str(series) for card in RATES)


def _short(name: str) -> str:
    return re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())
