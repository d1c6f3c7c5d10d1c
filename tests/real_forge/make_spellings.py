"""LoRA files as trainers spell them, for the tiny models of the test Forge, and beside each a file of the difference it comes to.

    FORGE_ROOT=... python tests/real_forge/make_spellings.py        (needs lycoris-lora and peft 0.21)

The differences are computed here in float64, by the trainers' own formulas, and saved under names that every reader knows.
`spellings.py` makes the pictures.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import OFTConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.raw_files import entry, safetensors_bytes

from real_forge.make_kinds import LORA, MODELS, weights_of

FLUX, SD15 = "tiny_flux_bf16", "rand_sd15_tiny"
GENERATOR = torch.Generator().manual_seed(11)
RANK = 4
DOUBLE, SINGLE = "double_blocks.0", "single_blocks.0"


@dataclass
class File:
    """One file as a trainer writes it.

    `delta`: what it adds, by Forge's names with dots; `twin`: a whole file to compare with instead.
    """

    tensors: dict
    delta: dict = field(default_factory=dict)
    metadata: dict | None = None
    twin: dict | None = None


def rand(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def pair(rows, columns):
    """`(up, down)` whose product has about the size of a weight of these small models."""
    return rand(rows, RANK) * 0.15, rand(RANK, columns) * 0.15


def product(up, down, scale=1.0):
    return up.double() @ down.double() * scale


def plain(name, up, down, alpha=None):
    """The factors of one module as PEFT names them."""
    found = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return found if alpha is None else {**found, f"{name}.alpha": torch.tensor(float(alpha))}


def rows_of(shape, start, part):
    """`part` as the rows from `start` on of a difference of this shape."""
    whole = torch.zeros(*shape, dtype=torch.float64)
    whole[start : start + part.shape[0]] = part
    return whole


def stack_prefixes(weights):
    """Two, three and trailing prefixes, of one file each."""
    for label, before, flat, after in (
        ("transformer base model", "transformer.base_model.model.", False, ""),
        ("transformer diffusion model", "transformer.diffusion_model.", False, ""),
        ("orig mod", "_orig_mod.diffusion_model.", False, ""),
        ("doubled", "lora_unet_model_diffusion_model_", True, ""),
        ("two underscores", "lora_unet__", True, ""),
        ("trailing underscore", "lora_unet_", True, "_"),
    ):
        tensors, delta = {}, {}
        for name, weight in weights.items():
            up, down = pair(*weight.shape)
            tensors |= plain(before + (name.replace(".", "_") if flat else name) + after, up, down)
            delta[name] = product(up, down)
        yield f"prefix {label}", File(tensors, delta)


def two_spellings(weights):
    """OneTrainer's LoHa: the factors under dots, alpha under underscores."""
    tensors, delta = {}, {}
    for block, name in (("attn.to_out.0", f"{DOUBLE}.img_attn.proj"), ("attn.to_add_out", f"{DOUBLE}.txt_attn.proj")):
        weight = weights[name]
        flat = "lora_transformer_transformer_blocks_0_" + block.replace(".", "_")
        dotted = flat.removesuffix("_" + block.split("attn.")[1].replace(".", "_")) + "." + block.split("attn.")[1]
        (a1, b1), (a2, b2) = pair(*weight.shape), pair(*weight.shape)
        a2, b2 = a2 * 7, b2 * 7
        tensors |= {
            f"{dotted}.hada_w{n}_{s}": t for n, s, t in ((1, "a", a1), (1, "b", b1), (2, "a", a2), (2, "b", b2))
        }
        tensors[f"{flat}.alpha"] = torch.tensor(8.0)
        delta[name] = product(a1, b1) * product(a2, b2) * 8.0 / RANK
    return File(tensors, delta)


def magnitudes(weights):
    """DoRA of ai-toolkit and of diffusers' converter; beside each the same in kohya's names, which the host knows."""
    name = f"{DOUBLE}.img_attn.proj"
    weight = weights[name]
    up, down = pair(*weight.shape)
    magnitude = weight.norm(dim=1) * (1 + rand(weight.shape[0]).abs())
    kohya = "lora_unet_" + name.replace(".", "_")
    twin = {f"{kohya}.lora_up.weight": up, f"{kohya}.lora_down.weight": down, f"{kohya}.alpha": torch.tensor(4.0), f"{kohya}.dora_scale": magnitude[:, None]}  # fmt: skip
    flat = "lora_unet_transformer_blocks_0_attn_to_out_0"
    yield "dora magnitude", File({**plain("diffusion_model." + name, up, down), f"diffusion_model.{name}.magnitude": magnitude}, twin=twin)  # fmt: skip
    tensors = {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down, f"{flat}.alpha": torch.tensor(4.0)}
    tensors["lora_unet_transformer_blocks_0_attn_to_out.0.lora_magnitude_vector"] = magnitude
    yield "dora two spellings", File(tensors, twin=twin)


