"""Describes a crash in words, with advice, and derives the precautions for the next run. Pure."""

from __future__ import annotations

import math
import platform
import time
from enum import Enum

from ..messages import Joined, Message
from ..units import GB
from .crash import Crash
from .flight_recorder import (
    ALIVE,
    RAM_AVAILABLE,
    RAM_NEED,
    RAM_TOTAL,
    RSS,
    SWAP_FREE,
    SWAP_TOTAL,
    VRAM_FREE,
    VRAM_NEED,
    VRAM_TOTAL,
    Phase,
    name_only,
)

LEAST_LEFT_BYTES = GB // 2
"""Systems stop responding, and kill processes, before the last byte is allocated."""

_PAGE_FILE_STEP_GB = 4
_UNKNOWN_NEED_BYTES = 8 * GB
"""Page file to add if the shortage is unknown: about one Flux model in fp8."""

_FOUR_BIT = ("nf4", "fp4", "4bit", "bnb", "q2", "q3", "q4", "iq")
_EIGHT_BIT = ("fp8", "float8", "e4m3", "e5m2", "q5", "q6", "q8", "int8")


class Precaution(str, Enum):
    """A precaution that a run takes after a crash."""

    NO_MERGE = "no_merge"
    PARTIAL_UNLOAD = "partial_unload"
    TILED_VAE = "tiled_vae"
    """For decoding."""
    TILED_ENCODE = "tiled_encode"
    DROP_CACHES = "drop_caches"

    @property
    def message(self) -> Message:
        """The precaution and its reason, for the user."""
        return Message(f"flight.avoid_{self.value}")


_AFTER = {
    Phase.MERGE: Precaution.NO_MERGE,
    Phase.BACKUP: Precaution.NO_MERGE,
    Phase.UNLOAD: Precaution.PARTIAL_UNLOAD,
    Phase.VAE_DECODE: Precaution.TILED_VAE,
    Phase.VAE_ENCODE: Precaution.TILED_ENCODE,
    Phase.LOAD_CHECKPOINT: Precaution.DROP_CACHES,
    Phase.LOAD_TEXT_ENCODER: Precaution.DROP_CACHES,
    Phase.MOVE_TO_GPU: Precaution.DROP_CACHES,
    Phase.APPLY_LORA: Precaution.DROP_CACHES,
}


def avoid(crash: Crash | None, model: str, storage: str) -> frozenset[Precaution]:
    """Returns the precautions for a model after `crash`.

    Precautions that concern the model's own weights apply only to the model that crashed, or to every model if the
    crash names none.

    Args:
        crash: The last crash, if any.
        model: The model's name or path.
        storage: Its storage format.
    """
    if crash is None:
        return frozenset()
    after = {_AFTER[phase] for phase in crash.phases if phase in _AFTER}
    same = crash.model in ("", name_only(model)) and crash.storage in ("", name_only(storage))
    return frozenset(after if same else after - {Precaution.NO_MERGE})


def ran_out_of_ram(crash: Crash) -> bool | None:
    """True if the last numbers explain the crash by a lack of RAM; None without numbers."""
    alive = _alive_bytes(crash)
    return None if alive is None else alive < crash.plan.get(RAM_NEED, 0) + LEAST_LEFT_BYTES


def crash_report(crash: Crash, system: str | None = None) -> list[Message]:
    """Describes the crash: time, operation, likely reason, and advice.

    `system`: as `platform.system()`; None asks the platform.
    """
    return [*_facts(crash), _reason(crash), *_advice(crash, platform.system() if system is None else system)]


def _facts(crash: Crash) -> list[Message]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(crash.time))
    messages = [Message("flight.died", {"phase": Message(f"flight.phase_{crash.phase.value}"), "when": when})]
    if crash.model:
        kind = " ".join(part for part in (crash.architecture, crash.storage) if part)
        messages.append(Message("flight.model", {"model": f"{crash.model} ({kind})" if kind else crash.model}))
    if crash.loras:
        names = Joined([*crash.loras, *(["..."] if crash.lora_count > len(crash.loras) else [])], "list.names")
        messages.append(Message("flight.loras", {"count": crash.lora_count, "names": names}))
    if numbers := _memory(crash):
        messages.append(Message("flight.memory", {"numbers": Joined(numbers)}))
    needs = {"flight.ram": RAM_NEED, "flight.vram": VRAM_NEED}
    planned = [Message(key, {"gb": crash.plan[name] / GB}) for key, name in needs.items() if crash.plan.get(name)]
    if planned:
        messages.append(Message("flight.plan", {"numbers": Joined(planned)}))
    return messages


def _memory(crash: Crash) -> list[Message]:
    known, messages = crash.memory, []
    for key, key_of, free, total in (
        ("flight.ram_free", "flight.ram_free_of", RAM_AVAILABLE, RAM_TOTAL),
        ("flight.swap_free", "flight.swap_free_of", SWAP_FREE, SWAP_TOTAL),
        ("flight.vram_free", "flight.vram_free_of", VRAM_FREE, VRAM_TOTAL),
    ):
        if free in known and total in known:
            messages.append(Message(key_of, {"gb": known[free] / GB, "total_gb": known[total] / GB}))
        elif free in known:
            messages.append(Message(key, {"gb": known[free] / GB}))
    if RSS in known:
        messages.append(Message("flight.rss", {"gb": known[RSS] / GB}))
    return messages


def _reason(crash: Crash) -> Message:
    short = ran_out_of_ram(crash)
    if short is None:
        return Message("flight.reason_unknown")
    if not short:
        return Message("flight.reason_enough")
    alive_gb = (_alive_bytes(crash) or 0) / GB
    if crash.plan.get(RAM_NEED):
        return Message("flight.reason_ram", {"need_gb": crash.plan[RAM_NEED] / GB, "alive_gb": alive_gb})
    return Message("flight.reason_little", {"alive_gb": alive_gb})


def _advice(crash: Crash, system: str) -> list[Message]:
    if not ran_out_of_ram(crash):
        return []
    key = "flight.page_file" if system == "Windows" else "flight.swap_file"
    messages = [Message(key, {"size_gb": page_file_gb(crash)})]
    if crash.lora_count:
        messages.append(Message("flight.fewer_loras", {"count": crash.lora_count}))
    storage = crash.storage.lower()
    if not any(name in storage for name in _FOUR_BIT):
        smaller = "NF4, GGUF Q4" if any(name in storage for name in _EIGHT_BIT) else "fp8, NF4, GGUF Q8, GGUF Q4"
        messages.append(Message("flight.smaller_format", {"formats": smaller}))
    return messages


def page_file_gb(crash: Crash) -> int:
    """Returns the size of a page file (swap) that would have been enough, in steps of _PAGE_FILE_STEP_GB.

    The sum of the present swap, the shortage and twice LEAST_LEFT_BYTES.
    """
    need, alive = crash.plan.get(RAM_NEED, 0), _alive_bytes(crash) or 0
    missing = need - alive + 2 * LEAST_LEFT_BYTES if need else _UNKNOWN_NEED_BYTES
    size_gb = (crash.memory.get(SWAP_TOTAL, 0) + max(0, missing)) / GB
    return max(1, math.ceil(size_gb / _PAGE_FILE_STEP_GB)) * _PAGE_FILE_STEP_GB


def _alive_bytes(crash: Crash) -> int | None:
    known = crash.memory
    if ALIVE in known or RAM_AVAILABLE not in known:
        return known.get(ALIVE)
    return known[RAM_AVAILABLE] + known.get(SWAP_FREE, 0)
