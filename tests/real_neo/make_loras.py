"""LoRA files for Neo's tiny Flux, as tests/real_forge/make_loras.py makes them for the models of the test Forge.

FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_neo/make_loras.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from real_forge.make_loras import LORA, MODELS, kohya, norms, shapes
from safetensors.torch import save_file

CHECKPOINT = MODELS / "nf_bf16.safetensors"
UNET, CLIP = "model.diffusion_model.", "text_encoders.clip_l.transformer."
STRONG, STRONGER = 1.5, 6


def modules(prefix, start):
    """`{name in the file: weight shape}` of the linear layers in blocks whose names begin with `prefix`."""
    return {
        start + key.removeprefix(prefix).removesuffix(".weight").replace(".", "_"): shape
        for key, shape in shapes(CHECKPOINT).items()
        if key.startswith(prefix) and key.endswith(".weight") and len(shape) == 2
        if "_blocks." in key or ".layers." in key
    }


def norm(key):
    is_norm = key.startswith(UNET) and "_norm." in key
    return key.removeprefix("model.").removesuffix(".weight") + ".diff" if is_norm else None


def main():
    unet, text = modules(UNET, "lora_unet_"), modules(CLIP, "lora_te1_")
    files = {
        "a": kohya(unet | text, 1, STRONG),
        "b": kohya(unet, 2, STRONG),
        "text": kohya(text, 3, STRONGER),
        "norm": norms(CHECKPOINT, norm, 4, 16.0),
    }
    for name, tensors in files.items():
        save_file(tensors, str(LORA / f"lg_nf_{name}.safetensors"))
    print({name: len(tensors) for name, tensors in files.items()})


if __name__ == "__main__":
    main()
