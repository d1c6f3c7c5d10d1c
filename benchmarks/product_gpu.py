"""Does the time of a product depend on the numbers in its weight? A card that may draw so much power and no more is slower for numbers
that make it draw more.

    python benchmarks/product_gpu.py [--smoke]

Products of Flux-dev's largest layer (4608 x 3072 x 21504, bf16) without a pause, a second for each weight in turn, four times: decoded
NF4, the same with a LoRA of rank 16 in it that is 0.3, 3 and 30 % of it, and the random numbers that it was made of. Prints each weight's
milliseconds, with the card's power and clock (`nvidia-smi`). Needs bitsandbytes. `--smoke` runs it on the CPU with tiny sizes, rounded
numbers in the place of NF4.
"""

import subprocess
import sys
import time

import torch
from torch.nn.functional import linear

SMOKE = "--smoke" in sys.argv
DEVICE = "cpu" if SMOKE else "cuda:0"
TOKENS, COLUMNS, ROWS = (4, 32, 48) if SMOKE else (4608, 3072, 21504)
FIRST, COUNTED, TURNS = (1, 2, 1) if SMOKE else (400, 600, 4)
CHANGES = (0.0015, 0.015, 0.15)


def decoded(weight):
    """A weight as four bits hold it."""
    if SMOKE:
        return (weight * 100).round() / 100
    import bitsandbytes.functional as bnb

    data, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    return bnb.dequantize_4bit(data, state).bfloat16()


def weights():
    random = (torch.randn(ROWS, COLUMNS, device=DEVICE) * 0.02).bfloat16()
    nf4 = decoded(random)
    found = {"NF4": nf4}
    for change in CHANGES:
        up, down = torch.randn(ROWS, 16, device=DEVICE) * change, torch.randn(16, COLUMNS, device=DEVICE) * 0.01
        with_lora = (nf4.float() + up @ down).bfloat16()
        share = ((with_lora.float() - nf4.float()).norm() / nf4.float().norm()).item()
        found[f"NF4 with a LoRA of {share:.2%}"] = with_lora
    return found | {"random": random}


def card():
    """Watts and MHz."""
    if SMOKE:
        return ""
    asked = ["nvidia-smi", "--query-gpu=power.draw,clocks.sm", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def milliseconds(x, weight):
    """Of a product, when many were made before it."""
    if SMOKE:
        begin = time.perf_counter()
        linear(x, weight)
        return (time.perf_counter() - begin) * 1e3, ""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for number in range(FIRST + COUNTED):
        if number == FIRST:
            begin.record()
        linear(x, weight)
    end.record()
    time.sleep(0.45)
    seen = card()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / COUNTED, seen


def main():
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    x, found = torch.randn(TOKENS, COLUMNS, device=DEVICE).bfloat16(), weights()
    print("cpu" if SMOKE else torch.cuda.get_device_name(), torch.__version__, flush=True)
    rows = {name: [] for name in found}
    for turn in range(TURNS):
        for name in list(found)[:: -1 if turn % 2 else 1]:
            ms, seen = milliseconds(x, found[name])
            rows[name].append(f"{ms:.4f} ms {seen}".strip())
    for name, row in rows.items():
        print(f"{name}: " + "; ".join(row))


if __name__ == "__main__":
    main()
