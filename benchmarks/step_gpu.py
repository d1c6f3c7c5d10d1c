"""What a LoRA costs the linear layers and the attention of one Flux-dev step on a card, with all weights on it.

    python benchmarks/step_gpu.py --commit HASH --json benchmarks/results/step-HASH.json [--time-limit 220] [--cases "fp8 lora 64"] [--kernels] [--smoke]

A case is `storage kind rank`, for several LoRAs `storage kind COUNTxRANK`, and `@512` or `@768` for a smaller image; of LoKr the rank is the
number of blocks a side. Three ways take turns in a changing order, with runs of five steps of which the last three count, each with the guard's own code:
`host` has no LoRA, `guard` goes as a user's step does, with its fused kernels where they are taken, `plain` is the same in plain torch. Of LoRAs of fp8
and of the first goals three more are tried, which the guard does not have: `weight` adds the product to the temporary weight in plain torch, `wider` (fp8) makes that weight with
the ranks as further columns, so that the layer's own product adds them, `first` begins the output with the LoRA and the bias, so that the layer's own product adds to it. A step is the sequence of 19 double and 38
single blocks on random activations: 304 linear layers in bf16, and 57 attentions; its norms and activation functions are left out, which
are the same in all ways. Four bits go by bitsandbytes' product without a LoRA, as in the hosts; for one token with one by the guard's own, or, with LORA_GUARD_TOKEN_PRODUCT=0, by that. Weights are
random, one for each shape. Milliseconds are medians of `--steps` steps, or one or two more, by CUDA events, launches included. "off" is how far outputs are
from plain torch's, relative to what the LoRA changes: activations in bf16 make a tenth or two.

The cases of the first goals come first; what does not fit into `--time-limit` is left out and named. NF4 needs bitsandbytes.
`--kernels` also prints what the card's kernels take in such a run of the host's way and of the guard's, by name.

The file is one that `benchmarks/plots.py` draws. `--smoke` runs all cases on the CPU with tiny sizes, plain torch in the kernels' place.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
if "--smoke" in sys.argv:
    os.environ["LORA_GUARD_KERNELS"] = "twin"

import kernels_gpu
import torch
from kernels_gpu import DEVICE, DTYPE, SMOKE, stored_and_host
from torch.nn.functional import linear, scaled_dot_product_attention

from lib_lora_guard.adapters import LohaAdapter, LokrAdapter, LoraAdapter, Term
from lib_lora_guard.kernels.fused import KERNELS
from lib_lora_guard.kernels.recipes import HADAMARD, KRONECKER, ROW_SCALED, rank_of_sides
from lib_lora_guard.kernels.stored import Bnb4
from lib_lora_guard.patching.bypass import Bypass, call_of_layer
from lib_lora_guard.patching.forward_program import lokr_pass
from lib_lora_guard.patching.fused import Fused, Held, RawWeight, is_one_token
from lib_lora_guard.patching.fused_choice import CHOICE, Key
from lib_lora_guard.patching.marked_class import mark
from lib_lora_guard.patching.on_the_fly import WeightTerms
from lib_lora_guard.patching.operators import WEIGHT_PATCH
from lib_lora_guard.planning.cheap import forms_of, pays

FIRST_ONES, COUNTED = 2, 3
"""Steps of a run: those that are left out, and those that count."""
CASES = (
    "fp8 lora 64", "nf4 lora 3x32", "Q8_0 lora 16", "fp8 lora 16", "nf4 lora 16", "Q4_0 lora 16", "Q4_K lora 16", "fp8 dora 16", "fp8 loha 8",
    "fp8 loha 16", "fp8 lokr 8", "fp8 lora 4x16", "fp8 lora 2x16", "fp8 lora 128", "nf4 lora 64", "fp8 lora 16@512", "fp8 lora 16@768", "fp8 lora 32",
    "nf4 lora 4x16", "nf4 lora 2x16", "nf4 lora 128", "nf4 lora 16@512", "nf4 lora 16@768", "nf4 dora 16", "fp8 lora 256", "int8 lora 16",
    "fp8scaled lora 16", "Q6_K lora 16", "nf4 lokr 8", "nf4 loha 8", "Q8_0 lora 64", "Q4_K lora 128",
)  # fmt: skip
DOUBLE, SINGLE = (1, 1) if SMOKE else (19, 38)
HIDDEN, HEADS, TEXT = (128, 2, 8) if SMOKE else (3072, 24, 512)
STRENGTH = 0.8
LAYERS = {
    "qkv": (3, 1), "proj": (1, 1), "mlp0": (4, 1), "mlp2": (1, 4), "modulation": (6, 1), "linear1": (7, 1), "linear2": (1, 5), "modulation1": (3, 1),
}  # fmt: skip
"""Rows and columns of each weight, in HIDDEN."""
SHARE = 0.02
"""The size of a LoRA's change, relative to the weights."""


