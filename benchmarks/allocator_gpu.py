"""The allocator options on a GPU: switched at run time, read back, proven, and their effect.

    LORA_GUARD_COMMIT=... python benchmarks/allocator_gpu.py --out allocator.jsonl [--case NAME ...]

Needs no Forge, about two minutes and 20 GB of VRAM. Every case runs in its own process, because a process keeps traces
of its settings. The first line has hardware and versions, each other line a case with its checks. The case `strings`
needs a CUDA build of torch but no GPU; all others need one.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib_lora_guard.memory.allocator import apply
from lib_lora_guard.memory.allocator_machine import Machine
from lib_lora_guard.memory.allocator_text import COLLECT, CUDA_VARIABLE, EXPANDABLE, OPTIONS, AllocatorWish
from lib_lora_guard.memory.allocator_torch import TorchAllocator

MB, GB = 1 << 20, 1 << 30
DEVICE = torch.device("cuda", 0)
NOTHING = AllocatorWish()
ON = AllocatorWish(expandable_segments=True)
NUMBERS = AllocatorWish(max_split_size_mb=64, garbage_collection_threshold=0.8)


def take(mb):
    return torch.empty(int(mb) * MB, dtype=torch.uint8, device=DEVICE)


def expandable(tensor):
    """True if the memory of `tensor` lies in an expandable segment."""
    address = tensor.data_ptr()
    segments = torch.cuda.memory._snapshot()["segments"]
    return next(s["is_expandable"] for s in segments if s["address"] <= address < s["address"] + s["total_size"])


def settings():
    return TorchAllocator().read()


def said(state):
    return {name: f"{option.standing.value}: {option.reason}" for name, option in state.options().items()}


def standings(state):
    return [state.options()[name].standing.value for name in OPTIONS]


def timed(call):
    start = time.perf_counter()
    result = call()
    return result, (time.perf_counter() - start) * 1000


class Case:
    """The result of a case: `check` records conditions that must hold, `row` the measured values."""

    def __init__(self):
        self.row, self.failed = {}, []

    def check(self, name, true):
        self.row[name] = bool(true)
        if not true:
            self.failed.append(name)


class WithoutGpu(TorchAllocator):
    """torch's real parser, without memory."""

    def takes_expandable(self, device):
        return True

    def cap_near_whole_card(self, device):
        pass


def strings(case):
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])

    def tell(wish, environment, before=None):
        return apply(wish, environment, DEVICE, before, machine=Machine("cuda", version), allocator=WithoutGpu())

    state = tell(ON, {})
    case.check("on", settings()[EXPANDABLE] is True and standings(state)[0] == "active")
    state = tell(NOTHING, {}, state)
    case.check("off again", settings()[EXPANDABLE] is False and standings(state) == ["off"] * 3)
    state = tell(NUMBERS, {}, state)
    case.check("numbers", settings()["max_split_size"] == 64 * MB and settings()[COLLECT] == 0.8)
    case.check("numbers active", standings(state) == ["off", "active", "active"])
    refused = tell(AllocatorWish(max_split_size_mb=128), {CUDA_VARIABLE: "no_such_key:1"}, state)
    case.check("refused is told", standings(refused)[1] == "not available" and "no_such_key" in str(refused.notes[0]))
    case.check("previous holds", settings()["max_split_size"] == 64 * MB and settings()[COLLECT] == 0.8)
    case.row["refused"] = str(refused.notes[0])
    tell(NOTHING, {}, refused)
    case.check("numbers off", settings()["max_split_size"] < 0 and settings()[COLLECT] == 0)
    case.row["least max_split_size_mb that torch takes"] = least_split()


def least_split():
    for mb in range(1, 64):
        try:
            TorchAllocator().write(f"max_split_size_mb:{mb}")
        except (RuntimeError, ValueError):
            continue
        TorchAllocator().write("expandable_segments:False")
        return mb
    return None


