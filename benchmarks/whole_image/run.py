"""Whole images in a whole Forge or Forge Neo, with a random Flux-dev of real size: what a person waits for.

    python run.py --host forge --root FORGE --models FOLDER --storage fp8 --free-gb 12 --plan 4 --ways stock fp16 guard --out OUT

Each way gets a fresh host (API, no pages) and makes the images of the plan, one after the other (`day.py`): without a LoRA, the
first LoRA, the same again, another strength, another LoRA, two, a new prompt, the previous one, removed. A second process takes
the VRAM beyond `--free-gb`. `OUT/results.jsonl` gets one JSON line for each image: seconds; seconds to the first step, of the
first step and of a usual one; peaks of VRAM and of RAM that no file backs; the picture's hash, and its distance from an earlier
picture that should be the same. `OUT/table.md` is made from them (`table.py`), also when the time is up (`--time-limit`): each way
gets an equal share of what is left, so put the fast one first, and the part of the plan that matters most.

    --ways: stock (Automatic), fp16 ("(fp16 LoRA)"), guard (this checkout), NAME=FOLDER or the name of a folder in --builds;
        guard+LORA_GUARD_KERNELS=0 sets a variable of its host
    --beside: ways of an earlier call with the same --work, whose pictures are compared too: of another setting in --flags, say
    --plan: STEPS, STEPS:DAY or STEPS:DAY@WAY (for one way), several in one process, e.g. 50:long 4:three@guard 4
    --checkpoint NAME --loras A=NAME B=NAME: existing files instead of made ones; with --cpu a trial without a GPU

Made files and pictures lie in --models and --work, and are kept for the next run.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import time
from datetime import datetime
from itertools import chain
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import day as days  # noqa: E402  # lies beside this file
import flux_files  # noqa: E402
import table  # noqa: E402
from host import KINDS, Host, HostError  # noqa: E402
from peaks import Card, Peaks  # noqa: E402
from ways import Way, data_folder  # noqa: E402

GB = 1 << 30
CONTEXT_BYTES = GB // 2
"""A first guess at the VRAM of a process's own CUDA context; a probe process says how wrong it was."""
START_SECONDS = 150
LEAST_PAUSE_SECONDS = 0.05
LEAST_SECONDS = 8
"""Left of the time limit for the end: a host that stops, the table."""
PROBE = "import torch; print(torch.cuda.mem_get_info()[0])"


def say(text):
    print(f"{datetime.now():%H:%M:%S} {text}", flush=True)


class Clock:
    """A time limit."""

    def __init__(self, limit_seconds):
        self.end = time.monotonic() + limit_seconds

    def left(self):
        """Returns the seconds until the end must begin."""
        return self.end - time.monotonic() - LEAST_SECONDS

    def share(self, among):
        """Returns the clock of the first of so many that divide what is left; what it leaves over is the others'."""
        return Clock(self.left() / among + LEAST_SECONDS)


class Results:
    """The file of JSON lines: each is on the disk before the next image is begun."""

    def __init__(self, path, common):
        self.path, self.common = path, common

    def add(self, row):
        row = {**self.common, **row}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return row


def machine():
    """Returns the hardware and versions of this machine."""
    import torch

    has_card = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_card else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def leave_free(ballast, wanted_bytes):
    """Leaves a new process `wanted_bytes` of VRAM beside its own CUDA context; returns what one sees."""
    ballast.leave(wanted_bytes + CONTEXT_BYTES)
    seen = seen_by_a_process()
    if seen is not None:
        ballast.leave(wanted_bytes + CONTEXT_BYTES + wanted_bytes - seen)
        seen = seen_by_a_process()
    return seen


def seen_by_a_process():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None


