"""Log lines from threads that are no configuration of their own, and the formulas that give them. Pure."""

from __future__ import annotations

from ..planning.host_memory import Latent
from ..units import MB
from . import forge_memory as forge
from . import known_models as models
from .field_cases import thread_url
from .forge_memory import Request
from .lines import (
    SEVERAL_NUMBERS,
    Implied,
    Line,
    Seen,
    early_request,
    estimate_mb,
    implied_decode_area,
    merging,
    progress,
    remaining,
    request,
    size,
)

SENTINEL_THREAD = thread_url("F1261")
_TOOLS_THREAD = "https://github.com/AcademiaSD/sd-forge-fluxcontrolnet/issues/17"


def elsewhere() -> list[tuple[str, Line]]:
    """Returns `(thread, line)`. The numbers are those of the threads, in MB."""
    loaded = forge.request_when_loaded_bytes(Request(estimate_bytes=estimate_mb(Latent.of(1024, 1024)) * MB)) / MB
    text = models.flux_text_bytes(1, True, False) / MB
    killed = {"17.txt_mlp.2 allocation": 144.00, "merged before 17.txt_mlp.2": 179}
    sd15 = {"free": 3235.60, "model": 3278.81, "inference": 1535.00, "remaining": -1578.22}
    rocm = {"free": 5901.52, "model": 11353.05, "inference": 1227.00, "remaining": -6678.53}
    tools = {"free": 11234.33, "model": 5154.62, "inference": 1287.00, "remaining": 4792.71}
    neo = {"free": 7160.79, "model": 22706.06, "inference": 1419.20, "remaining": -16964.47}
    area = implied_decode_area(4563.84, models.FLUX_VAE_PARAMETERS * 2 / MB, 2)
    found: list[tuple[str, Line]] = [
        ("F2414", Seen("loaded model: Trying to free", 1310.72, loaded, "1.28 * 2 * 128 * 128 * 2 bytes * 16384",
                       assumed="picture of 1024x1024")),
        ("F1256", merging(models.FLUX_DOUBLE, killed, 17, "txt_mlp.2")),
        ("F1256", progress(killed, "double", 17, "txt_mlp.2")),
        ("F1598", request("model", 5797.46, sd15["model"], sd15["inference"])),
        ("F1598", remaining("model", sd15, "free", "model", "remaining")),
        ("F1481", early_request("text encoder", 7928.00, 5154.62, rocm["inference"])),
        ("F1481", early_request("model", 15985.96, rocm["model"], rocm["inference"])),
        ("F1481", remaining("model", rocm, "free", "model", "remaining")),
        ("N565", remaining("model", neo, "free", "model", "remaining")),
        ("F1820", Implied("picture behind the VAE's request", area, "latent pixels",
                          "request - 1.3 * VAE, over 2178 * 64 * 2", "16384: 1024x1024")),
    ]  # fmt: skip
    rows = [(thread_url(short), line) for short, line in found]
    return [
        *rows,
        (_TOOLS_THREAD, size("text encoder", 5154.62, text * MB, "CLIP-L in fp16, T5 in fp8")),
        (_TOOLS_THREAD, request("text encoder", 7988.00, tools["model"], tools["inference"])),
        (_TOOLS_THREAD, remaining("text encoder", tools, "free", "model", "remaining")),
        (
            _TOOLS_THREAD,
            size(
                "model",
                6241.47,
                models.flux_bytes("nf4", with_guidance=False),
                "FLUX.1-schnell in NF4, from its shapes",
            ),
        ),
        (_TOOLS_THREAD, request("model", 9400.91, 6241.47, tools["inference"])),
    ]


def everything_line() -> Seen:
    """Returns the number that old versions printed for "unload everything"."""
    seen = 953674316406250018963456.00
    return Seen("Trying to free", seen, forge.SENTINEL_BYTES / MB, "1e30 bytes", rounding=SEVERAL_NUMBERS)
