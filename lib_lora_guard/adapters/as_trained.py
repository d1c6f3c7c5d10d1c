"""DoRA's magnitude step as its trainers mean it (arXiv 2402.09353), where `dora.py` follows the host.

At strength 1 peft (`tuners/lora/variants.py`) and LyCORIS (`functional/general.py`) give the same weight:
`magnitude * (W + D) / |W + D|`, the norm taken of the *patched* weight, by output row (peft always, LyCORIS
`wd_on_out=True`, its default) or by input column (`wd_on_out=False`). The host takes the norm of the *unpatched* weight
on the output axis; on the input axis it agrees.

At other strengths `s` each goes its own way, and the trainers' ways do not give W back at 0:

========  =======================================  ==============================
rule      weight                                   at 0
========  =======================================  ==============================
blend     `(1 - s) W + s m (W + D) / |W + D|`      W (also what the host does)
peft      `m (W + s D) / |W + s D|`                `m W / |W|` (`set_scale` scales D)
lycoris   `(W + D) (1 + s (m / |W + D| - 1))`      `W + D` (`make_weight(scale)`)
========  =======================================  ==============================
"""

from __future__ import annotations

from typing import Literal

import torch

from .base import RowFunction

StrengthRule = Literal["blend", "peft", "lycoris"]


def decompose_as_trained(
    weight: torch.Tensor,
    delta: torch.Tensor,
    magnitude: torch.Tensor,
    strength: float,
    function: RowFunction | None,
    *,
    rule: StrengthRule = "blend",
) -> torch.Tensor:
    """`weight` set to its magnitude-normalised sum with `delta` (which holds alpha / rank), by `strength` under `rule`.

    Takes what `dora.decompose` takes: `magnitude` `(out, ...)` scales rows, any other shape with one number per input
    channel scales columns. Computed in fp32 at least and rounded once.
    """
    base = weight.to(torch.promote_types(weight.dtype, torch.float32))
    delta = delta.reshape(weight.shape)
    if function is not None:
        delta = function(delta)
    patched = base + (delta.to(base) * strength if rule == "peft" else delta)
    by_row = magnitude.dim() > 0 and magnitude.shape[0] == magnitude.numel() == weight.shape[0]
    axis = 0 if by_row else 1
    channels = [1] * weight.dim()
    channels[axis] = -1
    others = [d for d in range(weight.dim()) if d != axis]
    norm: torch.Tensor = torch.linalg.vector_norm(patched, dim=others, keepdim=True)
    gain = magnitude.to(base).reshape(channels) / (norm + torch.finfo(base.dtype).eps)
    if rule == "lycoris":
        gain = torch.lerp(torch.ones_like(gain), gain, strength)
    patched.mul_(gain)
    return weight.copy_(torch.lerp(base, patched, strength) if rule == "blend" and strength != 1.0 else patched)