def step_times(notes, began):
    """Returns seconds of an image's steps, and of the host's functions before the first of them, from the probe's notes.

    Args:
        notes: Lines of the probe, as dicts, of one image.
        began: When the image was asked for (epoch seconds).
    """
    begins = [note["at"] for note in notes if note["event"] == "step begins"]
    ends = [note["at"] for note in notes if note["event"] == "step ended"]
    steps = [end - begin for begin, end in zip(begins, ends, strict=False)]
    if not steps:
        return {}
    row = {"to_first_step_s": round(begins[0] - began, 3), "first_step_s": round(steps[0], 3)}
    if len(steps) > 1:
        row["usual_step_s"] = round(table.median(steps[1:]), 4)
        row["steps_s"] = [round(step, 4) for step in steps]
    starts = [note for note in notes if note["event"] == "image begins"]
    if starts:
        first = next(note for note in notes if note["event"] == "step begins")
        row["parts_s"] = {name: round(first["parts"][name] - at, 3) for name, at in starts[0]["parts"].items()}
    watched = [note["watched"] for note in notes if "watched" in note]
    if watched:
        row["watched"] = {name: [one.get(name) for one in watched] for name in dict.fromkeys(chain(*watched))}
    if "retries" in notes[0]:
        row["alloc_retries"] = notes[-1]["retries"] - notes[0]["retries"]
        row["reserved_mb"] = max(note["reserved_mb"] for note in notes)
    return row


def levels_apart(picture, other):
    """Returns the largest and the mean difference in grey levels."""
    import numpy as np

    if picture.shape != other.shape:
        return {}
    apart = np.abs(picture.astype(np.int16) - other.astype(np.int16))
    return {"max_levels": int(apart.max()), "mean_levels": round(float(apart.mean()), 3)}


class Pace:
    """What the images of a way have taken, to tell whether there is time for another."""

    def __init__(self):
        self.images = 0
        self.beside_s = self.step_s = 0.0

    def note(self, steps, seconds, step_seconds):
        """Counts an image. The first one of a host loads everything, and counts only until there is another."""
        beside = max(0.0, seconds - steps * step_seconds)
        self.beside_s = beside if self.images < 2 else max(self.beside_s, beside)
        self.step_s = max(self.step_s, step_seconds)
        self.images += 1

    def expected(self, steps):
        """Returns the seconds of an image at most, as far as is known."""
        return self.beside_s + steps * self.step_s


class WayRun:
    """One way: its host, and the pictures of the current part of the plan."""

    def __init__(self, options, way, host, results, card, clock, vram_before):
        self.options, self.way, self.host, self.results = options, way, host, results
        self.card, self.clock, self.vram_before = card, clock, vram_before
        self.notes = options.work / "steps.jsonl"
        self.pace = Pace()
        self.slowed, self.collected = (0, 0.0), 0.0

    def play(self, part):
        """Makes the images of a part; returns whether there was time for all."""
        pictures = {}
        for case in days.DAYS[part.day]:
            if self.clock.left() < 1.1 * self.pace.expected(case.steps or part.steps):
                return False
            row, picture = self.image(part, case)
            if picture is not None:
                pictures[case.name] = picture
                if case.same_as in pictures:
                    row |= {"same_as": case.same_as, **levels_apart(picture, pictures[case.same_as])}
                row |= self.beside_other_ways(part, case, picture)
            say(table.line(self.results.add(row)))
            if not self.pace.images:
                raise HostError(f"the first image failed: {row['error']}")
            if self.host.process.poll() is not None:
                raise HostError(f"the host ended with {self.host.process.returncode}: {self.host.last_words()}")
        return True

    def image(self, part, case):
        """Makes one image; returns its row and the picture, or None where the host answered with an error."""
        steps = case.steps or part.steps
        prompt = days.prompt_of(case, self.options.loras)
        row = {
            "day": part.day,
            "plan_steps": part.steps,
            "case": case.name,
            "steps": steps,
            "changes": case.changes,
            "loras": len(case.stack),
            "lora_mb": round(sum(self.options.lora_bytes[letter] for letter, _ in case.stack) / 1e6),
        }
        self.notes.write_text("")
        began, picture, error = time.time(), None, None
        with Peaks(self.host.process.pid, self.card) as peaks:
            try:
                picture, seconds = self.host.image(prompt, steps, self.options.size, max(1, self.clock.left()))
                row["seconds"] = round(seconds, 3)
            except HostError as failure:
                error = str(failure)
        row |= peaks.as_row(self.vram_before)
        notes = [json.loads(line) for line in self.notes.read_text().splitlines()]
        row |= step_times(notes, began) | self.waits(notes) | self.pauses(notes)
        if picture is None:
            return {**row, "error": error}, None
        self.pace.note(steps, row["seconds"], row.get("usual_step_s", 0.0))
        return {**row, "hash": hashlib.sha1(picture.tobytes()).hexdigest()[:12]}, picture

    def waits(self, notes):
        """Returns the copies that were slowed until the image's last step, those of the decode before it included."""
        found = [(note["copies"], note["waited_s"]) for note in notes if "copies" in note]
        if not found:
            return {}
        before, self.slowed = self.slowed, found[-1]
        return {"slowed_copies": found[-1][0] - before[0], "waited_s": round(found[-1][1] - before[1], 2)}

    def pauses(self, notes):
        """Returns the seconds of Python's garbage collector until the image's last step, where it took any worth a word."""
        found = [note["collector_s"] for note in notes if "collector_s" in note]
        before, self.collected = self.collected, found[-1] if found else self.collected
        seconds = round(self.collected - before, 3)
        return {"collector_s": seconds} if seconds >= LEAST_PAUSE_SECONDS else {}

    def beside_other_ways(self, part, case, picture):
        """Keeps the picture, and returns its distance from those of the ways before it."""
        import numpy as np

        options = self.options
        kind = f"{options.host}-{options.storage}-{options.free_gb:g}-{options.size}-{part.steps}-{part.day}"
        folder = options.work / "pictures" / kind
        folder.mkdir(parents=True, exist_ok=True)
        name = case.name.replace(" ", "_").replace(",", "")
        ways = [way for way in (*options.ways, *options.beside) if way.name != self.way.name]
        others = {way.name: folder / f"{way.file_name}.{name}.npy" for way in ways}
        np.save(folder / f"{self.way.file_name}.{name}.npy", picture)
        apart = {other: levels_apart(picture, np.load(path)) for other, path in others.items() if path.exists()}
        return {"from_ways": apart} if apart else {}


