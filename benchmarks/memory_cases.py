"""The cases of `memory_matrix.py` and their scores. Pure: no torch, no Forge."""

from dataclasses import asdict, dataclass, replace

FACTORS = ("storage", "cap_gb", "rank", "loras", "size_px", "mode")
GOAL_SHARE = 0.05
GOAL_UNDER_MB = 128.0


@dataclass(frozen=True)
class Case:
    """One load, apply and a few steps."""

    model: str
    storage: str
    cap_gb: float
    """Free VRAM before the case."""
    rank: int = 16
    loras: int = 1
    size_px: int = 1024
    mode: str = "Automatic"
    """A value of the guard's setting."""

    @property
    def name(self):
        stack = f"{self.loras}xr{self.rank}" if self.loras else "no LoRA"
        return f"{self.model} {self.storage} {self.cap_gb:g}GB {stack} {self.size_px} {self.mode}"

    @property
    def built_as(self):
        return self.model, self.storage


def around(base, **levels):
    """Returns `base` and its variants with one factor changed at a time."""
    return [base, *(replace(base, **{factor: level}) for factor, found in levels.items() for level in found)]


FLUX = Case("Flux", "fp8", 12)
FLUX_BF16 = Case("Flux", "bf16", 24)
SDXL = Case("SDXL", "fp16", 6)
SD1 = Case("SD 1.x", "fp16", 4, size_px=512)

CASES = list(
    dict.fromkeys(
        [
            *around(
                FLUX,
                cap_gb=(24, 16, 8),
                rank=(64, 128),
                loras=(0, 3, 6),
                size_px=(512, 768, 1536),
                mode=("fp16 LoRA", "Merge"),
            ),
            *around(replace(FLUX, storage="nf4"), cap_gb=(8, 6)),
            *around(replace(FLUX, storage="Q4_K"), cap_gb=(8,)),
            *around(SDXL, cap_gb=(12, 4), loras=(0, 3), size_px=(768, 1536), mode=("Merge",)),
            *around(SD1, size_px=(1024,), cap_gb=(2,)),
            *around(replace(FLUX, storage="Q8_0"), cap_gb=(16,)),
            *around(FLUX_BF16, cap_gb=(12, 16, 8), mode=("fp16 LoRA", "Merge")),
        ]
    )
)
"""Ordered: cases with the same model are adjacent, and the most expensive ones come last."""

SMALL_CASES = [
    Case("Flux", "fp8", 2, size_px=64),
    Case("Flux", "bf16", 2, loras=3, size_px=64, mode="Merge"),
    Case("Flux", "nf4", 2, size_px=64),
    Case("Flux", "Q4_K", 2, loras=0, size_px=64),
    Case("SD 1.x", "fp16", 1, size_px=64),
]


def key_of(row):
    """Identifies a row: a case that ran at another commit is a different one."""
    return row["case"], row.get("commit", "unknown")


def still_to_do(cases, rows, commit):
    """Returns the cases without a row of this commit, in order. A case that failed is run again."""
    done = {key_of(row) for row in rows if "error" not in row}
    return [case for case in cases if (case.name, commit) not in done]


def fits_in(seconds_left, is_built, case_seconds, build_seconds):
    """True if there is time for another case. Expects the longest time seen so far; before the first one,
    HABITUAL_SECONDS.
    """
    expected = max(case_seconds, default=HABITUAL_SECONDS["case"])
    if not is_built:
        expected += max(build_seconds, default=HABITUAL_SECONDS["build"])
    return seconds_left >= expected


HABITUAL_SECONDS = {"case": 25.0, "build": 30.0}
"""Durations of a full case and of building its model on another machine."""


def score(predicted_mb, measured_mb):
    """Compares a prediction with a measurement.

    `over_mb` is predicted minus measured. `ok`: within GOAL_SHARE of the measurement, and at most GOAL_UNDER_MB below
    it; None without a measurement.
    """
    if not measured_mb:
        return {"over_mb": None, "share": None, "ok": None}
    over = predicted_mb - measured_mb
    share = over / measured_mb
    return {
        "over_mb": round(over, 1),
        "share": round(share, 4),
        "ok": abs(share) <= GOAL_SHARE and over >= -GOAL_UNDER_MB,
    }


def idle_mb(cap_mb, peak_mb, swapped_mb):
    """Returns the VRAM that stayed free at the peak although weights were swapped, at most the swapped weights."""
    return round(max(0.0, min(swapped_mb, cap_mb - peak_mb)), 1)


def scored(predicted, measured):
    """Returns the scores of a row.

    `promised` and `plan` compare the guard's placement and `lora-guard plan` with the peak of the allocated memory.
    `room_mb` is the room kept free for a step minus what torch took from the card beside the weights. It is negative if
    a step took more, and None if the load itself took more than the steps. `idle_mb`: see there.
    """
    peak = measured["allocated_mb"]
    known = bool(peak)
    beside = measured["reserved_mb"] - measured["weights_mb"]
    is_the_steps = known and measured["reserved_mb"] > measured["load_reserved_mb"]
    return {
        "promised": score(predicted["promised_mb"], peak),
        "plan": score(predicted["plan_mb"], peak),
        "weights": score(predicted["weights_mb"], measured["weights_mb"]),
        "room_mb": round(predicted["kept_free_mb"] - beside, 1) if is_the_steps else None,
        "idle_mb": idle_mb(measured["free_before_mb"], measured["reserved_mb"], measured["swapped_mb"])
        if known
        else None,
    }


def as_row(case):
    return {"case": case.name, **asdict(case)}
