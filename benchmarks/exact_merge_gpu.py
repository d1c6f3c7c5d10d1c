"""An exact merge on a card whose backup is the checkpoint file: seconds to apply, change and remove, RAM, and steps.

    python benchmarks/exact_merge_gpu.py --model flux --free-gb 28 --out results.jsonl
    python benchmarks/exact_merge_gpu.py --model sdxl --out results.jsonl
    python benchmarks/exact_merge_gpu.py --small          # on any machine, to try the script itself

The models have the real shapes and random weights: Flux-dev's transformer in bf16 (`lib_lora_guard.demo.model`), and the layers
of SDXL's U-Net in fp16, called one after the other with the tokens that they see at 1024 x 1024. They are written to a
safetensors file in `--folder`, and loaded from it. A second process holds all VRAM except `--free-gb`. The engine is the
guard's own, without a host: a host adds its own moves to either side. A LoRA of `--rank` is on every layer of the blocks.

The ways are "file" (the checkpoint is the backup), "ram" (a copy in RAM) and "bypass". For each way, `--repeats` times:

- first apply: the originals are proven and merged; changes of strength; removal. Only the first proof of the process reads the
  file, so each repeat of "file" has an engine of its own;
- anonymous and shared RAM of the process at each point, above the model alone, and the peak of the anonymous RAM;
- how often torch had to ask the driver for memory in the first of each change, and found none;
- where the first of each change waits ("waits"): for the threads that read the file, for the card to free a part of the ring, for
  the answers of the card (checksums, finite values), and how many weights were read alone; the rest is this thread's own work, most
  of it starting kernels. With `--profile` also how often torch itself waited for the card ("synchronised"), and where Python's
  time goes. Both cost time: such a run is no measurement;
- which mappings of the process have grown by anonymous RAM in the first apply ("grown_mb"), and of the C library's heap how much is in
  use and how much is freed and kept ("heap_mb"). Before that some products are made, as merges make them: what cuBLAS takes for its
  first ones is no merge's ("product_mb"); and each other operation of merges once, with some numbers: the driver loads a kernel's code into RAM
  when it is first used, and keeps it ("kernels_mb");
- one step of the model with the LoRA, and without (before and after).

"rings" is "file" with other numbers of threads and sizes in turn: medians of a first apply, a change of strength and a removal with each.

Also: the link to the card out of pinned RAM, the file through the ring of `patching/file_reader.py`, the same with other numbers of
threads and sizes ("rings"), and the same file by one thread. `--threads`, `--ring-mb` and `--piece-mb` change the ring for all
else. "patched bytes / link" is the floor of a change. At the end every weight is compared with the file.
"""

import argparse
import contextlib
import cProfile
import gc
import json
import os
import pstats
import statistics
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

from lib_lora_guard.adapters import LoraAdapter, Term, parse_term  # noqa: E402
from lib_lora_guard.demo import model as flux  # noqa: E402
from lib_lora_guard.files import open_header, read_tensors  # noqa: E402
from lib_lora_guard.files.safetensors_file import read_header  # noqa: E402
from lib_lora_guard.hosts.plain.access import PlainAccess  # noqa: E402
from lib_lora_guard.memory.probe import BackupBudget  # noqa: E402
from lib_lora_guard.patching import backup, file_backup, file_reader, file_sums, merge_attachment, merging  # noqa: E402
from lib_lora_guard.patching.engine import Engine  # noqa: E402
from lib_lora_guard.patching.file_backup import WeightFile  # noqa: E402
from lib_lora_guard.patching.file_reader import FileReader, Piece  # noqa: E402
from lib_lora_guard.patching.lora_request import LoraRequest  # noqa: E402
from lib_lora_guard.patching.merging_together import MergingTogether  # noqa: E402
from lib_lora_guard.patching.reading_threads import Task  # noqa: E402
from lib_lora_guard.patching.spool import memory_of  # noqa: E402
from lib_lora_guard.planning.mode import Wish  # noqa: E402

