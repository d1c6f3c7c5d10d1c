"""User reports about LoRAs and memory: 54 configurations with the numbers of their logs. Pure data: facts and links.

VRAM and RAM are MB of 2^20 as printed in logs; if only "12 GB" is known, 12 * 1024. Empty: unknown. `numbers` are those
of the log or the text, in MB unless the name has another unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

_URLS = {
    "F": "https://github.com/lllyasviel/stable-diffusion-webui-forge/issues/",
    "N": "https://github.com/Haoming02/sd-webui-forge-classic/issues/",
    "NP": "https://github.com/Haoming02/sd-webui-forge-classic/pull/",
    "R": "https://github.com/Panchovix/stable-diffusion-webui-reForge/issues/",
    "C": "https://github.com/Comfy-Org/ComfyUI/issues/",
    "CP": "https://github.com/Comfy-Org/ComfyUI/pull/",
}


class Outcome(str, Enum):
    """How a configuration ended. The value is shown in tables."""

    OK = "ok"
    SLOW = "slow"
    OOM_IN_MERGE = "oom in merge"
    OOM = "oom elsewhere"
    RAM_DEATH = "ram death"
    CRASH = "crash"
    NO_EFFECT = "no effect"
    UNLOAD_CHURN = "unload churn"
    OTHER = "other"
    REFUSED = "refused with a message"
    """Never reported: the guard's own outcome (`guard_case`)."""


@dataclass(frozen=True)
class FieldCase:
    """One configuration."""

    number: int
    gpu: str
    vram_total_mb: float | None
    vram_free_mb: float | None
    """Free VRAM when the host placed the diffusion model."""
    ram_mb: float | None
    system: str
    torch: str
    host: str
    model: str
    loras: str
    outcome: Outcome
    urls: tuple[str, ...]
    numbers: Mapping[str, float] = field(default_factory=dict)


def thread_url(short: str) -> str:
    """Returns the address of a thread ("F1260")."""
    name = short.rstrip("0123456789")
    return _URLS[name] + short.removeprefix(name)


