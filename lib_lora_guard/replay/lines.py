"""The numbers of the logs and the formulas that reproduce them. Pure.

No number proves itself. The input of a formula is another line of the log, a shape of the published model, or a
setting. It is never the number that is compared. If an input had to be solved for (the size of an image that the report
does not state), the line is `Implied`. It proves little by itself and is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..planning.host_memory import Latent, swap_budget_bytes, unet_estimate_bytes
from ..units import FP32_BYTES, MB
from . import forge_memory as forge
from . import known_models as models
from .field_cases import FieldCase
from .forge_memory import Request

ONE_NUMBER = 0.005
"""Logs have two decimal places."""
SEVERAL_NUMBERS = 0.02
"""For a printed difference of three such numbers. A sum of two, one of them times 1.3, has a smaller error."""


@dataclass(frozen=True)
class Seen:
    """One number of a log, and the result of the formula."""

    name: str
    seen: float
    computed: float
    formula: str
    unit: str = "MB"
    assumed: str = ""
    """An input that the log does not show, and the reason for its value."""
    rounding: float = ONE_NUMBER

    @property
    def off(self) -> float:
        """The difference, computed minus seen."""
        return self.computed - self.seen

    @property
    def is_reproduced(self) -> bool:
        """True if the difference is explained by rounding."""
        return abs(self.off) <= self.rounding


@dataclass(frozen=True)
class Implied:
    """An input that the log does not show, solved for. `solved` must be a whole number to make sense."""

    name: str
    solved: float
    unit: str
    formula: str
    reading: str


Line = Seen | Implied
Numbers = Mapping[str, float]


def lines(case: FieldCase) -> tuple[Line, ...]:
    """Returns all lines of one configuration; none if no formula is known for its numbers."""
    rule = _RULES.get(case.number)
    if rule is None:
        return ()
    return tuple(rule({**case.numbers, "VRAM": case.vram_total_mb or 0.0}))


def remaining(name: str, n: Numbers, free: str, model: str | None, seen: str) -> Seen:
    """Reproduces "Remaining" of a placement. `model` None: everything was on the GPU already."""
    placed = forge.place(n[free] * MB, n[model] * MB if model else 0, 0, n["inference"] * MB)
    left = placed.remaining_bytes / MB
    return Seen(f"{name}: Remaining", n[seen], left, "free - model - inference", rounding=SEVERAL_NUMBERS)


def request(name: str, seen: float, model: float, rest: float, estimate: float = 0, assumed: str = "") -> Seen:
    """Reproduces the request for free VRAM before a model is loaded."""
    wanted = forge.request_bytes(Request(model * MB, 0, rest * MB, estimate * MB)) / MB
    rule = "1.3 * model + max(slider rest, estimate)"
    return Seen(f"{name}: Trying to free", seen, wanted, rule, assumed=assumed, rounding=SEVERAL_NUMBERS)


def early_request(name: str, seen: float, model: float, rest: float, estimate: float = 0, assumed: str = "") -> Seen:
    """Reproduces that request of August 2024, for a model that may be loaded already."""
    wanted = forge.early_request_bytes(model * MB, rest * MB, estimate * MB) / MB
    rule = "1.3 * whole model + max(slider rest, estimate)"
    return Seen(f"{name}: Trying to free", seen, wanted, rule, assumed=assumed, rounding=SEVERAL_NUMBERS)


def size(name: str, seen: float, count: float, of: str) -> Seen:
    """Compares the size of a model in a log with `count` bytes."""
    return Seen(f"{name}: size", seen, count / MB, of)


def merging(shapes: Mapping[str, tuple[int, int]], n: Numbers, block: int, name: str) -> Seen:
    """Reproduces the allocation that failed in a merge: one fp32 tensor of the layer."""
    rows, columns = shapes[name]
    return Seen(
        f"merge of {name}: Tried to allocate",
        n[f"{block}.{name} allocation"],
        forge.merge_copy_bytes(rows * columns) / MB,
        f"{rows} x {columns} in fp32",
    )


def progress(n: Numbers, kind: str, block: int, name: str) -> Seen:
    """Reproduces how many weights were merged before the one that failed."""
    return Seen(
        f"weights merged before {name} of block {block}",
        n[f"merged before {block}.{name}"],
        models.flux_matrices_before(kind, block, name),
        "order of Flux's 304 matrices",
        "weights",
        rounding=0,
    )


def estimate_mb(latent: Latent, compute_bytes: int = 2) -> float:
    """Returns Forge's estimate for a step, in MB."""
    return unet_estimate_bytes(latent, compute_bytes) / MB


