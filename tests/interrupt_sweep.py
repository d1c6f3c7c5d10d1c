"""Interrupts an apply, a change and a remove at every place where CPython can deliver an interrupt, once and twice.

    python tests/interrupt_sweep.py                 one interrupt, every place from the first change of the model to the return
    python tests/interrupt_sweep.py --whole         the same from the start of the call
    python tests/interrupt_sweep.py --twice         every place, with a second interrupt at every place that follows
    python tests/interrupt_sweep.py --file --modes merge   the backups of merges are the checkpoint file
    python tests/interrupt_sweep.py --signals 5000  real SIGALRM at random microseconds; --twice: two of them

CPython looks for signals where a function begins, after a call, and where a loop jumps back; 3.10 also before a handler runs. A trace
function raises there; `--opcodes` raises before every instruction, which is stricter than CPython. It knows the public names of the product alone, so
that it runs on other versions of it (PYTHONPATH). After each interrupt the model must have the stack before or the one after,
whole; then a remove must give every bit and every table of hooks back.
"""

import argparse
import dis
import functools
import itertools
import logging
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lib_lora_guard import LoraGuard
from lib_lora_guard.patching import backup, engine, file_backup, file_reader, merge_attachment

MODES = ("auto", "bypass", "on_the_fly", "merge")
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """Linear layers and a norm: every mode, a bypass with hooks before and after its layer, merges of small parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.requires_grad_(False)

    def forward(self, x):
        for layer in self.l:
            x = torch.tanh(layer(x))
        return self.norm(x)


def write_lora(path, seed, norm):
    """Two low-rank layers, one with a DoRA by column; where `norm`, a difference for the norm and a bias."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    tensors = {}
    for n in range(3):
        tensors[f"l.{n}.lora_up.weight"], tensors[f"l.{n}.lora_down.weight"] = rand(16, 4), rand(4, 16)
    tensors["l.1.dora_scale"] = rand(1, 16).abs() + 0.5
    if norm:
        tensors["norm.diff"], tensors["l.0.diff_b"] = rand(16), rand(16)
    save_file(tensors, str(path))
    return path


class Files:
    """The LoRA files. "bypass" and "on_the_fly" take no norm and no bias."""

    def __init__(self, folder):
        self.of = {
            (name, norm): write_lora(Path(folder) / f"{name}{norm}.safetensors", seed, norm)
            for (name, seed), norm in itertools.product((("a", 3), ("b", 5)), (False, True))
        }

    def stack(self, names, mode):
        return [(self.of[name.lower(), mode in ("auto", "merge")], 0.5 if name.isupper() else 1.0) for name in names]


ACTS = {"apply": ("", "a"), "change": ("a", "b"), "strength": ("a", "A"), "remove": ("a", "")}
"""The stack before and after, by names of LoRAs; a capital has half the strength."""


class Case:
    """One act in one mode, on a model that is used again as long as nothing is wrong with it."""

    patience_seconds = 20.0
    """For another thread's change, in milliseconds' work."""

    def __init__(self, files, act, mode):
        self.files, self.mode, self.name = files, mode, f"{mode} {act}"
        self.old, self.new = ACTS[act]
        self.found = Counter()
        self.examples = []
        self.renew()
        self.signatures = {}
        for names in ("", self.old, self.new):
            self.change(names)
            self.signatures[names] = self.signature()
        self.change("")

    def renew(self):
        self.model = Model()
        self.guard = LoraGuard(self.model)
        self.bits = {name: p.data.clone() for name, p in self.model.named_parameters()}

    def change(self, names):
        if names:
            self.guard.apply(self.files.stack(names, self.mode), mode=self.mode)
        else:
            self.guard.remove()

    def signature(self):
        with torch.no_grad():
            try:
                output = self.model(X).numpy().tobytes()
            except Exception as error:
                output = f"{type(error).__name__}: {error}"
        return output, tuple(p.detach().numpy().tobytes() for p in self.model.parameters())

    def wrong_for_others(self):
        """Returns what goes wrong where another thread changes the model; "" where nothing does."""
        found = []

        def change():
            try:
                guard = LoraGuard(self.model)
                guard.apply(self.files.stack(self.old or self.new, self.mode), mode=self.mode)
                guard.remove()
                found.append("")
            except Exception as error:
                found.append(f"{type(error).__name__} in another thread: {error}")

        thread = threading.Thread(target=change, daemon=True)
        thread.start()
        thread.join(self.patience_seconds)
        return found[0] if found else "a lock stays taken"

    def left_over(self):
        """What a model without LoRAs does not have."""
        for name, layer in self.model.named_modules():
            tables = [v for k, v in vars(layer).items() if "forward" in k and "hooks" in k and isinstance(v, dict)]
            if any(tables):
                yield f"{name}: hooks"
            if "forward" in vars(layer):
                yield f"{name}: forward"
            if type(layer).__call__ is not nn.Module.__call__:
                yield f"{name}: call"

    def run(self, interrupted):
        """Makes the change under `interrupted`, which tells whether an interrupt came, and looks at what is left."""
        self.change(self.old)
        try:
            came = interrupted(lambda: self.change(self.new))
        except SystemError as error:
            # Of CPython 3.10, where a signal comes while it makes the exception of another one.
            came = "KeyboardInterrupt" in str(error) or str(error)
        except BaseException as error:
            came = f"{type(error).__name__}: {error}"
        if came is False:
            self.found["not reached"] += 1
            self.change("")
            return False
        self.found["interrupts"] += 1
        wrong = [] if came is True else [came]
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            wrong.append("gradients stay off")
            torch.set_grad_enabled(True)
        signature = self.signature()
        if signature == self.signatures[self.new]:
            self.found["new stack"] += 1
            now = self.new
        elif signature == self.signatures[self.old]:
            now = self.old
        else:
            wrong.append("half patched")
            now = None
        report = getattr(self.guard, "report", None)
        if report is not None and now is not None:
            said = [(lora.label, lora.strength) for lora in report.loras]
            if said != [(path.name, strength) for path, strength in self.files.stack(now, self.mode)]:
                wrong.append("untrue report")
        try:
            self.guard.remove()
        except Exception as error:
            wrong.append(f"remove() raises {type(error).__name__}")
        lost = [name for name, p in self.model.named_parameters() if not same_bits(p, self.bits[name])]
        if lost:
            wrong.append("originals lost for ever")
        if list(self.left_over()):
            wrong.append("hooks without an owner")
        if self.signature() != self.signatures[""]:
            wrong.append("wrong for ever")
        if why := self.wrong_for_others():
            wrong.append(why)
        for what in wrong:
            self.found[what] += 1
        if wrong:
            self.found["wrong"] += 1
            self.examples.append(wrong)
            self.renew()
        return True


