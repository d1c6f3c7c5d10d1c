#!/usr/bin/env bash
# Guess:    An OFT adapter that was just added to a 3x3 convolution is the identity. The output stays, as it does with a
#           LoRA whose up factor is zero.
# Versions: torch==2.13.0 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0, any
#           build of torch, on a CPU
# Seen:     The output has almost nothing in common with the plain one (correlation -0.02, change 290 %). PEFT cuts the
#           input into 3x3 patches and lays them back on each other, but in another order: one bright pixel becomes
#           nine, in rows 3 to 13 of 16. Where the picture is even, it is 9 times as bright. The merge changes the
#           weight alone, so a merged adapter is another function than the trained one. A 1x1 convolution is right.
# Matters:  What a PEFT OFT learns on a 3x3 convolution belongs to a scrambled picture. No merge and no patch of the
#           weight shows what its trainer saw, PEFT's own included.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 peft==0.21.2 \
    transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import torch
from peft import OFTConfig, get_peft_model
from torch import nn


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


torch.manual_seed(0)
picture, pixel = torch.randn(1, 8, 16, 16), torch.zeros(1, 8, 16, 16)
pixel[0, 3, 8, 8] = 1
for size in (1, 3):
    base = nn.Sequential(nn.Conv2d(8, 8, size, padding=size // 2, bias=False))
    plain = base(picture).detach()
    model = get_peft_model(base, OFTConfig(r=0, oft_block_size=8, target_modules=["0"]))
    turn = model.base_model.model[0].oft_R["default"]  # what is done to the input before the convolution
    with torch.no_grad():
        fresh = model(picture)
        places = turn(pixel).nonzero()[:, 2:].tolist()
        print(f"{size}x{size}: the pixel of row 8, column 8 is now at", places)
        check(f"{size}x{size}: places of one pixel", len(places), size**2, size**2)
        rows = max(row for row, _ in places) - min(row for row, _ in places)
        check(f"{size}x{size}: rows between them", rows, *((0, 0) if size == 1 else (10, 10)))
        check(
            f"{size}x{size}: an even picture, in its middle",
            turn(torch.ones_like(picture))[0, 0, 8, 8].item(),
            size**2,
            size**2,
        )
        alike = nn.functional.cosine_similarity(fresh.flatten(), plain.flatten(), dim=0).item()
        check(
            f"{size}x{size}: correlation with the plain output",
            alike,
            *((0.9999, 1.0001) if size == 1 else (-0.1, 0.2)),
        )
        change = ((fresh - plain).norm() / plain.norm()).item()
        check(f"{size}x{size}: change by a fresh adapter", change, *((0, 1e-6) if size == 1 else (2, 4)))
        merged = model.merge_and_unload()(picture)
        check(f"{size}x{size}: change by the merged adapter", ((merged - plain).norm() / plain.norm()).item(), 0, 1e-6)
PY