def play_way(options, way, results, card, clock):
    """Starts a host for a way and makes the images of the plan."""
    data = options.work / f"data_{options.host}"
    extensions = [HERE / "whole_image_probe", *options.extensions]
    data_folder(data, way, {**KINDS[options.host].config, **options.config}, extensions)
    environment = {**way.environment, "WHOLE_IMAGE_STEPS": str(options.work / "steps.jsonl")}
    if options.slow_link_gb_s:
        environment["WHOLE_IMAGE_LINK_GB_S"] = str(options.slow_link_gb_s)
    if options.profile:
        environment["WHOLE_IMAGE_PROFILE"] = str(
            options.out / f"{options.host}_{options.storage}_{way.file_name}.profile.txt"
        )
    log = options.out / f"{options.host}_{options.storage}_{options.free_gb:g}_{way.file_name}.log"
    vram_before = card.used_bytes() or 0
    host = Host(
        options.host, options.root, options.python, data, options.models, log, options.port,
        on_cpu=options.cpu, environment=environment, flags=options.flags,
    )  # fmt: skip
    began = time.monotonic()
    with host:
        try:
            host.wait(min(START_SECONDS, max(1, clock.left())))
            say(f"{way.name}: the host answers after {time.monotonic() - began:.0f} s")
            host.choose(options.checkpoint)
            run = WayRun(options, way, host, results, card, clock, vram_before)
            if not all(run.play(part) for part in options.plan if part.is_for(way.name)):
                say(f"{way.name}: the time is up")
        except HostError as failure:
            say(f"{way.name}: {failure}")
            results.add({"error": str(failure)})


def play(options):
    """Makes what is missing of the files, takes VRAM away, and plays one way after the other."""
    from ballast import Ballast

    clock = Clock(options.time_limit)
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    if options.made:
        say(f"making {flux_files.model_name(options.storage)}")
        loras = [f"{letter}={days.RANKS[letter]}" for letter in options.loras]
        arguments = ["--models", str(options.models), "--storage", options.storage, "--loras", *loras]
        subprocess.run([options.python, HERE / "flux_files.py", *arguments], check=True)
    files = {letter: options.models / "Lora" / f"{name}.safetensors" for letter, name in options.loras.items()}
    options.lora_bytes = {letter: path.stat().st_size for letter, path in files.items()}
    import torch

    card = Card()
    facts = machine()
    with Ballast(torch) as ballast:
        if not options.cpu:
            seen = leave_free(ballast, int(options.free_gb * GB))
            say(f"a new process sees {(seen or 0) / GB:.2f} GB free of {facts['gpu']}")
        started = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        for number, way in enumerate(options.ways):
            if clock.left() < 30:
                say(f"{way.name}: no time left")
                continue
            common = {"run": started, "host": options.host, "storage": options.storage, "free_gb": options.free_gb}
            common |= {"size": options.size, "slow_link_gb_s": options.slow_link_gb_s, "way": way.name}
            results = Results(options.out / "results.jsonl", {**common, "commit": way.commit, **facts})
            say(f"{way.name} {way.commit}: {way.setting}")
            play_way(options, way, results, card, clock.share(len(options.ways) - number))
    text = table.page(table.read([options.out / "results.jsonl"]))
    (options.out / "table.md").write_text(text, encoding="utf-8")
    print("\n" + text, flush=True)


