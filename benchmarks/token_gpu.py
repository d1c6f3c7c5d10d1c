"""The product of one token with a weight of bitsandbytes' four bits and LoRAs: the host's way with a bypass, and the kernels'.

    python benchmarks/token_gpu.py --time-limit 60 --json token.json [--tiles] [--smoke]

For each shape and rank, microseconds a call: `host` is bitsandbytes' product with the bias, `bypass` that and the LoRAs on its output,
`kernel` the guard's two kernels. Of the card: a CUDA graph of calls with 200 MB of weights in turn, more than its cache holds, so that no launch is
waited for; median of seven. Of the processor: what a call takes while nothing is waited for. Each product is compared with fp64, a tile's with small weights.
`--tiles` tries other tiles, the fastest first. `--smoke` runs it on the CPU with small sizes, by Triton's interpreter.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import kernels_gpu  # reads --smoke before it imports torch
import torch
from kernels_gpu import DEVICE, DTYPE, SMOKE, factors_of, processor_us, stored_and_host

from lib_lora_guard.kernels.probe import compare_product, moved, probe_token
from lib_lora_guard.kernels.recipes import ONE_TOKEN, TokenTile
from lib_lora_guard.kernels.token_product import TokenProduct

SHAPES = ((40, 128),) if SMOKE else ((18432, 3072), (9216, 3072), (3072, 3072), (6144, 3072), (3072, 768))
"""Flux's modulations, and its embedders of time and pooled text."""
RANKS = (16,) if SMOKE else (16, 96)
FRESH_BYTES = 0 if SMOKE else 200_000_000
"""Of weights that are used in turn: more than a card's cache holds."""
CPU = torch.device("cpu")


def card_us(calls, repeats=7, turns=20):
    """Returns the card's microseconds a call, from a graph of all calls one behind the other."""
    if SMOKE:
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) / len(calls) * 1e6
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    found = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(turns):
            graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / turns / len(calls) * 1e3)
    return statistics.median(found)


class Layers:
    """Weights of one shape, each with LoRAs of a rank, and a token."""

    def __init__(self, shape, rank):
        count = max(2, 2 * FRESH_BYTES // (shape[0] * shape[1]))
        self.weights = [(*stored_and_host("nf4", *shape), factors_of(*shape, rank)) for _ in range(count)]
        self.token = torch.randn(1, shape[1], device=DEVICE).to(DTYPE)
        self.bias = torch.randn(shape[0], device=DEVICE).to(DTYPE)
        self.kind = ONE_TOKEN + self.weights[0][0].kind
        self.has_per_rank = self.weights[0][2].per_rank is not None

    def host(self, number):
        host = self.weights[number][1]
        if not hasattr(host, "product"):
            return torch.nn.functional.linear(self.token, host(), self.bias)
        return host.product(self.token, self.bias)

    def bypass(self, number):
        factors = self.weights[number][2]
        h = torch.nn.functional.linear(self.token, factors.down)
        if factors.per_rank is not None:
            h = (h * factors.per_rank).to(DTYPE)
        return self.host(number).addmm_(h, factors.up.t(), alpha=factors.alpha)

    def by(self, kernel):
        def call(number):
            stored, _, factors = self.weights[number]
            return kernel(stored, factors, self.token, self.bias)

        return call

    def us(self, call):
        """Returns the microseconds of the card and of the processor."""
        return self.card_us(call), round(processor_us(lambda: call(0)), 1)

    def card_us(self, call):
        return round(card_us([partial(call, number) for number in range(len(self.weights))]), 2)

    def check(self, kernel):
        stored, _, factors = (moved(one, CPU) if not callable(one) else one for one in self.weights[0])
        compare_product(self.by(kernel)(0), stored, factors, self.token.to(CPU), self.bias.to(CPU))


def row_of(shape, rank):
    layers = Layers(shape, rank)
    kernel = TokenProduct(layers.kind, DTYPE, layers.has_per_rank)
    layers.check(kernel)
    ways = {"host": layers.host, "bypass": layers.bypass, "kernel": layers.by(kernel)}
    return {"shape": shape, "rank": rank, **{way: layers.us(call) for way, call in ways.items()}}


def tiles_of(shape, rank, until):
    """Returns the card's microseconds of tiles, the fastest first."""
    layers, found = Layers(shape, rank), []
    tiles = product((2, 4, 1, 8, 16), (64, 32, 128, 256), (1, 2, 4, 8)) if not SMOKE else [(4, 16, 1)]
    for rows, words, warps in tiles:
        if time.monotonic() > until or (not SMOKE and not 32 * warps <= words <= 64 * warps):
            continue
        tile = TokenTile(rows, words, warps)
        try:
            kernel = TokenProduct(layers.kind, DTYPE, layers.has_per_rank, tile)
            probe_token(kernel, DEVICE)
            found.append((layers.card_us(layers.by(kernel)), *tile))
        except Exception as error:
            print("FAILED", tile, type(error).__name__, str(error)[:150], flush=True)
    return {"shape": shape, "rank": rank, "tiles": sorted(found)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-limit", type=float, default=60, help="seconds; what comes later is left out")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    until, rows = time.monotonic() + options.time_limit, []
    head = {
        "commit": options.commit, "script": "token_gpu.py", "device": "cpu" if SMOKE else torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": kernels_gpu.triton_version(), "bitsandbytes": kernels_gpu.bnb is not None,
    }  # fmt: skip
    print(json.dumps(head), flush=True)
    for shape, rank in product(SHAPES, RANKS):
        if time.monotonic() > until:
            print("left out, time is up:", shape, rank)
            continue
        rows.append(tiles_of(shape, rank, until) if options.tiles else row_of(shape, rank))
        print(json.dumps(rows[-1] if not options.tiles else {**rows[-1], "tiles": rows[-1]["tiles"][:8]}), flush=True)
        if options.json:
            options.json.write_text(json.dumps({**head, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
