"""The inputs that `guard_case` takes from a field report, row by row, and the reasons for rows without inputs. Pure
data.

Unknown facts of a report are replaced by assumptions; each is a constant here. If the model's storage is not named, all
four are tried.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..planning.gguf_baked import value_bytes
from ..planning.rates import RATES
from ..planning.tokens import Picture
from ..units import FP32_BYTES, MB
from . import known_models as models
from .field_cases import FieldCase
from .forge_memory import DEFAULT_SLIDER_REST_BYTES, FLUX_PRESET_HEIGHT, FLUX_PRESET_WIDTH

OTHERS_MB = 1600
"""VRAM of the desktop and CUDA if no log states it: the most that these logs show (row 25: 24575 less 22999)."""
LORA_RANK = 32
"""Rank of a LoRA whose file is not described: on every linear layer of Flux, in 16 bit, 331 MB."""
SDXL_LORA_MB = 200
"""Size of an SDXL LoRA whose file is not described: that of row 45."""
STORAGES = ("nf4", "fp8", "Q8_0", "bf16")
_T5_BYTES = {"nf4": 1.0, "fp8": 1.0, "Q8_0": 2.0, "bf16": 2.0}
"""Bytes per value of T5 if it is not named: NF4 and fp8 checkpoints contain it in fp8."""
_PRESET = Picture(FLUX_PRESET_WIDTH, FLUX_PRESET_HEIGHT)
SDXL = "SDXL fp16"


@dataclass(frozen=True)
class Reading:
    """One image on one machine, in bytes."""

    storage: str
    architecture: str
    denoiser_bytes: int
    text_bytes: int
    vae_bytes: int
    largest_values: int
    """Values of the largest layer."""
    picture: Picture
    loras: int
    lora_bytes: int
    """All LoRAs in 16 bit."""
    free_bytes: int
    """VRAM without our models, or as logged before the denoiser was placed."""
    inference_bytes: int
    ram_bytes: int | None
    compute_bytes: int = 2
    online: bool = False
    """True with Forge's "fp16 LoRA"."""

    @property
    def is_wide(self) -> bool:
        """True if the weights are stored in 16 bit."""
        return self.storage in ("bf16", SDXL)

    @property
    def values(self) -> float:
        """Values of the denoiser."""
        return models.SDXL_UNET_PARAMETERS if self.storage == SDXL else models.flux_bytes("fp8")

    @property
    def file_bytes(self) -> int:
        """Size of the model's files in RAM while they are read."""
        return self.denoiser_bytes + self.text_bytes + self.vae_bytes


@dataclass(frozen=True)
class _Row:
    """The facts of one report."""

    storages: tuple[str, ...]
    loras: int
    picture: Picture = _PRESET
    lora_mb: float | None = None
    """All LoRAs together; None if the file is not described."""
    t5_bytes: float | None = None
    """Bytes per value."""
    compute_bytes: int | None = None
    online: bool = False


def _flux_lora_mb(rank: int) -> float:
    return sum(models.flux_lora_pairs(rank)) * 2 / MB


_HYPER_MB = _flux_lora_mb(64)
"""The LoRA of row 24: its request fits rank 64."""
_ROWS: dict[int, _Row] = {
    1: _Row(("fp8",), 1),
    2: _Row(("nf4",), 1),
    3: _Row(("nf4",), 1),
    4: _Row(("fp8", "Q8_0"), 1, Picture(512, 512)),
    5: _Row(STORAGES, 1),
    6: _Row(("nf4",), 1),
    7: _Row(("nf4",), 1),
    8: _Row(("nf4",), 1),
    9: _Row(("nf4",), 1),
    11: _Row(STORAGES, 1),
    12: _Row(("nf4",), 2, Picture(1024, 768), online=True),
    13: _Row(STORAGES, 2, lora_mb=200),
    15: _Row(STORAGES, 3),
    16: _Row((SDXL,), 1, Picture(1024, 1024)),
    17: _Row((SDXL,), 2, Picture(1024, 1024)),
    19: _Row((SDXL,), 2, Picture(1024, 1024)),
    20: _Row((SDXL,), 1, Picture(1024, 1024)),
    22: _Row(STORAGES, 1, t5_bytes=1),
    23: _Row(("Q8_0",), 1, Picture(1920, 1080), lora_mb=200, t5_bytes=value_bytes("Q8_0")),
    24: _Row(("Q8_0",), 1, Picture(768, 768), lora_mb=_HYPER_MB, t5_bytes=2, online=True),
    25: _Row(("bf16",), 0, Picture(1080, 1440), t5_bytes=2),
    27: _Row(STORAGES, 0),
    28: _Row(("nf4",), 0),
    29: _Row(("nf4",), 0, t5_bytes=1),
    30: _Row(("nf4",), 0),
    34: _Row(("fp8",), 0),
    # 258048 latent pixels, computed in fp32, by the requests in its log (`lines`).
    38: _Row((SDXL,), 1, Picture(4032, 4096), compute_bytes=FP32_BYTES),
}

