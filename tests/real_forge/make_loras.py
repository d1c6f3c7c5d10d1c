"""LoRA files for the tiny random models of the test Forge, strong enough to be seen in their pictures.

Keys are those of the checkpoints themselves: kohya names, norm differences, and one file of the wrong shapes.
"""

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FORGE = Path(os.environ["FORGE_ROOT"])
LORA = FORGE / "models" / "Lora"
MODELS = FORGE / "models" / "Stable-diffusion"
RANK = 8


def shapes(path):
    with safe_open(str(path), "pt") as file:
        return {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118  # no iterator of its own


def kohya(modules, seed, size):
    """One LoRA file's tensors for `{module: weight shape}`; the delta is `size` times a usual weight."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in modules.items():
        inputs = torch.Size(shape[1:]).numel()
        factor = (size / inputs**0.5 / RANK**0.5 * 2) ** 0.5  # alpha is half the rank
        up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator) * factor
        down = torch.randn(RANK, *shape[1:], generator=generator) * factor
        tensors |= {
            f"{name}.lora_up.weight": up,
            f"{name}.lora_down.weight": down,
            f"{name}.alpha": torch.tensor(RANK / 2),
        }
    return tensors


def from_example(path):
    """`{module: weight shape}` of a kohya file that is known to fit."""
    found = shapes(path)
    modules = {}
    for key, shape in found.items():
        if key.endswith(".lora_up.weight"):
            name = key.removesuffix(".lora_up.weight")
            modules[name] = (shape[0], *found[f"{name}.lora_down.weight"][1:])
    return modules


def norms(path, name_of, seed, size):
    """Differences on norm weights and biases: `name_of` gives the module name in the file or None."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes(path).items():
        name = name_of(key)
        if name is not None:
            tensors[name] = torch.randn(shape, generator=generator) * size
    return tensors


def sd15_norm(key):
    prefix = "model.diffusion_model."
    if not key.startswith(prefix) or "norm" not in key:
        return None
    module, _, kind = key.removeprefix(prefix).rpartition(".")
    return f"lora_unet_{module.replace('.', '_')}.{'diff' if kind == 'weight' else 'diff_b'}"


def flux_norm(key):
    return (
        key.removeprefix("model.") + ".diff"
        if key.startswith("model.diffusion_model.") and key.endswith("norm.scale")
        else None
    )


def main():
    families = {
        "sd15": (
            LORA / "rand_lora_tiny.safetensors",
            MODELS / "rand_sd15_tiny.safetensors",
            "lora_te_",
            sd15_norm,
            0.3,
        ),
        "flux": (
            LORA / "tiny_flux_lora.safetensors",
            MODELS / "tiny_flux_bf16.safetensors",
            "lora_te1_",
            flux_norm,
            1.5,
        ),
    }
    for family, (example, checkpoint, text_prefix, name_of, size) in families.items():
        modules = from_example(example)
        unet = {k: v for k, v in modules.items() if not k.startswith(text_prefix)}
        text = {k: v for k, v in modules.items() if k.startswith(text_prefix)}
        wrong = {module: (shape[0], shape[1] + 16, *shape[2:]) for module, shape in unet.items()}
        files = {
            "a": kohya(modules, 1, size),
            "b": kohya(unet, 2, size),
            "text": kohya(text, 3, 4 * size),
            "norm": norms(checkpoint, name_of, 4, 16.0 if family == "flux" else 0.3),
            "wrong": kohya(wrong, 5, size),
        }
        for name, tensors in files.items():
            assert tensors, f"{family}_{name} would be empty"
            save_file(tensors, str(LORA / f"lg_{family}_{name}.safetensors"))
        print(family, {name: len(tensors) for name, tensors in files.items()})


if __name__ == "__main__":
    main()