# number | GPU | VRAM | free | RAM | system | torch | host | model | LoRAs | outcome | threads
_TABLE = """
 1 | RTX 3060           | 12287 |          | 32692 | Windows            | 2.4.0+cu124  | Forge   | Flux fp8, then NF4 v2               | 1                       | crash         | F1260
 2 |                    |       |  9846.12 |       | Windows            | 2.3.1+cu121  | Forge   | Flux NF4 v2                         | 1 of 494 keys           | slow          | F1260
 3 |                    | 16384 |  9773.37 |       | Windows            |              | Forge   | Flux NF4 v1                         | 1                       | oom in merge  | F1202
 4 | RTX 3090           | 24576 |          | 65536 |                    |              | Forge   | Flux 8 bit, 512x512                 | 1                       | oom in merge  | F1658
 5 |                    | 24566 |          |       | Windows            |              | Forge   | Flux                                | 1                       | oom in merge  | F1137
 6 | RTX 2060           | 12288 |          |       |                    |              | Forge   | Flux NF4 v2                         | 1                       | oom in merge  | F1256
 7 |                    | 16384 |          | 32768 | Windows 11         |              | Forge   | Flux NF4                            | 1                       | oom in merge  | F1256
 8 | RTX 4070           | 12288 |          | 32768 |                    |              | Forge   | Flux NF4, 896x1152, Never OOM       | 1                       | ok            | F1218
 9 | RTX 3060           | 12288 |          | 16384 | Windows 10         |              | Forge   | Flux NF4                            | 1                       | oom in merge  | F1374
10 | RTX 2060           |  6144 |          |       |                    |              | Forge   | Flux NF4                            | some                    | crash         | F1473
11 |                    | 16384 |          |       | Windows            |              | Forge   | Flux, Automatic (fp16 LoRA)         | 1 of 304 keys           | oom in merge  | F1569
12 | RTX 4060 Ti        | 16379 |          | 65536 | Windows            |              | Forge   | Flux NF4 v2, 1024x768               | 0, 1, 2                 | slow          | F1739
13 |                    | 16384 |          | 65536 |                    |              | Forge   | Flux                                | 2 of 100 MB             | ram death     | F1147
14 |                    | 16384 |          |       | Windows            |              | Forge   | Flux                                | 1, then 2               | ram death     | F2219
15 | RTX 4080           | 16384 |          | 32768 | Windows 10         |              | Forge   | Flux                                | 2 ok, 3 not             | ram death     | F2527
16 | RTX 3060           | 12288 |          | 16384 | Windows            |              | Forge   | SD and SDXL                         | 1                       | ram death     | F2891
17 | RTX 3070 Ti        |  8192 |          | 16384 | Windows 10         |              | Forge   | SDXL, 1024x1024                     | 2                       | slow          | F2735
18 |                    |       |          |       | Linux              |              | Forge   | SDXL (Illustrious) fp16             | 1 of 1298 + 264 keys    | other         | F2735
19 | RTX 3060           |  6144 |          |       | Windows            |              | Forge   | SDXL                                | 2                       | slow          | F782
20 | RTX 4070 Ti        | 12288 |          | 65536 |                    |              | Forge   | SDXL                                | 1                       | slow          | F782
21 |                    |       |          |       |                    | 2.4.0+cu124  | Forge   | Flux                                | 0, 1                    | slow          | F1132
22 |                    | 24575 |          |       | Windows            |              | Forge   | Flux, T5 in fp8                     | 1                       | slow          | F1132
23 | RTX 3080 Ti        | 12288 |          | 32768 | Windows 10         |              | Forge   | Flux Q8_0, T5 Q8_0, 1920x1080       | 1 of 200 MB             | slow          | F1634
24 |                    | 16384 | 15018.08 |       | Windows            |              | Forge   | Flux Q8_0, T5 in fp16               | 1 of 504 keys, fp16     | slow          | F1655
25 |                    | 24575 |  9589.18 |       | Windows            |              | Forge   | Flux bf16, T5 in fp16               |                         | slow          | F1575
26 |                    | 24576 |          | 32768 | Windows 11         |              | Forge   | Flux NF4, Q4, Q6, Q8, fp16          | 0                       | slow          | F1354
27 | RTX 3090           | 24576 |          | 32768 |                    |              | Forge   | Flux dev                            | 0                       | ram death     | F1901
28 | RTX 4070 Super     | 12281 |          |       | Windows            |              | Forge   | Flux NF4 v2                         |                         | oom elsewhere | F2968
29 | RTX 4070 Super     | 12288 |          | 32768 | Windows 11         |              | Forge   | Flux schnell NF4, T5 in fp8         | 0                       | ram death     | F2432
30 | RTX 3050           |  8191 |          | 16335 | Windows            | 2.4.0+cu124  | Forge   | Flux schnell NF4                    | 0 and more              | slow          | F2652 F2772
31 | GTX 1070           |  8192 |          | 65536 |                    |              | Forge   | Flux, many checkpoints              | 0                       | ram death     | F2836
32 | RTX 4060 laptop    |  8192 |          | 32768 | Ubuntu 22.04       |              | Forge   | many checkpoints                    | 0                       | ram death     | F2747
33 | 4 x RTX 4090       | 24564 |          |192512 |                    |              | Forge   | many, over the API                  | many                    | ram death     | F2017
34 | GTX 1650           |  4096 |  3232.70 | 16384 |                    |              | Forge   | Flux fp8                            | 0                       | oom elsewhere | F1926
35 |                    |       |          |       | Linux              |              | Forge   | Flux Q4_K_S, T5 in fp16, API        | 0                       | oom elsewhere | F2858
36 |                    | 48676 |          |       | Windows            |              | Forge   |                                     |                         | other         | F2016
37 |                    | 24207 |          |       | Linux              |              | Forge   | Flux                                |                         | oom elsewhere | F1984
38 |                    |       |  7136.14 |       | Windows            |              | Forge   | SDXL, a huge picture                | 1, 264 CLIP keys @0.5   | slow          | N403
39 | RTX 5060 Ti        | 16384 | 13858.37 |       | Linux              |              | Neo     | Flux SVDQuant fp4                   | changed                 | oom in merge  | N384
40 | RTX 5060 Ti        | 16384 |          |       | Linux              |              | Neo     | Klein 9B bf16, int8, fp8            | changed per picture     | oom in merge  | N676 NP979
41 |                    | 16384 |          | 16384 |                    |              | Neo     | krea2 turbo fp8                     | strength changed        | slow          | N1275
42 |                    |  8192 |          |       |                    |              | Neo     | krea2 fp8_scaled, Q8_0              | 1                       | no effect     | N1288
43 | RTX 3060           | 12288 |          | 65536 |                    |              | Neo     | Flux bf16, T5 in fp16               | many, fp16              | no effect     | N1006
44 |                    | 16376 |          | 98121 | Windows            | 2.10.0+cu130 | Neo     | Flux fp8_scaled                     | some                    | ok            | N1006
45 |                    | 16374 |          |       |                    | 2.7.1+cu128  | Classic | SDXL v-pred                         | 0, 1, 7 of 200 MB       | ok            | N126
46 | RTX 3070           |  8192 |          |       | Windows 11         | 2.7.1+cu128  | Classic | SDXL                                | 2 to 10                 | no effect     | N117
47 |                    | 24576 | 23184.74 |       |                    |              | Neo     | Chroma bf16, T5 in fp16             | 0                       | unload churn  | N164
48 | RTX 4090           | 24564 |          | 64630 | Windows            | 2.11.0+cu130 | Neo     | Anima                               | 1 of 567 keys @0.8      | other         | N1162
49 |                    | 12278 |  3905.60 |       | Windows            |              | reForge | SDXL                                | 1, per step             | oom in merge  | R191
50 |                    |  4096 |          |       |                    |              | reForge | SDXL                                | 10                      | slow          | R94
51 | RTX 2070           |  8192 |          | 32713 | Windows            |              | Forge   | SDXL                                | 1                       | no effect     | F786
52 | RTX 4090           | 24564 |          | 97415 |                    | 2.3.1+cu121  | ComfyUI | Flux fp8, fp16                      | 1 of 40 MB              | other         | C4343
53 | GTX 1070           |  8192 |          | 32768 | Windows 10         |              | ComfyUI | Flux fp8                            | 1, 2                    | other         | C4674 C4681
54 | RTX 5090 as 24 GB  | 24576 |          |       |                    |              | ComfyUI | Flux2 fp8                           | 1                       | slow          | CP11069
"""