def same_bits(parameter, bits):
    return parameter.dtype == bits.dtype and parameter.detach().numpy().tobytes() == bits.numpy().tobytes()


CHECKED_AFTER = (
    ("CALL", "JUMP_BACKWARD", "RESUME") if sys.version_info >= (3, 11) else ("CALL", "JUMP_ABSOLUTE", "POP_JUMP")
)
"""Beginnings of the names of instructions after which this CPython looks for signals."""


HANDLER = "" if sys.version_info >= (3, 11) else "CALL"
"""In the place of the instruction before a handler."""


@functools.lru_cache(None)
def instructions(code):
    return {one.offset: one.opname for one in dis.get_instructions(code)}


CALLBACKS_ALONE = ("torch/_dynamo/utils.py",)
"""Of this file only callbacks of weak references run in a change, where models were compiled before: the collector calls them, and
Python ends an interrupt there itself."""
CALLBACKS = (("weakref.py", "remove"), ("_weakrefset.py", "_remove"))
"""The same in files that have more: of dictionaries and sets of weak references, whose layers end in the middle of a change."""


class Tracer:
    """Raises KeyboardInterrupt at places counted from 1: at `first`, and at the place `second` after that one.

    `whole`: counts from the start; else from `Engine.commit` on, before which nothing of the model has changed. `opcodes`: every
    instruction is a place.
    """

    def __init__(self, first=0, second=0, whole=False, opcodes=False):
        self.first, self.second, self.whole, self.opcodes = first, second, whole, opcodes
        self.count, self.after, self.raised = 0, 0, 0
        self._last = {}
        self._here = None

    def __call__(self, work):
        """Runs `work`; returns whether all interrupts came."""
        self._here = sys._getframe()
        self.armed = self.whole
        # What Python ends itself it says to this, in the middle of the work. Code of a test runner there would be a place; this is C.
        said_to, sys.unraisablehook = sys.unraisablehook, bool
        if self.second:
            sys.setprofile(self._profile)
        sys.settrace(self._enter)
        try:
            work()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
            sys.setprofile(None)
            sys.unraisablehook = said_to
            self._last.clear()
        return self.raised == (2 if self.second else 1) or (self.raised == 1 and not self.second)

    def _enter(self, frame, event, argument):
        if not self.armed:
            if frame.f_code.co_name != "commit" or not frame.f_code.co_filename.endswith("engine.py"):
                return None
            self.armed = True
            self._trace_callers(frame)
        code = frame.f_code
        if code.co_filename.endswith(CALLBACKS_ALONE) or (Path(code.co_filename).name, code.co_name) in CALLBACKS:
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _trace_callers(self, frame):
        while frame is not None and frame is not self._here:
            frame.f_trace, frame.f_trace_opcodes = self._step, True
            frame = frame.f_back

    def _step(self, frame, event, argument):
        if event == "exception":
            # What runs next is a handler: no place, although a call came before it.
            self._last[frame] = HANDLER
        if event != "opcode":
            return self._step
        before = self._last.get(frame)
        self._last[frame] = instructions(frame.f_code).get(frame.f_lasti, "")
        if (
            before is not None
            and not self.opcodes
            and not (before.startswith(CHECKED_AFTER) and "INTRINSIC" not in before)
        ):
            return self._step
        if self.raised:
            self.after += 1
            if self.after == self.second:
                self.raised = 2
                raise KeyboardInterrupt
        else:
            self.count += 1
            if self.count == self.first:
                self.raised = 1
                raise KeyboardInterrupt
        return self._step

    def _profile(self, frame, event, argument):
        # A trace function that has raised is switched off. The next call or return switches it on again.
        if self.raised == 1 and sys.gettrace() is None and frame.f_code is not Tracer.__call__.__code__:
            sys.settrace(self._enter)
            self._trace_callers(frame)


