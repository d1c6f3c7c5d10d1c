"""The rules that hold for every file: errors by name only, no wrong state, the same result in every mode, bounded memory and time."""

import contextlib
import io
import json
import logging
import random
import re
import shutil
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from support.machine_speed import CpuTime, times_slower_now

from lib_lora_guard import LoraGuard, cli
from lib_lora_guard.errors import LayerError, LoraGuardError, ModeError
from lib_lora_guard.hosts.plain import load_stored

from . import files, models
from .files import FuzzFile

MODES = ("auto", "bypass", "on_the_fly", "merge")
MOST_CPU_SECONDS = 2.0
"""CPU time of one call with one file: reading, matching, applying."""
MORE_BYTES = 64_000_000
CONTRIBUTION = 1e-4
EPSILON = {torch.float32: 1.2e-7, torch.bfloat16: 7.8e-3, torch.float16: 9.8e-4}


@dataclass
class Finding:
    """A rule that does not hold for a file."""

    rule: str
    detail: str


@dataclass
class Seen:
    """The findings and outcomes of one file."""

    findings: list = field(default_factory=list)
    outcomes: Counter = field(default_factory=Counter)
    most_seconds: float = 0.0
    over_bytes: int = 0

    def say(self, rule, detail):
        self.findings.append(Finding(rule, detail))


def _trace():
    return "".join(traceback.format_exc().splitlines(keepends=True)[-14:])


class Timed:
    """CPU seconds, and how far resident memory went up."""

    def __init__(self, seen, what, file=None):
        self.seen, self.what, self.file = seen, what, file

    def __enter__(self):
        self.rss = reset_peak()
        self.spent = CpuTime()
        self.spent.__enter__()

    def __exit__(self, *error):
        self.spent.__exit__(*error)
        seconds = self.spent.seconds
        self.seen.most_seconds = max(self.seen.most_seconds, seconds)
        if seconds > MOST_CPU_SECONDS and seconds > MOST_CPU_SECONDS * times_slower_now():
            self.seen.say("slow", f"{self.what}: {seconds:.1f} s of CPU")
        if self.file is not None and self.rss:
            grown = peak_bytes() - self.rss
            allowed = self.file.tensor_bytes + 8 * self.file.header_bytes + MORE_BYTES
            self.seen.over_bytes = max(
                self.seen.over_bytes, grown - self.file.tensor_bytes - 8 * self.file.header_bytes
            )
            if grown > allowed:
                self.seen.say("memory", f"{self.what}: {grown / 1e6:.0f} MB more, allowed {allowed / 1e6:.0f} MB")


