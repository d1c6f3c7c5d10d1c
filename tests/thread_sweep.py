"""Two threads apply, change and remove while four run the layers and the model.

    python tests/thread_sweep.py --seconds 60

First each mode alone, where the two appliers change between two stacks: every call of a layer must give the bits of the one or
of the other, and never those of the base (but for a bypass with hooks before and after its layer). Then all modes in turn with
removes between: here a call may give the base too, for a moment. At the end a remove must give every bit and every table of hooks
back. It knows the public names of the product alone, so that it runs on other versions of it (PYTHONPATH).
"""

import argparse
import logging
import random
import sys
import tempfile
import threading
import time
from collections import Counter

import torch
from interrupt_sweep import MODES, Files, Model, same_bits

from lib_lora_guard import LoraGuard

APPLIERS, RUNNERS = 2, 4
STACKS = ("a", "b", "A")
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
BIAS = "l.0"
"""The layer whose weight and bias both get a LoRA in "auto" and "merge": two weights, so that a call may have one of each."""


class Threads:
    """The threads on one model. `modes`: the appliers choose among them; `removes`: and take everything off between."""

    def __init__(self, files, modes, removes, seed=0):
        self.files, self.modes, self.removes, self.seed = files, modes, removes, seed
        self.model = Model()
        self.bits = {name: p.data.clone() for name, p in self.model.named_parameters()}
        self.layers = {name: layer for name, layer in self.model.named_modules() if name and not list(layer.children())}
        self.found, self.examples = Counter(), []
        self.over = threading.Event()
        self.allowed = self.outputs_of_all_stacks()

    def outputs(self):
        with torch.no_grad():
            return {name: layer(X).numpy().tobytes() for name, layer in self.layers.items()}

    def outputs_of_all_stacks(self):
        """The outputs of each layer that a call may give."""
        allowed = {name: set() for name in self.layers}
        guard, base = LoraGuard(self.model), self.outputs()
        for mode in self.modes:
            for names in STACKS:
                guard.apply(self.files.stack(names, mode), mode=mode)
                for name, output in self.outputs().items():
                    allowed[name].add(output)
        guard.remove()
        for name, layer in self.layers.items():
            if self.removes or type(layer) is not torch.nn.Linear or name == "l.1":
                allowed[name].add(base[name])
        return allowed

    def apply(self, number):
        guard, rng = LoraGuard(self.model), random.Random(f"{self.seed} {number}")
        while not self.over.is_set():
            try:
                if self.removes and rng.random() < 0.3:
                    guard.remove()
                else:
                    mode = rng.choice(self.modes)
                    guard.apply(self.files.stack(rng.choice(STACKS), mode), mode=mode)
                self.found["changes"] += 1
            except Exception as error:
                self.wrong(f"a change raises {type(error).__name__}: {error}")

    def run(self, number):
        names = list(self.layers)
        with torch.no_grad():
            while not self.over.is_set():
                try:
                    for name in names:
                        output = self.layers[name](X).numpy().tobytes()
                        if output not in self.allowed[name] and not (
                            name == BIAS and {"auto", "merge"} & set(self.modes)
                        ):
                            self.wrong(f"{name}: an output of no stack")
                    if not self.model(X).isfinite().all():
                        self.wrong("a pass is not finite")
                    self.found["passes"] += 1
                except Exception as error:
                    self.wrong(f"a pass raises {type(error).__name__}: {error}")

    def wrong(self, what):
        self.found["wrong"] += 1
        if len(self.examples) < 3:
            self.examples.append(what)

    def __call__(self, seconds, at_least=0):
        """Runs for `seconds`, or longer on a busy machine until there were `at_least` changes and passes."""
        # More switches between threads than the 5 ms that are usual.
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        LoraGuard(self.model).apply(self.files.stack("a", self.modes[0]), mode=self.modes[0])
        work = [(self.apply, n) for n in range(APPLIERS)] + [(self.run, n) for n in range(RUNNERS)]
        threads = [threading.Thread(target=act, args=(n,), daemon=True) for act, n in work]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        end = time.monotonic() + 60
        while min(self.found["changes"], self.found["passes"]) < at_least and time.monotonic() < end:
            time.sleep(0.05)
        self.over.set()
        for thread in threads:
            thread.join(30)
            if thread.is_alive():
                self.wrong("a thread hangs")
                break
        sys.setswitchinterval(before)
        if thread.is_alive():
            # It may have the lock of the model.
            return self.found
        try:
            LoraGuard(self.model).remove()
        except Exception as error:
            self.wrong(f"remove() raises {type(error).__name__}")
        for name, parameter in self.model.named_parameters():
            if not same_bits(parameter, self.bits[name]):
                self.wrong(f"{name} is patched for ever")
        for name, layer in self.model.named_modules():
            if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
                self.wrong(f"{name}: something is left on it")
        return self.found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    total = Counter()
    with tempfile.TemporaryDirectory() as folder:
        files = Files(folder)
        for modes, removes in [*(((mode,), False) for mode in MODES), (MODES, True)]:
            threads = Threads(files, modes, removes, chosen.seed)
            total += threads(chosen.seconds / (1 + len(MODES)))
            print("+".join(modes), dict(threads.found), threads.examples, flush=True)
    print("all", dict(total))
    return 1 if total["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
