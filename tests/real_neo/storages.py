"""LoRAs on every storage that Forge Neo loads on a CPU: tables in docs/neo.md.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_neo/make_storages.py
    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_neo/storages.py --keep FOLDER [--tables NAME,...] [--write-docs]

The reference has the decoded weights in fp32 and the LoRA merged in fp64. int8 is the exception: Neo multiplies int8 weights with
activations that it rounds to int8, with LoRAs or without, and that product is in the reference too; the LoRA's is beside it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from real_neo.neo import GGUF_PARTS, parts
from real_neo.tables import Table, image_with, main

SD = "rand_sd15_tiny"
STRONG, WEAK = 4, 0.2
"""Strengths with which the Flux LoRA adds 40 % and 2 % of a weight's standard deviation."""
GGUF = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "bf16"]
# A change of "Diffusion in Low Bits" counts at the next load of a checkpoint, so no two rows of one checkpoint are neighbours.
STORAGES = {
    "SD1.5, fp16 file in fp32": (SD, "Automatic"),
    "Flux, bf16 file in fp32": ("nf_bf16.safetensors", "Automatic"),
    "SD1.5, float8-e4m3fn chosen": (SD, "float8-e4m3fn"),
    "Flux, float8-e5m2 chosen": ("nf_bf16.safetensors", "float8-e5m2"),
    "Flux, plain fp8 e4m3": ("nf_fp8.safetensors", "Automatic"),
    "Flux, plain fp8 e5m2": ("nf_e5m2.safetensors", "Automatic"),
    "Flux, scaled fp8 of 2025": ("nf_scaledfp8.safetensors", "Automatic"),
    "Flux, comfy_quant fp8 e5m2": ("nf_comfy_e5m2.safetensors", "Automatic"),
    "Flux, nvfp4": ("nf_nvfp4.safetensors", "Automatic"),
    "Flux, mxfp8": ("nf_mxfp8.safetensors", "Automatic"),
    "Flux, int8, a scale for each tensor": ("nf_int8_tensorwise.safetensors", "Automatic"),
    "Flux, int8, a scale for each row": ("nf_int8_rows.safetensors", "Automatic"),
    "Flux, int8, rotated": ("nf_int8_rotated.safetensors", "Automatic"),
    **{f"Flux, GGUF {name.upper()}": (f"nf_{name}.gguf", "Automatic") for name in GGUF},
}
IN_MEMORY = {
    "SD1.5, fp16 file": (SD, "Automatic"),
    "Flux, bf16 file": ("nf_bf16.safetensors", "Automatic"),
    "Flux, scaled fp8 of 2025": ("nf_scaledfp8.safetensors", "Automatic"),
    "Flux, nvfp4": ("nf_nvfp4.safetensors", "Automatic"),
}
T5 = {
    "T5, bf16 file": "nf_t5",
    "T5, plain fp8": "nf_t5_fp8",
    "T5, scaled fp8 of 2025": "nf_t5_scaledfp8",
    "T5, mxfp8": "nf_t5_mxfp8",
    "T5, nvfp4": "nf_t5_nvfp4",
    "T5, GGUF Q8_0": "nf_t5_q8_0",
    "T5, GGUF Q4_0": "nf_t5_q4_0",
}


def shots(neo, row, model, lora, strengths, **settings):
    for case, strength in {"without": 0, **strengths, "removed": 0}.items():
        prompt = f"a cat <lora:{lora}:{strength}>" if strength else "a cat"
        yield (row, case), image_with(neo, model, prompt=prompt, **settings)


def of(rows):
    def table(neo, side):
        for row, (model, low_bits) in rows.items():
            is_sd = model == SD
            settings = {
                "modules": parts(GGUF_PARTS) if model.endswith(".gguf") else [],
                "cfg_scale": 7 if is_sd else 1,
                "override_settings": {"forge_unet_storage_dtype": neo.low_bits.replace("Automatic", low_bits)},
            }
            strengths = {"strong": 1, "weak": 0.1} if is_sd else {"strong": STRONG, "weak": WEAK}
            yield from shots(neo, row, model, "lg_sd15_a" if is_sd else "nf_lora", strengths, **settings)

    return table


def text_encoders(neo, side):
    both = {"strong": 1, "weak": 0.1}
    yield from shots(neo, "CLIP, fp16 file", SD, "lg_sd15_text", both)
    yield from shots(neo, "CLIP and denoiser", SD, "lg_sd15_a", both)
    for row, file in T5.items():
        modules = parts(["nf_vae", "nf_clip_l", file])
        for model in ("nf_q8_0.gguf", "nf_fp8.safetensors") if "GGUF" in row else ("nf_q8_0.gguf",):
            name = row if model.endswith(".gguf") else f"{row}, beside a denoiser in fp8"
            yield from shots(neo, name, model, "nf_t5", {"strong": 1, "weak": 0.05}, modules=modules, cfg_scale=1)


WHAT = "weights"
TABLES = {
    "storages": Table(of(STORAGES), WHAT, fp16_lora=True),
    "storages in bf16": Table(of(IN_MEMORY), WHAT, ("--bf16-unet",), fp16_lora=True),
    "storages in fp16": Table(of(IN_MEMORY), WHAT, ("--fp16-unet",), fp16_lora=True),
    "text encoders": Table(text_encoders, WHAT, fp16_lora=True),
}

if __name__ == "__main__":
    sys.exit(main(TABLES, __doc__))
