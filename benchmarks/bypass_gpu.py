"""What a bypass takes of a card and of the processor on the layers of one Flux-dev step, without the layers' own products.

    python benchmarks/bypass_gpu.py [--smoke]

For each shape: milliseconds of the card for what a bypass adds to a layer's output (the card is kept busy while it is queued, so that
launches are hidden), and microseconds of the processor where the layer is short. LoRAs of rank 16, of 16 and 32 at two strengths, and of 48.
The last line has the card's milliseconds of all layers of a step. The figures of docs/ were taken with products of 8192 x 8192 keeping the
card busy. `--smoke` runs it on the CPU with tiny sizes.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from kernels_gpu import DEVICE, LAYERS, SMOKE, median_ms, processor_us  # noqa: E402

from lib_lora_guard.adapters import LoraAdapter, Term  # noqa: E402
from lib_lora_guard.patching.bypass import Bypass  # noqa: E402

STACKS = {"16": ((16, 0.8),), "16 + 32, two strengths": ((16, 0.8), (32, 0.4)), "48": ((48, 0.8),)}
SHORT_TOKENS = 512
REPEATS = 11


def numbers(*shape):
    return torch.randn(shape, device=DEVICE).bfloat16()


def main():
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    totals = dict.fromkeys(STACKS, 0.0)
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

            ms = median_ms(call, REPEATS)
            totals[stack] += ms * count
            processor = f", {processor_us(call):.0f} us of the processor" if tokens <= SHORT_TOKENS else ""
            found.append(f"{stack}: {ms:.4f} ms{processor}")
        print(f"{name} ({rows}, {columns}), {tokens} tokens: " + "; ".join(found), flush=True)
    print("a step, ms:", {stack: round(total, 2) for stack, total in totals.items()})


if __name__ == "__main__":
    main()
