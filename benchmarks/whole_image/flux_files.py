"""Makes a random Flux-dev of real size, its text encoders and VAE, and LoRAs, as files that Forge and Forge Neo load.

    python flux_files.py --models FOLDER --storage fp8|nf4|int8|q4_k [--loras A=16 B=32]

fp8, NF4 and int8_tensorwise (Neo's) are one file with CLIP-L, T5-XXL (fp8) and VAE in it, as such checkpoints are published.
GGUF Q4_K has them beside it, to be named in the host's options. Weights are random: for seconds, bytes and equality of
pictures between ways, not for pictures to look at. On an H200 the 16 GB of fp8 take about 35 seconds.
"""

import argparse
import hashlib
import json
import math
import struct
import sys
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reading import flux_shapes  # lies one folder above

STORAGES = ("fp8", "nf4", "int8", "q4_k")
GAIN = 0.7
"""Of a matrix of the transformer: outputs have about this share of the inputs' magnitude, so 57 blocks stay finite."""
LORA_SHARE = 0.3
"""A LoRA's difference, as a share of the weight's own magnitude: to be seen in the picture."""
UNET, CLIP, T5, VAE = (
    "model.diffusion_model.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.t5xxl.transformer.",
    "vae.",
)


def model_name(storage):
    """Returns the checkpoint's file name."""
    return f"whole_image_flux_{storage}.{'gguf' if storage == 'q4_k' else 'safetensors'}"


def lora_name(letter):
    """Returns the LoRA's name in a prompt."""
    return f"whole_image_{letter.lower()}"


SEPARATE = {
    "clip": ("text_encoder", "whole_image_clip_l.safetensors"),
    "t5": ("text_encoder", "whole_image_t5xxl_fp8.safetensors"),
    "vae": ("VAE", "whole_image_ae.safetensors"),
}
"""Folder and file of what lies beside a GGUF."""


def clip_shapes(layers=12, width=768):
    """Names and shapes of CLIP-L's text model."""
    shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
    }
    for n in range(layers):
        block = f"text_model.encoder.layers.{n}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            add_layer(shapes, f"{block}.self_attn.{name}", width, width)
        add_layer(shapes, f"{block}.mlp.fc1", 4 * width, width)
        add_layer(shapes, f"{block}.mlp.fc2", width, 4 * width)
        add_layer(shapes, f"{block}.layer_norm1", width)
        add_layer(shapes, f"{block}.layer_norm2", width)
    add_layer(shapes, "text_model.final_layer_norm", width)
    return shapes


def t5_shapes(layers=24, width=4096, inner=10240):
    """Names and shapes of T5-XXL's encoder."""
    shapes = {"shared.weight": (32128, width), "encoder.final_layer_norm.weight": (width,)}
    for n in range(layers):
        block = f"encoder.block.{n}.layer"
        for name in "qkvo":
            shapes[f"{block}.0.SelfAttention.{name}.weight"] = (width, width)
        for name in ("wi_0", "wi_1"):
            shapes[f"{block}.1.DenseReluDense.{name}.weight"] = (inner, width)
        shapes[f"{block}.1.DenseReluDense.wo.weight"] = (width, inner)
        shapes[f"{block}.0.layer_norm.weight"] = shapes[f"{block}.1.layer_norm.weight"] = (width,)
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
    return shapes


def vae_shapes(widths=(128, 256, 512, 512), latent=16):
    """Names and shapes of Flux's autoencoder."""
    shapes, top = {}, widths[-1]

    def block(name, inputs, outputs):
        add_layer(shapes, f"{name}.norm1", inputs)
        add_layer(shapes, f"{name}.norm2", outputs)
        add_layer(shapes, f"{name}.conv1", outputs, inputs, 3, 3)
        add_layer(shapes, f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            add_layer(shapes, f"{name}.nin_shortcut", outputs, inputs, 1, 1)

    def middle(name):
        for n in (1, 2):
            block(f"{name}.mid.block_{n}", top, top)
        add_layer(shapes, f"{name}.mid.attn_1.norm", top)
        for part in ("q", "k", "v", "proj_out"):
            add_layer(shapes, f"{name}.mid.attn_1.{part}", top, top, 1, 1)

    add_layer(shapes, "encoder.conv_in", widths[0], 3, 3, 3)
    inputs = widths[0]
    for level, outputs in enumerate(widths):
        for n in range(2):
            block(f"encoder.down.{level}.block.{n}", outputs if n else inputs, outputs)
        inputs = outputs
        if level < len(widths) - 1:
            add_layer(shapes, f"encoder.down.{level}.downsample.conv", outputs, outputs, 3, 3)
    middle("encoder")
    add_layer(shapes, "encoder.norm_out", top)
    add_layer(shapes, "encoder.conv_out", 2 * latent, top, 3, 3)
    add_layer(shapes, "decoder.conv_in", top, latent, 3, 3)
    middle("decoder")
    for level, outputs in reversed(list(enumerate(widths))):
        for n in range(3):
            block(f"decoder.up.{level}.block.{n}", outputs if n else inputs, outputs)
        inputs = outputs
        if level:
            add_layer(shapes, f"decoder.up.{level}.upsample.conv", outputs, outputs, 3, 3)
    add_layer(shapes, "decoder.norm_out", widths[0])
    add_layer(shapes, "decoder.conv_out", 3, widths[0], 3, 3)
    return shapes


def add_layer(shapes, name, outputs, *rest):
    """Adds a weight and its bias."""
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, *rest), (outputs,)


