"""What a bypass takes of a card and of the processor on the layers of one Flux-dev step, without the layers' own products.

    python benchmarks/bypass_gpu.py [--smoke]

For each shape: milliseconds of the card for what a bypass adds to a layer's output (the card is kept busy while it is queued, so that
launches are hidden), and microseconds of the processor where the layer is short. LoRAs of rank 16, of 16 and 32 at two strengths, and of 48.
The last line has the card's milliseconds of all layers of a step. `--smoke` runs it on the CPU with tiny sizes.
"""

import statistics
import sys
import time
from pathlib import Path

SMOKE = "--smoke" in sys.argv
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from kernels_gpu import LAYERS  # noqa: E402

from lib_lora_guard.adapters import LoraAdapter, Term  # noqa: E402
from lib_lora_guard.patching.bypass import Bypass  # noqa: E402

DEVICE = torch.device("cpu" if SMOKE else "cuda:0")
STACKS = {"16": ((16, 0.8),), "16 + 32, two strengths": ((16, 0.8), (32, 0.4)), "48": ((48, 0.8),)}
SHORT_TOKENS = 512
REPEATS, CALLS = (1, 2) if SMOKE else (11, 200)


def numbers(*shape):
    return torch.randn(shape, device=DEVICE).bfloat16()


def milliseconds(call, busy):
    """The card's own time of a call."""
    if SMOKE:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    found = []
    for _ in range(REPEATS + 2):
        for _ in range(6):
            busy @ busy
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found[2:])


def microseconds(call):
    """The processor's time of a call, while the card is ahead."""
    for _ in range(10):
        call()
    if not SMOKE:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS * 1e6


def main():
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    busy, totals = numbers(64 if SMOKE else 8192, 64 if SMOKE else 8192), dict.fromkeys(STACKS, 0.0)
    print("cpu" if SMOKE else torch.cuda.get_device_name(), torch.__version__, flush=True)
    for name, rows, columns, tokens, count in LAYERS:
        if SMOKE:
            rows, columns, tokens = rows // 256, columns // 256, min(tokens, 4)
        layer = torch.nn.Linear(columns, rows, device=DEVICE, dtype=torch.bfloat16)
        x, output, found = numbers(1, tokens, columns), numbers(1, tokens, rows), []
        for stack, loras in STACKS.items():
            terms = tuple(
                Term(
                    LoraAdapter(numbers(rows, rank).cpu() * 0.1, numbers(rank, columns).cpu() * 0.1, alpha=rank),
                    strength,
                )
                for rank, strength in loras
            )
            hook = Bypass(name, terms, (rows, columns))

            def call(hook=hook, layer=layer, x=x, output=output):
                hook.changed(layer, x, output)

            ms = milliseconds(call, busy)
            totals[stack] += ms * count
            processor = f", {microseconds(call):.0f} us of the processor" if tokens <= SHORT_TOKENS else ""
            found.append(f"{stack}: {ms:.4f} ms{processor}")
        print(f"{name} ({rows}, {columns}), {tokens} tokens: " + "; ".join(found), flush=True)
    print("a step, ms:", {stack: round(total, 2) for stack, total in totals.items()})


if __name__ == "__main__":
    main()