class Case(NamedTuple):
    """One line of the table."""

    storage: str
    kind: str
    rank: int
    count: int
    size: int

    @classmethod
    def of(cls, text: str) -> "Case":
        words, _, size = text.partition("@")
        storage, kind, number = words.split()
        count, _, rank = number.rpartition("x")
        return cls(storage.replace("scaled", " scaled"), kind, int(rank), int(count or 1), int(size or 1024))

    @property
    def image_tokens(self) -> int:
        return 16 if SMOKE else (self.size // 16) ** 2


FIRST = tuple(Case.of(text) for text in CASES[:7])


class Layer(torch.nn.Module):
    """A linear layer as a host has it: it dequantises its weight in each call, or has a product of the storage's own."""

    def __init__(self, host, bias):
        super().__init__()
        self.host, self.bias, self.weight_terms = host, bias, None
        self.product = getattr(host, "product", None)

    def forward(self, x):
        if self.weight_terms is None and self.product is not None:
            return self.product(x, self.bias)
        weight = self.host()
        if self.weight_terms is not None:
            weight = self.weight_terms.apply(weight, None)
        return linear(x, weight, self.bias)


class Known(RawWeight):
    """The stored weight of a layer, as it was made: in place of a host's parameter and what `Fused` finds out about that."""

    def __init__(self, stored, bias):
        self._stored, self._bias = stored, bias

    def of(self, layer, x, terms=None):
        if layer.weight_terms is not terms:
            return None
        # As `hosts.webui.raw_weights.goes_by_vector` has it.
        goes_by_vector = isinstance(self._stored, Bnb4) and is_one_token(x)
        if goes_by_vector and not CHOICE.multiplies_tokens:
            return None
        return Held(self._stored.data, self._bias, is_one_token=goes_by_vector)

    def stored(self, *_):
        return self._stored


def adapters_of(case, out, inner, change):
    """Returns the LoRAs of a case on a weight, whose numbers each of them changes by `change`."""

    def normal(*shape, factors):
        # So many factors of this size, multiplied and summed over the rank.
        size = (change / case.rank**0.5) ** (1 / factors)
        return (torch.randn(shape, device=DEVICE) * size).to(DTYPE).cpu()

    rank, alpha = case.rank, float(case.rank)
    if case.kind == "loha":
        size = [(out, rank), (rank, inner)] * 2
        # The product of two sums over the rank.
        a, b, c, d = (normal(*shape, factors=4) * rank**-0.125 for shape in size)
        return [LohaAdapter(a, b, c, d, alpha=alpha)]
    if case.kind == "lokr":
        sides = torch.randn(rank, rank), torch.randn(out // rank, inner // rank) * change
        return [LokrAdapter(*(side.to(DTYPE) for side in sides), alpha=1.0)]
    magnitude = torch.rand(out, 1).add_(0.5) if case.kind == "dora" else None
    return [
        LoraAdapter(normal(out, rank, factors=2), normal(rank, inner, factors=2), alpha=alpha, magnitude=magnitude)
        for _ in range(case.count)
    ]


def patched(case, layer, stored, tokens, is_fused):
    """Returns a layer with the same weight and the LoRAs of a case on it, in the way that the guard's rules give it."""
    made = Layer(layer.host, layer.bias)
    change = SHARE * layer.host().float().std().item()
    adapters = adapters_of(case, *stored.shape, change)
    terms = [Term(adapter, STRENGTH - 0.1 * n) for n, adapter in enumerate(adapters)]
    forms = forms_of(terms, stored.shape)
    if None in forms or not pays(forms, one_token=tokens == 1):
        made.weight_terms = WeightTerms("weight", terms)
        made.__dict__[WEIGHT_PATCH] = made.weight_terms
        stack = lokr_pass(terms, forms, stored.shape, lambda layer: layer.bias)
        if is_fused and stack is not None:
            made.weight_terms.fused = short_way(made, stored, stack)
        return made
    # As if the norm of each row were 1.
    ratios = {0: terms[0].adapter.magnitude.flatten()} if case.kind == "dora" else {}
    hook = Bypass("weight", tuple(terms), stored.shape, ratios, lambda layer: layer.bias, forms=forms)
    stack = hook.program.one_pass
    if is_fused and stack is not None:
        hook.fused = short_way(made, stored, stack)
    hook.attach(made)
    return made


def short_way(made, stored, stack):
    """Returns the short way of a layer, and has the layer take it."""
    fused = Fused(Known(stored, made.bias), stack)
    fused._facts.stored = lambda *_: stored
    made.key = fused.key(made, DEVICE, DTYPE)
    mark(made, "step_gpu", call=call_of_layer)
    return fused


class Tried(torch.nn.Module):
    """A layer that takes its LoRAs in a way that the guard does not have."""

    def __init__(self, case, layer, stored, way):
        super().__init__()
        self.layer, self.host, self.bias, self.data = layer, layer.host, layer.bias, stored.data
        change = SHARE * layer.host().float().std().item()
        adapters = adapters_of(case, *stored.shape, change)
        strengths = [STRENGTH - 0.1 * n for n in range(case.count)]
        self.up = torch.cat([a.up * s for a, s in zip(adapters, strengths, strict=True)], 1).to(DEVICE)
        self.down = torch.cat([a.down for a in adapters]).to(DEVICE)
        # A longer input is copied for `wider`; and for `first` a shorter output is soon added to.
        self.way = "after" if way != "weight" and stored.shape[1] > stored.shape[0] else way

    def forward(self, x):
        if self.way == "weight":
            return linear(x, self.host().addmm_(self.up, self.down), self.bias)
        inner = linear(x, self.down)
        if self.way == "after" or (self.way == "first" and is_one_token(x)):
            out = self.layer(x)
            out.view(-1, out.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), self.up.t())
            return out
        if self.way == "first":
            out = torch.addmm(self.bias, inner.view(-1, inner.shape[-1]), self.up.t())
            # In place: a new output would begin as a copy of this one.
            torch.addmm(out, x.view(-1, x.shape[-1]), self.host().t(), out=out)
            return out.view(*x.shape[:-1], -1)
        rows, columns = self.data.shape
        weight = torch.empty(rows, columns + self.up.shape[1], dtype=DTYPE, device=DEVICE)
        weight[:, :columns].copy_(self.data)
        weight[:, columns:].copy_(self.up)
        return linear(torch.cat([x, inner], -1), weight, self.bias)


class Model:
    """The linear layers of a storage without LoRAs, one for each shape."""

    def __init__(self, storage):
        self.stored, self.layers = {}, {}
        for name, (rows, columns) in LAYERS.items():
            out, inner = rows * HIDDEN, columns * (512 if SMOKE and storage.startswith("Q") else HIDDEN)
            self.stored[name], host = stored_and_host(storage, out, inner)
            self.layers[name] = Layer(host, (torch.randn(out, device=DEVICE) * 0.01).to(DTYPE))

    def tried(self, case, way):
        """Returns layers that take the LoRAs of a case in a way that the guard does not have."""
        torch.manual_seed(1)
        return {name: Tried(case, layer, self.stored[name], way) for name, layer in self.layers.items()}

    def with_loras(self, case, is_fused):
        """Returns layers that share these weights, with the LoRAs of a case on all of them."""
        torch.manual_seed(1)
        return {
            name: patched(case, layer, self.stored[name], 1 if "modulation" in name else 2, is_fused)
            for name, layer in self.layers.items()
        }


class Inputs:
    """Random activations for one size of image."""

    def __init__(self, case, model):
        image, both = case.image_tokens, case.image_tokens + TEXT

        def make(*shape):
            return torch.randn(shape, device=DEVICE).to(DTYPE)

        self.of = {}
        for name, stored in model.stored.items():
            for tokens in (1,) if "modulation" in name else (both,) if name.startswith("linear") else (image, TEXT):
                self.of[name, tokens] = make(1, tokens, stored.shape[1])
        self.qkv = [make(1, HEADS, both, HIDDEN // HEADS) for _ in range(3)]
        self.image, self.both = image, both


def step(layers, x):
    """Runs the linear layers and the attentions of one step."""
    for _ in range(DOUBLE):
        for _ in ("image", "text"):
            layers["modulation"](x.of["modulation", 1])
        for tokens in (x.image, TEXT):
            layers["qkv"](x.of["qkv", tokens])
        scaled_dot_product_attention(*x.qkv)
        for tokens in (x.image, TEXT):
            for name in ("proj", "mlp0", "mlp2"):
                layers[name](x.of[name, tokens])
    for _ in range(SINGLE):
        layers["modulation1"](x.of["modulation1", 1])
        layers["linear1"](x.of["linear1", x.both])
        scaled_dot_product_attention(*x.qkv)
        layers["linear2"](x.of["linear2", x.both])


def milliseconds(ways, x, steps):
    """Returns the times of the steps of each way, in runs of one way as an image has them. The ways take turns, each time in another order."""
    times, order = {way: [] for way in ways}, random.Random(0)
    for way in ways:
        step(ways[way], x)
    for _ in range(-(-steps // COUNTED)):
        for way in order.sample([*ways], len(ways)):
            times[way] += run_of(ways[way], x)[:COUNTED]
    return times


def run_of(layers, x):
    """Returns the milliseconds of a way's steps, one after the other without a pause, but for the first ones: the card's clock is still
    that of the way before.
    """
    if SMOKE:
        begin = time.perf_counter()
        step(layers, x)
        return [(time.perf_counter() - begin) * 1e3]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(FIRST_ONES + COUNTED + 1)]
    marks[0].record()
    for mark_of_step in marks[1:]:
        step(layers, x)
        mark_of_step.record()
    marks[-1].synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(marks)][FIRST_ONES:]


def off(ways, x):
    """Returns how far the outputs of each way are from plain torch's, relative to what the LoRA changes: the worst of all shapes."""
    worst = {way: 0.0 for way in ways if way not in ("host", "plain")}
    for (name, _), one in x.of.items():
        host, plain = (ways[way][name](one).double() for way in ("host", "plain"))
        change = (plain - host).norm()
        for way in ways:
            if way not in ("host", "plain"):
                worst[way] = max(worst[way], ((ways[way][name](one).double() - plain).norm() / change).item())
    return {way: round(value, 4) for way, value in worst.items()}


def measure(case, model, steps, prints_kernels=False):
    """Returns the row of a case."""
    ways = {"host": model.layers, "guard": model.with_loras(case, True), "plain": model.with_loras(case, False)}
    if case.kind == "lora" and (case.storage == "fp8" or case in FIRST):
        ways |= {way: model.tried(case, way) for way in ("weight", "first")}
    if case.kind == "lora" and case.storage == "fp8":
        ways["wider"] = model.tried(case, "wider")
    x = Inputs(case, model)
    keys = {layer.key for layer in ways["guard"].values() if hasattr(layer, "key")}
    faults = off(ways, x)
    times = milliseconds(ways, x, 1 if SMOKE else steps)
    ms = {way: round(statistics.median(found), 3) for way, found in times.items()}
    if prints_kernels:
        print_kernels(ways, x)
    return {
        "what": "step", "storage": case.storage, "kind": case.kind, "ranks": [case.rank] * case.count, "tokens": case.image_tokens,
        "size": case.size, "fused": bool(keys) and all(CHOICE.takes(key) for key in keys), "ms": ms,
        "spread": {way: round((max(found) - min(found)) / ms[way], 3) for way, found in times.items()},
        "ratio": {way: round(ms[way] / ms["host"], 4) for way in ms if way != "host"}, "off": faults,
    }  # fmt: skip


def kernels_of(layers, x, steps):
    """Returns the card's kernels of so many steps of a way, in the order in which they ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step(layers, x)
        torch.cuda.synchronize()
    found = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sorted(found, key=lambda event: event.time_range.start)


def print_kernels(ways, x, steps=5, most=12):
    """Prints what the card's kernels take of a step, by name, while it works without a pause."""
    sums = {way: {} for way in ("host", "guard")}
    for way, found in sums.items():
        events = kernels_of(ways[way], x, FIRST_ONES + steps)
        for event in events[len(events) * FIRST_ONES // (FIRST_ONES + steps) :]:
            number, spent = found.get(event.name, (0, 0.0))
            found[event.name] = number + 1, spent + event.device_time_total / 1e3
    for way, found in sums.items():
        print(f"{way}: {sum(spent for _, spent in found.values()) / steps:.2f} ms of kernels a step")
        for name, (count, spent) in sorted(found.items(), key=lambda one: -one[1][1])[:most]:
            print(
                f"  {spent / steps:8.3f} ms, {count // steps} of {spent / count * 1e3:.2f} us  {name[:90]}", flush=True
            )


def prepare(cases, models):
    """Compiles the kernels of all cases; returns the seconds."""
    begin = time.monotonic()
    before = {"dora": ROW_SCALED, "loha": HADAMARD, "lokr": KRONECKER}
    for case in cases:
        keys = set()
        for stored in models[case.storage].stored.values():
            rank = rank_of_sides(stored.shape[1] // case.rank) if case.kind == "lokr" else case.rank * case.count
            keys.add(Key(before.get(case.kind, "") + stored.kind, DEVICE, DTYPE, rank))
        CHOICE.prepare(key for key in keys if CHOICE.may_take(key))
    KERNELS.wait(120)
    return round(time.monotonic() - begin, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-limit", type=float, default=220, help="seconds; cases that come later are left out")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    begin = time.monotonic()
    head = {
        "commit": options.commit, "date": datetime.now().isoformat(timespec="minutes"), "script": "step_gpu.py", "device": "cpu" if SMOKE else torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": kernels_gpu.triton_version(), "bitsandbytes": kernels_gpu.bnb is not None, "steps": options.steps,
    }  # fmt: skip
    cases = [Case.of(text) for text in options.cases.split(",")]
    if kernels_gpu.bnb is None and not SMOKE:
        # Without the host's own kernel there is nothing to compare with.
        print("left out, no bitsandbytes:", *(case for case in cases if case.storage in ("nf4", "fp4")))
        cases = [case for case in cases if case.storage not in ("nf4", "fp4")]
    models = {storage: Model(storage) for storage in dict.fromkeys(case.storage for case in cases)}
    head["compile_seconds"] = prepare(cases, models)
    print(json.dumps(head), f"{time.monotonic() - begin:.0f} s before the first case", flush=True)
    rows, longest = [], 0.0
    for case in cases:
        started = time.monotonic()
        if started - begin + longest > options.time_limit:
            print("left out, time is up:", case, flush=True)
            continue
        try:
            rows.append(measure(case, models[case.storage], options.steps, options.kernels and not SMOKE))
            print(json.dumps(rows[-1]), flush=True)
        except Exception as error:
            print("FAILED", case, type(error).__name__, str(error)[:500], flush=True)
        longest = max(longest, time.monotonic() - started)
        if options.json:
            options.json.write_text(json.dumps({**head, "states": KERNELS.states(), "rows": rows}, indent=1) + "\n")
    print(json.dumps(KERNELS.states()), f"{time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
