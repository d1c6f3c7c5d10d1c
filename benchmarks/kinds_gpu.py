"""Every adapter kind in every mode and storage on a GPU, against an fp64 merge; and the cost of a merge there.

    python benchmarks/kinds_gpu.py

Needs no Forge. Prints one line per case and the number of wrong cases. A case is wrong if its error exceeds 1e-4 of the
LoRA's contribution in fp32 (2e-2 with bf16 activations). It is also wrong if a weight was not restored bit for bit.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.make import host_value, rand
from support.reference import merge_reference

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.planning.mode import Wish
from lib_lora_guard.weights import Nf4Codec, Q8_0Codec, ScaledFp8Codec, StoredLinear

SIZE = 256
CODECS = {"fp8": ScaledFp8Codec(), "nf4": Nf4Codec(), "Q8_0": Q8_0Codec()}
CASES = [("lora", None), ("loha", None), ("lokr", None), ("lokr_factors", None), ("glora", None), ("diff", None), ("lora", "output"), ("lora", "input")]  # fmt: skip


def layer_of(storage):
    torch.manual_seed(0)
    layer = torch.nn.Linear(SIZE, SIZE)
    if storage in CODECS:
        return StoredLinear(CODECS[storage], layer.weight.data, layer.bias.data)
    return layer.to(torch.bfloat16) if storage == "bf16" else layer


def one_case(storage, kind, dora, wish):
    """Returns `(mode, error relative to the LoRA's contribution, restored)`."""
    layer = layer_of(storage)
    model = torch.nn.Sequential(layer).cuda()
    x = rand(8, 300, SIZE, seed=9).cuda().to(torch.bfloat16 if storage == "bf16" else torch.float32)
    dense = (layer.decode(torch.float32) if storage in CODECS else layer.weight.data).double().cpu()
    bits = [p.detach().clone() for p in model.parameters()]
    entry = [0.8, host_value(kind, (SIZE, SIZE), 1, rank=4, dora=dora), 1.0, None, None]
    true, base = (x.double().cpu() @ weight.T for weight in (merge_reference([entry], dense), dense))
    engine, access = Engine(), PlainAccess(model)
    report = engine.change(access, [LoraRequest("l", 0.8, {"0.weight": [parse_term(entry, {})]})], wish)
    found = model(x).double().cpu() - layer.bias.data.double().cpu()
    engine.change(access, [])
    same = all(torch.equal(a.view(torch.uint8), b.detach().view(torch.uint8)) for a, b in zip(bits, model.parameters(), strict=True))  # fmt: skip
    (mode,) = report.loras[0].modes
    return (
        mode,
        float((found - true).norm() / (true - base).norm()),
        same and all(p.is_cuda for p in model.parameters()),
    )


def merge_cost():
    """Merges a LoRA into 40 bf16 layers and restores them. Returns seconds, peak MB beside the model, and backups as
    text.
    """
    model = torch.nn.Sequential(*[torch.nn.Linear(3072, 3072, bias=False) for _ in range(40)]).to(torch.bfloat16).cuda()
    value = ("lora", (rand(3072, 16, seed=1, scale=0.02), rand(16, 3072, seed=2, scale=0.02), 16.0, None, None))
    terms = {f"{n}.weight": [parse_term([1.0, value, 1.0, None, None], {})] for n in range(40)}
    engine, access = Engine(), PlainAccess(model)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    engine.change(access, [LoraRequest("l", 1.0, terms)], Wish.MERGE)
    torch.cuda.synchronize()
    merged, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated() - before
    backups, started = engine._backups.bytes(), time.perf_counter()
    engine.change(access, [])
    torch.cuda.synchronize()
    restored = time.perf_counter() - started
    return f"merge of 720 MB: {merged:.3f} s, {peak >> 20} MB at the peak, {backups >> 20} MB of backups, restored in {restored:.3f} s"


def main():
    torch.set_grad_enabled(False)
    wrong = total = 0
    for storage in ("fp32", "bf16", *CODECS):
        for kind, dora in CASES:
            for wish in Wish:
                if wish is Wish.MERGE and storage in CODECS:
                    continue
                mode, error, restored = one_case(storage, kind, dora, wish)
                right = restored and error < (2e-2 if storage == "bf16" else 1e-4)
                total, wrong = total + 1, wrong + (not right)
                print(storage, kind, dora or "", wish.value, mode, f"{error:.1e}", "" if right else "WRONG")
    print(f"{wrong} of {total} wrong; {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(merge_cost())
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