NO_VRAM = "no VRAM known"
_CHECKPOINTS = "RAM that grows over many checkpoints: which and how many is not known"
MISSING: dict[int, str] = {
    10: "neither the number of LoRAs nor the RAM is known",
    14: "neither the model's storage nor the RAM that ran out is known",
    18: f"{NO_VRAM}, and nothing went wrong",
    21: NO_VRAM,
    31: _CHECKPOINTS,
    32: _CHECKPOINTS,
    33: _CHECKPOINTS,
    35: NO_VRAM,
    36: "no model named",
    37: "neither the model's storage nor its LoRAs are known",
}
"""Reasons for rows without a reading."""

_NOT_RUN = "the guard leaves this host's loading alone"
ELSEWHERE: dict[int, str] = {
    26: "it came with the swap method Shared and start options and without a LoRA; the guard leaves both as they are set",
    51: "Forge of February 2024 has another LoRA loader, which the guard does not take over",
    **dict.fromkeys((39, 40, 41, 42, 43, 44, 47, 48), f"Forge Neo: {_NOT_RUN}"),
    **dict.fromkeys((45, 46), f"Forge Classic: {_NOT_RUN}"),
    **dict.fromkeys((49, 50), f"reForge of that time: {_NOT_RUN}"),
    **dict.fromkeys((52, 53, 54), "ComfyUI: the guard does not run there"),
}
"""Reasons why an outcome stays as it is: the guard does not touch its cause."""


def readings(case: FieldCase) -> tuple[Reading, ...]:
    """Returns one reading for each storage that the model may have; none if too little is known."""
    row = _ROWS.get(case.number)
    if row is None or (case.vram_free_mb is None and case.vram_total_mb is None):
        return ()
    return tuple(_reading(case, row, storage) for storage in row.storages)


def _reading(case: FieldCase, row: _Row, storage: str) -> Reading:
    free_mb = case.vram_free_mb if case.vram_free_mb is not None else (case.vram_total_mb or 0) - OTHERS_MB
    usual_mb = SDXL_LORA_MB if storage == SDXL else _flux_lora_mb(LORA_RANK)
    lora_mb = row.lora_mb if row.lora_mb is not None else row.loras * usual_mb
    known = RATES[case.gpu].compute_bytes if case.gpu in RATES else 2
    if storage == SDXL:
        rows, columns = models.SDXL_FEED_FORWARD
        denoiser, text = models.SDXL_UNET_PARAMETERS * 2.0, models.sdxl_text_bytes(True)
        vae = models.VAE_PARAMETERS * FP32_BYTES
    else:
        rows, columns = models.FLUX_SINGLE["linear1"]
        denoiser, vae = models.flux_bytes(storage), models.FLUX_VAE_PARAMETERS * 2
        text = models.flux_text_bytes(row.t5_bytes or _T5_BYTES[storage], True, True)
    return Reading(
        storage,
        "SDXL" if storage == SDXL else "Flux",
        int(denoiser),
        int(text),
        vae,
        rows * columns,
        row.picture,
        row.loras,
        int(lora_mb * MB),
        int(max(0, free_mb) * MB),
        int(case.numbers.get("inference", DEFAULT_SLIDER_REST_BYTES / MB) * MB),
        None if case.ram_mb is None else int(case.ram_mb * MB),
        row.compute_bytes or known,
        row.online,
    )
