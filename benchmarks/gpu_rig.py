"""Shared parts of the GPU scripts `memory_matrix.py`, `real_oom.py` and `one_setting.py`.

Denoisers in Forge's own classes with random weights, LoRAs for them, and results as JSON lines. Without CUDA everything
runs on the CPU (`device_for`), with small models and without a ballast, to test the scripts themselves.
"""

import gc
import json
import math
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import activations_gpu  # noqa: E402  # lies beside this file
import forge_gpu  # noqa: E402  # lies beside this file

MB, GB = 1 << 20, 1 << 30


def import_forge():
    """Imports Forge's backend with arguments for this machine; returns torch."""
    forge_gpu.import_forge()
    activations_gpu.stand_ins()
    import torch

    if not torch.cuda.is_available():
        sys.argv += ["--always-cpu"]
        torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    return torch


def device_for(torch):
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def header(torch):
    """Returns hardware and versions, for every line of results."""
    import psutil

    has_card = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_card else "none",
        "driver": _driver() if has_card else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "ram_gb": round(psutil.virtual_memory().total / GB),
        "commit": os.environ.get("LORA_GUARD_COMMIT", "unknown"),
    }


def _driver():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


SMALL_FLUX = {"vec_in_dim": 256, "context_in_dim": 256, "hidden_size": 256, "num_heads": 2}
SMALL_UNET = {"model_channels": 32}
PART_FLUX = {"depth": 1, "depth_single_blocks": 2}
"""Few blocks of the real width: layers as large as real ones in a model that loads quickly."""