def implied_decode_area(request_mb: float, vae_mb: float, value_bytes: int) -> float:
    """Returns the latent pixels of the image whose decode led to this request."""
    decode = request_mb - forge.REQUEST_FACTOR * vae_mb
    return decode / (forge.vae_decode_bytes(Latent(1, 1, 1), value_bytes) / MB)


_PRESET = Latent.of(forge.FLUX_PRESET_WIDTH, forge.FLUX_PRESET_HEIGHT)
_PRESET_NOTE = "picture of 896x1152, the size that the preset Flux sets"
_HYPER_RANK = 64
_FROM_SHAPES = "from the model's published shapes"


def _row_2(n: Numbers) -> Iterator[Line]:
    nf4, text = models.flux_bytes("nf4") / MB, models.flux_text_bytes(1, True, True) / MB
    assumed = "T5 in fp8, as the checkpoint NF4 v2 has it"
    yield early_request("text encoder", n["text request"], text, n["inference"], assumed=assumed)
    yield remaining("text encoder", n, "text free", None, "text remaining")
    yield early_request("model", n["model request"], nf4, n["inference"], estimate_mb(_PRESET), _PRESET_NOTE)


def _row_3(n: Numbers) -> Iterator[Line]:
    yield size("model", n["model"], models.flux_bytes("nf4"), _FROM_SHAPES + ", 0.55 bytes a value")
    yield early_request("model", n["model request"], n["model"], n["inference"], estimate_mb(_PRESET), _PRESET_NOTE)
    yield remaining("model", n, "model free", "model", "remaining")
    for name in ("img_mod.lin", "txt_mod.lin", "txt_attn.qkv", "txt_mlp.0"):
        yield merging(models.FLUX_DOUBLE, n, 13, name)
    yield progress(n, "double", 13, "img_mod.lin")
    yield progress(n, "double", 13, "txt_mod.lin")


def _row_4(n: Numbers) -> Iterator[Line]:
    for name in ("txt_mod.lin", "txt_mlp.0", "txt_mlp.2"):
        yield merging(models.FLUX_DOUBLE, n, 18, name)
    for name in ("linear1", "linear2"):
        yield merging(models.FLUX_SINGLE, n, 0, name)


def _row_5(n: Numbers) -> Iterator[Line]:
    yield merging(models.FLUX_SINGLE, n, 0, "linear2")


def _row_11(n: Numbers) -> Iterator[Line]:
    yield progress(n, "single", 32, "linear1")


def slider(n: Numbers, weights: str, inference: str) -> Seen:
    """Reproduces the inference memory for a setting of "GPU Weights"."""
    rest = forge.slider_rest_bytes(n["VRAM"] * MB, n[weights] * MB) / MB
    return Seen(f"slider at {n[weights]:.0f}: inference_memory", n[inference], rest, "VRAM - slider, not clamped")


def percent(n: Numbers, weights: str, seen: str) -> Seen:
    """Reproduces the share for weights for a setting of "GPU Weights"."""
    share = forge.weights_percent(n["VRAM"] * MB, n[weights] * MB)
    return Seen(f"slider at {n[weights]:.0f}: share for weights", n[seen], share, "100 - inference / VRAM", "%")


