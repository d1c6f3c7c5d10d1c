"""One LoRA file per kind of adapter for the tiny models of the test Forge, and what each must come to.

    FORGE_ROOT=... python tests/real_forge/make_kinds.py        (needs lycoris-lora and peft)

A kind that Forge has needs no more than its file: the reference server merges it in fp64. For a kind that Forge has not,
a second file holds the difference that LyCORIS' own code makes of the checkpoint's weights (`..._as_diff`). `kinds.py`
makes the pictures.
"""

import json
import os
import sys
from pathlib import Path

import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.ia3 import IA3Module
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.reference import merge_reference

FORGE = Path(os.environ["FORGE_ROOT"])
LORA = FORGE / "models" / "Lora"
MODELS = FORGE / "models" / "Stable-diffusion"
PREFIX = "model.diffusion_model."
RANK = 4
GENERATOR = torch.Generator().manual_seed(7)


def rand(*shape, scale=1.0):
    return torch.randn(*shape, generator=GENERATOR) * scale


def weights_of(path, wanted):
    """`{kohya name: weight in fp32}` of a checkpoint's linear layers and convolutions."""
    weights = {}
    with safe_open(str(path), "pt") as file:
        for key in file.keys():  # noqa: SIM118  # no iterator of its own
            name = key.removeprefix(PREFIX)
            if key.startswith(PREFIX) and key.endswith(".weight") and any(part in name for part in wanted):
                weight = file.get_tensor(key)
                if weight.dim() >= 2:
                    weights["lora_unet_" + name.removesuffix(".weight").replace(".", "_")] = weight.float()
    return weights


def lora(shape):
    return {"lora_up.weight": rand(shape[0], RANK, *[1] * (len(shape) - 2)), "lora_down.weight": rand(RANK, *shape[1:]), "alpha": torch.tensor(2.0)}  # fmt: skip


def tucker(shape):
    if len(shape) == 2 or shape[2] == 1:
        return lora(shape)
    return {"lora_up.weight": rand(shape[0], RANK, 1, 1), "lora_down.weight": rand(RANK, shape[1], 1, 1), "lora_mid.weight": rand(RANK, RANK, *shape[2:]), "alpha": torch.tensor(2.0)}  # fmt: skip


def loha(shape, rank=RANK):
    columns = torch.Size(shape[1:]).numel()
    return {"hada_w1_a": rand(shape[0], rank), "hada_w1_b": rand(rank, columns), "hada_w2_a": rand(shape[0], rank), "hada_w2_b": rand(rank, columns), "alpha": torch.tensor(2.0)}  # fmt: skip


def loha_tucker(shape):
    if len(shape) == 2 or shape[2] == 1:
        return loha(shape)
    sides = {f"hada_w{n}_a": rand(RANK, shape[0]) for n in (1, 2)} | {
        f"hada_w{n}_b": rand(RANK, shape[1]) for n in (1, 2)
    }
    return sides | {f"hada_t{n}": rand(RANK, RANK, *shape[2:]) for n in (1, 2)} | {"alpha": torch.tensor(2.0)}


