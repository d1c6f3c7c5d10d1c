"""Everything people do around a LoRA, in a running Forge: the guard against what Forge itself should give.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_forge/everyday.py [--only NAME] [--fresh] [--write-docs]

16-bit models are compared with stock's pictures, low-bit ones with the fp64 merge (sides.py). Every path ends with the
picture without LoRA, which must be the first one bit for bit, and must leave no error line in Forge's console.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("LORA_GUARD_TEST_PORT", "7915")
os.environ.setdefault("PYTHONUNBUFFERED", "1")
from real_forge import everyday_changes, everyday_pictures
from real_forge.server import FORGE
from real_forge.sides import HERE, Comparison


def prepare(store):
    """Second checkpoints and VAEs: the first ones with other values. Returns the flags that show them to Forge."""
    import torch
    from safetensors.torch import load_file, save_file

    checkpoints = FORGE / "models" / "Stable-diffusion"
    unet = "model.diffusion_model."
    sources = {
        "zz_second_sd15": (checkpoints / "rand_sd15_tiny.safetensors", lambda k: k.startswith(unet)),
        "zz_second_flux": (checkpoints / "tiny_flux_bf16.safetensors", lambda k: k.startswith(unet)),
        "zz_vae_flux": (FORGE / "models" / "VAE" / "tiny_flux_vae.safetensors", lambda k: "decoder" in k),
    }
    for name, (source, changed) in sources.items():
        target = store / f"{name}.safetensors"
        if target.exists():
            continue
        generator = torch.Generator().manual_seed(11)
        tensors = load_file(str(source))
        for key, value in tensors.items():
            if changed(key) and value.is_floating_point() and value.dim() > 1:
                noise = torch.randn(value.shape, generator=generator) * value.float().std() * 0.3
                tensors[key] = (value.float() + noise).to(value.dtype)
        save_file(tensors, str(target.with_suffix(".part")))
        target.with_suffix(".part").replace(target)
    return ["--ckpt-dir", str(store), "--vae-dir", str(store)]


def main():
    ways = everyday_pictures.WAYS + everyday_changes.WAYS
    extension = HERE / "everyday_extension"
    run = Comparison("everyday", ways, {"zz_lora_guard_everyday": extension}, {"LORA_GUARD_EVERYDAY": "1"})
    run.prepare = prepare
    return run.main(__doc__)


if __name__ == "__main__":
    sys.exit(main())
