"""What a LoRA costs a Flux-dev step where one pass makes the temporary weight: all linear layers, by storage and rank.

    python benchmarks/kernels_gpu.py --time-limit 150 --json kernels.json [--cases fp8:16,nf4:96] [--tiles] [--smoke]

For each storage and rank: `base` is the host's dequantisation and the product, `bypass` adds the LoRA to the output, `fused` makes
the weight with the LoRA in it and multiplies. Milliseconds of all layers of one step at 1024x1024 (medians per layer, times their
number), the dequantisation alone (`host cast`, `fused cast` with and without the LoRA), the error of the LoRA's part against fp64,
whether the weight without a LoRA is bit for bit the host's, seconds to compile and probe, and microseconds of the processor a launch.
The GPU is kept busy while the processor queues a call, as in a step, where the processor is ahead: times are the GPU's own.
`--tiles` measures tiles on the two largest layers instead, and several tiles a program for four bits; each weight is compared with the
twin's. `--smoke` runs all of it on the CPU with tiny sizes.
"""

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

SMOKE = "--smoke" in sys.argv
if SMOKE:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch.nn.functional import linear  # noqa: E402

from lib_lora_guard.kernels import twin  # noqa: E402
from lib_lora_guard.kernels.factors import Factors  # noqa: E402
from lib_lora_guard.kernels.fused import KERNELS, fused_weight  # noqa: E402
from lib_lora_guard.kernels.launch import Kernel  # noqa: E402
from lib_lora_guard.kernels.probe import ProbeError, compare, moved  # noqa: E402
from lib_lora_guard.kernels.recipes import Tile, bucket_of  # noqa: E402
from lib_lora_guard.kernels.stored import BAKED_BYTES, BLOCKS, Bnb4, Fp8, Gguf, Int8  # noqa: E402

try:
    import bitsandbytes
    import bitsandbytes.functional as bnb
except Exception as error:
    bitsandbytes = bnb = None
    print("no bitsandbytes:", type(error).__name__, str(error)[:120])

LAYERS = (
    ("qkv", 9216, 3072, 4096, 19), ("proj", 3072, 3072, 4096, 19), ("mlp0", 12288, 3072, 4096, 19), ("mlp2", 3072, 12288, 4096, 19),
    ("text qkv", 9216, 3072, 512, 19), ("text proj", 3072, 3072, 512, 19), ("text mlp0", 12288, 3072, 512, 19),
    ("text mlp2", 3072, 12288, 512, 19), ("linear1", 21504, 3072, 4608, 38), ("linear2", 3072, 15360, 4608, 38),
    ("modulation", 18432, 3072, 1, 38), ("modulation1", 9216, 3072, 1, 38),
)  # fmt: skip
"""Name, out, in, tokens, number in a step."""
CASES = "fp8:16,fp8:64,nf4:16,nf4:96,Q8_0:16,Q4_K:16,Q4_0:16,int8:16,fp8:128,nf4:64,fp8 scaled:16,nf4 nested:16,fp4:16,Q5_0:16,Q5_K:16,Q6_K:16,fp8:256"
SPANNED = ((64, 64, 4), (128, 64, 8), (64, 128, 8), (64, 128, 4))
"""Tiles of four bits that are tried with several a program."""
JOINED = {96: 3}
"""Ranks that are several LoRAs joined, each with a strength of its own."""
DEVICE = torch.device("cpu" if SMOKE else "cuda:0")
DTYPE = torch.float16 if SMOKE else torch.bfloat16  # Triton's interpreter rounds bf16 wrongly


