"""The small Flux in every storage that Forge Neo loads on a CPU, its T5 in some, and a LoRA for that T5.

    FORGE_ROOT=... $FORGE_PYTHON tests/real_neo/make_storages.py

Out of `nf_bf16.safetensors` (a Flux of 1 + 1 blocks, hidden size 256, with VAE, CLIP and T5 in the file) and `nf_t5.safetensors`.
Neo's own layouts and writers quantise. Where its GGUF has no encoder, the blocks are random bytes with scales that give weights
of the usual size: it is another model then, with its own reference.
"""

import json
import math
import os
import sys
from pathlib import Path

FORGE = os.environ["FORGE_ROOT"]
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [FORGE, f"{FORGE}/modules_forge/packages"]
os.chdir(FORGE)

import numpy as np  # noqa: E402  # Neo's modules are found by the lines above
import torch  # noqa: E402
from backend import memory_management  # noqa: E402, F401  # the layouts need it to be there
from backend.quant_ops import QUANT_ALGOS, QuantizedTensor  # noqa: E402
from gguf import GGUFWriter  # noqa: E402
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: E402
from gguf.quants import quantize  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

MODELS = Path(FORGE) / "models"
PREFIX = "model.diffusion_model."
RANK = 8
KITCHEN = {
    "nvfp4": ("nvfp4", {"scale": "recalculate"}, {}),
    "mxfp8": ("mxfp8", {}, {}),
    "comfy_e5m2": ("float8_e5m2", {"scale": "recalculate"}, {}),
    "int8_tensorwise": ("int8_tensorwise", {}, {}),
    "int8_rows": ("int8_tensorwise", {"per_channel": True}, {}),
    "int8_rotated": (
        "int8_tensorwise",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 256},
        {"convrot": True, "convrot_groupsize": 256},
    ),
}
"""By name: the format in the file, arguments of its encoder, and what else the file says of a layer."""
ENCODED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16"]
RANDOM = {
    "Q2_K": {80: 0.003, 82: 0.0045},
    "Q3_K": {108: 0.001},
    "Q4_K": {0: 0.00017, 2: 0.0013},
    "Q5_K": {0: 0.00008, 2: 0.00124},
    "Q6_K": {208: 0.00003},
}
"""Where in a block its fp16 scales lie, and their values."""


def is_quantised(key, value):
    return value.dim() == 2 and "block" in key and key.endswith(".weight") and "relative" not in key


def kitchen(state, name, prefix=""):
    """The tensors of a file with `comfy_quant` for each quantised layer."""
    kind, arguments, more = KITCHEN[name]
    tensors = {}
    for key, value in state.items():
        if not is_quantised(key, value):
            tensors[prefix + key] = value
            continue
        stored = QuantizedTensor.from_float(value.float(), QUANT_ALGOS[kind]["comfy_tensor_layout"], **arguments)
        for part, tensor in stored.state_dict(prefix + key).items():
            is_exponent = tensor.dtype == torch.float8_e8m0fnu
            tensors[part] = (tensor.view(torch.uint8) if is_exponent else tensor).contiguous()
        said = json.dumps({"format": kind, **more}).encode()
        tensors[prefix + key.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    return tensors


def scaled_fp8(state, prefix=""):
    """The tensors of a file as they were before `comfy_quant`."""
    tensors = {prefix + "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for key, value in state.items():
        if is_quantised(key, value):
            scale = value.float().abs().max() / 448
            tensors[prefix + key] = (value.float() / scale).to(torch.float8_e4m3fn)
            tensors[prefix + key.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
        else:
            tensors[prefix + key] = value
    return tensors


def plain_fp8(state, dtype):
    return {key: value.to(dtype) if value.dim() >= 2 else value for key, value in state.items()}


def gguf(path, architecture, state, name):
    generator, kind = np.random.default_rng(1), GGMLQuantizationType[name]
    writer = GGUFWriter(str(path), architecture)
    for key, value in state.items():
        numbers = value.float().numpy()
        if not is_quantised(key, value):
            writer.add_tensor(key, numbers, raw_dtype=GGMLQuantizationType.F32)
            continue
        if name in ENCODED:
            data = quantize(numbers, kind)
        else:
            values, size = GGML_QUANT_SIZES[kind]
            data = generator.integers(0, 256, (numbers.shape[0], numbers.shape[1] // values * size), dtype=np.uint8)
            blocks = data.reshape(-1, size)
            for offset, scale in RANDOM[name].items():
                blocks[:, offset : offset + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        writer.add_tensor(key, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def lora_of_t5(state):
    """A LoRA in OneTrainer's spelling of Flux's second text encoder."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    for key, value in state.items():
        if is_quantised(key, value):
            rows, width = value.shape
            module = "lora_te2_" + key.removesuffix(".weight").replace(".", "_")
            spread = float(value.float().std()) * math.sqrt(width / RANK)
            tensors |= {
                f"{module}.lora_down.weight": torch.randn(RANK, width, generator=generator) / math.sqrt(width),
                f"{module}.lora_up.weight": torch.randn(rows, RANK, generator=generator) * spread,
                f"{module}.alpha": torch.tensor(RANK / 2),
            }
    return tensors


def main():
    models = MODELS / "Stable-diffusion"
    every = load_file(models / "nf_bf16.safetensors")
    denoiser = {key.removeprefix(PREFIX): value for key, value in every.items() if key.startswith(PREFIX)}
    rest = {key: value for key, value in every.items() if not key.startswith(PREFIX)}
    for name in KITCHEN:
        save_file(kitchen(denoiser, name, PREFIX) | rest, models / f"nf_{name}.safetensors")
    save_file(scaled_fp8(denoiser, PREFIX) | rest, models / "nf_scaledfp8.safetensors")
    for name, dtype in (("fp8", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        weights = {PREFIX + key: value for key, value in plain_fp8(denoiser, dtype).items()}
        save_file(weights | rest, models / f"nf_{name}.safetensors")
    for name in (*ENCODED, *RANDOM):
        gguf(models / f"nf_{name.lower()}.gguf", "flux", denoiser, name)

    texts = MODELS / "text_encoder"
    t5 = load_file(texts / "nf_t5.safetensors")
    save_file(plain_fp8(t5, torch.float8_e4m3fn), texts / "nf_t5_fp8.safetensors")
    save_file(scaled_fp8(t5), texts / "nf_t5_scaledfp8.safetensors")
    save_file(kitchen(t5, "mxfp8"), texts / "nf_t5_mxfp8.safetensors")
    save_file(kitchen(t5, "nvfp4"), texts / "nf_t5_nvfp4.safetensors")
    # Neo reads the names of llama.cpp as well; the authors' own need no table here.
    gguf(texts / "nf_t5_q8_0.gguf", "t5", t5, "Q8_0")
    gguf(texts / "nf_t5_q4_0.gguf", "t5", t5, "Q4_0")
    save_file(lora_of_t5(t5), MODELS / "Lora" / "nf_t5.safetensors")


if __name__ == "__main__":
    main()