_NUMBERS: dict[int, dict[str, float]] = {
    2: {
        "text request": 7819.24, "text free": 9851.10, "text remaining": 8827.10, "inference": 1024.00, "model request": 9411.13,
    },
    3: {
        "model request": 9411.13, "model free": 9773.37, "model": 6246.84, "inference": 1024.00, "remaining": 2502.53,
        "13.img_mod.lin allocation": 216.00, "13.txt_mod.lin allocation": 216.00, "13.txt_attn.qkv allocation": 108.00,
        "13.txt_mlp.0 allocation": 144.00, "merged before 13.img_mod.lin": 130, "merged before 13.txt_mod.lin": 135,
    },
    4: {
        "18.txt_mod.lin allocation": 216.00, "18.txt_mlp.0 allocation": 144.00, "18.txt_mlp.2 allocation": 144.00,
        "0.linear1 allocation": 252.00, "0.linear2 allocation": 180.00,
    },
    5: {"0.linear2 allocation": 180.00, "allocated": 20.53 * 1024, "reserved": 2.40 * 1024},
    6: {"merged": 250},
    8: {"seconds per picture": 38},
    11: {"merged before 32.linear1": 286, "merge seconds": 118.75, "move seconds": 130.87},
    12: {"weights": 12000, "inference": 4379.00, "weights percent": 73.26, "inference percent": 26.74},
    14: {"vram used": 7.4 * 1024},
    17: {"move seconds": 300},
    18: {
        "text request": 3051.58, "text free": 9793.00, "text": 1559.68, "inference": 1024.00, "text remaining": 7209.32,
        "text after a prompt": 1752.98,
    },
    21: {"move seconds": 221.23, "move seconds without": 15.82},
    22: {"text free": 16511.12, "text": 5227.11, "inference": 1024.00, "text remaining": 10260.02},
    23: {"step seconds": 15.35, "step seconds without": 3.75},
    24: {
        "text request": 13464.34, "text free": 15077.00, "text": 9569.49, "inference": 1024.00, "text remaining": 4483.51,
        "model request": 17816.28, "model free": 15018.08, "model": 12119.55, "remaining": 1874.53,
    },
    25: {
        "weights": 20500.00, "inference of 20500": 4075.00, "percent of 20500": 83.42, "text request": 15609.57,
        "text free": 22999.48, "text": 9641.98, "inference": 3075.00, "text remaining": 10282.50, "model request": 32585.18,
        "model free": 9589.18, "model": 22700.13, "remaining": -16185.96, "swapped": 17496.00, "on gpu": 5204.13,
        "vae": 159.87, "vae request": 6668.46, "step seconds": 21.18,
    },
    28: {"inference": 1024.00},
    29: {"text request": 7725.00, "text free": 11041.00},
    34: {"model free": 3232.70, "model": 11350.07, "inference": 189.00, "remaining": -8306.37},
    35: {"allocation": 202.00},
    36: {
        "weights": 40000.00, "inference": 8676.00, "weights percent": 82.18, "inference percent": 17.82,
        "pasted weights": 80204.00, "pasted inference": -31528.00,
    },
    37: {"allocated": 22.60 * 1024, "reserved": 0.53 * 1024, "allocation": 268.00},
    38: {
        "model request": 47653.84, "model free": 7136.14, "model": 4897.05, "inference": 1024.00, "remaining": 1215.09,
        "vae request": 137628.85, "vae free": 7128.26, "vae": 319.11, "vae remaining": 5785.15, "step seconds": 473.56,
    },
    39: {
        "model request": 35524.15, "model free": 13858.37, "model": 11350.12, "inference": 2038.40, "remaining": 469.84,
    },
    45: {"peak without": 7.51 * 1024, "peak with 1": 10.53 * 1024, "peak with 7": 10.54 * 1024},
    47: {
        "text request": 17424.81, "text free": 23023.56, "text": 9334.77, "inference": 5289.60, "text remaining": 8399.18,
        "model request": 33864.46, "model free": 23184.74, "model": 16975.37, "remaining": 919.77,
        "text move seconds": 77.61, "model move seconds": 213.02,
    },
    48: {"idle": 7.8 * 1024, "at 1024x1024": 10.6 * 1024, "upscaling": 21 * 1024},
    49: {
        "text free": 5761.109375, "text": 2144.3535232543945, "inference": 1024.0, "text remaining": 2592.7558517456055,
        "model free": 3905.59521484375, "model": 0.0, "remaining": 2881.59521484375, "ff.net.0.proj allocation": 50.00,
    },
    50: {"first seconds": 176, "later seconds": 76},
    52: {"with one kind": 14.3 * 1024, "with another kind": 12.2 * 1024},
    54: {"reserved": 12636, "reserved after": 4860},
}  # fmt: skip


def _case(line: str) -> FieldCase:
    number, gpu, total, free, ram, system, torch, host, model, loras, outcome, threads = (
        cell.strip() for cell in line.split("|")
    )
    return FieldCase(
        int(number),
        gpu,
        _size(total),
        _size(free),
        _size(ram),
        system,
        torch,
        host,
        model,
        loras,
        Outcome(outcome),
        tuple(thread_url(short) for short in threads.split()),
        _NUMBERS.get(int(number), {}),
    )


def _size(cell: str) -> float | None:
    return float(cell) if cell else None


CASES: tuple[FieldCase, ...] = tuple(_case(line) for line in _TABLE.strip().splitlines())
