"""One layer of Flux on a GPU: the cost of each way to apply each kind of LoRA, and the cost of a merge.

    python benchmarks/layer_gpu.py --out layers.jsonl [--write]

Needs no Forge. Times are the median of `--repeats` calls after a warm-up, timed by CUDA events, with 4608 tokens
(1024x1024) in bf16. "Over base" is the time that the LoRA adds to the layer's own. `--write` puts the table into
docs/gpu.md.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib_lora_guard.adapters import LohaAdapter, LokrAdapter, LoraAdapter, Term
from lib_lora_guard.adapters.base import apply_terms
from lib_lora_guard.patching.bypass import Bypass
from lib_lora_guard.patching.merging import merge
from lib_lora_guard.patching.on_the_fly import WeightTerms
from lib_lora_guard.planning.cheap import forms_of, pays
from lib_lora_guard.weights import Nf4Codec, PlainCodec, ScaledFp8Codec, StoredLinear

TOKENS = 4608
SHAPES = {"qkv+mlp 21504x3072": (21504, 3072), "proj 3072x3072": (3072, 3072)}
CODECS = {"fp8": ScaledFp8Codec(), "nf4": Nf4Codec(), "bf16": PlainCodec(torch.bfloat16, "bf16")}


def normal(*shape, scale=0.02):
    return (torch.randn(shape) * scale).to(torch.bfloat16)


def stacks(shape):
    """Returns the adapters of each stack by its label."""
    out, inner = shape

    def lora(rank, magnitude=None):
        return LoraAdapter(normal(out, rank), normal(rank, inner), alpha=rank / 2, magnitude=magnitude)

    def loha(rank):
        return LohaAdapter(
            normal(out, rank), normal(rank, inner), normal(out, rank), normal(rank, inner), alpha=rank / 2
        )

    rows = torch.rand(out, 1).add_(0.5)
    return {
        "LoRA rank 16": [lora(16)],
        "LoRA rank 128": [lora(128)],
        "four LoRAs rank 16": [lora(16) for _ in range(4)],
        "four LoRAs rank 128": [lora(128) for _ in range(4)],
        "LoHa rank 4": [loha(4)],
        "LoHa rank 8": [loha(8)],
        "LoHa rank 16": [loha(16)],
        "LoHa rank 32": [loha(32)],
        "LoKr factor 8": [LokrAdapter(normal(8, 8), normal(out // 8, inner // 8), alpha=1.0)],
        "LoKr factor 8, rank 16": [
            LokrAdapter(normal(8, 8), w2a=normal(out // 8, 16), w2b=normal(16, inner // 8), alpha=16.0)
        ],
        "DoRA rank 16, rows": [lora(16, rows)],
        "DoRA rank 16, columns": [lora(16, torch.rand(1, inner).add_(0.5))],
    }


def seconds(call, repeats):
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak_mb(call):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(options):
    for shape_name, shape in SHAPES.items():
        for codec_name, codec in CODECS.items():
            layer = StoredLinear(codec, torch.randn(shape) * 0.02, None).cuda()
            x = torch.randn(1, TOKENS, shape[1], device="cuda", dtype=torch.bfloat16)
            for label, adapters in stacks(shape).items():
                row = {"layer": shape_name, "storage": codec_name, "stack": label}
                row |= measure_stack(layer, x, [Term(adapter, 0.8) for adapter in adapters], shape, options.repeats)
                yield {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def measure_stack(layer, x, terms, shape, repeats):
    """Measures one stack on one layer, each way in turn."""

    def run():
        return layer(x)

    forms = forms_of(terms, shape)
    exact = None not in forms
    row = {
        "base_ms": seconds(run, repeats),
        "auto": "bypass" if exact and pays(forms, one_token=False) else "on_the_fly",
    }
    base_mb = peak_mb(run)
    magnitudes = {i: getattr(t.adapter, "magnitude", None) for i, t in enumerate(terms)}
    ratios = {i: torch.ones(m.numel()) for i, m in magnitudes.items() if m is not None}
    if exact:
        bypass = Bypass("k", tuple(terms), shape, ratios)
        bypass.attach(layer)
        row["bypass_ms"] = seconds(run, repeats)
        row["bypass_extra_mb"] = peak_mb(run) - base_mb
        bypass.detach(layer)
    layer.weight_terms = WeightTerms("k", terms)
    row["on_the_fly_ms"] = seconds(run, repeats)
    row["on_the_fly_extra_mb"] = peak_mb(run) - base_mb
    layer.weight_terms = None
    weight = layer.weight.data
    if weight.dtype is torch.bfloat16:

        def sliced():
            return merge(weight, terms, device=weight.device, out_dtype=weight.dtype)

        def whole():
            return apply_terms(weight.float(), terms).to(weight.dtype)

        row |= {"merge_ms": seconds(sliced, 5), "merge_peak_mb": peak_mb(sliced)}
        row |= {"merge_whole_ms": seconds(whole, 5), "merge_whole_peak_mb": peak_mb(whole)}
    return row


def table(rows):
    head = ["layer", "storage", "stack", "base ms", "bypass", "on the fly", "auto takes", "bypass / on the fly, extra MB", "merge ms (whole at once)", "merge peak MB (whole)"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for r in rows:

        def over(key, r=r):
            return "-" if key not in r else f"{r[key]:.3f} ({100 * (r[key] / r['base_ms'] - 1):+.0f} %)"

        extra = f"{r.get('bypass_extra_mb', float('nan')):.0f} / {r['on_the_fly_extra_mb']:.0f}".replace("nan", "-")
        merge_ms = f"{r['merge_ms']:.1f} ({r['merge_whole_ms']:.1f})" if "merge_ms" in r else "-"
        peak = f"{r['merge_peak_mb']:.0f} ({r['merge_whole_peak_mb']:.0f})" if "merge_ms" in r else "-"
        lines.append([r["layer"], r["storage"], r["stack"], f"{r['base_ms']:.3f}", over("bypass_ms"), over("on_the_fly_ms"), r["auto"], extra, merge_ms, peak])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help="only write the table of --out into docs/gpu.md")
    options = parser.parse_args()
    if options.write:
        head, *rows = [json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()]
        text = f"{head['gpu']}, torch {head['torch']}, LoRA Guard {head['commit']}; {TOKENS} tokens, bf16, median of {head['repeats']}.\n\n{table(rows)}"  # fmt: skip
        page = Path(__file__).resolve().parent.parent / "docs" / "gpu.md"
        old = page.read_text(encoding="utf-8")
        new = re.sub(r"(<!-- layer table -->\n).*?(<!-- end of layer table -->)", lambda m: m[1] + text + "\n" + m[2], old, flags=re.DOTALL)  # fmt: skip
        assert new != old or text in old, "docs/gpu.md has no markers for the layer table"
        page.write_text(new, encoding="utf-8")
        return
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    head = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": options.commit, "repeats": options.repeats}  # fmt: skip
    with options.out.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head) + "\n")
        for row in measure(options):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(row, flush=True)


if __name__ == "__main__":
    main()
