"""The pass and the product behind it, one after the other without a pause: what they take of a card that is at its power limit.

    python benchmarks/pass_gpu.py [--storage nf4] [--ranks 16,64,96] [--time-limit 60] [--tiles "64 64 4 8 2,64 64 4 4 2"]

The two largest weights of Flux-dev with 4608 tokens: the host's decoding and product, the product alone with weights that are ready, and
for each rank the pass in their place, with the tile of `kernels/recipes.py` or with others. A pass that is shorter than the host's may
still cost a step as much: products draw what the card may have, and what a pass draws is taken from them. The ways take turns in runs of
`--count`, each time in another order; the line of a way is the median of its runs, and that over the host's.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from kernels_gpu import DEVICE, DTYPE, SMOKE, factors_of, linear, stored_and_host

from lib_lora_guard.kernels.launch import Kernel
from lib_lora_guard.kernels.recipes import Tile, bucket_of

SHAPES, TOKENS = (((64, 512), (48, 512)), 4) if SMOKE else (((21504, 3072), (3072, 15360)), 4608)
FIRST_ONES = 12
"""Of a run, which are not counted: the card's clock is still that of the way before."""


def ways_of(options):
    """Returns by name what one turn of each way calls."""
    weights = [(*stored_and_host(options.storage, *shape), shape) for shape in SHAPES]
    weights = [
        (stored, host, shape, torch.randn(TOKENS, shape[1], device=DEVICE).to(DTYPE)) for stored, host, shape in weights
    ]
    ready = [host().clone() for _, host, *_ in weights]
    found = {
        "host": lambda: [linear(x, host()) for _, host, _, x in weights],
        "ready": lambda: [linear(x, weight) for (*_, x), weight in zip(weights, ready, strict=True)],
    }
    for rank in map(int, options.ranks.split(",")):
        factors = [factors_of(*shape, rank) for _, _, shape, _ in weights]
        tiles = [Tile(*map(int, words.split())) for words in options.tiles.split(",")] if options.tiles else [None]
        for tile in tiles:
            has_per_rank = factors[0].per_rank is not None
            kernel = Kernel(weights[0][0].kind, DTYPE, bucket_of(rank), rank % 16 == 0, has_per_rank, tile)

            def passed(kernel=kernel, factors=factors):
                return [linear(x, kernel(one[0], more)) for (*one, x), more in zip(weights, factors, strict=True)]

            found[f"rank {rank}, {' '.join(map(str, kernel.tile))}"] = passed
    return found


def run_of(call, count):
    """Returns the milliseconds of a turn in one run of a way."""
    if SMOKE:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    for _ in range(FIRST_ONES):
        call()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="nf4")
    parser.add_argument("--ranks", default="16,64,96")
    parser.add_argument(
        "--tiles", default="", help="rows, columns, warps, spans and stages of tiles in place of the recipes'"
    )
    parser.add_argument("--count", type=int, default=90, help="turns of a run")
    parser.add_argument("--time-limit", type=float, default=60)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    until = time.monotonic() + options.time_limit
    ways, order = ways_of(options), random.Random(0)
    found = {way: [] for way in ways}
    for call in ways.values():
        call()
    while min(map(len, found.values())) < (1 if SMOKE else 3) or time.monotonic() < until:
        for way in order.sample([*ways], len(ways)):
            found[way].append(run_of(ways[way], options.count))
        if SMOKE:
            break
    host = statistics.median(found["host"])
    for way, runs in found.items():
        ms = statistics.median(runs)
        print(f"{way}: {ms:.4f} ms, x{ms / host:.4f}, {len(runs)} runs", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