def run_time(case):
    kept, cached = take(300), take(300)
    del cached
    reserved = torch.cuda.memory_reserved()
    state, case.row["apply_ms"] = timed(lambda: apply(ON, os.environ, DEVICE))
    case.row |= {"text": state.text, "says": said(state), "notes": [str(note) for note in state.notes]}
    case.row["reserved_mb_before_and_after"] = [reserved / MB, torch.cuda.memory_reserved() / MB]
    case.check("active", standings(state) == ["active", "off", "off"])
    case.check("proven", state.expandable_segments.reason.key == "allocator.proven")
    case.check("the proof keeps no memory", torch.cuda.memory_reserved() <= reserved)
    fresh = take(400)
    case.check("a fresh allocation is expandable", expandable(fresh))
    case.check("memory from before stays where it was", not expandable(kept))
    again, case.row["apply_again_ms"] = timed(lambda: apply(ON, os.environ, DEVICE, state))
    case.check("the same wish again does nothing", again is state)
    off, case.row["apply_off_ms"] = timed(lambda: apply(NOTHING, os.environ, DEVICE, state))
    case.check("off", standings(off) == ["off"] * 3 and settings()[EXPANDABLE] is False)
    case.check("a fresh allocation is ordinary", not expandable(take(500)))
    del fresh, kept
    on, _ = timed(lambda: apply(ON, os.environ, DEVICE, off))
    case.check("on a second time", standings(on)[0] == "active" and expandable(take(600)))


def numbers(case):
    kept = take(100)
    state, case.row["apply_ms"] = timed(lambda: apply(NUMBERS, os.environ, DEVICE))
    case.row |= {"text": state.text, "says": said(state)}
    case.check("active", standings(state) == ["off", "active", "active"])
    case.check("read back", settings()["max_split_size"] == 64 * MB and settings()[COLLECT] == 0.8)
    both = apply(AllocatorWish(True, 64, 0.8), os.environ, DEVICE, state)
    case.row["beside expandable segments"] = said(both)
    case.check("set aside beside expandable", standings(both) == ["active", "not available", "not available"])
    off = apply(NOTHING, os.environ, DEVICE, both)
    case.check("off", standings(off) == ["off"] * 3)
    case.check("reset", settings()["max_split_size"] < 0 and settings()[COLLECT] == 0 and not settings()[EXPANDABLE])
    del kept


def environment(case):
    case.row["environment"] = os.environ[CUDA_VARIABLE]
    kept = take(100)
    state = apply(ON, os.environ, DEVICE)
    case.row |= {"text": state.text, "says": said(state)}
    case.check("the list is kept", settings()["roundup_power2_divisions"]["256"] == 1)
    case.check("and its end", settings()["roundup_power2_divisions"]["32768"] == 4)
    case.check("on", standings(state)[0] == "active" and settings()[EXPANDABLE] is True)
    off = apply(NOTHING, os.environ, DEVICE, state)
    case.check("the environment's number is back", settings()["max_split_size"] == 512 * MB)
    case.check("and said to be its own", off.max_split_size_mb.reason.key == "allocator.by_environment")
    del kept


def common_variable(case):
    kept = take(100)
    state = apply(NOTHING, os.environ, DEVICE)
    case.row |= {"says": said(state), "torch has": settings()[CUDA_VARIABLE], EXPANDABLE: settings()[EXPANDABLE]}
    claimed = state.expandable_segments.standing.value == "active"
    case.check("claimed as torch has it", claimed == settings()[EXPANDABLE])
    del kept


def cuda_malloc(case):
    kept = take(100)
    state = apply(AllocatorWish(True, 64, 0.8), os.environ, DEVICE)
    case.row["says"] = said(state)
    case.check("not available", standings(state) == ["not available"] * 3)
    case.check("for this reason", "cudaMallocAsync" in str(state.expandable_segments.reason))
    case.check("memory still works", take(100).numel() == 100 * MB)
    del kept


def cap(gb):
    torch.cuda.set_per_process_memory_fraction(gb * GB / torch.cuda.get_device_properties(DEVICE).total_memory)


def no_room(case):
    cap(2)
    held = []
    for mb in (256, 32, 2):
        try:
            while True:
                held.append(take(mb))
        except torch.cuda.OutOfMemoryError:
            pass
    case.row["allocated_mb"] = torch.cuda.memory_allocated() / MB
    state = apply(ON, os.environ, DEVICE)
    case.row["says"] = said(state)
    case.check("told", state.expandable_segments.reason.key == "allocator.no_room")
    held.clear()
    case.check("and true once there is room", expandable(take(300)))


def collect(case, through_us):
    if through_us:
        state = apply(AllocatorWish(garbage_collection_threshold=0.02), os.environ, DEVICE)
        case.row["says"] = said(state)
    else:
        TorchAllocator().write("garbage_collection_threshold:0.02")
    threshold_mb = 0.02 * torch.cuda.get_device_properties(DEVICE).total_memory / MB
    cached = [take(1000) for _ in range(8)]
    cached.clear()
    before = torch.cuda.memory_reserved() / MB
    larger = take(1500)
    after = torch.cuda.memory_reserved() / MB
    case.row |= {"threshold_mb": threshold_mb, "reserved_mb": [before, after], "reads": settings()[COLLECT]}
    case.check("collected" if through_us else "torch alone collects nothing", (after < before) == through_us)
    del larger