def pairs(texts):
    """Reads `["A=one", "B=two"]` as a dict."""
    return dict(text.split("=", 1) for text in texts)


def parse(arguments=None):
    """Returns the options, with files, plan and ways worked out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=tuple(KINDS), required=True)
    parser.add_argument("--root", type=Path, required=True, help="the host's folder")
    parser.add_argument("--python", default=sys.executable, help="the Python that has the host's packages")
    parser.add_argument("--models", type=Path, required=True, help="models for all hosts; made files go there")
    parser.add_argument("--work", type=Path, required=True, help="settings, extensions and pictures of the ways")
    parser.add_argument("--out", type=Path, required=True, help="results, table and console logs")
    parser.add_argument("--storage", choices=flux_files.STORAGES, default="fp8")
    parser.add_argument("--free-gb", type=float, default=12.0)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--plan", nargs="+", default=["4"], metavar="STEPS[:DAY]")
    parser.add_argument("--ways", nargs="+", default=["stock", "fp16", "guard"], metavar="WAY")
    parser.add_argument("--beside", nargs="+", default=[], metavar="WAY")
    parser.add_argument("--builds", type=Path, help="a folder of builds of the guard, for their names in --ways")
    parser.add_argument(
        "--slow-link-gb-s", "--link-gb-s", type=float, help="slow copies between RAM and card down to this rate"
    )
    parser.add_argument("--profile", action="store_true", help="torch's profile of each image's third step, in --out")
    parser.add_argument("--time-limit", type=float, default=540, metavar="SECONDS", help="for all of it")
    parser.add_argument("--checkpoint", help="an existing one instead of a made Flux")
    parser.add_argument("--loras", nargs="+", default=[], metavar="LETTER=NAME", help="with --checkpoint")
    parser.add_argument("--modules", nargs="+", type=Path, default=[], help="text encoders and VAE beside --checkpoint")
    parser.add_argument("--extensions", nargs="+", type=Path, default=[], help="more extensions for the host")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="the host's own arguments; comes last")
    parser.add_argument("--port", type=int, default=7861)
    parser.add_argument("--cpu", action="store_true", help="a trial without a GPU and without a ballast")
    options = parser.parse_args(arguments)
    try:
        options.plan = [days.Part.parse(text) for text in options.plan]
        options.ways, options.beside = (
            [Way.parse(text, options.builds) for text in texts] for texts in (options.ways, options.beside)
        )
    except ValueError as error:
        parser.error(str(error))
    # A host that plays no part would take its start from the others' time.
    options.ways = [way for way in options.ways if any(part.is_for(way.name) for part in options.plan)]
    if not options.ways:
        parser.error("--plan: none of --ways plays a part of it")
    if options.storage == "int8" and options.host != "neo":
        parser.error("int8: only Forge Neo loads int8_tensorwise")
    for name in ("root", "models", "work", "out"):
        setattr(options, name, getattr(options, name).absolute())
    options.made = options.checkpoint is None
    letters = days.loras_of(options.plan)
    if options.made:
        options.checkpoint = flux_files.model_name(options.storage)
        options.loras = {letter: flux_files.lora_name(letter) for letter in letters}
    else:
        options.loras = pairs(options.loras)
        if missing := [letter for letter in letters if letter not in options.loras]:
            parser.error(f"--loras: no file for {', '.join(missing)}")
    modules = [path.absolute() for path in options.modules]
    if options.made and options.storage == "q4_k":
        modules = [options.models / folder / name for folder, name in flux_files.SEPARATE.values()]
    options.config = {"forge_additional_modules": [str(path) for path in modules]}
    return options


if __name__ == "__main__":
    play(parse())