def reset_peak():
    """Sets the highest resident memory back to the present one and returns it; 0 where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return peak_bytes()


def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def is_line(text):
    return text.isprintable() and len(text) < 2000


def check_plain(file: FuzzFile, rng: random.Random, seen: Seen):
    """LoraGuard in all modes on the file's model, alone or between sound files."""
    subject = models.subject(file.model, file.storage)
    guard = LoraGuard(subject.model)
    strength = rng.choice((1.0, 1.0, 0.7, -0.5, 0.0, 2.0))
    stack = [(file.path, strength)]
    if rng.random() < 0.25:
        good = [good_of(file.path.parent, file.model, n) for n in (1, 2)]
        stack = [(good[0], 0.6), *stack, (good[1], 0.4)]
        seen.outcomes["in a stack"] += 1
    as_trained, keeps = rng.random() < 0.15, rng.random() < 0.5
    results, refusals, before = {}, {}, subject.base
    for mode in MODES:
        outcome = _apply(subject, guard, stack, mode, as_trained, file, seen)
        if isinstance(outcome, LoraGuardError):
            refusals[mode] = outcome
            now = subject.outputs()
            if not all(models.same(a, b) for a, b in zip(now, before, strict=True)):
                seen.say("wrong state", f"{mode}: refused ({outcome}), and the model is another than before")
        elif outcome is not None:
            results[mode] = outcome
            if mode == "merge" and len(stack) == 1 and file.wanted and not as_trained:
                _check_values(subject, file, strength, seen)
        before = outcome if keeps and isinstance(outcome, list) else before
        if not keeps:
            before = subject.base
            _remove(subject, guard, seen)
    _remove(subject, guard, seen)
    if found := subject.differences():
        seen.say("wrong state", f"after remove: {found[:4]}")
        models.subject.cache_clear()
    _compare(subject, results, refusals, seen)
    if file.must_apply and refusals.keys() - {"merge"}:
        seen.say("sound file refused", str(refusals))
    plain = {mode for mode, error in refusals.items() if not isinstance(error, ModeError)}
    if plain == {"merge"} and _is_beyond(results):
        # A product of the factors beyond fp32: merging sees the values and refuses them, the others make a picture of no numbers.
        seen.outcomes["beyond fp32"] += 1
    elif plain and plain <= {"auto", "merge"} and all(_weight_is_beyond(refusals[mode], file) for mode in plain):
        # Only a merge makes every value of the patched weight; bypass makes those that the inputs meet, as numbers of a picture.
        seen.outcomes["patched weight beyond its type"] += 1
    elif plain and results:
        seen.say("modes differ", f"refused in {sorted(plain)} only: {refusals[sorted(plain)[0]]}")
    seen.outcomes["applied" if results else "refused"] += 1
    if not results:
        seen.outcomes[f"refused: {type(next(iter(refusals.values()), None)).__name__}"] += 1
        seen.outcomes[f"sentence: {_sentence(next(iter(refusals.values()), None))}"] += 1


def _is_beyond(results):
    return any(not torch.isfinite(output).all() for outputs in results.values() for output in outputs)


def _weight_is_beyond(error, file):
    """True where a refusal for the patched values' size has a reason in the file: a value large enough to be one factor of such a product."""
    message = str(error)
    if "the patched values do not fit into" not in message:
        return False
    most = torch.finfo(torch.float16 if "fit into fp16" in message else torch.float32).max
    values = [tensor.double().nan_to_num().abs().max() for tensor in _tensors(file.path) if tensor.numel()]
    # Two factors, an alpha and a strength share the size of the product between them.
    return max(values, default=0.0) > most**0.25


def _tensors(path):
    try:
        return [one for one in load_file(path).values() if one.is_floating_point()]
    except (SafetensorError, ValueError):
        return []


def _sentence(error):
    """The catalogue's name of a refusal, without the names of file and key before it."""
    message = getattr(error, "message", None)
    while getattr(message, "key", None) == "about.one":
        message = list(message.facts.values())[-1]
    return getattr(message, "key", None) or re.sub(r"\W+|\d+", " ", str(message))[:40]


def good_of(folder, model, number):
    path = folder / f"good{number}.safetensors"
    return path if path.exists() else files.good_file(path, model)


def _apply(subject, guard, stack, mode, as_trained, file, seen):
    """The outputs, the error by name, or None after a finding."""
    try:
        with Timed(seen, f"apply {mode}", file):
            report = guard.apply(stack, mode, as_trained)
    except LoraGuardError as error:
        text = str(error)
        if not is_line(text):
            seen.say("not printable", repr(text[:600]))
        # Of these two the cause is the weight, with the whole stack on it.
        of_weight = isinstance(error, ModeError) or "the patched values" in text
        if not of_weight and not any(path.name[:20] in text for path, _ in stack):
            seen.say("without the file's name", text)
        if isinstance(error, LayerError):
            seen.say("raw error", f"apply {mode}: {text}")
        return error
    except Exception:
        seen.say("raw error", f"apply {mode}: {_trace()}")
        return None
    try:
        lines = str(report).split("\n")
        of_file = next(one for (path, _), one in zip(stack, report.loras, strict=True) if path == file.path)
        if file.must_apply and (of_file.skipped or of_file.lost):
            seen.say("sound file refused", f"in part: {[*of_file.skipped, *of_file.lost][:3]}")
        if len(lines) != 1 + len(stack) or not all(map(is_line, lines)) or not is_line(str(report.line())):
            seen.say("not printable", repr(str(report)[:1000]))
        with Timed(seen, f"forward {mode}"):
            return subject.outputs()
    except Exception:
        seen.say("raw error", f"forward {mode}: {_trace()}")
        return None