def fragmentation(case, on):
    """Fragments memory, then allocates 2 GB in one piece.

    7 GB in pieces of 1 GB are freed and split into pieces of 300 MB, of which every third stays. Then more than half of
    the allowed memory is free, but not in one piece.
    """
    take(10)
    state = apply(ON if on else NOTHING, os.environ, DEVICE)
    case.row["says"] = said(state)[EXPANDABLE]
    cap(8)
    whole = [take(1024) for _ in range(7)]
    whole.clear()
    pieces = [take(300) for _ in range(21)]
    kept = pieces[::3]
    pieces.clear()
    case.row |= {"cap_mb": 8192, "allocated_mb": torch.cuda.memory_allocated() / MB}
    case.row["reserved_mb"] = torch.cuda.memory_reserved() / MB
    try:
        large = take(2048)
        case.row |= {"2 GB": "had", "reserved_mb_after": torch.cuda.memory_reserved() / MB}
        fits = large.numel() == 2 * GB
    except torch.cuda.OutOfMemoryError as error:
        case.row["2 GB"] = str(error).split("\n")[0]
        fits = False
    case.check("2 GB fit" if on else "2 GB do not fit", fits == on)
    del kept


def reading(case):
    """Measures the read-back with as many blocks as a model has."""
    held = [take(3) for _ in range(2000)]
    case.row["read_ms"] = sorted(timed(settings)[1] for _ in range(5))[2]
    state, case.row["apply_on_ms"] = timed(lambda: apply(ON, os.environ, DEVICE))
    case.row["apply_again_ms"] = timed(lambda: apply(ON, os.environ, DEVICE, state))[1]
    case.check("proven", state.expandable_segments.reason.key == "allocator.proven")
    held.clear()


CASES = {
    "strings": (strings, {}),
    "run time": (run_time, {}),
    "numbers": (numbers, {}),
    "environment": (environment, {CUDA_VARIABLE: "roundup_power2_divisions:[256:1,512:2,>:4],max_split_size_mb:512"}),
    "PYTORCH_ALLOC_CONF": (common_variable, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
    "cudaMallocAsync": (cuda_malloc, {CUDA_VARIABLE: "backend:cudaMallocAsync"}),
    "no room": (no_room, {}),
    "collect, torch alone": (lambda case: collect(case, False), {}),
    "collect": (lambda case: collect(case, True), {}),
    "fragmentation, ordinary": (lambda case: fragmentation(case, False), {}),
    "fragmentation, expandable": (lambda case: fragmentation(case, True), {}),
    "reading": (reading, {}),
}


def run_here(name):
    case = Case()
    CASES[name][0](case)
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in case.row.items()}
    print(json.dumps({"case": name, "passed": not case.failed, "failed": case.failed, **rounded}), flush=True)
    return bool(case.failed)


def run_apart(name):
    """Returns the case's row from a new process, whose only allocator variables are the case's own."""
    clean = {key: value for key, value in os.environ.items() if not key.endswith("ALLOC_CONF")}
    command = [sys.executable, __file__, "--here", name]
    done = subprocess.run(command, env={**clean, **CASES[name][1]}, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"case": name, "passed": False, "failed": ["crashed"], "stderr": done.stderr[-2000:]}
    return {**json.loads(lines[-1]), **({"stderr": done.stderr[-500:]} if done.stderr else {})}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", nargs="*", choices=list(CASES), help="only these")
    parser.add_argument("--here", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return run_here(options.here)
    there = torch.cuda.is_available()
    head = {
        "gpu": torch.cuda.get_device_name() if there else None,
        "vram_gb": round(torch.cuda.get_device_properties(0).total_memory / GB, 1) if there else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": os.environ.get("LORA_GUARD_COMMIT", "unknown"),
    }
    rows = [head]
    print(json.dumps(head), flush=True)
    for name in options.case or (list(CASES) if there else ["strings"]):
        rows.append(run_apart(name))
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    wrong = [row["case"] for row in rows[1:] if not row["passed"]]
    print("all as expected" if not wrong else f"NOT as expected: {', '.join(wrong)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