def triton_version():
    """Returns Triton's version as text; None where there is none."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def stored_and_host(name, out, inner):
    """Returns a weight as it is stored, and the host's own dequantisation of it."""
    form, *more = name.split()
    if form == "fp8":
        data = (torch.randn(out, inner, device=DEVICE) * 0.02).to(torch.float8_e4m3fn)
        if not more:
            return Fp8(data), lambda: data.to(DTYPE)
        scale = torch.tensor(0.013, device=DEVICE)
        return Fp8(data, scale=scale.to(DTYPE).float()), lambda: data.to(DTYPE) * scale.to(dtype=DTYPE)
    if form == "int8":
        data = torch.randint(-127, 128, (out, inner), device=DEVICE, dtype=torch.int8)
        scale = torch.rand(out, 1, device=DEVICE) * 0.0002 + 0.0001
        return Int8(data, DTYPE, scale), lambda: (data.float() * scale).to(DTYPE)
    if form in ("nf4", "fp4"):
        return four_bits(form, bool(more), out, inner)
    block, size = BLOCKS[form]
    size = BAKED_BYTES.get(form, size)
    blocks = torch.randint(0, 256, (out * inner // block, size), device=DEVICE, dtype=torch.uint8)
    first, count = {"Q6_K": (208, 1), "Q5_K": (0, 2), "Q4_K": (0, 16)}.get(form, (0, 1))
    baked = form in ("Q8_0", "Q4_0", "Q4_K")
    scales = (torch.rand(len(blocks), count, device=DEVICE) * 0.0005 + 0.0005).to(DTYPE if baked else torch.float16)
    blocks[:, first : first + 2 * count] = scales.view(torch.uint8)
    stored = Gguf(blocks, DTYPE, form, (out, inner), baked=True)
    return stored, host_gguf(stored, blocks) or (lambda: twin.dequantised(stored, DTYPE))


class HostFourBits:
    """What a host does with a weight of bitsandbytes' four bits."""

    def __init__(self, data, state):
        self._data, self._state = data, state

    def __call__(self):
        """Dequantises it: for more than a few tokens."""
        return bnb.dequantize_4bit(self._data, self._state)

    def product(self, x, bias):
        """Returns a layer's output, as the hosts call it: one token is multiplied with the stored numbers."""
        return bitsandbytes.matmul_4bit(x, self._data.t(), bias=bias, quant_state=self._state)


def four_bits(form, nested, out, inner):
    if bnb is not None and not SMOKE:
        weight = (torch.randn(out, inner, device=DEVICE) * 0.02).to(DTYPE)
        data, state = bnb.quantize_4bit(weight, quant_type=form, blocksize=64, compress_statistics=nested)
        from lib_lora_guard.kernels.stored import Nested

        second = (
            None if not nested else Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
        )
        stored = Bnb4(data, state.dtype, state.absmax, (out, inner), form, 64, second)
        return stored, HostFourBits(data, state)
    from lib_lora_guard.kernels.probe import sample

    kind = f"{form} 64 {'nested256 ' if nested else ''}by {'fp16' if torch.float16 == DTYPE else 'bf16'}"
    stored = sample(kind, out, inner, DTYPE, torch.Generator(), DEVICE)
    return stored, lambda: twin.dequantised(stored, DTYPE)


def host_gguf(stored, blocks):
    """Returns a dequantisation with as many passes as Forge's: nibbles by a table of 65536 rows, products in the layer's dtype."""
    if stored.form == "Q8_0":
        return lambda: (blocks[:, 2:].view(torch.int8) * blocks[:, :2].view(DTYPE)).view(stored.shape)
    if stored.form not in ("Q4_0", "Q4_K"):
        return None
    words = torch.arange(65536, device=DEVICE)
    table = torch.stack([(words >> shift & 15) - (8 if stored.form == "Q4_0" else 0) for shift in (0, 4, 8, 12)], 1)
    table = table.to(torch.int8).view(torch.int32).flatten()
    head = 2 if stored.form == "Q4_0" else 32

    def nibbles():
        index = blocks[:, head:].contiguous().view(torch.uint16).to(torch.int32).flatten()
        return table.index_select(0, index).view(torch.int8).view(len(blocks), -1)

    if stored.form == "Q4_0":
        return lambda: (blocks[:, :2].view(DTYPE) * nibbles()).view(stored.shape)

    def q4_k():
        scale = blocks[:, :16].contiguous().view(DTYPE).unsqueeze(-1)
        minimum = blocks[:, 16:32].contiguous().view(DTYPE).unsqueeze(-1)
        return (scale * nibbles().view(len(blocks), 8, 32).view(torch.uint8) - minimum).view(stored.shape)

    return q4_k


def factors_of(out, inner, rank):
    up = (torch.randn(out, rank, device=DEVICE) * (0.0004 / rank**0.5) ** 0.5).to(DTYPE)
    down = (torch.randn(rank, inner, device=DEVICE) * (0.0004 / rank**0.5) ** 0.5).to(DTYPE)
    count = JOINED.get(rank, 1)
    strengths = None
    if count > 1:
        strengths = torch.linspace(0.5, 1.0, count, device=DEVICE).repeat_interleave(rank // count)
    return Factors(up, down, 0.8, strengths)


def bypassed(x, weight, factors):
    y = linear(x, weight)
    h = x @ factors.down.t()
    if factors.per_rank is not None:
        h = (h * factors.per_rank).to(h.dtype)
    return y.addmm_(h, factors.up.t(), alpha=factors.alpha)


def median_ms(call, repeats, warm=3):
    if SMOKE:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    for _ in range(warm):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        torch.cuda._sleep(400_000)  # some 0.2 ms
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def processor_us(call, count=300):
    """Returns the processor's time a call, with nothing waiting for the GPU."""
    count = 3 if SMOKE else count
    for _ in range(3):
        call()
    if not SMOKE:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    spent = time.perf_counter() - begin
    if not SMOKE:
        torch.cuda.synchronize()
    return spent / count * 1e6


def errors(stored, host, factors):
    """Returns the error of the LoRA's part, of the fused weight and of its twin, relative to that part, and the bit-equality."""
    plain, fused = host().double(), fused_weight(stored, factors, DTYPE).double()
    up = factors.up.double() if factors.per_rank is None else factors.up.double() * factors.per_rank.double()
    part = up @ factors.down.double() * factors.alpha
    beside = twin.with_factors(twin.dequantised(stored, DTYPE), factors).double()
    without = fused_weight(stored, None, DTYPE)
    return {
        "error": ((fused - plain - part).norm() / part.norm()).item(),
        "twin_error": ((beside - plain - part).norm() / part.norm()).item(),
        "bit_equal": torch.equal(without, host().to(DTYPE)),
    }


def measure_layer(name, rank, shape, tokens, repeats):
    """Returns the milliseconds of each way of one layer."""
    stored, host = stored_and_host(name, *shape)
    factors = factors_of(*shape, rank)
    x = torch.randn(tokens, shape[1], device=DEVICE).to(DTYPE)
    ways = {
        "base": lambda: linear(x, host()),
        "bypass": lambda: bypassed(x, host(), factors),
        "fused": lambda: linear(x, fused_weight(stored, factors, DTYPE)),
        "host cast": host,
        "fused cast": lambda: fused_weight(stored, factors, DTYPE),
        "fused cast without": lambda: fused_weight(stored, None, DTYPE),
    }
    return {way: round(median_ms(call, repeats), 4) for way, call in ways.items()}


def measure(name, rank, layers, repeats):
    """Returns one row: sums over the layers of a step."""
    row = {"storage": name, "rank": rank, "ms": {}, "layers": {}}
    stored, host = stored_and_host(name, 96, 512)
    begin = time.perf_counter()
    KERNELS.prepare([stored.kind], DEVICE, DTYPE, [0, rank])
    KERNELS.wait(300)
    row |= {
        "kind": stored.kind,
        "state": KERNELS.state(stored.kind),
        "compile_seconds": round(time.perf_counter() - begin, 2),
    }
    factors = factors_of(96, 512, rank)
    row |= errors(stored, host, factors)
    row["processor_us"] = {
        "host cast": processor_us(host),
        "fused": processor_us(lambda: fused_weight(stored, factors, DTYPE)),
        "fused without": processor_us(lambda: fused_weight(stored, None, DTYPE)),
    }
    kernel = KERNELS.kernel(stored.kind, DEVICE, DTYPE, rank, factors.per_rank is not None)
    if kernel is not None:

        def ordinary():
            kernel._handle = None
            kernel(stored, factors)

        row["processor_us"]["fused, Triton's own launch"] = processor_us(ordinary)
    for label, out, inner, tokens, count in layers:
        one = row["layers"][label] = measure_layer(name, rank, (out, inner), tokens, repeats)
        for way, ms in one.items():
            row["ms"][way] = row["ms"].get(way, 0.0) + ms * count
    base = row["ms"]["base"]
    row["ratio"] = {way: round(row["ms"][way] / base, 4) for way in ("bypass", "fused")}
    row["ms"] = {way: round(ms, 2) for way, ms in row["ms"].items()}
    row["processor_us"] = {way: round(us, 1) for way, us in row["processor_us"].items()}
    return row


def table(rows):
    """Returns the rows as Markdown."""
    lines = [
        "| storage | rank | base ms | bypass | fused | host cast ms | fused cast ms | without LoRA | error (twin) | bits | processor us: host, fused, without, Triton's | compile s | state |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ms, us = row["ms"], row["processor_us"]
        lines.append(
            f"| {row['storage']} | {row['rank']} | {ms['base']} | {ms['bypass']} (x{row['ratio']['bypass']}) | {ms['fused']} (x{row['ratio']['fused']}) "
            f"| {ms['host cast']} | {ms['fused cast']} | {ms['fused cast without']} | {row['error']:.4f} ({row['twin_error']:.4f}) "
            f"| {'equal' if row['bit_equal'] else 'DIFFERENT'} | {', '.join(str(value) for value in us.values())} | {row['compile_seconds']} | {row['state']} |"
        )
    return "\n".join(lines)


def tiles_of(name, rank):
    """Returns the tiles to measure."""
    if SMOKE:
        return [Tile(16, 256, 4)]
    found = [Tile(*tile) for tile in product((16, 32, 64, 128), (64, 128, 256, 512), (4, 8))]
    found = [
        tile for tile in found if 2048 <= tile.rows * tile.columns <= 16384 and (name != "Q6_K" or tile.columns >= 128)
    ]
    if rank and name.split()[0] in ("nf4", "fp4"):
        found += [Tile(*tile, *more) for tile, more in product(SPANNED, ((4, 2), (4, 3), (8, 2), (8, 3)))]
    return found


def tiles(name, rank, repeats, until):
    """Returns the milliseconds of tiles, on the two largest layers together, the fastest first, beside the host's cast."""
    shapes = ((64, 512), (48, 512)) if SMOKE else ((21504, 3072), (3072, 15360))
    weights = []
    for shape in shapes:
        stored, host = stored_and_host(name, *shape)
        weights.append((stored, factors_of(*shape, rank) if rank else None, host))
    small = weights[0][0] if SMOKE else stored_and_host(name, 300, 1536)[0]
    small_factors = factors_of(*small.shape, rank) if rank else None

    def made(tile):
        try:
            if time.monotonic() < until:
                with torch.no_grad():
                    kernel = Kernel(small.kind, DTYPE, bucket_of(rank), rank % 16 == 0, rank in JOINED, tile)
                    return kernel, kernel(small, small_factors)
        except Exception as error:
            print("FAILED", name, rank, tile, type(error).__name__, str(error)[-150:].replace("\n", " "), flush=True)
        return None

    with ThreadPoolExecutor(1 if SMOKE else 12) as pool:  # the compiler runs outside Python for most of its time
        kernels = [one for one in pool.map(made, tiles_of(name, rank)) if one is not None]
    found, cpu = [], torch.device("cpu")
    for kernel, weight in kernels:
        if time.monotonic() > until:
            break
        ms = sum(median_ms(lambda k=kernel, w=w: k(w[0], w[1]), repeats) for w in weights)
        try:
            compare(weight, moved(small, cpu), None if small_factors is None else moved(small_factors, cpu), DTYPE)
            wrong = ""
        except ProbeError as error:
            wrong = str(error)[:100]
        found.append((round(ms, 4), *kernel.tile, wrong))
    floor = sum(s.data.numel() * s.data.element_size() + s.shape[0] * s.shape[1] * 2 for s, *_ in weights) / 4.3e9
    host_ms = sum(median_ms(host, repeats) for *_, host in weights)
    return {
        "storage": name,
        "rank": rank,
        "host_ms": round(host_ms, 4),
        "floor_ms": round(floor, 4),
        "tiles": sorted(found),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-limit", type=float, default=150, help="seconds; cases that come later are left out")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    until = time.monotonic() + options.time_limit
    head = {"torch": torch.__version__, "device": "cpu" if SMOKE else torch.cuda.get_device_name()}
    head["triton"] = triton_version()
    print(json.dumps(head), flush=True)
    layers = (("small", 96, 512, 3, 2), ("one token", 40, 768, 1, 1)) if SMOKE else LAYERS
    way = "tiles" if options.tiles else "rows"
    rows, longest = [], 0.0
    for case in options.cases.split(","):
        name, rank = case.rsplit(":", 1)
        begin = time.monotonic()
        if begin + longest > until:
            print("left out, time is up:", case, flush=True)
            continue
        try:
            if options.tiles:
                rows.append(tiles(name, int(rank), options.repeats, until))
            else:
                rows.append(measure(name, int(rank), layers, options.repeats))
            print(json.dumps(rows[-1]), flush=True)
        except Exception as error:
            print("FAILED", case, type(error).__name__, str(error)[:500], flush=True)
        longest = max(longest, time.monotonic() - begin) if way == "rows" else 0.0
        if options.json:
            options.json.write_text(json.dumps({**head, way: rows}, indent=1))
    if options.tiles:
        for row in rows:
            print(row["storage"], row["rank"], "host", row["host_ms"], "floor", row["floor_ms"], *row["tiles"][:6])
    else:
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
