"""Test-only extension: with LORA_GUARD_REFERENCE=1 Forge merges LoRAs in fp64 into fp32 weights, on every storage.

The result is the fp32 reference picture from Forge's own pipeline. Linked into extensions/ by tests/real_forge/run.py.
"""

import os
import sys

if os.environ.get("LORA_GUARD_REFERENCE"):
    import torch
    from backend.operations_gguf import dequantize_tensor
    from backend.patcher.lora import LoraLoader, extra_weight_calculators

    sys.path.append(os.environ["LORA_GUARD_TESTS"])
    from support.reference import merge_reference

    def refresh(self, lora_patches, offload_device=None, force_refresh=False):
        stack = {}
        for patches in lora_patches.values():
            for key, entries in patches.items():
                stack.setdefault(key, []).extend(entries)
        with torch.inference_mode(False), torch.no_grad():
            for (layer, name), parameter in self.backup.items():
                setattr(layer, name, parameter)
            self.backup = {}
            for key, entries in stack.items():
                path, _, name = key.rpartition(".")
                layer = self.model.get_submodule(path)
                parameter = getattr(layer, name)
                scale = getattr(layer, "scale_weight", None) if name == "weight" else None
                dense = dequantize_tensor(parameter).data.double()
                if scale is not None:
                    self.backup[layer, "scale_weight"] = scale
                    dense = dense * scale.double()
                    layer.scale_weight = None
                self.backup[layer, name] = parameter
                merged = merge_reference(entries, dense, extra_weight_calculators).float()
                setattr(layer, name, torch.nn.Parameter(merged, requires_grad=False))
        self.loaded_hash = str(list(lora_patches.keys()))

    def unless_same(self, lora_patches, offload_device=None, force_refresh=False):
        if str(list(lora_patches.keys())) != self.loaded_hash or force_refresh:
            refresh(self, lora_patches, offload_device, force_refresh)

    LoraLoader.refresh = unless_same
    print("[reference] LoRAs are merged in fp64 into fp32 weights")
