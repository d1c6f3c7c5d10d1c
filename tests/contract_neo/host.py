"""The same small models in the double's and in the real Neo's layers."""

import importlib
import json
import os
import sys
from pathlib import Path

import torch
from support.make import Net

from lib_lora_guard.adapters.patch_tuples import parse_value, term_of
from lib_lora_guard.hosts.neo.patchers import LORAS, loras_of
from lib_lora_guard.runtime.host import FittedLora

REAL = bool(os.environ.get("LORA_GUARD_CONTRACT_REAL"))
WIDE = ["fp32", "bf16", "fp16"]
KITCHEN = {"kitchen fp8": "float8_e4m3fn", "mxfp8": "mxfp8"} | (
    {"nvfp4": "nvfp4", "int8": "int8_tensorwise", "int8 rotated": "int8_tensorwise"} if REAL else {}
)
GGUF = ["Q8_0"] + (["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "BF16"] if REAL else [])
STORAGES = [*WIDE, "fp8", *KITCHEN, *GGUF]
LOW_BIT = [storage for storage in STORAGES if storage not in WIDE]
WIDTH, K_WIDTH = 32, 256
"""K-quants have blocks of 256 columns, and tiles of scales 128 rows."""

CPU = torch.device("cpu")


class Host:
    """The imported host, fresh for every test on the double, one for all on the real Neo."""

    def __init__(self):
        root = Path(os.environ["FORGE_ROOT"]) if REAL else Path(__file__).parent.parent / "neo_double"
        self._paths = [str(root)] + ([str(root / "modules_forge" / "packages")] if REAL else [])
        for path in reversed(self._paths):
            if path not in sys.path:
                sys.path.insert(0, path)
        self.memory = importlib.import_module("backend.memory_management")
        self.operations = importlib.import_module("backend.operations")
        self.quants = importlib.import_module("backend.quant_ops")
        self.lora = importlib.import_module("backend.patcher.lora")
        self.gguf = importlib.import_module("backend.operations_gguf")
        self.base = importlib.import_module("backend.patcher.base")
        self.state_dict = importlib.import_module("backend.state_dict")
        self.guard = None

    def close(self):
        self.memory.current_loaded_models.clear()
        if not REAL:
            for path in self._paths:
                sys.path.remove(path)
            for name in [n for n in sys.modules if n == "backend" or n.startswith("backend.")]:
                del sys.modules[name]

    def build(self, storage, seed=0):
        """`(patcher, dense)`: a model stored as `storage`, and its weights as the host itself reads them, in fp32."""
        is_wide = storage.endswith("_K") or storage in KITCHEN
        plain = Net(K_WIDTH if is_wide else WIDTH, depth=1 if is_wide else 2, seed=seed)
        state, settings = self._stored(plain, storage)
        with self.operations.using_forge_operations(**settings), torch.random.fork_rng(devices=[]):
            model = Net(plain.blocks[0].norm.normalized_shape[0], depth=len(plain.blocks))
        with torch.inference_mode(False):
            model.load_state_dict(state, strict=False)
        model.requires_grad_(False)
        patcher = self.base.ModelPatcher(model, load_device=CPU, offload_device=CPU, current_device=CPU)
        self.load(patcher)
        wide = (torch.float32, torch.bfloat16, torch.float16)
        model.rounded_to = {
            n: torch.float32 if self.is_quantised(p) or p.dtype not in wide else p.dtype
            for n, p in model.named_parameters()
        }
        return patcher, {name: self.dense(model, name) for name in plain.state_dict()}

    def is_quantised(self, parameter):
        return isinstance(parameter, self.quants.QuantizedTensor) or getattr(parameter, "gguf_cls", None) is not None

    def load(self, patcher):
        self.memory.load_models_gpu([patcher])
        return patcher

    def place(self, patcher, room_bytes):
        """Loads `patcher` with room for so many bytes of its weights."""
        loaded = patcher.model.model_loaded_weight_memory
        patcher.partially_load(CPU, room_bytes - loaded)
        return patcher

    def with_loras(self, patcher, *loras, online=False):
        """A clone of `patcher` that is to have `loras`, `(filename, patches, strength)`. It is not loaded."""
        clone = patcher.clone()
        for filename, patches, strength in loras:
            terms = {}
            for address, value in patches.items():
                key, offset, function = (address, None, None) if isinstance(address, str) else (*address, None)[:3]
                entry = (1.0, value, 1.0, offset, function)
                terms.setdefault(key, []).append(term_of(entry, lambda one: parse_value(one, {})))
            setattr(clone, LORAS, (*loras_of(clone), FittedLora(filename, terms, strength, online)))
        return clone

    def stack(self, patcher):
        return self.guard.stacks.known(patcher.model)

    def report(self, patcher):
        return self.stack(patcher).report

    def dense(self, model, name):
        path, _, leaf = name.rpartition(".")
        parameter = getattr(model.get_submodule(path), leaf)
        if isinstance(parameter, self.quants.QuantizedTensor):
            return parameter.dequantize().float()
        return self.gguf.dequantize_tensor(parameter).data.to(torch.float32, copy=True)

    def _stored(self, plain, storage):
        state = {k: v.clone() for k, v in plain.state_dict().items()}
        linear = [k for k in state if k.endswith(("qkv.weight", "proj.weight"))]
        if storage in WIDE:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[storage]
            settings = {"dtype": dtype, "manual_cast_enabled": dtype != torch.float32}
            return {k: v.to(dtype) for k, v in state.items()}, settings
        if storage == "fp8":
            fp8 = torch.float8_e4m3fn
            stored = {k: v if k.endswith(".scale") else v.to(fp8) for k, v in state.items()}
            return stored, {"dtype": fp8, "manual_cast_enabled": True}
        if storage in KITCHEN:
            for key in linear:
                self._kitchen(state, key, storage)
            return state, {"dtype": torch.float32, "manual_cast_enabled": True, "bnb_dtype": {"mixed": True}}
        for key in linear:
            state[key] = self._gguf(state[key], storage)
        others = [k for k in state if ".conv." in k and REAL] + [k.replace("weight", "bias") for k in linear]
        # A GGUF file holds every tensor in this form.
        state |= {key: self._gguf(state[key], "F32") for key in others}
        return state, {"dtype": torch.bfloat16, "manual_cast_enabled": True, "bnb_dtype": "gguf"}

    def _kitchen(self, state, key, storage):
        form = KITCHEN[storage]
        if not REAL:
            layout = {"kitchen fp8": "TensorCoreFP8E4M3Layout", "mxfp8": "TensorCoreMXFP8Layout"}[storage]
            state[key] = self.quants.QuantizedTensor.from_float(state[key], layout)
            return
        layout, conf, more = self.quants.QUANT_ALGOS[form]["comfy_tensor_layout"], {"format": form}, {}
        if storage == "int8 rotated":
            more = {"per_channel": True, "convrot": True, "convrot_groupsize": 64}
            conf |= {"convrot": True, "convrot_groupsize": 64}
        elif form != "mxfp8":
            more = {"scale": "recalculate"}
        quantised = self.quants.QuantizedTensor.from_float(state[key], layout, **more)
        state |= quantised.state_dict(key)
        name = key.replace("weight", "comfy_quant")
        state[name] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)

    def _gguf(self, weight, kind):
        if not REAL:
            from lib_lora_guard.weights import Q8_0Codec

            if kind == "F32":
                return self.gguf.ParameterGGUF(weight, None, weight.shape)
            return self.gguf.ParameterGGUF(Q8_0Codec().encode(weight)["data"], self.gguf.Q8_0, weight.shape)
        return _real_gguf(self.gguf, weight, kind)


def _real_gguf(operations_gguf, weight, kind):
    import numpy as np
    from modules_forge.packages import gguf
    from modules_forge.packages.gguf import quants
    from modules_forge.packages.gguf.constants import GGML_QUANT_SIZES

    quant, array = gguf.GGMLQuantizationType[kind], weight.float().numpy()
    if kind == "F32":
        return operations_gguf.ParameterGGUF(weight, tensor_type=quant, tensor_shape=weight.shape)
    if kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16"):
        data = quants.quantize(array, quant)
    else:
        # Neo's gguf copy has no encoder for K-quants: any bytes with sane scales are a valid weight.
        block, size = GGML_QUANT_SIZES[quant]
        data = np.random.default_rng(1).integers(0, 255, (array.shape[0], array.shape[1] // block * size), np.uint8)
        scale = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
        blocks = data.reshape(-1, size)
        for place in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]:
            blocks[:, place : place + 2] = scale
    return operations_gguf.ParameterGGUF(torch.from_numpy(data), tensor_type=quant, tensor_shape=weight.shape)