def _row_12(n: Numbers) -> Iterator[Line]:
    yield slider(n, "weights", "inference")
    yield percent(n, "weights", "weights percent")


def _row_18(n: Numbers) -> Iterator[Line]:
    yield size("text encoder", n["text"], models.sdxl_text_bytes(False), "CLIP-L and CLIP-G in fp16")
    grown = models.sdxl_text_bytes(True)
    yield size("text encoder after a prompt", n["text after a prompt"], grown, "the same, embeddings in fp32")
    yield request("text encoder", n["text request"], n["text"], n["inference"])
    yield remaining("text encoder", n, "text free", "text", "text remaining")


def _row_22(n: Numbers) -> Iterator[Line]:
    text = models.flux_text_bytes(1, True, True)
    yield size("text encoder", n["text"], text, "CLIP-L in fp16, T5 in fp8, embeddings in fp32")
    yield remaining("text encoder", n, "text free", "text", "text remaining")


def _row_24(n: Numbers) -> Iterator[Line]:
    text = models.flux_text_bytes(2, False, False)
    yield size("text encoder", n["text"], text, "CLIP-L and T5 in fp16, T5's embedding in fp32")
    yield request("text encoder", n["text request"], n["text"], n["inference"])
    yield remaining("text encoder", n, "text free", "text", "text remaining")
    yield size("model", n["model"], models.flux_bytes("Q8_0"), _FROM_SHAPES + ", 34 bytes for 32 values")
    yield remaining("model", n, "model free", "model", "remaining")
    lora = sum(models.flux_lora_pairs(_HYPER_RANK)) * FP32_BYTES / MB
    left = n["model request"] - forge.REQUEST_FACTOR * n["model"] - lora
    yield Implied(
        "picture behind the request",
        left / estimate_mb(Latent(1, 1, 1)),
        "latent pixels",
        f"request - 1.3 * model - LoRA ({lora:.2f} MB: 504 pairs of rank {_HYPER_RANK} in fp32)",
        "9216: 768x768",
    )


def _row_25(n: Numbers) -> Iterator[Line]:
    yield slider(n, "weights", "inference of 20500")
    yield percent(n, "weights", "percent of 20500")
    text = models.flux_text_bytes(2, False, True)
    yield size("text encoder", n["text"], text, "CLIP-L and T5 in fp16, embeddings in fp32")
    yield request("text encoder", n["text request"], n["text"], n["inference"])
    yield remaining("text encoder", n, "text free", "text", "text remaining")
    yield size("model", n["model"], models.flux_bytes("bf16"), _FROM_SHAPES)
    yield request("model", n["model request"], n["model"], n["inference"])
    yield remaining("model", n, "model free", "model", "remaining")
    budget = swap_budget_bytes(n["model free"] * MB, n["inference"] * MB)
    layout = forge.distribute(models.flux_layers("bf16"), budget, models.flux_norm_bytes("bf16"))
    rule = "small layers first below max(rest / 1.3, rest - 1280)"
    yield Seen("model: GPU Loaded", n["on gpu"], layout.gpu_bytes / MB, rule)
    yield Seen("model: Swap Loaded", n["swapped"], layout.swapped_bytes / MB, rule)
    yield size("VAE", n["vae"], models.FLUX_VAE_PARAMETERS * 2, "its parameters in bf16")
    area = implied_decode_area(n["vae request"], n["vae"], 2)
    yield Implied(
        "picture behind the VAE's request",
        area,
        "latent pixels",
        "request - 1.3 * VAE, over 2178 * 64 * 2",
        "24300: 1080x1440",
    )


def _row_29(n: Numbers) -> Iterator[Line]:
    text = models.flux_text_bytes(1, True, False) / MB
    rest = forge.DEFAULT_SLIDER_REST_BYTES / MB
    yield request(
        "text encoder", n["text request"], text, rest, assumed="the slider as it comes: 1024 MB for inference"
    )