def _remove(subject, guard, seen):
    try:
        guard.remove()
    except Exception:
        seen.say("raw error", f"remove: {_trace()}")


def _check_values(subject, file, strength, seen):
    """The merged weights against the formulas, in float64."""
    for key, rows, wanted, numbers in file.wanted:
        before = subject.bits[key].view(torch.float32).reshape(subject.objects[key][0].shape).double()
        part = before if rows is None else before.narrow(0, *rows)
        right = before.clone()
        (right if rows is None else right.narrow(0, *rows)).copy_(wanted(part, strength, numbers).reshape(part.shape))
        found = subject.model.get_parameter(key).detach().double()
        size = (right - before).norm()
        error = (found - right).norm() / size if size else (found - right).norm()
        limit = CONTRIBUTION + 1e-6 * float(right.norm() / size) if size else 0.0
        seen.outcomes["values checked"] += 1
        if not error <= limit and torch.isfinite(right).all():
            seen.say("wrong value", f"{key}: error {float(error):.2e} of the contribution, allowed {limit:.2e}")


def _compare(subject, results, refusals, seen):
    """Outputs of all modes: the same within the rounding of the model's dtype."""
    if len(results) < 2:
        return
    first, *others = results
    epsilon = EPSILON[subject.dtype]
    for mode in others:
        for n, (one, other, base) in enumerate(zip(results[first], results[mode], subject.base, strict=True)):
            if one.shape != other.shape:
                seen.say("modes differ", f"output {n}: {first} {list(one.shape)}, {mode} {list(other.shape)}")
                continue
            one, other, base = one.double(), other.double(), base.double()
            if not (torch.isfinite(one).all() and torch.isfinite(other).all()):
                if torch.isfinite(one).all() != torch.isfinite(other).all():
                    seen.outcomes["finite in one mode only"] += 1
                continue
            size = max(float((one - base).norm()), float((other - base).norm()))
            scale = max(float(t.norm()) for t in (one, other, base))
            if float((one - other).norm()) > 0.02 * size + 16 * epsilon * scale:
                seen.say(
                    "modes differ",
                    f"output {n}: {first} and {mode} differ by {float((one - other).norm()):.3g}; contribution {size:.3g}, output {scale:.3g}",
                )


SIZES = ("--vram", "8GB", "--ram", "16GB")


def check_command_line(file: FuzzFile, rng, seen, checkpoint):
    """`inspect` and `plan` in this process: an exit code, the file's name, and lines that can be printed."""
    path, output = str(file.path), file.path.with_name("baked.safetensors")
    good = str(good_of(file.path.parent, file.model, 1))
    words = rng.choice(
        (
            ["inspect", path], ["inspect", path, "--model", str(checkpoint)], ["inspect", path, "--json"], ["inspect", good, "--model", path],
            ["plan", str(checkpoint), path, *SIZES], ["plan", str(checkpoint), f"{path}:0.5", good, *SIZES, "--json"], ["plan", path, good, *SIZES],
        )
    )  # fmt: skip
    if rng.random() < 0.08:
        as_lora, as_model = [str(checkpoint), good, path], [path, good, "--dtype", "fp16"]
        words = ["bake", *rng.choice((as_lora, as_model)), "-o", str(output)]
    before = sorted(p.name for p in file.path.parent.iterdir())
    out, err = io.StringIO(), io.StringIO()
    try:
        with Timed(seen, words[0], file), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(words)
    except SystemExit as error:
        code = error.code
    except Exception:
        seen.say("raw error", f"{words[0]}: {_trace()}")
        return
    seen.outcomes[f"{words[0]} ended with {code}"] += 1
    said, wrong = out.getvalue(), err.getvalue()
    if code not in (0, 1) or (code == 1 and (wrong.count("\n") != 1 or "Traceback" in wrong)):
        seen.say("raw error", f"{words}: code {code}: {wrong[-600:]}")
    if words[0] == "bake" and output.exists() != (code == 0):
        seen.say("wrong state", f"{words}: code {code}, a new file: {output.exists()}")
    if sorted(p.name for p in file.path.parent.iterdir() if p.name != output.name) != before:
        seen.say("renamed", f"{words}: files left behind or gone")
    output.unlink(missing_ok=True)
    if not all(line.isprintable() for line in (said + wrong).split("\n")):
        seen.say(
            "not printable",
            f"{words[0]}: {[line for line in (said + wrong).split(chr(10)) if not line.isprintable()][:3]!r}",
        )
    stems = [Path(word.partition(":")[0]).stem[:20] for word in words[1:] if word.startswith("/")]
    # JSON writes other letters than ASCII in its own way.
    stems += [json.dumps(stem)[1:-1] for stem in stems]
    if not any(stem in said + wrong for stem in stems) and "?" not in said + wrong:
        seen.say("without the file's name", f"{words[:1]} code {code}: {(said + wrong)[:400]}")


