"""Model and LoRA files of true size without their data: a header, then nothing (the file is sparse).

Names and shapes are those of `original_layouts` at the published models' sizes. The few values that are
read (alpha, the state of bitsandbytes) are written.
"""

import json
import math
import struct

from support.original_layouts import bfl, ldm_unet, open_clip
from support.raw_files import gguf_bytes, info

BITS = {"F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "U8": 8}
GGUF_NUMBERS = {"F32": (0, 1, 4), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144), "IQ4_XS": (23, 256, 136)}


def flux_shapes(hidden=3072, double=19, single=38, **more):
    return _shapes(bfl(hidden, double, single, **more))


def flux_linears(shapes):
    """The 304 matrices of Flux's blocks."""
    return {name: shape for name, shape in shapes.items() if "_blocks." in name and len(shape) == 2}


def sdxl_shapes(prefix="model.diffusion_model."):
    """The U-Net alone: 320, 640 and 1280 channels."""
    unet = ldm_unet((320, 640, 1280), (0, 2, 10), 10, 2048, label=2816)
    return {prefix + name: _as_convolution(name, shape) for name, shape in _shapes(unet).items()}


def sdxl_checkpoint():
    """U-Net, CLIP-G and a VAE of one tensor."""
    clip = {f"conditioner.embedders.1.model.{name}": shape for name, shape in _shapes(open_clip(1280, 32)).items()}
    return {**sdxl_shapes(), **clip, "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}


def _shapes(layers):
    return {
        f"{module}.{name}": (rows, columns) if columns and "weight" in name else (rows,)
        for module, rows, columns, names in layers
        for name in names.split()
    }


def _as_convolution(name, shape):
    if len(shape) != 2:
        return shape
    embedded = ("time_embed", "label_emb", "emb_layers")
    if any(word in name for word in embedded):  # the layouts have toy widths there
        first = {"time_embed.0.weight": 320, "label_emb.0.0.weight": 2816}.get(name, 1280)
        return (1280 if "emb_layers" not in name else shape[0], first)
    if "skip_connection" in name:
        return (*shape, 1, 1)
    three = (".in_layers.2.", ".out_layers.3.", ".0.op.", "input_blocks.0.0.", ".conv.")
    return (*shape, 3, 3) if any(part in name for part in three) or name.startswith("out.2.") else shape


def write_safetensors(path, tensors, metadata=None, values=None):
    """`tensors`: name -> (format, shape); `values`: name -> bytes. Returns the bytes of all tensors."""
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, (form, shape) in tensors.items():
        size = math.prod(shape) * BITS[form] // 8
        header[name] = {"dtype": form, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
        for name, content in (values or {}).items():
            start, end = header[name]["data_offsets"]
            assert len(content) == end - start
            file.seek(8 + len(raw) + start)
            file.write(content)
    return at


def stored(shapes, form, small="BF16"):
    """Matrices in `form`, everything else in `small`."""
    return {name: (form if len(shape) > 1 else small, shape) for name, shape in shapes.items()}


def write_nf4(path, shapes, prefix="model.diffusion_model."):
    """Matrices as bitsandbytes stores them without nested statistics."""
    tensors, values = {}, {}
    for bare, shape in shapes.items():
        name = prefix + bare
        if len(shape) < 2:
            tensors[name] = ("BF16", shape)
            continue
        count = math.prod(shape)
        state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}).encode()
        tensors[name] = ("U8", ((count + 1) // 2, 1))
        tensors[f"{name}.absmax"] = ("F32", (-(-count // 64),))
        tensors[f"{name}.quant_map"] = ("F32", (16,))
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = ("U8", (len(state),))
        values[f"{name}.quant_state.bitsandbytes__nf4"] = state
    return write_safetensors(path, tensors, values=values)


def write_gguf(path, shapes, form):
    """Matrices in `form` where their rows are whole blocks, everything else in F32."""
    infos, at = [], 0
    for name, shape in shapes.items():
        fills = len(shape) > 1 and shape[-1] % GGUF_NUMBERS[form][1] == 0
        number, block, block_bytes = GGUF_NUMBERS[form if fills else "F32"]
        infos.append(info(name, tuple(reversed(shape)), number, at))
        at += math.prod(shape) // block * block_bytes
        at += -at % 32
    head = gguf_bytes(infos=infos)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + at)


def write_lora(path, shapes, rank=16, alpha=8.0, form="BF16", prefix="lora_unet_", metadata=None):
    """A kohya file on these weights (names of parameters). Returns the bytes of its factors."""
    tensors, values = {}, {}
    for name, shape in shapes.items():
        module = prefix + name.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
        kernel, points = shape[2:], (1,) * len(shape[2:])
        tensors[f"{module}.lora_up.weight"] = (form, (shape[0], rank, *points))
        tensors[f"{module}.lora_down.weight"] = (form, (rank, shape[1], *kernel))
        tensors[f"{module}.alpha"] = ("F32", ())
        values[f"{module}.alpha"] = struct.pack("<f", alpha)
    write_safetensors(path, tensors, metadata, values)
    return sum(math.prod(shape) * BITS[form] // 8 for name, (_, shape) in tensors.items() if ".lora_" in name)
