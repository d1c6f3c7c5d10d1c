"""Adapters from the tensors of one module, through the reader of LoRA files."""

from dataclasses import replace
from pathlib import Path

import torch

from lib_lora_guard.adapters.file_settings import FileSettings, PeftSettings
from lib_lora_guard.adapters.files import parse_tensors


def adapter_from(tensors, alpha=None, rank=4, **more):
    """The adapter that holds `tensors` (suffix -> tensor); `alpha` where the file keeps it outside its tensors.

    A magnitude (`dora_scale`, `lora_magnitude_vector`) is left out: `decompose` takes it.
    """
    left_out = ("dora_scale", "lora_magnitude_vector", "diff_b", "b_norm")
    named = {f"m.{suffix}": tensor for suffix, tensor in tensors.items() if suffix not in left_out}
    settings = FileSettings({} if alpha is None else {"": PeftSettings({"lora_alpha": alpha, "r": rank})})
    adapter = parse_tensors(Path("x.safetensors"), named, settings).adapters["m", "weight"]
    return replace(adapter, **more)


def patched(adapter, weight, strength):
    """`weight` patched, after the check that a host makes first; the caller's tensor stays as it is."""
    adapter.check(tuple(weight.shape), may_expand=False)
    return adapter.patch(weight.clone(), strength, None)


def delta_of(adapter, weight):
    """What an additive adapter adds at strength 1."""
    return patched(adapter, torch.zeros_like(weight), 1.0)
