"""Ways through Forge walked without the guard and with it, then compared: pictures, consoles, seconds.

Used by everyday.py and neighbours.py. A way is a function that asks for pictures; it runs unchanged on every side:
"stock" (Forge alone), "reference" (the fp64 merge of run.py, for low-bit storage, where stock rounds the weights) and
"guard". What stock and the reference give is kept in the temporary folder until one of the scripts changes.
"""

import argparse
import hashlib
import inspect
import json
import pickle
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from real_forge.run import link_extensions, markdown, measured_on, parts, write_table
from real_forge.server import FORGE, ROOT, ApiError, Server
from real_forge.verdicts import judge

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Model:
    checkpoint: str
    family: str
    cfg: float
    modules: tuple[str, ...] = ()
    steps: int = 3
    low_bit: bool = False
    size: int = 64


GGUF_PARTS = ("tiny_flux_vae", "tiny_clip_l", "tiny_t5")
MODELS = {
    "Flux bf16": Model("tiny_flux_bf16", "flux", 1),
    "Flux fp8": Model("tiny_flux_allfp8", "flux", 1, low_bit=True),
    "Flux Q4_K": Model("tiny_flux_q4_k", "flux", 1, GGUF_PARTS, low_bit=True),
    "SD1.5 fp16": Model("rand_sd15_tiny", "sd15", 7, steps=2, size=32),
}
WIDE = ("Flux bf16", "SD1.5 fp16")
ALL = tuple(MODELS)


@dataclass
class Shot:
    """One picture of a way, or the error that came instead of it."""

    image: Any
    bare: Any = None
    """The same request without any LoRA; made on the stock and reference sides only."""
    truth: str | None = None
    """The shot of the same way that stock is asked for instead, where stock itself is wrong; the reason is in the way."""
    strict: bool = False


@dataclass
class Walked:
    shots: dict[str, Shot] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    first: Any = None
    last: Any = None
    console: str = ""
    seconds: float = 0.0

    def errors(self):
        return {label: shot.image for label, shot in self.shots.items() if isinstance(shot.image, str)}


@dataclass(frozen=True)
class Way:
    name: str
    walk: Any
    models: tuple[str, ...]
    wants: tuple[str, ...] = ()
    """What the guard's console must say; such a line is no error line."""
    env: tuple[tuple[str, str], ...] = ()
    """Ways with the same environment share one server."""
    verdict: str = ""
    """For the table, where stock cannot be compared with: what stock does there."""


def into(ways, **usual):
    """A decorator that makes a function a way in `ways`: `@way("name", *models, wants=...)`."""

    def way(name, *models, **about):
        def add(walk):
            ways.append(Way(name, walk, models or WIDE, **{**usual, **about}))
            return walk

        return add

    return way


class Walker:
    """What a way gets: requests to one side, with the model's settings filled in. `@` in a prompt stands for the
    family's LoRA names: `<lora:@a:1>`."""

    def __init__(self, forge, side, model, walked, lora_folder, store, bare_images):
        self.forge, self.side, self.model, self.walked = forge, side, model, walked
        self.loras, self.store, self._bare_images = lora_folder, store, bare_images
        self._unmeasured = []

    @property
    def guarded(self):
        return self.side == "guard"

    def image(self, prompt="a cat", **settings):
        model = settings.pop("on", self.model)
        modules = settings.pop("modules", None)
        for key in ("prompt", "hr_prompt"):
            if key in settings:
                settings[key] = self.named(settings[key], model)
        return self.forge.image(
            self.title(model.checkpoint),
            modules=parts(model.modules) if modules is None else modules,
            prompt=self.named(prompt, model),
            **{"cfg_scale": model.cfg, "steps": model.steps, "width": model.size, "height": model.size, **settings},
        )

    def title(self, checkpoint):
        """Forge's title of the file with exactly this name; others may lie beside it that contain the name."""
        models = self.forge.call("/sdapi/v1/sd-models")
        return next(m["title"] for m in models if Path(m["filename"]).stem == checkpoint)

    def named(self, text, model=None):
        return text.replace("@", f"lg_{(model or self.model).family}_")

    def shot(self, label, prompt="a cat", *, truth=None, effect=True, stock=True, strict=False, make=None, **settings):
        """Makes a picture and keeps it under `label`. `stock=False`: not asked of stock, which would fail or be spoiled."""
        if not stock and not self.guarded:
            return None
        make = make or self.image
        shot = Shot(attempt(lambda: make(prompt, **settings)), truth=truth, strict=strict)
        if effect and not self.guarded:
            self._unmeasured.append((shot, prompt, settings, make))
        self.walked.shots[label] = shot
        return shot.image

    def keep(self, label, image, bare=None, **flags):
        self.walked.shots[label] = Shot(image, bare, **flags)

    def measure(self):
        """The same requests without any LoRA; after the way, so that every side walks it in the same order."""
        for shot, *request in self._unmeasured:
            shot.bare = self._bare(*request)

    def _bare(self, prompt, settings, make):
        plain = {k: without_loras(v) for k, v in settings.items()}
        key = repr((make.__qualname__, self.model, without_loras(prompt), sorted(plain.items(), key=str)))
        if key not in self._bare_images:
            self._bare_images[key] = attempt(lambda: make(without_loras(prompt), **plain))
        return self._bare_images[key]

    def check(self, holds, sentence, everywhere=False):
        """Something the guard promises beyond the picture; `everywhere`: without it the other sides prove nothing either."""
        if not holds and (self.guarded or everywhere):
            self.walked.wrong.append(sentence)

    def option(self, **options):
        """Sets options of the guard; stock has none of them."""
        if self.guarded:
            answer = attempt(
                lambda: self.forge.call("/sdapi/v1/options", {f"lora_guard_{k}": v for k, v in options.items()})
            )
            if isinstance(answer, str):
                self.walked.wrong.append(f"option {options}: {answer[:120]}")