def _row_34(n: Numbers) -> Iterator[Line]:
    yield size("model", n["model"], models.flux_bytes("fp8"), _FROM_SHAPES)
    yield remaining("model", n, "model free", "model", "remaining")


def _row_36(n: Numbers) -> Iterator[Line]:
    yield slider(n, "weights", "inference")
    yield percent(n, "weights", "weights percent")
    yield slider(n, "pasted weights", "pasted inference")


def _row_38(n: Numbers) -> Iterator[Line]:
    yield size("model", n["model"], models.SDXL_UNET_PARAMETERS * 2, "its parameters in fp16")
    yield remaining("model", n, "model free", "model", "remaining")
    yield size("VAE", n["vae"], models.VAE_PARAMETERS * 4, "its parameters in fp32")
    yield remaining("VAE", n, "vae free", "vae", "vae remaining")
    area = implied_decode_area(n["vae request"], n["vae"], FP32_BYTES)
    # The area is known from the other request of the same image: 258048.
    picture = Latent(1, 1, round(area))
    yield request(
        "model",
        n["model request"],
        n["model"],
        n["inference"],
        estimate_mb(picture, FP32_BYTES),
        f"picture of {picture.area} latent pixels, from the VAE's request in the same log; computed in fp32 like its VAE "
        "(two such pictures in fp16 need the same)",
    )


def _row_39(n: Numbers) -> Iterator[Line]:
    yield remaining("model", n, "model free", "model", "remaining")
    extra = forge.neo_inference_bytes(0, n["model free"] * MB, is_windows=False) / MB
    yield Implied(
        "slider rest behind Inference Require", (n["inference"] - extra) / 0.8, "MB", "Neo: 0.8 * rest + 400", "2048"
    )
    estimate = n["model request"] - forge.REQUEST_FACTOR * n["model"]
    area = estimate / (forge.neo_estimate_bytes(Latent(1, 1, 1), _NEO_FLUX) / MB)
    yield Implied("picture behind the request", area, "latent pixels", "Neo: 0.15 * 2 * area * 2.8", "24725: 920x1720")


def _row_47(n: Numbers) -> Iterator[Line]:
    yield size("text encoder", n["text"], models.t5_bytes(2), "T5 in fp16, embedding in fp32")
    yield request("text encoder", n["text request"], n["text"], n["inference"])
    yield remaining("text encoder", n, "text free", "text", "text remaining")
    yield remaining("model", n, "model free", "model", "remaining")
    estimate = n["model request"] - forge.REQUEST_FACTOR * n["model"]
    area = estimate / (forge.neo_estimate_bytes(Latent(1, 1, 1), _NEO_CHROMA) / MB)
    yield Implied("picture behind the request", area, "latent pixels", "Neo: 0.15 * 2 * area * 3.2", "12288: 1024x768")


def _row_49(n: Numbers) -> Iterator[Line]:
    yield remaining("text encoder", n, "text free", "text", "text remaining")
    yield remaining("model", n, "model free", "model", "remaining")
    rows, columns = models.SDXL_FEED_FORWARD
    copy = forge.merge_copy_bytes(rows * columns) / MB
    seen = n["ff.net.0.proj allocation"]
    yield Seen("merge of ff.net.0.proj: Tried to allocate", seen, copy, f"{rows} x {columns} in fp32")


_NEO_FLUX, _NEO_CHROMA = 2.8, 3.2

_RULES: dict[int, Callable[[Numbers], Iterator[Line]]] = {
    2: _row_2,
    3: _row_3,
    4: _row_4,
    5: _row_5,
    11: _row_11,
    12: _row_12,
    18: _row_18,
    22: _row_22,
    24: _row_24,
    25: _row_25,
    29: _row_29,
    34: _row_34,
    36: _row_36,
    38: _row_38,
    39: _row_39,
    47: _row_47,
    49: _row_49,
}
