"""Small checkpoints of five architectures with real values, LoRA files for them, and what baking must make of them.

`Target`s say where each module of a LoRA file goes; written down by hand, so that a test does not ask the product for it.
"""

import random
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from support import original_layouts as layouts
from support.gguf_by_hand import BY_HAND
from support.make import rand
from support.raw_files import STRING, gguf_bytes, info, pair

from lib_lora_guard.adapters import Slice, Term, apply_terms
from lib_lora_guard.adapters.files import read_lora_file

UNET = "model.diffusion_model."
THREE = (".in_layers.2", ".out_layers.3", ".0.op", "input_blocks.0.0", ".conv")


class Target(NamedTuple):
    """`module` as a LoRA file has it, the parameter (its weight; the bias beside it), and the rows of it."""

    module: str
    key: str
    rows: tuple[int, int] | None = None


def values(layers, prefix="", seed=0):
    """`{name: fp32 values}` of the rows of `original_layouts`: matrices of usual size, norms around one."""
    made = {}
    for module, rows, columns, names in layers:
        for name in names.split():
            matrix = columns and "weight" in name
            kernel = (3, 3) if matrix and prefix == UNET and (module.endswith(THREE) or module == "out.2") else ()
            shape = (rows, columns, *kernel) if matrix else (rows,)
            noise = rand(*shape, seed=seed + len(made), scale=0.5 * max(1, torch.Size(shape[1:]).numel()) ** -0.5)
            made[f"{prefix}{module}.{name}"] = noise if columns else noise * 0.1 + 1
    return made


def clip(prefix, width, layers=2):
    """transformers' names."""
    made = {f"{prefix}embeddings.token_embedding.weight": rand(50, width, seed=900)}
    for n in range(layers):
        for m, (rows, columns) in {
            **{f"self_attn.{x}_proj": (width, width) for x in ("q", "k", "v", "out")},
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }.items():
            block = f"{prefix}encoder.layers.{n}.{m}"
            made[f"{block}.weight"] = rand(rows, columns, seed=910 + n, scale=columns**-0.5)
            made[f"{block}.bias"] = rand(rows, seed=920 + n, scale=0.1)
    made[f"{prefix}final_layer_norm.weight"] = torch.ones(width)
    return made


VAE = {"first_stage_model.decoder.conv_in.weight": rand(8, 4, 3, 3, seed=930)}
CLIP_L = "cond_stage_model.transformer.text_model."
XL_L, XL_G = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."


def sd15():
    unet = values(layouts.ldm_unet((8, 16, 16, 16), (1, 1, 1, 0), 1, 768), UNET)
    return {**unet, **clip(CLIP_L, 32), **VAE, f"{CLIP_L}embeddings.position_ids": torch.arange(77)[None]}


def sdxl():
    unet = values(layouts.ldm_unet((8, 16, 16), (0, 2, 4), 4, 2048, label=10), UNET)
    return {**unet, **clip(XL_L, 32), **values(layouts.open_clip(48, 1), XL_G, 40), **VAE}


def sd3():
    return {**values(layouts.mmdit(16, 2, {0}), UNET), **clip("text_encoders.clip_l.transformer.text_model.", 32)}


def flux(hidden=16):
    return values(layouts.bfl(hidden, 2, 2))


def chroma():
    return values(layouts.bfl(16, 2, 2, chroma=True))


MODELS = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux, "chroma": chroma}