def without_loras(value):
    if isinstance(value, str):
        return re.sub(r"<lora:[^>]*>", "", value)
    if isinstance(value, dict):
        return {k: without_loras(v) for k, v in value.items()}
    return [without_loras(v) for v in value] if isinstance(value, list) else value


def attempt(make):
    try:
        return make()
    except ApiError as error:
        return str(error)


def wait_until_started(forge, times):
    """Until Forge's web UI has started `times` times. Its API answers earlier, when scripts have no arguments yet."""
    for _ in range(480):
        if forge.console().count("Startup time:") >= times:
            return
        time.sleep(0.25)
    raise TimeoutError("Forge's web UI did not start in 2 minutes")


def links(extensions):
    """Links test extensions, `{name: folder}`, into Forge; returns what must be taken away again."""
    link_extensions()
    made = []
    for name, target in extensions.items():
        link = FORGE / "extensions" / name
        if not link.is_symlink():
            link.symlink_to(target, target_is_directory=True)
            made.append(link)
    return made


class Comparison:
    """All ways of one script."""

    def __init__(self, name, ways, extensions, env):
        self.name, self.ways, self.extensions, self.env = name, ways, extensions, env
        self.store = Path(tempfile.gettempdir()) / f"lora_guard_{name}"
        self.store.mkdir(exist_ok=True)
        sources = [f for folder in extensions.values() for f in sorted(Path(folder).rglob("*.py"))]
        self.stamp = b"".join(f.read_bytes() for f in sources) + repr(MODELS).encode()
        self.prepare = lambda store: []
        """Makes files that the ways need in the store; returns flags for Forge."""

    def stamped(self, way, model):
        """Under what a result of stock is kept: another text of the way, of the extensions or of a model means another."""
        text = self.stamp + inspect.getsource(way.walk).encode() + inspect.getsource(Walker).encode()
        return way.name, model, hashlib.sha256(text).hexdigest()

    # One side

    def run_side(self, side, pairs, keep=lambda results: None):
        """`{(way name, model): Walked}`; ways with an environment of their own get a server of their own. `keep` is called
        after each way."""
        results = {}
        for env in dict.fromkeys(way.env for way, _ in pairs):
            # One model after the other: loading one takes longer than a picture.
            group = sorted((p for p in pairs if p[0].env == env), key=lambda p: list(MODELS).index(p[1]))
            while group:
                before = len(group)
                with tempfile.TemporaryDirectory() as folder:
                    self._serve(side, group, dict(env), Path(folder), results, keep)
                if len(group) == before:
                    raise RuntimeError(f"Forge ends again and again at {group[0][0].name}")
        return results

    def _serve(self, side, pending, env, folder, results, keep):
        config, loras = folder / "config.json", folder / "Lora"
        config.write_text(json.dumps({"forge_unet_storage_dtype": "Automatic (fp16 LoRA)", "sd_checkpoint_hash": ""}))
        loras.mkdir()
        for file in (FORGE / "models" / "Lora").glob("lg_*.safetensors"):
            shutil.copy(file, loras)
        flags = ["--ui-settings-file", str(config), "--lora-dir", str(loras), *self.prepare(self.store)]
        flags += [] if side == "guard" else ["--lora-guard-off"]
        # One thread: tiny tensors gain nothing from two, and threads that wait for each other on a busy machine take ten times as long.
        env = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **self.env, **env}
        if side == "reference":
            env |= {"LORA_GUARD_REFERENCE": "1", "LORA_GUARD_TESTS": str(ROOT / "tests")}
        bare, firsts = {}, {}
        log = self.store / f"{side}_{pending[0][0].name.split()[0]}.log"
        with Server(log, flags, env, web=True) as forge:
            wait_until_started(forge, 1)
            while pending:
                way, label = pending[0]
                walked = Walked()
                started, offset = time.perf_counter(), log.stat().st_size
                walker = Walker(forge, side, MODELS[label], walked, loras, self.store, bare)
                try:
                    if label not in firsts:
                        firsts[label] = walker.image()
                        started = time.perf_counter()
                    walked.first = firsts[label]
                    way.walk(walker)
                    walked.seconds = time.perf_counter() - started
                    walked.last = attempt(walker.image)
                    walker.measure()
                except ApiError as error:
                    walked.wrong.append(f"the way ended: {error}"[:200])
                except OSError as error:
                    walked.wrong.append(f"Forge ended: {error}")
                except (AttributeError, TypeError) as error:  # an error text in the place of a picture
                    walked.wrong.append(f"no picture to look at: {error}; {walked.errors()}"[:400])
                walked.console = log.read_bytes()[offset:].decode("utf-8", "replace")
                results[way.name, label] = walked
                pending.pop(0)
                keep(results)
                print(f"  {side}: {way.name}, {label}: {time.perf_counter() - started:.1f} s", flush=True)
                if forge.process.poll() is not None or (walked.wrong and "Forge ended" in walked.wrong[-1]):
                    return

    # All sides

    def run(self, only, model, fresh):
        pairs = [(w, m) for w in self.ways for m in w.models if is_in(only, w.name) and is_in(model, m)]
        assert pairs, f"no way is called {only}, or not for {model}"
        made = links(self.extensions)
        try:
            truths = {}
            for side in ("stock", "reference"):
                wanted = [(w, m) for w, m in pairs if MODELS[m].low_bit == (side == "reference")]
                truths |= self._kept_or_run(side, wanted, fresh)
            guard = self.run_side("guard", pairs)
        finally:
            for link in made:
                link.unlink(missing_ok=True)
        return [judge(w, m, MODELS[m].low_bit, truths[w.name, m], guard[w.name, m]) for w, m in pairs]

    def _kept_or_run(self, side, pairs, fresh):
        file = self.store / f"{side}.pickle"
        kept = pickle.loads(file.read_bytes()) if file.exists() and not fresh else {}
        stamps = {(w.name, m): self.stamped(w, m) for w, m in pairs}

        def keep(results):
            kept.update({stamps[pair]: walked for pair, walked in results.items()})
            file.write_bytes(pickle.dumps(kept))

        missing = [(w, m) for w, m in pairs if stamps[w.name, m] not in kept]
        if missing:
            self.run_side(side, missing, keep)
        return {pair: kept[stamp] for pair, stamp in stamps.items()}

    def main(self, description):
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--only", help="ways whose name contains this")
        parser.add_argument("--model", help="models whose name contains this")
        parser.add_argument("--fresh", action="store_true", help="make stock's pictures anew")
        parser.add_argument("--list", action="store_true")
        parser.add_argument("--write-docs", action="store_true", help=f"put the table between the {self.name} markers")
        options = parser.parse_args()
        if options.list:
            print("\n".join(f"{w.name}: {', '.join(w.models)}" for w in self.ways))
            return 0
        started = time.perf_counter()
        rows = self.run(options.only, options.model, options.fresh)
        wrong = [f"{row[0]}, {row[1]}: {sentence}" for row in rows for sentence in row[-1]]
        head = ["path", "model", "effect of the LoRA", "guard from the truth", "seconds stock / guard", "verdict"]
        text = markdown(head, [[*map(shown, row[:5]), "WRONG" if row[6] else row[5]] for row in rows])
        print(text)
        print(f"{len(rows)} rows, {time.perf_counter() - started:.0f} s")
        print("\n".join(wrong) or "all as it should be")
        if options.write_docs and not wrong and options.only is None and options.model is None:
            about = "Effect and difference: the smallest and the largest over the pictures of a path, in grey levels (0-255)."
            write_table(self.name, f"{measured_on()} {about}\n\n{text}")
        return int(bool(wrong))


def is_in(part, name):
    return part is None or part.lower() in name.lower()


def shown(value):
    return "-" if value is None else value