MB, GB = 1 << 20, 1 << 30
BALLAST = """
import sys, time, torch
leave = float(sys.argv[1])
free = torch.cuda.mem_get_info()[0]
held = torch.empty(int(free - (leave + 0.5) * 1024**3), dtype=torch.uint8, device="cuda")  # 0.5: the tester's own context
print("ready", flush=True)
time.sleep(3600)
"""
WAYS = ("file", "ram", "bypass", "rings")
RINGS = ((8, 64, 4), (8, 64, 8), (8, 128, 8), (8, 256, 16), (8, 32, 4), (12, 64, 4))
"""Threads, MB of the ring, of a piece."""
RING_NAMES = ("THREADS", "RING_BYTES", "PIECE_BYTES")
LEAST_SECONDS, COMPARED_SECONDS = 5, 40
"""Of the time limit: for the end, and for the comparison of 24 GB with their file before it."""
HAS_CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if HAS_CARD else "cpu")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["flux", "sdxl"], default="flux")
    parser.add_argument("--ways", default="file,ram,bypass", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--free-gb", type=float, help="VRAM that a second process leaves; all of it if left out")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9, help="of apply, change, remove, and of the steps")
    parser.add_argument("--folder", type=Path, default=Path("."), help="for the checkpoint file: on a disk, not in RAM")
    parser.add_argument("--threads", type=int, help="that read the file")
    parser.add_argument("--ring-mb", type=int, help="MB of the ring")
    parser.add_argument("--piece-mb", type=int, help="MB that one thread reads, and the card gets, at once")
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--time-limit", type=float, default=540, help="seconds; what is not reached by then is left out"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--profile", action="store_true", help="print where Python's time goes in the first of each change"
    )
    return parser.parse_args()


# SDXL's U-Net: (channels, transformer blocks, attention layers, tokens at 1024 x 1024) of each level, both ways.
SDXL_LEVELS = ((640, 2, 5, 4096), (1280, 10, 6, 1024))
SDXL_CONVOLUTIONS = ((320, 320, 128, 10), (640, 640, 64, 10), (1280, 1280, 32, 10))