def count_places(case, **how):
    tracer = Tracer(**how)
    case.change(case.old)
    tracer(lambda: case.change(case.new))
    case.change("")
    return tracer.count


def sweep(case, stride=1, whole=False, opcodes=False, start=1):
    """One interrupt at every `stride`-th place."""
    for place in range(start, count_places(case, whole=whole, opcodes=opcodes) + 1, stride):
        case.run(Tracer(place, whole=whole, opcodes=opcodes))


def sweep_twice(case, stride=1, second_stride=1, opcodes=False, start=1):
    """A first interrupt at every `stride`-th place and a second one at every `second_stride`-th place after it."""
    for first in range(start, count_places(case, opcodes=opcodes) + 1, stride):
        second = 1 + first % second_stride
        while case.run(Tracer(first, second, opcodes=opcodes)):
            second += second_stride


class Alarm:
    """Real signals at random microseconds, one or two, the second within 0.3 ms of the first."""

    def __init__(self, seconds, twice, rng, found):
        self.seconds, self.twice, self.rng, self.found = seconds, twice, rng, found

    def __call__(self, work):
        count, active, wait = 0, True, self.rng.uniform(1e-6, 3e-4)

        def ring(number, frame):
            nonlocal count
            # No function of Python is called here: where the second signal meets such a call, CPython 3.10 raises a SystemError of the
            # call in place of the interrupt. Outside the change an interrupt is not the product's.
            while active and frame is not None:
                if frame.f_code is Case.change.__code__:
                    count += 1
                    if self.twice and count == 1:
                        signal.setitimer(signal.ITIMER_REAL, wait)
                    raise KeyboardInterrupt
                frame = frame.f_back

        before = signal.signal(signal.SIGALRM, ring)
        try:
            signal.setitimer(signal.ITIMER_REAL, self.rng.uniform(1e-6, self.seconds))
            work()
            active = False
        except KeyboardInterrupt:
            active = False
        finally:
            active = False
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
        self.found["both"] += count > 1
        return count > 0


def alarms(cases, total, twice, seed):
    """Real signals, spread over the cases, until `total` have hit."""
    rng = random.Random(seed)
    lengths = {}
    for case in cases:
        case.change(case.old)
        started = time.perf_counter()
        case.change(case.new)
        lengths[case] = 1.2 * (time.perf_counter() - started)
        case.change("")
    # An interrupt may come in a weak reference's callback, where CPython drops it with a line on stderr.
    sys.unraisablehook = lambda _: None
    for case in itertools.cycle(cases):
        if sum(c.found["interrupts"] for c in cases) >= total:
            sys.unraisablehook = sys.__unraisablehook__
            return
        case.run(Alarm(lengths[case], twice, rng, case.found))


def leave_originals_to_file(path):
    """Makes every merge's backup the file that the model comes from, as on a card; each weight is four pieces."""
    save_file(Model().state_dict(), str(path))
    for module in (merge_attachment, backup, file_backup):
        module.lies_in_ram = lambda tensor: False
    file_backup.LEAST_BYTES = file_backup.SMALLEST_BYTES = file_backup.LEAST_BYTES_PER_SECOND = 0
    file_reader.PIECE_BYTES = 256
    engine.Engine.__init__.__defaults__ = (*engine.Engine.__init__.__defaults__[:-1], lambda: [path])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--opcodes", action="store_true")
    parser.add_argument("--file", action="store_true", help="backups in the checkpoint file")
    parser.add_argument("--signals", type=int, default=0)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--second-stride", type=int, default=1)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--acts", default=",".join(ACTS))
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    # As weights above 1 MB are: merged when they are put in place.
    merge_attachment.KEPT_BYTES = 16
    with tempfile.TemporaryDirectory() as folder:
        if chosen.file:
            leave_originals_to_file(Path(folder) / "model.safetensors")
        files = Files(folder)
        cases = [Case(files, act, mode) for mode in chosen.modes.split(",") for act in chosen.acts.split(",")]
        started = time.perf_counter()
        if chosen.signals:
            alarms(cases, chosen.signals, chosen.twice, chosen.seed)
        for case in [] if chosen.signals else cases:
            if chosen.twice:
                sweep_twice(case, chosen.stride, chosen.second_stride, chosen.opcodes)
            else:
                sweep(case, chosen.stride, chosen.whole, chosen.opcodes)
            print(case.name, dict(case.found), case.examples[:2], flush=True)
        total = sum((case.found for case in cases), Counter())
        print(f"python {sys.version.split()[0]}, torch {torch.__version__}, {time.perf_counter() - started:.0f} s")
        print("all", dict(total))
    return 1 if total["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
