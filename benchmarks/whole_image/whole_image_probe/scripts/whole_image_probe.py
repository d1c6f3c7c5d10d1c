"""Extension for the whole-image benchmark: notes when each step begins and ends, and slows copies down if asked to.

WHOLE_IMAGE_STEPS names the file for the notes, a JSON line each. WHOLE_IMAGE_LINK_GB_S is the rate that copies between RAM
and the card shall have at most. WHOLE_IMAGE_PROFILE names a file that gets torch's profile of each image's third step, and Python's
of each image as a whole. WHOLE_IMAGE_STEP_PROFILE names one that gets Python's profile of each image's fourth step. WHOLE_IMAGE_SWAPPED=1 writes to the console which layers of each image are swapped,
WHOLE_IMAGE_WAITS=1 where the processor waits for the card in its third step. WHOLE_IMAGE_WATCH=1 notes what each step waited for (watch.py).
"""

import cProfile
import functools
import gc
import importlib.util
import io
import json
import os
import pstats
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from modules import processing, script_callbacks, shared

NOTES = os.environ.get("WHOLE_IMAGE_STEPS")
RATE = os.environ.get("WHOLE_IMAGE_LINK_GB_S")
PROFILE = os.environ.get("WHOLE_IMAGE_PROFILE")
STEP_PROFILE = os.environ.get("WHOLE_IMAGE_STEP_PROFILE")
SWAPPED = os.environ.get("WHOLE_IMAGE_SWAPPED")
WAITS = os.environ.get("WHOLE_IMAGE_WAITS")
WATCH = os.environ.get("WHOLE_IMAGE_WATCH")
PROFILED_STEP = 3
PYTHON_PROFILED_STEP = 4


def note(event):
    # The steps of one image are calculated one after the other: what is still running belongs to the one before.
    if watch is not None and event == "step ended":
        watch.launched()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    noted = {
        "event": event,
        "at": time.time(),
        "collector_s": round(collector.seconds, 4),
        "parts": dict(parts),
    } | allocator()
    if link is not None:
        noted |= {"copies": link.copies, "waited_s": link.waited}
    if watch is not None and event == "step ended":
        noted["watched"] = watch.facts()
    with open(NOTES, "a", encoding="utf-8") as file:
        file.write(json.dumps(noted) + "\n")


def steps_begun():
    """Returns how many steps of the image have begun."""
    return Path(NOTES).read_text(encoding="utf-8").count("step begins")


def allocator():
    """Returns how often torch's allocator had to give back its cache for want of room, and what it holds."""
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.memory_stats()
    return {"retries": found["num_alloc_retries"], "reserved_mb": found["reserved_bytes.all.current"] >> 20}


class Collector:
    """What Python's garbage collector has taken in this process: a full collection of a WebUI's objects takes half a second."""

    def __init__(self):
        self.seconds = self.began = 0.0

    def __call__(self, phase, _):
        now = time.perf_counter()
        if phase == "start":
            self.began = now
        else:
            self.seconds += now - self.began


def swapped():
    """Returns the weights of the denoiser that lie in RAM: their number and MB by the last part of the layer's name, and MB not pinned."""
    kinds, unpinned = {}, 0.0
    for name, layer in shared.sd_model.forge_objects.unet.model.named_modules():
        weight = layer._parameters.get("weight")
        if weight is not None and weight.device.type == "cpu":
            size = weight.data.nbytes / (1 << 20)
            count, total = kinds.get(name.rpartition(".")[2], (0, 0.0))
            kinds[name.rpartition(".")[2]] = count + 1, round(total + size, 1)
            unpinned += 0.0 if weight.data.is_pinned() else size
    return {"swapped": kinds, "unpinned_mb": round(unpinned, 1)}


class Profiler:
    """torch's profile of one step an image."""

    def __init__(self, path):
        self.path, self.running = path, None

    def begins(self):
        """Begins with the step that is to be looked at."""
        if steps_begun() == PROFILED_STEP:
            kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            self.running = torch.profiler.profile(activities=kinds)
            self.running.__enter__()

    def ends(self):
        """Writes what took longest, on the card and on the processor."""
        if self.running is None:
            return
        running, self.running = self.running, None
        running.__exit__(None, None, None)
        averages = running.key_averages()
        with open(self.path, "a", encoding="utf-8") as file:
            for order in ("self_cuda_time_total", "self_cpu_time_total"):
                file.write(averages.table(sort_by=order, row_limit=22, max_name_column_width=70) + "\n")


