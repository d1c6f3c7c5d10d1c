"""The conclusions from what a host printed. Each rule gives the facts of its sentence, or None. Worst first. Pure.

The sentences are `explain.NAME` and `explain.NAME_do` of the catalogue. Sources of the reasons: Forge dfdcbab6
(`backend/patcher/lora.py`, `backend/memory_management.py`) and Forge Neo 2.26, as docs/memory.md and docs/neo.md have them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any

from ..files import shown
from ..messages import Message
from .host_lines import Seen

Facts = Mapping[str, Any]

_MB_OF = {"KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0}
SENTINEL_MB = 1e18
"""Old versions of Forge ask for 1e30 bytes where they mean everything."""
UNUSED_SHARE_MB = 1024
"""Memory that torch holds without using it, from which it matters."""
LONG_SECONDS = 20.0
"""Patching or moving that takes longer than this is what a user complains of."""
SLOW_STEP_SECONDS, SLOWER_TIMES = 5.0, 3.0
STUCK_STEP_SECONDS = 30.0
"""A step that takes longer than this is no first step that warms up."""
OFTEN = 3
"""Loads of one model from which they count as repeated."""
_NAMES_SHOWN = 3
_LOW_BITS = ("nf4", "fp4", "float8_e4m3fn", "float8_e5m2", "gguf")
_K_TYPES = re.compile(r"'((?:Q\d_K|I?Q\d\w*|TQ\d\w*))'")
_BAKED = ("Q4_0", "Q5_0", "Q8_0")
"""GGUF types that Forge can merge into."""


@dataclass(frozen=True)
class Rule:
    """One conclusion.

    Attributes:
        name: The key of its sentences.
        facts: Returns the facts of the sentence; None where the log does not show it.
        is_harmless: The line alarms and means nothing.
    """

    name: str
    facts: Callable[[Seen], Facts | None]
    is_harmless: bool = False


def _ram_death(seen: Seen) -> Facts | None:
    killed = seen.has("killed") and any(map(seen.has, (*_WORK, "loaded")))
    if not killed and not (seen.has("ended") and _is_cut_off(seen)):
        return None
    return None if any(map(seen.has, _OTHER_ENDS)) else {"ram": _ram(seen)}


def _cut_off(seen: Seen) -> Facts | None:
    if seen.has("ended") or seen.has("killed") or any(map(seen.has, _OTHER_ENDS)) or not _is_cut_off(seen):
        return None
    return {"ram": _ram(seen)}


_WORK = ("placed", "placed_old", "patching", "loads_old", "loads_neo", "loading", "unloading")
_WORK_DONE = (
    "moved",
    "loaded_now",
    "cleaned",
    "patched",
    "model_loaded",
    "step",
    "step_fast",
    "stopped",
    "traceback",
    "merge_retry",
    "crashed",
)
_OTHER_ENDS = ("cuda_oom", "cuda_oom_bare", "async_oom", "driver_oom", "page_file", "ram_oom", "memory_error")


def _is_cut_off(seen: Seen) -> bool:
    """Returns True if the log ends while a model is loaded, moved or patched: no later line shows that it went on."""
    merges = {facts["at"] for facts in seen.all("patching")}
    done = [facts["at"] for name in _WORK_DONE for facts in seen.all(name) if facts["at"] not in merges]
    # The VAE comes last, and Neo says nothing of a move that is quick.
    work = [facts for name in _WORK for facts in seen.all(name)]
    begun = [facts["at"] for facts in work if not re.search("Autoencoder|VAE", facts.get("model", ""))]
    return max(map(int, begun), default=0) > max(map(int, done), default=0)


def _ram(seen: Seen) -> Message:
    machine = seen.all("machine")
    if not machine:
        return Message("explain.ram_unknown")
    return Message("explain.ram_known", {"gb": float(machine[0]["ram"]) / 1024})


def _crashed(seen: Seen) -> Facts | None:
    found = seen.texts("crashed", "what")
    return {"what": shown(found[0].strip())} if found else None


def _page_file(seen: Seen) -> Facts | None:
    return {} if seen.has("page_file") else None


def _ram_oom(seen: Seen) -> Facts | None:
    sizes = seen.numbers("ram_oom", "bytes")
    return {"mb": max(sizes) / 2**20} if sizes else None


def _memory_error(seen: Seen) -> Facts | None:
    return {} if seen.has("memory_error") and not seen.has("ram_oom") else None


def _driver_oom(seen: Seen) -> Facts | None:
    if not seen.has("driver_oom"):
        return None
    shared = any(facts.get("where") == "Shared" for facts in seen.all("swapped")) or any(
        facts.get("pinned") == "True" for facts in seen.all("settings")
    )
    return {} if shared else None


def _merge_oom(seen: Seen) -> Facts | None:
    failed = [facts for facts in seen.all("merge_error") if _is_oom(facts["why"])]
    wanted = [mb for facts in failed if (mb := _wanted_mb(facts["why"])) is not None]
    if not failed and not seen.has("merge_retry"):
        return None
    if not failed and seen.has("merge_error"):
        return None  # another error: Forge calls any of them out of memory
    # Without a line of the layer that failed there was one at least.
    return {"layers": max(1, len(failed)), "size": _asked(wanted)}


def _merge_failed(seen: Seen) -> Facts | None:
    failed = [facts for facts in seen.all("merge_error") if not _is_oom(facts["why"])]
    if not failed:
        return None
    why = shown(failed[0]["why"].strip(), 160) or "?"
    return {"layers": len(failed), "key": shown(failed[0]["key"], 80), "why": why}


def _fragments(seen: Seen) -> Facts | None:
    unused = [
        float(facts["unused"]) * _MB_OF[facts["unused_unit"]]
        for facts in seen.all("cuda_rest")
        if facts["unused_unit"] in _MB_OF
    ]
    return {"gb": max(unused) / 1024} if unused and max(unused) >= UNUSED_SHARE_MB else None


def _oom(seen: Seen) -> Facts | None:
    in_merges = {facts["at"] for facts in seen.all("merge_error")}
    wanted = [
        float(facts["wanted"]) * _MB_OF[facts["unit"]] for facts in seen.all("cuda_oom") if facts["at"] not in in_merges
    ]
    others = [facts for facts in seen.all("async_oom") if facts["at"] not in in_merges]
    others += seen.all("cuda_oom_bare")
    if seen.has("driver_oom") and _driver_oom(seen) is None:
        others += seen.all("driver_oom")
    if not wanted and not others:
        return None
    return {"size": _asked(wanted)}


def _sysmem(seen: Seen) -> Facts | None:
    free = seen.numbers("low_vram", "free")
    return {"mb": min(free), "count": len(free)} if free else None


def _slow_steps(seen: Seen) -> Facts | None:
    steps = _steps(seen)
    finals = [float(facts["seconds"]) for facts in steps if facts["percent"] == "100"]
    # A step below a second is written the other way round.
    fast = [1 / rate for rate in seen.numbers("step_fast", "rate") if rate > 0]
    readings = finals if finals else [float(facts["seconds"]) for facts in steps]
    if not readings:
        return None
    least, most = min([*readings, *(fast if not finals else [])]), max(readings)
    slow = [seconds for seconds in readings if seconds >= max(SLOW_STEP_SECONDS, SLOWER_TIMES * least)]
    # Without the end of a bar one reading may be the first step, which is always slow.
    if len(slow) < (1 if finals else OFTEN):
        return None
    return {"least": least, "most": most}


def _stuck_step(seen: Seen) -> Facts | None:
    steps = _steps(seen)
    if not steps or _slow_steps(seen) or float(steps[-1]["seconds"]) < STUCK_STEP_SECONDS:
        return None
    return {"seconds": float(steps[-1]["seconds"])}


def _steps(seen: Seen) -> Sequence[Mapping[str, str]]:
    """Returns the progress of sampling; the bar of a merge is another."""
    merges = {facts["at"] for facts in seen.all("patching")}
    return [facts for facts in seen.all("step") if facts["at"] not in merges]


def _patch_slow(seen: Seen) -> Facts | None:
    seconds = seen.numbers("patched", "seconds")
    merges = [facts for facts in seen.all("loaded") if facts["online"] != "True"]
    if merges or seen.has("patching"):
        seconds += [found for found in seen.numbers("moved", "seconds") if found >= LONG_SECONDS]
    if not seconds or max(seconds) < LONG_SECONDS:
        return None
    return {"seconds": max(seconds), "count": sum(found >= LONG_SECONDS for found in seconds)}


def _moving_slow(seen: Seen) -> Facts | None:
    seconds = seen.numbers("moved", "seconds")
    if _patch_slow(seen) or not seconds or max(seconds) < LONG_SECONDS:
        return None
    return {"seconds": max(seconds)}


def _reloads(seen: Seen) -> Facts | None:
    loads = [facts for facts in seen.all("placed") if _is_image_model(facts["model"]) and float(facts["before"]) == 0]
    loads += [
        facts for name in ("loads_old", "loads_neo") for facts in seen.all(name) if _is_image_model(facts["model"])
    ]
    if len(loads) < OFTEN:
        return None
    return {"count": len(loads), "seconds": sum(seen.numbers("moved", "seconds"))}


def _swap(seen: Seen) -> Facts | None:
    swapped = seen.numbers("swapped", "swapped")
    return {"mb": max(swapped)} if swapped and max(swapped) > 0 else None


def _bad_setting(seen: Seen) -> Facts | None:
    total = _vram_mb(seen)
    for inference in reversed(seen.numbers("settings", "inference")):
        if inference < 0 or (total and inference > total):
            card = Message("explain.of_card", {"mb": total}) if total else Message("explain.of_unknown_card")
            return {"mb": inference, "card": card}
    return None


def _all_weights(seen: Seen) -> Facts | None:
    return {} if seen.has("all_weights") else None


def _other_model(seen: Seen) -> Facts | None:
    return _files(seen.texts("other_model", "file"))


def _mismatched(seen: Seen) -> Facts | None:
    rows = seen.all("mismatched")
    if not rows:
        return None
    return {"files": _file(rows[-1]["file"]), "keys": rows[-1]["keys"], "of": rows[-1]["of"]}


def _unmatched(seen: Seen) -> Facts | None:
    rows = seen.all("unmatched")
    if not rows:
        return None
    counts = [int(float(row["keys"])) if row.get("keys") else row["list"].count("'") // 2 for row in rows]
    return {"keys": max(max(counts), 1), **(_files([row["file"] for row in rows]) or {})}


def _not_loaded(seen: Seen) -> Facts | None:
    rows = seen.all("not_loaded")
    return {"count": len(rows), "key": shown(rows[0]["key"], 80)} if rows else None


def _shape(seen: Seen) -> Facts | None:
    rows = seen.all("shape")
    return {"count": len(rows), "key": shown(rows[0]["key"], 80)} if rows else None


def _odd_patch(seen: Seen) -> Facts | None:
    rows = seen.all("odd_patch")
    return {"count": len(rows), "kind": shown(rows[0]["kind"], 80)} if rows else None


def _low_bit(seen: Seen) -> Facts | None:
    return {"types": _gguf_types(seen) or "4-bit"} if seen.has("low_bit") else None


def _missing(seen: Seen) -> Facts | None:
    names = seen.texts("missing", "name")
    return {"names": _listed(names)} if names else None


def _stage_failed(seen: Seen) -> Facts | None:
    return {} if seen.has("stage_failed") and not seen.has("missing") else None


def _damaged(seen: Seen) -> Facts | None:
    return {} if seen.has("damaged") else None


def _rounded(seen: Seen) -> Facts | None:
    found = {}
    for facts in seen.all("loaded"):
        storage = _storage_at(seen, int(facts["at"]))
        if facts["part"] == "UNet" and facts["online"] == "False" and storage in _LOW_BITS:
            found[_file(facts["file"])] = storage
    if not found:
        return None
    storage = next(iter(found.values()))
    return {"files": _listed(list(found)), "storage": _gguf_types(seen) if storage == "gguf" else storage}


def _wish_ignored(seen: Seen) -> Facts | None:
    wishes = seen.all("online_wish")
    if not wishes or wishes[-1]["online"] != "True":
        return None
    for facts in seen.all("loaded"):
        storage = _storage_at(seen, int(facts["at"]))
        if facts["online"] == "False" and storage and storage not in _LOW_BITS:
            return {"storage": storage}
    return None


def _sentinel(seen: Seen) -> Facts | None:
    asked = [facts["wanted"] for facts in seen.all("unloads") if facts["wanted"] != "all memory"]
    absurd = [text for text in asked if float(text) >= SENTINEL_MB]
    return {"mb": absurd[0]} if absurd else None


def _evict_all(seen: Seen) -> Facts | None:
    total = _vram_mb(seen)
    asked = [float(facts["wanted"]) for facts in seen.all("unloads") if facts["wanted"] != "all memory"]
    beyond = [mb for mb in asked if total and total < mb < SENTINEL_MB]
    return {"mb": max(beyond), "vram_mb": total} if beyond else None


def _count_of(name: str) -> Callable[[Seen], Facts | None]:
    return lambda seen: {"count": len(seen.all(name))} if seen.has(name) else None


def _removed_flag(seen: Seen) -> Facts | None:
    flags = seen.texts("removed_flag", "flag")
    return {"flags": _listed(flags)} if flags else None


def _leak(seen: Seen) -> Facts | None:
    models = seen.texts("leak", "model")
    return {"models": _listed(models)} if models else None


RULES: Sequence[Rule] = (
    Rule("ram_death", _ram_death),
    Rule("cut_off", _cut_off),
    Rule("page_file", _page_file),
    Rule("ram_oom", _ram_oom),
    Rule("memory_error", _memory_error),
    Rule("crashed", _crashed),
    Rule("driver_oom", _driver_oom),
    Rule("merge_oom", _merge_oom),
    Rule("merge_failed", _merge_failed),
    Rule("oom", _oom),
    Rule("fragments", _fragments),
    Rule("sysmem", _sysmem),
    Rule("slow_steps", _slow_steps),
    Rule("stuck_step", _stuck_step),
    Rule("patch_slow", _patch_slow),
    Rule("moving_slow", _moving_slow),
    Rule("stage_failed", _stage_failed),
    Rule("missing", _missing),
    Rule("damaged", _damaged),
    Rule("other_model", _other_model),
    Rule("mismatched", _mismatched),
    Rule("unmatched", _unmatched),
    Rule("not_loaded", _not_loaded),
    Rule("shape", _shape),
    Rule("odd_patch", _odd_patch),
    Rule("low_bit", _low_bit),
    Rule("rounded", _rounded),
    Rule("wish_ignored", _wish_ignored),
    Rule("bad_setting", _bad_setting),
    Rule("all_weights", _all_weights),
    Rule("swap", _swap),
    Rule("reloads", _reloads),
    Rule("leak", _leak),
    Rule("nan", _count_of("nan")),
    Rule("vae_tiled", _count_of("vae_tiled")),
    Rule("attention_sliced", _count_of("attention_sliced")),
    Rule("removed_flag", _removed_flag),
    Rule("sentinel", _sentinel, is_harmless=True),
    Rule("evict_all", _evict_all, is_harmless=True),
    Rule("no_expandable", _count_of("no_expandable"), is_harmless=True),
)


def _asked(wanted_mb: Sequence[float]) -> Message:
    return Message("explain.asked", {"mb": max(wanted_mb)}) if wanted_mb else Message("explain.asked_unknown")


def _is_oom(why: str) -> bool:
    return "out of memory" in why or "Allocation on device" in why


def _wanted_mb(why: str) -> float | None:
    found = re.search(r"Tried to allocate (\d+(?:\.\d+)?) ([KMG]iB)", why)
    return float(found[1]) * _MB_OF[found[2]] if found else None


def _is_image_model(name: str) -> bool:
    return not any(word in name for word in ("TextEncoder", "Autoencoder", "VAE", "CLIP", "T5", "ControlNet", "Text"))


def _vram_mb(seen: Seen) -> float:
    machine = seen.all("machine")
    return float(machine[-1]["vram"]) if machine else 0.0


def _storage_at(seen: Seen, line: int) -> str:
    """Returns how the model is stored that was loaded last before a line; "" if the log does not say."""
    before = [facts["storage"] for facts in seen.all("stored") if int(facts["at"]) < line]
    return before[-1] if before else ""


def _gguf_types(seen: Seen) -> str:
    types = [name for facts in seen.all("gguf") for name in _K_TYPES.findall(facts["types"])]
    odd = [name for name in dict.fromkeys(types) if name not in _BAKED]
    return ", ".join(odd or dict.fromkeys(types)) or "GGUF"


def _file(path: str) -> str:
    """Returns the name without its folders, which say who the user is."""
    return shown(PureWindowsPath(path.strip()).name)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(shown(name) for name in names[:_NAMES_SHOWN]) + (f" (+{more})" if more > 0 else "")


def _files(paths: Sequence[str]) -> Facts | None:
    names = list(dict.fromkeys(_file(path) for path in paths))
    return {"files": _listed(names)} if names else None