_IN = f"{UNET}input_blocks.1."
_SD = [
    Target("lora_unet_input_blocks_1_0_in_layers_2", f"{_IN}0.in_layers.2"),
    Target("lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k", f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k"),
    Target("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0", f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_out.0"),
    Target("lora_unet_middle_block_1_proj_in", f"{UNET}middle_block.1.proj_in"),
    Target("lora_unet_middle_block_1_transformer_blocks_0_ff_net_2", f"{UNET}middle_block.1.transformer_blocks.0.ff.net.2"),
    Target("lora_unet_out_2", f"{UNET}out.2"),
]  # fmt: skip
_FLUX = [
    Target("transformer.single_transformer_blocks.1.attn.to_k", "single_blocks.1.linear1", (16, 32)),
    Target("transformer.transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn.qkv", (0, 16)),
    Target("lora_unet_double_blocks_1_txt_mlp_0", "double_blocks.1.txt_mlp.0"),
    Target("lora_unet_single_blocks_0_linear2", "single_blocks.0.linear2"),
    Target("diffusion_model.double_blocks.1.img_attn.proj", "double_blocks.1.img_attn.proj"),
    Target("lora_unet_double_blocks_0_txt_attn_proj", "double_blocks.0.txt_attn.proj"),
]
TARGETS = {
    "sd15": [*_SD, Target("lora_te_text_model_encoder_layers_1_mlp_fc1", f"{CLIP_L}encoder.layers.1.mlp.fc1")],
    "sdxl": [
        *_SD,
        Target("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", f"{XL_L}encoder.layers.0.self_attn.q_proj"),
        Target("lora_te2_text_model_encoder_layers_0_self_attn_k_proj", f"{XL_G}transformer.resblocks.0.attn", (48, 96)),
    ],
    "sd3": [
        Target("transformer.transformer_blocks.1.attn.to_v", f"{UNET}joint_blocks.1.x_block.attn.qkv", (32, 48)),
        Target("transformer.transformer_blocks.0.attn.add_q_proj", f"{UNET}joint_blocks.0.context_block.attn.qkv", (0, 16)),
        Target("lora_unet_joint_blocks_0_x_block_mlp_fc1", f"{UNET}joint_blocks.0.x_block.mlp.fc1"),
        Target("lora_unet_joint_blocks_1_x_block_mlp_fc2", f"{UNET}joint_blocks.1.x_block.mlp.fc2"),
        Target("lora_unet_joint_blocks_0_x_block_attn_proj", f"{UNET}joint_blocks.0.x_block.attn.proj"),
        Target("lora_unet_context_embedder", f"{UNET}context_embedder"),
        Target("lora_te1_text_model_encoder_layers_0_mlp_fc2", "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc2"),
    ],
    "flux": _FLUX,
    "chroma": _FLUX,
}  # fmt: skip

KINDS = ("lora", "loha", "lokr", "dora", "diff", "lora")
"""One after the other over the targets, the first ones being fused or convolutions."""


def weight_name(tensors, key):
    return next(n for n in (f"{key}.weight", f"{key}.in_proj_weight") if n in tensors)


def bias_name(tensors, key):
    return next((n for n in (f"{key}.bias", f"{key}.in_proj_bias") if n in tensors), None)


def one_module(kind, shape, seed, size=0.3):
    """The tensors of one module for a weight of `shape`, by their endings."""
    rows, columns, *kernel = shape
    flat = columns * torch.Size(kernel).numel()

    def factor(*sizes, n, like=1.0):
        return rand(*sizes, seed=seed * 10 + n, scale=like)

    if kind in ("lora", "dora"):
        found = {
            "lora_up.weight": factor(rows, 4, *[1] * len(kernel), n=1, like=size),
            "lora_down.weight": factor(4, columns, *kernel, n=2, like=flat**-0.5),
            "alpha": torch.tensor(2.0),
        }
        return {**found, "dora_scale": factor(rows, 1, n=3, like=0.1).abs() + 0.5} if kind == "dora" else found
    if kind == "loha":
        return {
            **{f"hada_w{side}_a": factor(rows, 2, n=side, like=size) for side in (1, 2)},
            **{f"hada_w{side}_b": factor(2, flat, n=2 + side, like=flat**-0.25) for side in (1, 2)},
            "alpha": torch.tensor(1.0),
        }
    if kind == "lokr":
        right = (rows // 2, columns // 2, *kernel)
        return {"lokr_w1": factor(2, 2, n=1), "lokr_w2": factor(*right, n=2, like=size * flat**-0.5)}
    return {"diff": factor(*shape, n=1, like=0.1 * size)}


def write_lora(path, tensors, targets, kinds=KINDS, seed=1, size=0.3, metadata=None):
    """A LoRA of these kinds on the model `tensors`, with a difference of the bias on the last target that has one."""
    made = {}
    for n, target in enumerate(targets):
        shape = tuple(tensors[weight_name(tensors, target.key)].shape)
        if target.rows:
            shape = (target.rows[1] - target.rows[0], *shape[1:])
        made |= {
            f"{target.module}.{end}": t for end, t in one_module(kinds[n % len(kinds)], shape, seed + n, size).items()
        }
    last = next(t for t in reversed(targets) if bias_name(tensors, t.key) and not t.rows)
    made[f"{last.module}.diff_b"] = rand(*tensors[bias_name(tensors, last.key)].shape, seed=seed + 99, scale=0.1)
    save_file(made, path, metadata)
    return path


def merged(tensors, stack, targets):
    """`{name: fp32 values}` of the parameters that a stack of (file, strength) changes: one merge, in order, unrounded."""
    places, found = {target.module: target for target in targets}, {}
    for path, strength in stack:
        for (module, role), adapter in read_lora_file(path).adapters.items():
            target = places[module]
            name = (weight_name if role == "weight" else bias_name)(tensors, target.key)
            part = Slice(0, target.rows[0], target.rows[1] - target.rows[0]) if target.rows else None
            found.setdefault(name, []).append(Term(adapter, strength, part=part))
    return {name: apply_terms(tensors[name].to(torch.float32, copy=True), terms) for name, terms in found.items()}


def write_gguf(path, tensors, form, seed=3):
    """Matrices whose rows fill blocks in `form` (written by hand), the others in F32. Returns what the file means."""
    rng, infos, data, meaning = random.Random(seed), [], b"", {}
    block = len(BY_HAND[form](rng)[1])
    # Some blocks many times over: a block by hand takes a while.
    blocks = [BY_HAND[form](rng) for _ in range(32)]
    contents = torch.tensor([content for _, content in blocks])
    number = {"Q8_0": 8, "Q4_K": 12}[form]
    for name, tensor in tensors.items():
        fills = tensor.dim() == 2 and tensor.shape[1] % block == 0 and tensor.numel() >= 4096
        infos.append(info(name, tuple(reversed(tensor.shape)), number if fills else 0, len(data)))
        if fills:
            chosen = rng.choices(range(len(blocks)), k=tensor.numel() // block)
            data += b"".join(blocks[number][0] for number in chosen)
            meaning[name] = contents[chosen].reshape(tensor.shape)
        else:
            data += bytes(tensor.float().contiguous().reshape(-1).view(torch.uint8).tolist())
            meaning[name] = tensor.float()
        data += b"\0" * (-len(data) % 32)
    pairs = [pair("general.architecture", STRING, "flux"), pair("tokenizer.ggml.model", STRING, "none")]
    path.write_bytes(gguf_bytes(pairs, infos, data))
    return meaning