def check_stored(file, seen):
    """The file as the model itself."""
    try:
        with Timed(seen, "load_stored", file):
            load_stored(models.Blocks(), file.path)
    except LoraGuardError as error:
        if not is_line(str(error)):
            seen.say("not printable", repr(str(error)[:600]))
    except Exception:
        seen.say("raw error", f"load_stored: {_trace()}")


class HandedError(Exception):
    """The guard gave a file to the host's own reader."""


class Hosts:
    """The double of Forge and the WebUI's prompt, made once for many files."""

    def __init__(self, folder):
        import sys
        import types

        import pytest
        from contract.host import Host
        from support.webui import Web

        from lib_lora_guard.hosts.forge import takeover

        sys.argv = ["contract", "--always-cpu"]
        self.patch = pytest.MonkeyPatch()
        self.host = Host()
        self.takeover, self.types = takeover, types
        self.host.guard = takeover.install()
        self.patchers = {}
        self.folder = folder / "web"
        self.folder.mkdir()
        self.web = Web(self.folder, self.patch)
        self.x = models.some(1, 16, 32)
        self.good = [files.good_file(self.folder / f"good{n}.safetensors", "zoo") for n in (1, 2)]

    def close(self):
        self.host.memory.current_loaded_models.clear()
        self.takeover.uninstall()
        self.host.close()
        self.patch.undo()

    def patcher(self, storage):
        if storage not in self.patchers:
            patcher, _ = self.host.build(storage)
            self.patchers[storage] = (patcher, self.picture(patcher))
        return self.patchers[storage]

    def picture(self, patcher):
        self.host.load(patcher)
        with torch.no_grad():
            return patcher.model(
                self.x.to(next(p.dtype for p in patcher.model.parameters() if p.dtype in EPSILON))
            ).clone()