class SdxlLayers(torch.nn.Module):
    """The layers of SDXL's U-Net that LoRAs are on and most of the others, in a row instead of the U."""

    def __init__(self, small):
        super().__init__()
        self.blocks, self.tokens = torch.nn.ModuleList(), []
        scale = 16 if small else 1
        for width, depth, count, tokens in SDXL_LEVELS:
            width, count = width // scale, 1 if small else count
            for _ in range(depth * count):
                self.blocks.append(SdxlBlock(width, 2048 // scale, width // (64 // scale)))
                self.tokens.append((tokens // scale, width))
        self.convolutions, self.sizes = torch.nn.ModuleList(), []
        for inner, outer, size, count in SDXL_CONVOLUTIONS:
            for _ in range(1 if small else count):
                self.convolutions.append(torch.nn.Conv2d(inner // scale, outer // scale, 3, padding=1))
                self.sizes.append((inner // scale, size // scale))

    def forward(self, inputs, context):
        total = None
        for block, size in zip(self.blocks, self.tokens, strict=True):
            inputs[size] = block(inputs[size], context)
        for layer, size in zip(self.convolutions, self.sizes, strict=True):
            inputs[size] = layer(torch.nn.functional.silu(inputs[size]))
        for value in inputs.values():
            total = value.float().mean() if total is None else total + value.float().mean()
        return total


class SdxlBlock(torch.nn.Module):
    def __init__(self, width, context, heads):
        super().__init__()
        self.heads = heads
        for name, inner in (("attn1", width), ("attn2", context)):
            parts = {part: torch.nn.Linear(inner if part in "kv" else width, width, bias=False) for part in "qkv"}
            self.add_module(name, torch.nn.ModuleDict({**parts, "out": torch.nn.Linear(width, width)}))
        self.ff_in, self.ff_out = torch.nn.Linear(width, 8 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x, context):
        for attention, source in ((self.attn1, None), (self.attn2, context)):
            y = torch.nn.functional.layer_norm(x, x.shape[-1:])
            source = y if source is None else source
            q, k, v = (
                attention[part](z).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part, z in (("q", y), ("k", source), ("v", source))
            )
            x = x + attention["out"](flux.attend(q, k, v))
        a, b = self.ff_in(torch.nn.functional.layer_norm(x, x.shape[-1:])).chunk(2, -1)
        return x + self.ff_out(a * torch.nn.functional.gelu(b))


class Bench:
    """One model, its file and the measurements on it."""

    def __init__(self, options):
        self.options, self.started = options, time.perf_counter()
        is_flux = options.model == "flux"
        self.dtype = torch.bfloat16 if is_flux else torch.float16
        self.path = options.folder / f"exact_merge_{options.model}{'_small' if options.small else ''}.safetensors"
        with torch.device("meta"):
            inner = self._flux() if is_flux else SdxlLayers(options.small)
        self._write(inner)
        self.model = torch.nn.Module()
        self.model.diffusion_model = inner.to(self.dtype).requires_grad_(False)
        self._load()
        named = dict(self.model.named_parameters())
        self.keys = [
            name
            for name, parameter in named.items()
            if parameter.dim() > 1 and name.endswith(".weight") and ("blocks" in name)
        ]
        self.patched_bytes = sum(named[key].nbytes for key in self.keys)
        self.model_bytes = sum(parameter.nbytes for parameter in named.values())
        self.access = PlainAccess(self.model)
        # As in Forge: no VRAM is spare.
        self.access.backup_budget = lambda: BackupBudget(0, 1 << 40, 0)
        self.factors = self._factors(named)
        self.inputs = self._inputs()

    def left(self):
        """Returns the seconds that are left."""
        return self.options.time_limit - (time.perf_counter() - self.started)

    def _flux(self):
        shape = flux.FluxShape(128, 2, 1, 2, 64, 64, 16) if self.options.small else flux.FLUX_DEV
        self.shape = shape
        return flux.FluxShaped(shape)

    def _write(self, inner):
        """Writes the file with random weights, one tensor after the other: no second model lies in RAM."""
        import numpy

        if self.path.exists():
            return
        generator = torch.Generator(DEVICE).manual_seed(0)
        sizes = {f"model.diffusion_model.{name}": tuple(p.shape) for name, p in inner.named_parameters()}
        kind = {torch.bfloat16: "BF16", torch.float16: "F16"}[self.dtype]
        table, end = {}, 0
        for name, size in sizes.items():
            count = torch.Size(size).numel() * 2
            table[name] = {"dtype": kind, "shape": list(size), "data_offsets": [end, end + count]}
            end += count
        head = json.dumps(table, separators=(",", ":")).encode()  # as the library writes it
        head += b" " * (-len(head) % 8)
        part = self.path.with_suffix(".part")
        with part.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for size in sizes.values():
                value = torch.randn(size, generator=generator, device=DEVICE).mul_(0.02).to(self.dtype).cpu()
                file.write(memoryview(numpy.asarray(value.view(-1).view(torch.uint8))))
        part.rename(self.path)

    def _load(self):
        """Reads the file into the model on the card, tensor by tensor; no copy stays in RAM."""
        header, waiting, size = read_header(self.path), [], 0
        names = list(dict(self.model.named_parameters()))
        for name in names:
            waiting.append(name)
            size += header.tensors["model." + name].bytes
            if size > GB or name is names[-1]:
                for full, value in read_tensors(header, ["model." + one for one in waiting]).items():
                    layer, _, last = full.removeprefix("model.").rpartition(".")
                    owner = self.model.get_submodule(layer)
                    setattr(owner, last, torch.nn.Parameter(value.to(DEVICE), requires_grad=False))
                waiting, size = [], 0
        gc.collect()

    def _factors(self, named):
        generator, rank = torch.Generator().manual_seed(1), self.options.rank
        found = {}
        for key in self.keys:
            shape = named[key].shape
            size = (0.02 * 0.02 / rank**0.5) ** 0.5
            up = torch.randn(shape[0], rank, generator=generator) * size
            down = torch.randn(rank, shape[1:].numel(), generator=generator) * size
            down = down.reshape(rank, *shape[1:]) if len(shape) > 2 else down
            up = up.reshape(shape[0], rank, *([1] * (len(shape) - 2)))
            found[key] = ("lora", (up.to(self.dtype), down.to(self.dtype), float(rank), None, None))
        return found

    def _inputs(self):
        if self.options.model == "flux":
            sizes = (16, 8) if self.options.small else (4096, 512)
            return flux.random_inputs(self.shape, *sizes, self.dtype, str(DEVICE))
        inner = self.model.diffusion_model
        generator = torch.Generator(DEVICE).manual_seed(2)

        def normal(*size):
            return torch.randn(size, generator=generator, device=DEVICE).to(self.dtype)

        # Prompt and negative prompt.
        inputs = {size: normal(2, *size) for size in inner.tokens}
        inputs |= {(channels, side): normal(2, channels, side, side) for channels, side in inner.sizes}
        return inputs, normal(2, 77, inner.blocks[0].attn2["k"].in_features)

    def requests(self, strength):
        if strength is None:
            return []
        terms = {key: [parse_term([strength, value, 1.0, None, None], {}, 0)] for key, value in self.factors.items()}
        return [LoraRequest("a", strength, terms)]

    def step(self):
        """Returns the seconds of one call of the model."""
        with torch.inference_mode():
            synchronize()
            started = time.perf_counter()
            if self.options.model == "flux":
                self.model.diffusion_model(*self.inputs)
            else:
                self.model.diffusion_model(dict(self.inputs[0]), self.inputs[1])
            synchronize()
            return time.perf_counter() - started

    def steps(self):
        """Returns the times of the steps, after one that does not count."""
        self.step()
        return [self.step() for _ in range(self.options.repeats)]

    def way(self, name, peak, seconds):
        """Measures one way, in `seconds` where more than one repeat fits into them."""
        wish = Wish.NEVER_MERGE if name == "bypass" else Wish.PREFER_MERGE
        result = {
            "way": name,
            "step_before": median(self.steps()),
            "product_mb": product_mb(),
            "kernels_mb": kernels_mb(),
            "heap_mb": [heap()],
        }
        times = {"apply": [], "apply_again": [], "change": [], "remove": []}
        ram, asked, waits, synchronised, grown = {}, {}, {}, {}, None
        # A copy of a large model takes many seconds.
        repeats = min(2, self.options.repeats) if name == "ram" else self.options.repeats
        for _ in turns(seconds, repeats):
            engine = Engine(weight_files=lambda: [self.path] if name == "file" else [])

            def change(kind, strength, engine=engine, wish=wish):
                gc.collect()
                synchronize()
                profile = cProfile.Profile() if self.options.profile and not times[kind] else None
                before = allocations()
                noting = contextlib.nullcontext(None) if kind in waits else Waits()
                counting = contextlib.nullcontext(None) if profile is None else Synchronised()
                started = time.perf_counter()
                with noting as found, counting as count, profile or contextlib.nullcontext():
                    engine.change(self.access, self.requests(strength), wish)
                    engine.bring_factors(self.access)
                    synchronize()
                if found is not None:
                    waits[kind] = found.summary()
                if count is not None:
                    synchronised[kind] = count.count
                times[kind].append(time.perf_counter() - started)
                asked.setdefault(kind, {name: count - before[name] for name, count in allocations().items()})
                if profile is not None:
                    print(f"{name}: {kind}", flush=True)
                    pstats.Stats(profile).sort_stats("tottime").print_stats(14)

            before, mapped = memory(), mappings()
            peak.restart()
            change("apply", 1.0)
            if grown is None:
                grown = grown_since(mapped)
                result["heap_mb"].append(heap())
            ram.setdefault("applied", above(memory(), before))
            ram.setdefault("peak_applying_mb", round((peak.mb() - before["anonymous_mb"]), 1))
            peak.restart()
            change("change", 0.6)
            ram.setdefault("changed", above(memory(), before))
            ram.setdefault("peak_changing_mb", round((peak.mb() - before["anonymous_mb"]), 1))
            if "step" not in result:
                kinds = {
                    getattr(one, "backup", None) and one.backup.place.where.value for one in engine.attached.values()
                }
                result["backups"] = sorted(map(str, kinds))
                result["step"] = median(self.steps())
            change("remove", None)
            change("apply_again", 1.0)
            change("change", 0.3)
            change("remove", None)
            ram.setdefault("removed", above(memory(), before))
            del engine, change
        result["step_after"] = median(self.steps())
        without = (result["step_before"] + result["step_after"]) / 2
        result |= {kind: summary(found) for kind, found in times.items()}
        result |= {
            "waits": waits,
            "synchronised": synchronised,
            "grown_mb": grown,
            "cpu_threads": torch.get_num_threads(),
        }
        return result | {"ram": ram, "asked_of_the_driver": asked, "step_ratio": round(result["step"] / without, 4)}

    def rings(self, seconds):
        """Measures RINGS in turn, as often as there is time for all."""
        found = {}
        for _ in turns(seconds):
            for ring in RINGS:
                with ring_of(ring) as label:
                    times = found.setdefault(label, {"apply": [], "change": [], "remove": []})
                    engine = Engine(weight_files=lambda: [self.path])
                    for kind, strength in (("apply", 1.0), ("change", 0.6), ("remove", None)):
                        gc.collect()
                        synchronize()
                        started = time.perf_counter()
                        engine.change(self.access, self.requests(strength), Wish.PREFER_MERGE)
                        engine.bring_factors(self.access)
                        synchronize()
                        times[kind].append(time.perf_counter() - started)
        medians = {ring: {kind: median(spent) for kind, spent in times.items()} for ring, times in found.items()}
        return {"way": "rings", "count": len(next(iter(found.values()))["apply"]), "rings": medians}

    def changed_weights(self):
        """Returns the parameters that differ from the file, of those that there is time for, and how many these are."""
        header, found, count = open_header(self.path), [], 0
        for name, parameter in self.model.named_parameters():
            if self.left() < LEAST_SECONDS:
                break
            (value,) = read_tensors(header, ["model." + name]).values()
            count += 1
            if not torch.equal(parameter.data, value.to(DEVICE)):
                found.append(name)
        return {"changed_weights": found, "compared_weights": count}

    def rates(self):
        """Returns GB/s: the link out of pinned RAM, the file through the ring, and by one thread into RAM."""
        size = min(8 * GB, self.path.stat().st_size)
        found = {}
        if HAS_CARD:
            there = torch.empty(256 * MB, dtype=torch.uint8, device=DEVICE)
            here = torch.empty(256 * MB, dtype=torch.uint8, pin_memory=True)
            there.copy_(here)
            found["link"] = 256 * MB / best(lambda: there.copy_(here, non_blocking=True)) / GB
            del there, here
        step = 32 * MB
        parts = [Piece(start, min(step, size - start)) for start in range(0, size, step)]
        scratch = torch.empty(step, dtype=torch.uint8, device=DEVICE)

        def through_ring():
            reader = FileReader(self.path, None)
            reader.reserve(DEVICE)

            def read():
                reader.expect([part] for part in parts)
                for part in parts:
                    reader.read([part], scratch[: part.bytes])

            rate = size / best(read, 3) / GB
            reader.close()
            return rate

        found["ring"] = through_ring()
        for ring in RINGS:
            with ring_of(ring) as label:
                found[f"ring {label}"] = through_ring()
        size = min(size, GB)
        here = torch.empty(file_reader.PIECE_BYTES, dtype=torch.uint8)

        def by_one():
            with open(self.path, "rb", buffering=0) as file:
                for start in range(0, size, len(here)):
                    length = min(len(here), size - start)
                    file_reader.read_piece(file, Piece(start, length), memory_of(here[:length]))

        found["one_thread"] = size / best(by_one, 3) / GB
        return {name: round(rate, 2) for name, rate in found.items()}


def turns(seconds, most=1000):
    """Yields as often as there is time for another turn like the longest, and once in any case."""
    began, longest = time.perf_counter(), 0.0
    for number in range(most):
        this = time.perf_counter()
        if number and this - began + longest > seconds:
            return
        yield number
        longest = max(longest, time.perf_counter() - this)


@contextlib.contextmanager
def ring_of(ring):
    """Has the files read with other numbers of threads and sizes, one of RINGS; yields what it is called."""
    usual = {name: getattr(file_reader, name) for name in RING_NAMES}
    threads, *sizes_mb = ring
    for name, value in zip(RING_NAMES, (threads, *(size * MB for size in sizes_mb)), strict=True):
        setattr(file_reader, name, value)
    try:
        yield "{} threads, {} MB, pieces of {}".format(*ring)
    finally:
        for name, value in usual.items():
            setattr(file_reader, name, value)


class Peak(threading.Thread):
    """Samples the anonymous RAM of this process."""

    def __init__(self):
        super().__init__(daemon=True)
        self.lock, self.most = threading.Lock(), 0.0
        self.start()

    def restart(self):
        with self.lock:
            self.most = memory()["anonymous_mb"]

    def mb(self):
        with self.lock:
            return max(self.most, memory()["anonymous_mb"])

    def run(self):
        while True:
            with self.lock:
                self.most = max(self.most, memory()["anonymous_mb"])
            time.sleep(0.05)


class Waits:
    """Notes where the thread that changes the model waits: seconds, and how often."""

    PLACES = (
        (Task, "result", "readers"),
        (torch.cuda.Event, "synchronize", "buffers"),
        (MergingTogether, "settle", "answers"),
        (WeightFile, "read", "alone"),
    )

    def __enter__(self):
        self.found, self.originals, self.thread = {}, [], threading.get_ident()
        for owner, method, name in self.PLACES:
            self.originals.append((owner, method, owner.__dict__.get(method)))
            setattr(owner, method, self._noting(getattr(owner, method), name))
        return self

    def __exit__(self, *_):
        for owner, method, original in self.originals:
            if original is None:
                delattr(owner, method)
            else:
                setattr(owner, method, original)

    def _noting(self, original, name):
        def noting(*args, **more):
            started = time.perf_counter()
            try:
                return original(*args, **more)
            finally:
                if threading.get_ident() == self.thread:
                    seconds, count = self.found.get(name, (0.0, 0))
                    self.found[name] = seconds + time.perf_counter() - started, count + 1

        return noting

    def summary(self):
        return {name: {"seconds": round(seconds, 4), "count": count} for name, (seconds, count) in self.found.items()}


class Synchronised(warnings.catch_warnings):
    """Counts how often an operation of torch waits for the card."""

    def __init__(self):
        super().__init__(record=True)

    def __enter__(self):
        self.warned = super().__enter__()
        warnings.simplefilter("always")
        if HAS_CARD:
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error):
        if HAS_CARD:
            torch.cuda.set_sync_debug_mode("default")
        self.count = sum("synchronizing" in str(one.message) for one in self.warned)
        super().__exit__(*error)


def mappings():
    """Returns the anonymous RAM of each mapping of the process in MB, by its addresses and name."""
    found, name = {}, ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
            head, _, rest = line.partition(" ")
            if not head.endswith(":"):
                # Heaps and stacks grow at one end.
                name = f"{head.split('-')[0]} {' '.join(rest.split()[4:])}".strip()
            elif head == "Anonymous:":
                found[name] = int(rest.split()[0]) / 1024
    return found


def grown_since(before):
    """Returns the mappings with the most new anonymous RAM, in MB."""
    grown = {name: round(size - before.get(name, 0.0), 1) for name, size in mappings().items()}
    return dict(sorted(((name, size) for name, size in grown.items() if size > 0), key=lambda one: -one[1])[:8])


def memory():
    """Returns the process's anonymous and other RAM in MB. Pinned buffers count where the driver shows them."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        import psutil

        return {"anonymous_mb": psutil.Process().memory_info().rss / MB, "other_mb": 0.0}
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines[1:] if line.endswith("kB")}
    return {
        "anonymous_mb": found.get("Anonymous", 0.0),
        "other_mb": found.get("Rss", 0.0) - found.get("Anonymous", 0.0),
    }


def allocations():
    """Returns how often torch asked the driver for memory, found none and gave its cache back, and failed."""
    names = {"segments": "segment.all.allocated", "retries": "num_alloc_retries", "failed": "num_ooms"}
    found = torch.cuda.memory_stats() if HAS_CARD else {}
    return {ours: found.get(theirs, 0) for ours, theirs in names.items()}


def above(now, before):
    return {name: round(value - before[name], 1) for name, value in now.items()}


def synchronize():
    if HAS_CARD:
        torch.cuda.synchronize()


def best(work, times=5):
    """Returns the seconds of the fastest of some runs."""
    found = []
    for _ in range(times):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


def median(found):
    return round(statistics.median(found), 5)


def heap():
    """Returns MB of the C library's heap that are in use, and that are freed and kept; nothing where it does not say."""
    import ctypes

    class Info(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_size_t)
            for name in ["arena", "n1", "n2", "n3", "mapped", "n4", "n5", "used", "kept", "trim"]
        ]

    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return {}
    ask.restype = Info
    found = ask()
    return {"used": round(found.used / MB, 1), "kept": round(found.kept / MB, 1)}


def product_mb():
    """Returns the MB of anonymous RAM that the first products take, in fp32 and of 16-bit factors."""
    before = memory()
    for rows, columns in ((21504, 3072), (3072, 15360), (640, 2048)):
        value = torch.zeros(rows, columns, device=DEVICE)
        value.addmm_(torch.zeros(rows, 16, device=DEVICE), torch.zeros(16, columns, device=DEVICE), alpha=0.5)
        for dtype in (torch.float16, torch.bfloat16):
            factors = [torch.zeros(shape, dtype=dtype, device=DEVICE) for shape in ((rows, 16), (16, columns))]
            merging.WIDE_PRODUCT.merged(value.to(dtype), [Term(LoraAdapter(*factors, alpha=None), 0.5)])
    synchronize()
    return above(memory(), before)["anonymous_mb"]


def kernels_mb():
    """Returns the MB of anonymous RAM that the first uses of the other operations of merges take."""
    before = memory()
    for dtype in (torch.float16, torch.bfloat16):
        value = torch.ones(512, 512, dtype=dtype, device=DEVICE)
        wide = torch.empty(value.shape, dtype=torch.float32, device=DEVICE).copy_(value)
        torch.empty_like(value).copy_(wide)
        merging.are_finite([value, value])
        flat = value.view(-1).view(torch.uint8)
        sums = file_sums.checksums(torch.cat([flat, flat]), file_sums.factors_on(DEVICE))
        differs = (file_sums.words_of(flat) != file_sums.words_of(flat.clone())).view(2, -1).any(1)
        torch.cat([sums, sums]).cpu(), torch.stack([differs.any(), differs.any()]).any().tolist()
    synchronize()
    return above(memory(), before)["anonymous_mb"]


def summary(found):
    return {
        "first": round(found[0], 4),
        "median": round(statistics.median(found), 4),
        "least": round(min(found), 4),
        "most": round(max(found), 4),
        "count": len(found),
    }


def for_small():
    """Lets CPU tensors of any size go the way of a card's."""
    for module in (merge_attachment, backup, file_backup):
        module.lies_in_ram = lambda tensor: False
    file_backup.LEAST_BYTES = file_backup.SMALLEST_BYTES = merge_attachment.KEPT_BYTES = 0
    file_backup.LEAST_BYTES_PER_SECOND = 0


def keep(path, earlier, result):
    """Writes the line of this run behind those of earlier ones: what is measured is on the disk before the next way begins."""
    if path is not None:
        path.write_text(earlier + json.dumps(result) + "\n", encoding="utf-8")


def main():
    options = arguments()
    earlier = options.out.read_text(encoding="utf-8") if options.out and options.out.exists() else ""
    if options.small and not HAS_CARD:
        for_small()
    file_reader.THREADS = options.threads or file_reader.THREADS
    for name in ("ring", "piece"):
        if (size_mb := getattr(options, f"{name}_mb")) is not None:
            setattr(file_reader, f"{name.upper()}_BYTES", size_mb * MB)
    ballast = None
    if options.free_gb and HAS_CARD:
        command = [sys.executable, "-c", BALLAST, str(options.free_gb)]
        ballast = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert "ready" in ballast.stdout.readline(), "the ballast process did not get its memory"
    try:
        peak, bench = Peak(), Bench(options)
        rates = bench.rates()
        result = {
            **{name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
            "gpu": torch.cuda.get_device_name() if HAS_CARD else "none",
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "commit": os.environ.get("LORA_GUARD_COMMIT", "unknown"),
            "weights": len(bench.keys),
            "patched_gb": round(bench.patched_bytes / GB, 3),
            "model_gb": round(bench.model_bytes / GB, 3),
            "rates_gb_per_second": rates,
            "floor_seconds": round(bench.patched_bytes / GB / max(rates.get("link", rates["ring"]), 1e-9), 4),
            "seconds_to_prepare": round(time.perf_counter() - bench.started, 1),
            "ways": [],
        }
        print(json.dumps(result), flush=True)
        names = options.ways.split(",")
        for number, name in enumerate(names):
            # An equal share of what is left, the comparison at the end set aside.
            share = (bench.left() - COMPARED_SECONDS) / (len(names) - number)
            if share <= 0 and result["ways"]:
                result["ways"].append({"way": name, "left_out": "time"})
                continue
            result["ways"].append(bench.rings(share) if name == "rings" else bench.way(name, peak, share))
            print(json.dumps(result["ways"][-1]), flush=True)
            keep(options.out, earlier, result)
        compared = bench.changed_weights() | {"seconds": round(time.perf_counter() - bench.started, 1)}
        print(json.dumps(compared), flush=True)
        keep(options.out, earlier, result | compared)
    finally:
        if ballast is not None:
            ballast.kill()


if __name__ == "__main__":
    main()
