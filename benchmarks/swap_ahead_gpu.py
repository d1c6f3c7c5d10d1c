"""Swapped layers on the kernels' short way: what a pass takes with each weight copied when its layer is called, and one layer ahead.

    python benchmarks/swap_ahead_gpu.py [--layers 60] [--every 5] [--json FILE]

Layers of Flux's largest shape (21504 x 3072, fp8) with a LoRA of rank 16 each, called one after the other as in a step, by the guard's own
code (`patching/fused.py`, `patching/swapped_ahead.py`). Every fifth one lies in pinned RAM. Milliseconds are medians of `--passes`, by CUDA
events; outputs have to be the same bits in all ways. "peak_mb" is what torch's allocator has had beside what was there before a pass.
"processor_us": what a call of one layer takes of the processor, on 512 tokens, while the card is busy with something else.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from lib_lora_guard.adapters import LoraAdapter, Term
from lib_lora_guard.hosts.forge.raw_weights import ForgeWeight
from lib_lora_guard.kernels.fused import KERNELS
from lib_lora_guard.patching import fused, swapped_ahead
from lib_lora_guard.patching.bypass import Bypass
from lib_lora_guard.patching.fused import Fused
from lib_lora_guard.patching.fused_choice import CHOICE

ROWS, COLUMNS, TOKENS, RANK = 21504, 3072, 4608, 16
DEVICE, DTYPE = torch.device("cuda:0"), torch.bfloat16
MB = 1 << 20
BUSY_CYCLES = 60_000_000
"""Some 30 ms: longer than the processor needs for a pass."""


def layers_of(count, every):
    """Returns layers with their short ways, and those of them that are to be swapped. The others share a weight."""
    on_card = (torch.randn(ROWS, COLUMNS, device=DEVICE) * 0.02).to(torch.float8_e4m3fn)
    made = []
    for number in range(count):
        layer = torch.nn.Module()
        data = on_card
        if number % every == every - 1:
            data = (torch.randn(ROWS, COLUMNS, device=DEVICE) * 0.02).to(torch.float8_e4m3fn).cpu().pin_memory()
        layer.weight = torch.nn.Parameter(data, requires_grad=False)
        up, down = torch.randn(ROWS, RANK) * 0.01, torch.randn(RANK, COLUMNS) * 0.01
        term = Term(LoraAdapter(up.to(DTYPE), down.to(DTYPE), alpha=float(RANK)), 0.8)
        hook = Bypass("weight", (term,), (ROWS, COLUMNS), {}, lambda layer: None)
        short = Fused(ForgeWeight(lambda: False), hook.program.one_pass)
        made.append((layer, short, hook))
    return made


def one_pass(layers, x):
    """Returns a sum over the outputs, so that no more than one of them is there."""
    total = torch.zeros((), device=DEVICE)
    for layer, short, _ in layers:
        out = short.run(layer, x)
        assert out is not None, "the layer went the long way"
        total += out.float().mean()
    return total


def measure(layers, x, passes):
    times, totals = [], []
    for number in range(passes + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if number == 2:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start.record()
        totals.append(one_pass(layers, x))
        end.record()
        end.synchronize()
        if number > 1:
            times.append(start.elapsed_time(end))
    peak = (torch.cuda.max_memory_allocated() - before) / MB
    return round(statistics.median(times), 2), round(peak, 1), [float(total) for total in totals]


def processor_us(layers, passes):
    """Returns the processor's microseconds for a call: the medians of layers on the card, and of those in RAM."""
    x, spent = torch.randn(1, 512, COLUMNS, device=DEVICE).to(DTYPE), {"resident": [], "swapped": []}
    for number in range(passes + 2):
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY_CYCLES)
        for layer, short, _ in layers:
            begin = time.perf_counter()
            short.run(layer, x)
            took = time.perf_counter() - begin
            if number > 1:
                spent["resident" if layer.weight.device.type == "cuda" else "swapped"].append(took * 1e6)
    torch.cuda.synchronize()
    return {kind: round(statistics.median(found), 1) for kind, found in spent.items() if found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        layers, x = layers_of(options.layers, options.every), torch.randn(1, TOKENS, COLUMNS, device=DEVICE).to(DTYPE)
        CHOICE.prepare({layers[0][1].key(layers[0][0], DEVICE, DTYPE)})
        KERNELS.wait(120)
        row = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            **{k: str(v) for k, v in vars(options).items()},
        }
        found = {}
        for way in ("called", "ahead"):
            swapped_ahead.AHEAD._is_refused = way == "called"
            assert fused.AHEAD is swapped_ahead.AHEAD
            with CHOICE.image():
                row[f"{way}_ms"], row[f"{way}_peak_mb"], found[way] = measure(layers, x, options.passes)
                row[f"{way}_processor_us"] = processor_us(layers, options.passes)
        for layer, _, _ in layers:
            if layer.weight.device.type == "cpu":
                layer.weight = torch.nn.Parameter(layer.weight.data.to(DEVICE), requires_grad=False)
        with CHOICE.image():
            row["resident_ms"], row["resident_peak_mb"], found["resident"] = measure(layers, x, options.passes)
        row["same_bits"] = len({tuple(one) for one in found.values()}) == 1
    print(json.dumps(row))
    if options.json:
        options.json.write_text(json.dumps(row, indent=1) + "\n")
    return 0 if row["same_bits"] else 1


if __name__ == "__main__":
    sys.exit(main())