def check_forge(file, rng, seen, hosts):
    """A sound file, this one, and a sound one, through the guard's reader in the double of Forge."""
    from contract.lora_files import own_reader

    from lib_lora_guard.hosts.webui.lora_files import LoraFiles

    path = hosts.folder / file.path.name
    shutil.copyfile(file.path, path)
    for old in hosts.folder.glob("adapter_config.json"):
        old.unlink()
    if (config := file.path.with_name("adapter_config.json")).exists():
        shutil.copyfile(config, hosts.folder / config.name)
    listing = sorted(p.name for p in hosts.folder.iterdir())
    reader = rng.choice((hosts.host.guard.files, LoraFiles()))
    patcher, base = hosts.patcher(rng.choice(("fp32", "bf16", "fp8", "Q8_0")))

    def handed(*args, **kwargs):
        raise HandedError

    def chain(paths):
        changed = patcher
        for one in paths:
            state = reader.load_state(own_reader(handed), str(one))
            changed, _ = reader.load_for_models(handed, changed, None, state, 0.8, 0.8, str(one))
        return changed

    try:
        alone = chain(hosts.good)
        without = hosts.picture(alone)
        with Timed(seen, "Forge", file):
            together = chain([hosts.good[0], path, hosts.good[1]])
            got = hosts.picture(together)
        applied = len(together.lora_patches) - len(alone.lora_patches)
        seen.outcomes["Forge: applied" if applied else "Forge: refused"] += 1
        if len(alone.lora_patches) != 2 or applied not in (0, 1):
            seen.say(
                "takes others along",
                f"{len(alone.lora_patches)} sound files alone, {len(together.lora_patches)} with this one",
            )
        if not applied and not torch.equal(got, without):
            seen.say("takes others along", "the picture is another than with the sound files alone")
        if not torch.equal(hosts.picture(patcher), base):
            seen.say("wrong state", "Forge: the picture without LoRAs is another")
    except HandedError:
        seen.say("handed to the host", _trace())
    except Exception:
        seen.say("raw error", f"Forge: {_trace()}")
        hosts.patchers.clear()
    if rng.random() < 0.3:
        _check_prompt(path, seen, hosts)
    if sorted(p.name for p in hosts.folder.iterdir()) != listing:
        seen.say("renamed", f"{sorted(p.name for p in hosts.folder.iterdir())} instead of {listing}")
    path.unlink(missing_ok=True)


def _check_prompt(path, seen, hosts):
    """The three of them in a prompt."""
    if path.suffix != ".safetensors" or not re.fullmatch(r"[\w.-]+", path.stem):
        return
    web = hosts.web
    web.tracebacks.clear()
    web.networks.available_network_aliases.clear()
    web.networks.list_available_networks()
    try:
        with Timed(seen, "prompt"):
            request = web.image(f"a <lora:good1:0.8> <lora:{path.stem}:0.8> <lora:good2:0.8>")
    except HandedError:
        seen.say("handed to the host", _trace())
        return
    except (Exception, AssertionError):
        seen.say("raw error", f"prompt: {_trace()} {web.tracebacks[:1]!r}")
        return
    names = [name for name, _ in web.strengths()]
    if not {"good1", "good2"} <= set(names):
        seen.say("takes others along", f"in a prompt: {names}, {list(request.comments)}")
    if path.stem not in names and not any(path.name[:20] in comment for comment in request.comments):
        seen.say("refused without a word", f"{names}, {list(request.comments)}")
    if not all(comment.isprintable() for comment in request.comments):
        seen.say("not printable", repr(list(request.comments)))
    seen.outcomes["prompts"] += 1


def write_checkpoint(path, model):
    """A model file of the names and shapes of one of the small models."""
    rng, values = random.Random(1), models.torch.Generator().manual_seed(1)
    entries = []
    for key, shape in models.shapes_of(model).items():
        tensor = torch.randn(shape, generator=values)
        dtype, raw, _ = files.dtypes.encoded(tensor, "BF16", rng)
        prefix = "" if model in ("zoo", "blocks", "flux") else "model.diffusion_model."
        entries.append(files.Entry(prefix + key, dtype, list(shape), raw))
    path.write_bytes(files.container.file_bytes(entries, {}))
    return path


@contextlib.contextmanager
def quiet():
    """Logs of refused files are made, so that a fault in making one is seen, and shown to no one."""
    logger = logging.getLogger("lib_lora_guard")
    handler = _Formats()
    before, spread = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel("INFO")
    logger.propagate = False
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = spread


class _Formats(logging.Handler):
    def __init__(self):
        super().__init__()
        self.bad, self.tracebacks = [], []

    def emit(self, record):
        text = record.getMessage()
        if not is_line(text):
            self.bad.append(text)
        if record.exc_info and record.levelno >= logging.WARNING:
            self.tracebacks.append("".join(traceback.format_exception(*record.exc_info))[-1500:])
