"""The short way of patched layers, taken at once: plain torch does the kernels' work."""

import torch

from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.kernels.stored import Fp8
from lib_lora_guard.kernels.twin import with_factors
from lib_lora_guard.patching import fused
from lib_lora_guard.patching.fused_choice import CHOICE, Twin


def take_short_way(monkeypatch):
    """Returns the list that gets `(stored, factors)` of each fused pass from now on."""
    passes, original = [], fused.fused_weight

    def counted(stored, factors, dtype):
        passes.append((stored, factors))
        return original(stored, factors, dtype)

    monkeypatch.setattr(fused, "fused_weight", counted)
    monkeypatch.setattr(CHOICE, "compiler", Twin())
    monkeypatch.setattr(CHOICE, "held", {})
    return passes


class PlainWeight(fused.RawWeight):
    """A layer of torch's own, as if its plain numbers were of low bits."""

    def of(self, layer, x, terms=None):
        if terms is not None:
            # They have a forward pass of their own here.
            return None
        return fused.Held(layer.weight, layer.bias) if layer.weight.dtype == x.dtype else None


def take_short_way_of_plain_layers(monkeypatch):
    """Gives plain fp32 layers a short way. Returns the list that gets an entry for each fused pass."""
    passes, raw = take_short_way(monkeypatch), PlainWeight()

    def made(stored, factors, dtype):
        passes.append((stored, factors))
        return with_factors(stored.data.clone(), factors)

    monkeypatch.setattr(fused, "fused_weight", made)
    monkeypatch.setattr(fused, "stored_weight", lambda weight, *_: Fp8(weight.data))
    monkeypatch.setattr(
        PlainAccess,
        "raw_weight",
        lambda self, site: raw if type(site.layer).__name__ == "Linear" and len(site.shape) == 2 else None,
    )
    return passes


def bnb_parameter(weight, kind="nf4", block=64):
    """A parameter as bitsandbytes keeps it: `weight` (fp32, a multiple of the block) in four bits."""
    from lib_lora_guard.weights.bnb4 import LEVELS

    levels = torch.as_tensor(LEVELS[kind], dtype=torch.float32)
    blocks = weight.reshape(-1, block)
    absmax = blocks.abs().amax(1)
    index = (blocks / absmax.unsqueeze(1)).unsqueeze(-1).sub(levels).abs().argmin(-1).reshape(-1, 2).to(torch.uint8)
    packed = (index[:, 0] << 4 | index[:, 1]).reshape(-1, 1)
    parameter = torch.nn.Parameter(packed, requires_grad=False)
    state = type("State", (), {})()
    state.absmax, state.shape, state.dtype, state.blocksize, state.quant_type = (
        absmax,
        weight.shape,
        torch.float32,
        block,
        kind,
    )
    state.nested = False
    parameter.bnb_quantized, parameter.quant_state, parameter.quant_type = True, state, kind
    dense = levels[index.reshape(-1).long()].view(-1, block).mul(absmax.unsqueeze(1)).view(weight.shape)
    return parameter, dense