class StepProfiler:
    """Python's profile of one step an image, where the processor's time is what a step waits for."""

    def __init__(self, path):
        self.path, self.running = path, None

    def begins(self):
        """Begins with the step that is to be looked at."""
        if steps_begun() == PYTHON_PROFILED_STEP:
            self.running = cProfile.Profile()
            self.running.enable()

    def ends(self):
        """Writes what took longest, alone and with what it called."""
        if self.running is None:
            return
        running, self.running = self.running, None
        running.disable()
        text = io.StringIO()
        for order in ("tottime", "cumulative"):
            pstats.Stats(running, stream=text).sort_stats(order).print_stats(70)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text.getvalue())


class Waits:
    """Counts in one step an image where the processor waits for the card, as torch's synchronisation warnings tell it."""

    def __init__(self):
        self.before = None
        self.found = {}

    def begins(self):
        """Begins with the step that is to be looked at."""
        if steps_begun() == PROFILED_STEP:
            self.found, self.before = {}, warnings.showwarning
            warnings.showwarning = self._count
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def ends(self):
        """Writes the places to the console."""
        if self.before is not None:
            torch.cuda.set_sync_debug_mode("default")
            warnings.resetwarnings()
            warnings.showwarning, self.before = self.before, None
            print("whole image waits:", json.dumps(self.found), flush=True)

    def _count(self, message, category, filename, lineno, *_):
        # The place is torch's own for a method that is written in C++: the callers tell more.
        frames = [f"{Path(one.filename).name}:{one.lineno}" for one in traceback.extract_stack(limit=6)[:-1]]
        place = " < ".join(reversed(frames))
        self.found[place] = self.found.get(place, 0) + 1


def step_begins(_):
    note("step begins")
    if WAITS:
        waits.begins()
    if SWAPPED and not Path(NOTES).read_text(encoding="utf-8").count("step ended"):
        print("whole image:", json.dumps(swapped()), flush=True)
    if PROFILE:
        profiler.begins()
    if watch is not None:
        watch.begin()
    if STEP_PROFILE:
        step_profiler.begins()


def step_ended(_):
    if STEP_PROFILE:
        step_profiler.ends()
    if WAITS:
        waits.ends()
    note("step ended")
    if PROFILE:
        profiler.ends()


parts = {}
"""Seconds of the host's own functions with all that the guard does in them, since the process began."""
PARTS = {
    "networks": ("networks", "load_networks"),
    "load": ("backend.memory_management", "load_models_gpu"),
    "apply": ("backend.patcher.lora", "LoraLoader.refresh"),
}


def timed(name, original):
    """Wraps a function of the host: its seconds are added up in `parts`. "apply" is a part of "load"."""

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        began = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            parts[name] = parts.get(name, 0.0) + time.perf_counter() - began

    return wrapper


def time_parts():
    """Times what of `PARTS` this host has."""
    for name, (module, path) in PARTS.items():
        owner = sys.modules.get(module)
        *within, last = path.split(".")
        for one in within:
            owner = getattr(owner, one, None)
        if hasattr(owner, last):
            setattr(owner, last, timed(name, getattr(owner, last)))


def noted_from_the_start(make_images):
    """Wraps the host's own function that makes images: a note says that one begins."""

    @functools.wraps(make_images)
    def wrapper(*args, **kwargs):
        if not parts:
            # Every extension is there by now.
            parts.update(dict.fromkeys(PARTS, 0.0))
            time_parts()
        note("image begins")
        return make_images(*args, **kwargs)

    return wrapper


def profiled(make_images):
    """Wraps the host's own function that makes images: what took longest in it is written down."""

    @functools.wraps(make_images)
    def wrapper(*args, **kwargs):
        profile = cProfile.Profile()
        try:
            return profile.runcall(make_images, *args, **kwargs)
        finally:
            text = io.StringIO()
            pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(160)
            with open(Path(PROFILE).with_suffix(".python.txt"), "a", encoding="utf-8") as file:
                file.write(text.getvalue())

    return wrapper


profiler, step_profiler, waits, collector = Profiler(PROFILE), StepProfiler(STEP_PROFILE), Waits(), Collector()
gc.callbacks.append(collector)
if PROFILE:
    processing.process_images_inner = profiled(processing.process_images_inner)
if NOTES:
    processing.process_images_inner = noted_from_the_start(processing.process_images_inner)
    script_callbacks.on_cfg_denoiser(step_begins)
    script_callbacks.on_cfg_after_cfg(step_ended)


def beside(name):
    """Imports a module that lies beside the folder of scripts."""
    path = Path(__file__).resolve().parent.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"whole_image_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


link = beside("slow_link").install(torch, float(RATE) * 1e9) if RATE else None
watch = beside("watch").Watch(torch) if WATCH else None