class Denoiser:
    """One architecture in one storage, with random weights, as Forge has it. `patcher` is Forge's, without LoRA."""

    def __init__(self, torch, model, storage, size="full", compute=None):
        """Builds the model.

        Args:
            torch: The module, imported after Forge's arguments are set.
            model: "Flux" or a name of `activations_gpu.UNETS`.
            storage: The storage format.
            size: "full", "part" (real width, few blocks) or "small".
            compute: dtype of the activations; None takes fp16 for U-Nets, bf16 for Flux.
        """
        from backend import memory_management, operations
        from backend.modules.k_model import KModel
        from backend.patcher.unet import UnetPatcher
        from backend.sampling import sampling_function

        self.torch, self.name, self.storage, self.size = torch, model, storage, size
        self.memory, self.operations, self.sampling = memory_management, operations, sampling_function
        self.device, self.is_unet = device_for(torch), model in activations_gpu.UNETS
        self.compute = compute or (torch.float16 if self.is_unet else torch.bfloat16)
        self.rows = 2 if self.is_unet else 1
        """Prompt and negative prompt at once; Flux-dev has no negative prompt."""
        self.config = self._config()
        inner = self._build()
        inner.storage_dtype = {"nf4": "nf4", "Q8_0": "gguf", "Q4_K": "gguf"}.get(storage) or self._dtype()
        inner.computation_dtype = self.compute
        predictor = types.SimpleNamespace(percent_to_sigma=lambda x: x)
        self.kmodel = KModel(model=inner, diffusers_scheduler=None, k_predictor=predictor, config=None)
        self.kmodel.requires_grad_(False)
        cpu = memory_management.cpu
        self.patcher = UnetPatcher(self.kmodel, load_device=self.device, offload_device=cpu, current_device=cpu)
        self.current = self.patcher
        """Kept, as Forge's `sd_model` does: a patcher without references is unloaded without being moved."""

    def _config(self):
        if self.is_unet:
            return activations_gpu.UNETS[self.name] | (SMALL_UNET if self.size == "small" else {})
        blocks = {"depth": 19, "depth_single_blocks": 38} if self.size == "full" else PART_FLUX
        widths = SMALL_FLUX if self.size == "small" else {}
        return activations_gpu.FLUX | {"guidance_embed": True} | blocks | widths

    def _make(self):
        if self.is_unet:
            from backend.nn.unet import IntegratedUNet2DConditionModel as Made
        else:
            from backend.nn.flux import IntegratedFluxTransformer2DModel as Made
        return Made(**self.config)

    def _dtype(self):
        """Returns the dtype of plain tensors."""
        fixed = {"fp8": self.torch.float8_e4m3fn, "fp16": self.torch.float16, "bf16": self.torch.bfloat16}
        return fixed.get(self.storage, self.torch.bfloat16)

    def _build(self):
        torch, storage, dtype = self.torch, self.storage, self._dtype()
        with torch.device("meta"):
            plain = self._make()
        self.shapes = {key: tuple(value.shape) for key, value in plain.state_dict().items()}
        self.layers = lora_layers(self.shapes)
        family = {"nf4": "nf4", "Q8_0": "gguf", "Q4_K": "gguf"}.get(storage)
        with self.operations.using_forge_operations(
            device=self.memory.cpu,
            dtype=dtype,
            manual_cast_enabled=family is None and dtype != self.compute,
            bnb_dtype=family,
        ):
            made = self._make()
        generator = torch.Generator(self.device).manual_seed(0)
        state = {}
        for key, size in self.shapes.items():
            weight = torch.randn(size, generator=generator, device=self.device) * 0.02
            if key.endswith("norm.scale"):
                state[key] = torch.ones(size, dtype=self.compute)
            elif len(size) != 2 or family is None:
                state[key] = self._plain(key, weight, family)
            elif family == "gguf":
                state[key] = self._gguf(weight)
            else:
                state[key] = weight.to(torch.bfloat16).cpu()
        del weight
        made.load_state_dict(state, strict=False)
        self._norms_in_compute_dtype(made)
        missing = [key for key in self.shapes if key not in made.state_dict()]
        assert not missing, f"not loaded: {missing[:3]}"
        if family == "nf4":
            self._quantise(made)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return made

    def _plain(self, key, weight, family):
        if family == "gguf" and key.endswith("bias"):
            return self._gguf_parameter("F32", weight.float().cpu())
        return weight.to(self._dtype()).cpu()

    def _norms_in_compute_dtype(self, made):
        for name, parameter in made.named_parameters():
            if name.endswith("norm.scale"):
                parameter.data = parameter.data.to(self.compute)

    def _quantise(self, made):
        layers = [layer for layer in made.modules() if hasattr(layer, "reload_weight")]
        assert layers, "Forge has no 4-bit layers: bitsandbytes cannot be imported"
        for layer in layers:
            on_device = layer.weight.to("cuda") if self.device.type == "cuda" else layer.weight._quantize("cpu")
            layer.weight = on_device.to("cpu")

    def _gguf(self, weight):
        from lib_lora_guard.weights import Q8_0Codec

        # A K-quant needs rows of whole blocks.
        if self.storage == "Q4_K" and weight.shape[1] % 256 == 0:
            return self._gguf_parameter("Q4_K", random_q4_k(self.torch, weight.shape, self.device), weight.shape)
        return self._gguf_parameter("Q8_0", Q8_0Codec().encode(weight)["data"].cpu(), weight.shape)

    def _gguf_parameter(self, kind, data, shape=None):
        import gguf
        from backend.operations_gguf import ParameterGGUF

        shape = tuple(reversed(data.shape if shape is None else shape))
        kind = gguf.GGMLQuantizationType[kind]
        return ParameterGGUF(types.SimpleNamespace(tensor_type=kind, shape=shape, data=data.cpu().numpy()))

    def inputs(self, size_px, seed=0):
        """Returns the arguments of one call as a dict."""
        torch = self.torch
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=self.device).to(self.compute)

        rows, side, words = self.rows, size_px // 8, 16 if self.size == "small" else 512
        if not self.is_unet:
            config = self.config
            half = torch.full((rows,), 0.5, device=self.device, dtype=self.compute)
            return {
                "x": normal(rows, config["in_channels"], side, side),
                "timestep": half,
                "context": normal(rows, words, config["context_in_dim"]),
                "y": normal(rows, config["vec_in_dim"]),
                "guidance": 7 * half,
            }
        extra = {"y": normal(rows, self.config["adm_in_channels"])} if "adm_in_channels" in self.config else {}
        times = torch.full((rows,), 500.0, device=self.device)
        context = normal(rows, 77, self.config["context_dim"])
        return {
            "x": normal(rows, self.config["in_channels"], side, side),
            "timesteps": times,
            "context": context,
            "transformer_options": {},
        } | extra

    def latent(self, size_px):
        """Returns the latent of one image, as Forge passes it to `sampling_prepare`."""
        return self.torch.empty(1, self.config["in_channels"], size_px // 8, size_px // 8)

    def lora(self, seed, rank, share=0.02):
        """Returns patches as Forge reads them from a file; the delta's rms is `share` of the weights' rms."""
        torch = self.torch
        generator = torch.Generator(self.device).manual_seed(seed)
        scale = (share * 0.02 / rank**0.5) ** 0.5

        def normal(*shape):
            return (torch.randn(shape, generator=generator, device=self.device) * scale).to(torch.bfloat16).cpu()

        return {
            f"diffusion_model.{name}.weight": (
                "lora",
                (normal(out, rank), normal(rank, inner), float(rank), None, None),
            )
            for name, (out, inner) in self.layers.items()
        }

    def with_loras(self, loras, strength=1.0):
        """Returns a patcher with these LoRAs; `loras` maps names to results of `lora`."""
        patcher = self.patcher
        for name, patches in loras.items():
            patcher = patcher.clone()
            patcher.add_patches(filename=name, patches=patches, strength_patch=strength, online_mode=False)
        return patcher

    def prepare(self, patcher, size_px):
        """Loads the model and applies the LoRAs, as a sampler does before its first step."""
        self.current = patcher
        self.sampling.sampling_prepare(patcher, self.latent(size_px))

    def step(self, inputs):
        with self.torch.inference_mode():
            return self.kmodel.diffusion_model(**inputs)

    def unload(self):
        self.memory.unload_all_models()
        gc.collect()
        self.memory.soft_empty_cache()

    def bytes_on_card(self):
        return sum(bytes_of(p) for p in self.kmodel.parameters() if p.device.type == "cuda")

    def bytes_outside(self):
        return sum(bytes_of(p) for p in self.kmodel.parameters() if p.device.type != "cuda")


def bytes_of(parameter):
    """Returns a parameter's bytes, with the scales of a bitsandbytes weight."""
    state = getattr(parameter, "quant_state", None)
    scales = 0 if state is None else state.absmax.numel() * state.absmax.element_size()
    return parameter.data.numel() * parameter.data.element_size() + scales


def lora_layers(shapes):
    """Returns `(out, in)` by module name for the matrices that LoRAs are trained on: those inside the blocks."""
    return {
        key.removesuffix(".weight"): size
        for key, size in shapes.items()
        if key.endswith(".weight") and len(size) == 2 and ("_blocks." in key) and "emb_layers" not in key
    }


def random_q4_k(torch, shape, device):
    """Returns blocks of 144 bytes for 256 values: random scales and nibbles with a mean of about zero and the usual
    magnitude.
    """
    rows, columns = shape
    blocks = torch.randint(0, 256, (rows * columns // 256, 144), dtype=torch.uint8, device=device)
    scales = torch.tensor([1e-4, 7.4e-4], dtype=torch.float16, device=device)
    blocks[:, :4] = scales.view(torch.uint8)
    return blocks.view(rows, columns // 256 * 144)


def warm_up(torch):
    """Allocates kernels, handles and library workspaces, which stay, before the first case."""
    if not torch.cuda.is_available():
        return
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.randn(512, 512, device="cuda").to(dtype)
        torch.nn.functional.linear(x, x, x[0])
        torch.nn.functional.scaled_dot_product_attention(*[x.view(1, 8, 512, 64)] * 3)
        torch.nn.functional.conv2d(x.view(1, 64, 64, 64), torch.randn(64, 64, 3, 3, device="cuda").to(dtype), padding=1)
        torch.nn.functional.layer_norm(x, [512])
        x.to(torch.float8_e4m3fn).to(dtype)
    torch.cuda.synchronize()


def read_lines(*files):
    """Returns the rows of JSON-lines files; missing files count as empty."""
    there = [file for file in files if file is not None and file.is_file()]
    return [json.loads(line) for file in there for line in file.read_text(encoding="utf-8").splitlines() if line]


def write_line(file, row):
    print(json.dumps(row), flush=True)
    if file is not None:
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")


def mb(count):
    return None if count is None else round(count / MB, 1)


def finite(torch, tensor):
    return bool(torch.isfinite(tensor).all()) and math.isfinite(float(tensor.float().abs().max()))