def lokr(shape):
    return {
        "lokr_w1": rand(4, 4),
        "lokr_w2": rand(shape[0] // 4, shape[1] // 4, *shape[2:]),
        "alpha": torch.tensor(1.0),
    }


def lokr_factored(shape):
    columns = torch.Size(shape[1:]).numel() // 4
    return {"lokr_w1": rand(4, 4), "lokr_w2_a": rand(shape[0] // 4, RANK), "lokr_w2_b": rand(RANK, columns), "alpha": torch.tensor(2.0)}  # fmt: skip


def glora(shape):
    return {"a1.weight": rand(shape[1], RANK, scale=0.05), "a2.weight": rand(RANK, shape[1], scale=0.05), "b1.weight": rand(shape[0], RANK), "b2.weight": rand(RANK, *shape[1:]), "alpha": torch.tensor(2.0)}  # fmt: skip


def with_magnitude(make, axis):
    def build(shape, weight):
        norm = weight.flatten(1).norm(dim=1) if axis == 0 else weight.transpose(0, 1).flatten(1).norm(dim=1)
        form = (-1, *[1] * (len(shape) - 1)) if axis == 0 else (1, -1, *[1] * (len(shape) - 2))
        return make(shape) | {"dora_scale": (norm * (1 + rand(norm.numel(), scale=0.1))).reshape(form)}

    return build


def whole(shape):
    return {"diff": rand(*shape)}


FORGE_KINDS = {
    "locon": lora,
    "tucker": tucker,
    "loha": loha,
    "loha r16": lambda shape: loha(shape, 16),
    "loha tucker": loha_tucker,
    "lokr": lokr,
    "lokr factored": lokr_factored,
    "glora": glora,
    "full": whole,
    "dora out": with_magnitude(lora, 0),
    "dora in": with_magnitude(lora, 1),
    "dora loha": with_magnitude(loha, 0),
    "dora lokr": with_magnitude(lokr, 0),
}


def host_value(tensors):
    """The host's tuple of the tensors of one module, for `merge_reference`."""
    get = tensors.get
    alpha = None if get("alpha") is None else float(get("alpha"))
    if "lora_up.weight" in tensors:
        return "lora", (
            get("lora_up.weight"),
            get("lora_down.weight"),
            alpha,
            get("lora_mid.weight"),
            get("dora_scale"),
        )
    if "hada_w1_a" in tensors:
        names = ("hada_w1_a", "hada_w1_b", None, "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "dora_scale")
        return "loha", tuple(alpha if n is None else get(n) for n in names)
    if "lokr_w1" in tensors:
        names = ("lokr_w1", "lokr_w2", None, "-", "-", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale")
        return "lokr", tuple(alpha if n is None else get(n) for n in names)
    if "a1.weight" in tensors:
        return "glora", (*(get(f"{n}.weight") for n in ("a1", "a2", "b1", "b2")), alpha, None)
    return "diff", (get("diff"),)


LARGEST = {"lora_up.weight": 1, "hada_w1_a": 1, "lokr_w1": 1, "b1.weight": 1, "diff": 1}


def sized(tensors, weight, size):
    """The tensors with one factor scaled so that the additive part is `size` times the weight."""
    plain = {k: v for k, v in tensors.items() if k != "dora_scale"}
    delta = merge_reference([[1.0, host_value(plain), 1.0, None, None]], weight.double()) - weight.double()
    factor = float(size * weight.double().norm() / delta.norm())
    key = next(k for k in LARGEST if k in tensors)
    return {**tensors, key: tensors[key] * factor}


def layer_of(weight):
    if weight.dim() == 2:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    else:
        layer = torch.nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=False)
    layer.weight.data.copy_(weight)
    return layer


def lycoris_kind(make, weights):
    """`(tensors, difference for each weight)` of one LyCORIS module, its parameters random; None where it cannot be made
    (BOFT needs widths of many factors two)."""
    layer = layer_of(weights[0])
    try:
        module = make(layer)
    except ValueError:
        return None
    for name, parameter in module.named_parameters():
        if "org" not in name:
            parameter.data = rand(*parameter.shape, scale=0.3 if "oft" in name else 0.2)
    differences = []
    for weight in weights:
        layer.weight.data.copy_(weight)
        differences.append(module.get_merged_weight()[0].detach() - weight)
    state = {k: v.detach().clone() for k, v in module.state_dict().items() if "org" not in k}
    return state, differences


OTHER_KINDS = {
    "oft": lambda layer: DiagOFTModule("m", layer, multiplier=1.0, lora_dim=8, alpha=0),
    "oft bounded": lambda layer: DiagOFTModule("m", layer, multiplier=1.0, lora_dim=8, alpha=0.002, constraint=0.002),
    "boft": lambda layer: ButterflyOFTModule(
        "m", layer, multiplier=1.0, lora_dim=8 if layer.weight.shape[0] % 5 else 10, alpha=0
    ),
    "ia3 out": lambda layer: IA3Module("m", layer, multiplier=1.0, train_on_input=False),
    "ia3 in": lambda layer: IA3Module("m", layer, multiplier=1.0, train_on_input=True),
}


def main():
    families = {
        "sd15": (["rand_sd15_tiny"], ("attn", "ff.net", "in_layers.2", "out_layers.3", "proj_in"), 0.15),
        "flux": (["tiny_flux_bf16", "tiny_flux_allfp8"], ("double_blocks", "single_blocks"), 0.6),
    }
    torch.manual_seed(3)
    for family, (checkpoints, wanted, size) in families.items():
        all_weights = [weights_of(MODELS / f"{checkpoint}.safetensors", wanted) for checkpoint in checkpoints]
        weights = all_weights[0]

        def save(name, tensors, family=family, **settings):
            path = LORA / f"lgk_{family}_{name.replace(' ', '_')}.safetensors"
            save_file({k: v.contiguous() for k, v in tensors.items()}, str(path), **settings)

        for kind, make in FORGE_KINDS.items():
            tensors = {}
            for module, weight in weights.items():
                shape = tuple(weight.shape)
                made = make(shape, weight) if kind.startswith("dora") else make(shape)
                tensors |= {f"{module}.{k}": v for k, v in sized(made, weight, size).items()}
            save(kind, tensors)
        for kind, make in OTHER_KINDS.items():
            tensors, differences = {}, [{} for _ in checkpoints]
            for module in weights:
                made = lycoris_kind(make, [w[module] for w in all_weights])
                if made is None:
                    continue
                tensors |= {f"{module}.{k}": v for k, v in made[0].items()}
                for found, difference in zip(differences, made[1], strict=True):
                    found[f"{module}.diff"] = difference
            save(kind, tensors)
            for checkpoint, found in zip(checkpoints, differences, strict=True):
                save(f"{kind} as diff {checkpoint}", found)
        # alpha and rsLoRA in the metadata, as diffusers writes them; Forge's reader knows alpha as a tensor only.
        plain, named = {}, {}
        for module, weight in weights.items():
            made = sized(lora(tuple(weight.shape)), weight, size)
            made["alpha"] = torch.tensor(8.0 * RANK**0.5)
            plain |= {f"{module}.{k}": v for k, v in made.items()}
            named[f"{module}.lora_A.weight"], named[f"{module}.lora_B.weight"] = made["lora_down.weight"].clone(), made["lora_up.weight"].clone()  # fmt: skip
        settings = json.dumps({"r": RANK, "lora_alpha": 8, "use_rslora": True})
        for checkpoint in checkpoints:
            save(f"rslora as diff {checkpoint}", plain)
        save("rslora", named, metadata={"lora_adapter_metadata": settings})
        print(family, len(weights), "modules")


if __name__ == "__main__":
    main()
