"""The same small models in the double's and in the real Forge's layers.

`FORGE_ROOT` set: the real backend is imported from there (see run_real.py, which starts the right Python for it).
"""

import importlib
import os
import sys
from pathlib import Path

import torch
from support.make import Net

REAL = bool(os.environ.get("LORA_GUARD_CONTRACT_REAL"))
STORAGES = ["fp32", "bf16", "fp16", "fp8", "scaled_fp8", "Q8_0"] + (
    ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "BF16"] if REAL else []
)
LOW_BIT = [s for s in STORAGES if s not in ("fp32", "bf16", "fp16")]
WIDTH = 32
K_WIDTH = 256
"""K-quants have blocks of 256 columns."""


def import_paths():
    if not REAL:
        return [str(Path(__file__).parent.parent / "forge_double")]
    root = Path(os.environ["FORGE_ROOT"])
    return [str(root), str(root / "packages_3rdparty"), str(root / "repositories" / "huggingface_guess")]


class Host:
    """The imported host, fresh for every test on the double, one for all on the real Forge."""

    def __init__(self):
        for path in reversed(import_paths()):
            if path not in sys.path:
                sys.path.insert(0, path)
        self.memory = importlib.import_module("backend.memory_management")
        self.lora = importlib.import_module("backend.patcher.lora")
        self.operations = importlib.import_module("backend.operations")
        self.gguf = importlib.import_module("backend.operations_gguf")
        self.base = importlib.import_module("backend.patcher.base")

    def close(self):
        self.memory.current_loaded_models.clear()
        if not REAL:
            for path in import_paths():
                sys.path.remove(path)
            for name in [n for n in sys.modules if n == "backend" or n.startswith("backend.")]:
                del sys.modules[name]

    def build(self, storage, seed=0):
        """`(patcher, dense)`: a model stored as `storage`, and its weights as the host itself reads them, in fp32."""
        width = K_WIDTH if storage.endswith("_K") else WIDTH
        plain = Net(width, depth=1 if storage.endswith("_K") else 2, seed=seed)
        state, settings = self._stored(plain, storage)
        with self.operations.using_forge_operations(**settings), torch.random.fork_rng(devices=[]):
            model = Net(width, depth=len(plain.blocks))
        model.load_state_dict(state, strict=False)
        model.requires_grad_(False)
        cpu = torch.device("cpu")
        patcher = self.base.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        self.load(patcher)
        wide = (torch.float32, torch.bfloat16, torch.float16)
        model.rounded_to = {n: p.dtype if p.dtype in wide else torch.float32 for n, p in model.named_parameters()}
        return patcher, {name: self._dense(model, name) for name in plain.state_dict()}

    def load(self, patcher):
        self.memory.load_models_gpu([patcher])
        return patcher

    def _stored(self, plain, storage):
        state = {k: v.clone() for k, v in plain.state_dict().items()}
        if storage in ("fp32", "bf16", "fp16"):
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[storage]
            return {k: v.to(dtype) for k, v in state.items()}, {
                "dtype": dtype,
                "manual_cast_enabled": dtype != torch.float32,
            }
        if storage in ("fp8", "scaled_fp8"):
            fp8 = torch.float8_e4m3fn
            stored = {k: v.to(fp8) if k != "scale" else v for k, v in state.items()}
            if storage == "scaled_fp8":
                for key in [k for k in state if k.endswith(("qkv.weight", "proj.weight"))]:
                    scale = state[key].abs().max() / 448
                    stored[key] = (state[key] / scale).to(fp8)
                    stored[key[: -len("weight")] + "scale_weight"] = scale.reshape(1)
            return stored, {"dtype": fp8, "manual_cast_enabled": True}
        stored = {}
        for key, value in state.items():
            if key.endswith(("qkv.weight", "proj.weight")):
                stored[key] = self._gguf_parameter(value, storage)
            elif key.endswith(("qkv.bias", "proj.bias")):
                stored[key] = self._gguf_parameter(value, "F32")
            else:
                stored[key] = value
        return stored, {"dtype": torch.bfloat16, "manual_cast_enabled": True, "bnb_dtype": "gguf"}

    def _gguf_parameter(self, weight, kind):
        if REAL:
            return _real_gguf(self.gguf, weight, kind)
        from lib_lora_guard.weights import Q8_0Codec

        if kind == "F32":
            return self.gguf.ParameterGGUF(weight, None, weight.shape)
        data = Q8_0Codec().encode(weight)["data"]
        return self.gguf.ParameterGGUF(data, self.gguf.Q8_0, weight.shape)

    def _dense(self, model, name):
        layer_path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(layer_path)
        parameter = getattr(layer, leaf)
        value = self.gguf.dequantize_tensor(parameter)
        value = value.data.to(torch.float32, copy=True)
        scale = getattr(layer, "scale_weight", None) if leaf == "weight" else None
        return value if scale is None else value * scale.float()


def _real_gguf(operations_gguf, weight, kind):
    import gguf
    import numpy as np

    quant = gguf.GGMLQuantizationType[kind]

    class ReaderTensor:
        tensor_type = quant
        shape = tuple(reversed(weight.shape))

    array = weight.float().numpy()
    if kind in ("F32", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16"):
        data = array if kind == "F32" else gguf.quants.quantize(array, quant)
    else:
        # Forge's gguf copy has no encoder for K-quants: any bytes with sane scales are a valid weight.
        block, size = gguf.GGML_QUANT_SIZES[quant]
        data = np.random.default_rng(1).integers(
            0, 255, (array.shape[0], array.shape[1] // block * size), dtype=np.uint8
        )
        scale = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
        blocks = data.reshape(-1, size)
        for place in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]:
            blocks[:, place : place + 2] = scale
    ReaderTensor.data = data
    return operations_gguf.ParameterGGUF(ReaderTensor)