def is_block_matrix(name, shape):
    """Returns whether a weight of the transformer is quantised, and patched by the LoRAs."""
    return len(shape) == 2 and "blocks." in name and name.endswith(".weight")


class Maker:
    """Draws tensors. Each is drawn from its own name, so a file does not depend on what was made before it."""

    def __init__(self, torch):
        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def normal(self, name, shape, deviation):
        generator = self.torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        return self.torch.randn(shape, generator=generator, device=self.device) * deviation

    def weight(self, name, shape, dtype, gain=GAIN):
        """Draws one tensor as a trained one would be: norms near one, no bias, matrices that keep the magnitude."""
        torch = self.torch
        if "final_layer_norm.bias" in name:  # else every prompt would end as the same text
            return torch.full(shape, 0.1).to(dtype)
        if name.endswith("bias"):
            return torch.zeros(shape, dtype=torch.bfloat16).to(dtype)
        if len(shape) <= 1:
            return torch.ones(shape, dtype=torch.bfloat16).to(dtype)
        embeds = any(word in name for word in ("embedding", "shared", "relative"))
        deviation = 0.05 if embeds else gain / math.sqrt(math.prod(shape[1:]))
        return self.normal(name, shape, deviation).to(dtype).cpu()

    def encoders_and_vae(self):
        """Returns `{part: tensors}` as they lie in files of their own: CLIP and VAE in bf16, T5's matrices in fp8."""
        torch = self.torch
        low, half = torch.float8_e4m3fn, torch.bfloat16
        return {
            "clip": {n: self.weight(CLIP + n, s, half, gain=0.5) for n, s in clip_shapes().items()},
            "t5": {n: self.weight(T5 + n, s, low if len(s) > 1 else half) for n, s in t5_shapes().items()},
            "vae": {n: self.weight(VAE + n, s, half) for n, s in vae_shapes().items()},
        }

    def stored(self, name, shape, storage):
        """Returns one weight of the transformer as a safetensors checkpoint stores it: `{suffix: tensor}`."""
        torch = self.torch
        if storage == "fp8":
            return {"": self.weight(name, shape, torch.float8_e4m3fn)}
        if not is_block_matrix(name, shape):
            return {"": self.weight(name, shape, torch.bfloat16)}
        drawn = self.normal(name, shape, GAIN / math.sqrt(shape[1]))
        if storage == "nf4":
            from bitsandbytes.functional import quantize_4bit

            data, state = quantize_4bit(drawn.to(torch.bfloat16), blocksize=64, quant_type="nf4")
            packed = {f".{key}": value.cpu() for key, value in state.as_dict(packed=True).items()}
            return {"": data.cpu(), **packed}
        scale = drawn.abs().amax() / 127
        data = (drawn / scale).round_().clamp_(-128, 127).to(torch.int8)
        return {"": data.cpu(), "_scale": scale.float().cpu()}

    def transformer(self, storage, shapes):
        """Returns the tensors of the transformer for a safetensors checkpoint, without a prefix."""
        tensors = {}
        for name, shape in shapes.items():
            stored = self.stored(name, shape, storage)
            tensors |= {name + suffix: tensor for suffix, tensor in stored.items()}
            if storage == "int8" and "_scale" in stored:
                words = json.dumps({"format": "int8_tensorwise"}).encode()
                marked = name.removesuffix("weight") + "comfy_quant"
                tensors[marked] = self.torch.tensor(list(words), dtype=self.torch.uint8)
        return tensors

    def lora(self, letter, rank, shapes):
        """Returns a LoRA on every matrix of the blocks, in kohya's names."""
        torch, tensors = self.torch, {}
        for name, (rows, columns) in ((n, s) for n, s in shapes.items() if is_block_matrix(n, s)):
            module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            deviation = math.sqrt(LORA_SHARE * GAIN / math.sqrt(columns * rank))
            for side, shape in (("lora_down", (rank, columns)), ("lora_up", (rows, rank))):
                drawn = self.normal(f"{letter}.{module}.{side}", shape, deviation)
                tensors[f"{module}.{side}.weight"] = drawn.to(torch.bfloat16).cpu()
            tensors[f"{module}.alpha"] = torch.tensor(float(rank))
        return tensors

    def q4_k(self, name, shape):
        """Draws blocks of 144 bytes for 256 values, with the magnitude that the matrix should have."""
        torch, (rows, columns) = self.torch, shape
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        drawn = (rows * columns // 256, 144)
        blocks = torch.randint(0, 256, drawn, generator=generator, dtype=torch.uint8, device=self.device)
        # With 1e-4 and 7.4e-4 random scales and nibbles have a mean of about zero and a deviation of 0.0257.
        factor = GAIN / math.sqrt(columns) / 0.0257
        scales = torch.tensor([1e-4 * factor, 7.4e-4 * factor], dtype=torch.float16, device=self.device)
        blocks[:, :4] = scales.view(torch.uint8)
        return blocks.cpu()


GGUF_TYPES = {"F32": 0, "F16": 1, "Q4_K": 12}
GGUF_ALIGNMENT = 32


def gguf_header(tensors):
    """Returns the bytes of a GGUF file up to its data, and the place of each tensor in the data.

    Args:
        tensors: `{name: (type, shape, bytes)}`; the format writes the fastest dimension first.
    """

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    places, at, infos = {}, 0, b""
    for name, (kind, shape, size) in tensors.items():
        places[name] = at
        infos += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos += struct.pack("<IQ", GGUF_TYPES[kind], at)
        at += -(-size // GGUF_ALIGNMENT) * GGUF_ALIGNMENT
    fields = text("general.architecture") + struct.pack("<I", 8) + text("flux")
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1) + fields + infos
    return head + bytes(-len(head) % GGUF_ALIGNMENT), places


def write_gguf(path, maker, shapes):
    """Writes the transformer as Q4_K; matrices outside the blocks are F16, vectors F32."""
    torch, data = maker.torch, {}
    for name, shape in shapes.items():
        if is_block_matrix(name, shape):
            data[name] = ("Q4_K", maker.q4_k(name, shape))
        else:
            kind, dtype = ("F16", torch.float16) if len(shape) > 1 else ("F32", torch.float32)
            data[name] = (kind, maker.weight(name, shape, dtype))
    sizes = {n: (kind, shapes[n], tensor.numel() * tensor.element_size()) for n, (kind, tensor) in data.items()}
    head, places = gguf_header(sizes)
    with path.open("wb") as file:
        file.write(head)
        for name, (_, tensor) in data.items():
            file.seek(len(head) + places[name])
            file.write(tensor.contiguous().view(torch.uint8).reshape(-1).numpy().data)
        file.truncate(-(-file.tell() // GGUF_ALIGNMENT) * GGUF_ALIGNMENT)


def make(models, storage, loras, maker, shapes):
    """Writes what is missing of the files of a storage.

    Args:
        models: The folder that a host has its models in.
        storage: One of `STORAGES`.
        loras: The rank for each letter.
        maker: Draws the tensors.
        shapes: Names and shapes of the transformer.
    """
    from safetensors.torch import save_file

    for folder in ("Stable-diffusion", "Lora", "VAE", "text_encoder"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    checkpoint = models / "Stable-diffusion" / model_name(storage)
    if storage == "q4_k":
        wanted = {part: models / folder / name for part, (folder, name) in SEPARATE.items()}
        if not all(path.exists() for path in wanted.values()):
            for part, tensors in maker.encoders_and_vae().items():
                save_file(tensors, wanted[part])
        if not checkpoint.exists():
            write_gguf(checkpoint, maker, shapes)
    elif not checkpoint.exists():
        parts = maker.encoders_and_vae()
        whole = {UNET + name: tensor for name, tensor in maker.transformer(storage, shapes).items()}
        for part, prefix in (("clip", CLIP), ("t5", T5), ("vae", VAE)):
            whole |= {prefix + name: tensor for name, tensor in parts[part].items()}
        save_file(whole, checkpoint)
    for letter, rank in loras.items():
        path = models / "Lora" / f"{lora_name(letter)}.safetensors"
        if not path.exists():
            write_lora(path, maker.lora(letter, rank, shapes), rank)


def write_lora(path, tensors, rank):
    """Writes a LoRA with the metadata of sd-scripts, its hash of the values included: hosts need not calculate one."""
    from safetensors.torch import save

    facts = {"ss_network_dim": str(rank), "ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1"}
    plain = save(tensors)
    (header_bytes,) = struct.unpack("<Q", plain[:8])
    values = hashlib.sha256(memoryview(plain)[8 + header_bytes :]).hexdigest()
    path.write_bytes(save(tensors, metadata={**facts, "sshs_model_hash": values}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--storage", choices=STORAGES, required=True)
    parser.add_argument("--loras", nargs="*", default=[], metavar="LETTER=RANK")
    options = parser.parse_args()
    import torch

    began = time.monotonic()
    loras = {letter: int(rank) for letter, _, rank in (lora.partition("=") for lora in options.loras)}
    with torch.no_grad():
        make(options.models, options.storage, loras, Maker(torch), flux_shapes())
    path = options.models / "Stable-diffusion" / model_name(options.storage)
    print(f"{path.name}: {path.stat().st_size / 1e9:.1f} GB, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