def patterns(weights):
    """A pattern with an anchor, as diffusers writes it: of the top module alone."""
    inner, outer = weights[f"{SINGLE}.linear2"], weights["final_layer.linear"]
    (up, down), (top_up, top_down) = pair(*inner.shape), pair(*outer.shape)
    settings = {"transformer.r": RANK, "transformer.lora_alpha": RANK, "transformer.alpha_pattern": {"^proj_out": 2}}
    tensors = plain("transformer.single_transformer_blocks.0.proj_out", up, down)
    tensors |= plain("transformer.proj_out", top_up, top_down)
    delta = {f"{SINGLE}.linear2": product(up, down), "final_layer.linear": product(top_up, top_down, 0.5)}
    return File(tensors, delta, {"lora_adapter_metadata": json.dumps(settings)})


def settings_of_finetrainers(weights):
    name = f"{SINGLE}.linear2"
    up, down = pair(*weights[name].shape)
    tensors = plain("transformer.single_transformer_blocks.0.proj_out", up / 4, down)
    settings = {"lora_config": json.dumps({"r": RANK, "lora_alpha": 4 * RANK})}
    return File(tensors, {name: product(up, down)}, settings)


def split_bfl(weights):
    """OneTrainer: the parts of fused layers by their number."""
    tensors, delta = {}, {}
    for name, parts in ((f"{DOUBLE}.img_attn.qkv", 3), (f"{DOUBLE}.txt_attn.qkv", 3), (f"{SINGLE}.linear1", 4)):
        shape = weights[name].shape
        width = shape[1]
        sizes = [width] * 3 + [shape[0] - 3 * width] * (parts - 3)
        start, delta[name] = 0, torch.zeros(*shape, dtype=torch.float64)
        for number, rows in enumerate(sizes):
            up, down = pair(rows, width)
            tensors |= plain(f"transformer.{name}.{number}", up, down)
            delta[name] += rows_of(shape, start, product(up, down))
            start += rows
    return File(tensors, delta)


def first_rows(weights):
    """`linear1_qkv`: q, k and v of a single block without its MLP."""
    name = f"{SINGLE}.linear1"
    shape = weights[name].shape
    up, down = pair(3 * shape[1], shape[1])
    return File(plain(f"diffusion_model.{name}_qkv", up, down), {name: rows_of(shape, 0, product(up, down))})


def without_weight(weights):
    tensors, delta = {}, {}
    for name, weight in weights.items():
        up, down = pair(*weight.shape)
        tensors |= {f"diffusion_model.{name}.lora_A": down, f"diffusion_model.{name}.lora_B": up}
        delta[name] = product(up, down)
    return File(tensors, delta)


def turned_by(blocks, width, skew_bound=None):
    """The rotation of sd-scripts' OFT as one matrix: blocks of (I + Q)(I - Q)^-1."""
    q = blocks.double() - blocks.double().transpose(1, 2)
    if skew_bound is not None and q.norm() > skew_bound:
        q = q * (skew_bound + 1e-8) / (q.norm() + 1e-8)
    eye = torch.eye(q.shape[1], dtype=torch.float64).expand_as(q)
    turned = (eye + q) @ (eye - q).inverse()
    assert turned.shape[0] * turned.shape[1] == width
    return torch.block_diag(*turned)


def kohya_oft(weights):
    """`oft_unet_`, and the parts of a fused layer by their number."""
    name, fused = f"{DOUBLE}.img_attn.proj", f"{DOUBLE}.img_attn.qkv"
    width = weights[name].shape[0]
    blocks = rand(4, width // 4, width // 4) * 0.1
    flat = "oft_unet_" + name.replace(".", "_")
    turn = turned_by(blocks, width, 0.06 * width)
    weight = weights[name].double()
    yield "oft kohya", File({f"{flat}.oft_blocks": blocks, f"{flat}.alpha": torch.tensor(0.06)}, {name: turn.T @ weight - weight})  # fmt: skip
    flat, weight = "oft_unet_" + fused.replace(".", "_"), weights[fused].double()
    tensors, parts = {f"{flat}.alpha": torch.tensor(0.3)}, []
    for number in range(3):
        tensors[f"{flat}.oft_blocks.{number}"] = rand(4, width // 4, width // 4)
        turn = turned_by(tensors[f"{flat}.oft_blocks.{number}"], width, 0.3 * width)
        part = weight[number * width : (number + 1) * width]
        parts.append(turn.T @ part - part)
    yield "oft kohya in parts", File(tensors, {fused: torch.cat(parts)})


def peft_delta(weight, numbers, **settings):
    """What PEFT itself makes of a weight, with these numbers as its `oft_R`."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    model = get_peft_model(
        torch.nn.Sequential(layer), OFTConfig(target_modules=["0"], r=0, oft_block_size=32, **settings)
    )
    model.base_model.model[0].oft_R["default"].weight.data.copy_(numbers)
    return model.merge_and_unload()[0].weight.detach().double() - weight.double()


def peft_oft(weights):
    """PEFT's bounded OFT, and OneTrainer's scaled one."""
    name = f"{DOUBLE}.img_attn.proj"
    weight, b = weights[name], 32
    numbers = rand(weight.shape[1] // b, b * (b - 1) // 2) * 0.4
    dotted = "diffusion_model." + name
    settings = {"peft_type": "OFT", "oft_block_size": b, "r": 0, "coft": True, "eps": 8.0}
    delta = peft_delta(weight, numbers, coft=True, eps=8.0)
    yield "oft coft", File({f"{dotted}.oft_R.weight": numbers}, {name: delta}, {"lora_adapter_metadata": json.dumps(settings)})  # fmt: skip
    flat = "lora_transformer_transformer_blocks_0_attn_to_out_0"
    tensors = {f"{flat}.oft_R.weight": numbers, f"{flat}.oft_R.scaled_oft": torch.tensor(True)}
    yield "oft scaled", File(tensors, {name: peft_delta(weight, numbers / (2 * (b - 1) ** 0.5))})


def bias_and_norm():
    """A difference of a bias under its longer name, and a whole norm weight beside factors."""
    base = "input_blocks.1.0.out_layers.3"
    name = "down_blocks_0_resnets_0_conv2"
    values = rand(320) * 0.5
    return File({f"lora_unet_{name}.bias.diff": values}, twin={f"lora_unet_{base.replace('.', '_')}.diff_b": values})


def loha_of_convolutions(weights):
    """OneTrainer's LoHa: factors with four dimensions."""
    tensors, delta = {}, {}
    for flat, name in (("down_blocks_0_resnets_0_conv1", "input_blocks.1.0.in_layers.2"), ("down_blocks_0_resnets_0_conv2", "input_blocks.1.0.out_layers.3")):  # fmt: skip
        rows, columns, height, width = weights[name].shape
        w1a, w1b = rand(rows, RANK, 1, 1) * 0.05, rand(RANK, columns, height, width) * 0.05
        w2a, w2b = rand(rows, RANK, 1, 1), rand(RANK, columns, height, width)
        key = f"lora_unet_{flat}"
        tensors |= {f"{key}.hada_w1_a": w1a, f"{key}.hada_w1_b": w1b, f"{key}.hada_w2_a": w2a, f"{key}.hada_w2_b": w2b, f"{key}.alpha": torch.tensor(2.0)}  # fmt: skip
        made = product(w1a.flatten(1), w1b.flatten(1)) * product(w2a.flatten(1), w2b.flatten(1)) * 0.5
        delta[name] = made.reshape(weights[name].shape)
    return File(tensors, delta)


def flux_files(weights):
    inner = {name: weight for name, weight in weights.items() if "_blocks" in name}
    return {
        **dict(stack_prefixes(inner)),
        "loha two spellings": two_spellings(weights),
        **dict(magnitudes(weights)),
        "alpha pattern": patterns(weights),
        "alpha of finetrainers": settings_of_finetrainers(weights),
        "split bfl": split_bfl(weights),
        "linear1 qkv": first_rows(weights),
        "without weight": without_weight(inner),
        **dict(kohya_oft(weights)),
        **dict(peft_oft(weights)),
    }


def sd15_files(weights):
    return {"loha of convolutions": loha_of_convolutions(weights), "bias diff": bias_and_norm()}


def bad_files(weights):
    """What has to be refused, each by its name, without an effect on the LoRAs beside it."""
    name = f"{DOUBLE}.img_attn.proj"
    up, down = pair(*weights[name].shape)
    dotted = "diffusion_model." + name
    good = plain(dotted, up, down)
    pissa = json.dumps({"r": RANK, "lora_alpha": RANK, "init_lora_weights": "pissa"})
    norm = f"diffusion_model.{DOUBLE}.img_attn.norm.key_norm"
    nowhere = {**plain("diffusion_model.nowhere.0", up, down), **plain("diffusion_model.nowhere.1", up, down)}
    sides = {"a1": (64, 4), "a2": (4, 64), "b1": (64, 4), "b2": (4, 64)}
    return {
        "pissa": File(good, metadata={"lora_adapter_metadata": pissa}),
        "kasa": File({**good, f"{dotted}.lora_diag": torch.ones(RANK)}),
        "no kind": File({f"{dotted}.hira_A": down, f"{dotted}.hira_B": up}),
        "not a number": File({**good, f"{dotted}.lora_B.weight": up * float("nan")}),
        "beyond fp32": File({**good, f"{dotted}.lora_B.weight": up.double() * 1e300}),
        "another model": File({key: rand(*(size + 8 for size in value.shape)) for key, value in good.items()}),
        "two kinds": File({**good, f"{dotted}.lokr_w1": rand(4, 4), f"{dotted}.lokr_w2": rand(64, 64)}),
        "lonely factor": File({f"{dotted}.lora_A.weight": down}),
        "two numbers for alpha": File({**good, f"{dotted}.alpha": torch.ones(2)}),
        "checkpoint": File({f"model.diffusion_model.{key}.weight": value for key, value in weights.items()}),
        "mostly elsewhere": File({**good, **nowhere}),
        "glora on a norm": File({f"{norm}.{side}.weight": rand(*shape) for side, shape in sides.items()}),
    }


def kohya(name):
    return "lora_unet_" + name.replace(".", "_")


def main():
    # Its header is whole: of another file Forge's own list of LoRAs prints a traceback at every start.
    cut = safetensors_bytes({"lora_unet_x.lora_up.weight": entry("F32", (4, 4), (0, 64))}, bytes(32))
    (LORA / "lgs_bad_cut_off.safetensors").write_bytes(cut)
    name = f"diffusion_model.{DOUBLE}.img_attn.proj.lora"
    packed = {
        f"{name}_A.weight": entry("F4", (4, 256), (0, 512)),
        f"{name}_B.weight": entry("F4", (256, 4), (512, 1024)),
    }
    (LORA / "lgs_bad_packed.safetensors").write_bytes(safetensors_bytes(packed, bytes(1024)))
    for family, checkpoint, wanted, make in (
        ("flux", FLUX, ("_blocks", "final_layer.linear"), flux_files),
        ("sd15", SD15, ("in_layers.2", "out_layers.3"), sd15_files),
    ):
        found = weights_of(MODELS / f"{checkpoint}.safetensors", wanted)
        names = {kohya(name): name for name in _names(checkpoint)}
        weights = {names[key]: weight for key, weight in found.items()}
        for label, file in make(weights).items():
            _save(f"lgs_{family}_{label}", file.tensors, file.metadata)
            twin = file.twin or {f"{kohya(name)}.diff": delta.float() for name, delta in file.delta.items()}
            _save(f"lgs_{family}_{label}_twin", twin)
        if family == "flux":
            for label, file in bad_files(weights).items():
                _save(f"lgs_bad_{label}", file.tensors, file.metadata)


def _names(checkpoint):
    with safe_open(str(MODELS / f"{checkpoint}.safetensors"), "pt") as file:
        return [k.removeprefix("model.diffusion_model.").removesuffix(".weight") for k in file.keys() if k.endswith(".weight")]  # noqa: SIM118  # no iterator of its own  # fmt: skip


def _save(name, tensors, metadata=None):
    path = LORA / f"{name.replace(' ', '_')}.safetensors"
    save_file(
        {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()},
        str(path),
        metadata=metadata,
    )


if __name__ == "__main__":
    main()
