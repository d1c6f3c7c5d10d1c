"""Peak VRAM of one forward pass beside the weights, for each architecture's own module in Forge's backend.

    FORGE_ROOT=... python benchmarks/activations_gpu.py --out activations.jsonl

Random weights, 16 bit, all on the GPU. Transformers have few blocks, because a block releases its memory afterwards.
`planning.activations` has the formulas, and `tests/planning/test_activations.py` tests them against these measurements.
`--device cpu --small` tests the script itself.
"""

import argparse
import json
import os
import sys
import time
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import forge_gpu  # noqa: E402  # lies beside this file

MB = 1 << 20
SIZES = ((512, 512), (768, 1024), (1024, 1024), (1536, 1536), (2048, 2048))
ROWS = (1, 2, 4)


def unet(**different):
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "use_spatial_transformer": True,
        "dims": 2,
    }
    return config | different


UNETS = {
    "SD 1.x": unet(
        num_res_blocks=[2, 2, 2, 2],
        channel_mult=(1, 2, 4, 4),
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        transformer_depth_middle=1,
        context_dim=768,
        num_heads=8,
    ),
    "SD 2.x": unet(
        num_res_blocks=[2, 2, 2, 2],
        channel_mult=(1, 2, 4, 4),
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        transformer_depth_middle=1,
        context_dim=1024,
        num_head_channels=64,
        use_linear_in_transformer=True,
    ),
    "SDXL": unet(
        num_res_blocks=[2, 2, 2],
        channel_mult=(1, 2, 4),
        transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
        transformer_depth_middle=10,
        context_dim=2048,
        num_head_channels=64,
        use_linear_in_transformer=True,
        num_classes="sequential",
        adm_in_channels=2816,
    ),
}
FLUX = {
    "in_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
}
MMDIT = {"patch_size": 2, "in_channels": 16, "input_size": None, "pos_embed_scaling_factor": None}


def build_denoiser(name, torch):
    """Returns the module and a function that makes its inputs: `(rows, latent, like) -> kwargs`."""
    if name in UNETS:
        from backend.nn.unet import IntegratedUNet2DConditionModel

        config = UNETS[name]
        made = IntegratedUNet2DConditionModel(**config)
        width = config["context_dim"]

        def inputs(rows, latent, like):
            extra = {"y": like(rows, 2816)} if name == "SDXL" else {}
            return {
                "x": latent(rows, 4),
                "timesteps": like(rows).float(),
                "context": like(rows, 77, width),
                "transformer_options": {},
            } | extra

    elif name == "Flux":
        from backend.nn.flux import IntegratedFluxTransformer2DModel

        made = IntegratedFluxTransformer2DModel(**FLUX, depth=2, depth_single_blocks=3, guidance_embed=True)

        def inputs(rows, latent, like):
            return {
                "x": latent(rows, 16),
                "timestep": like(rows),
                "context": like(rows, 512, 4096),
                "y": like(rows, 768),
                "guidance": like(rows),
            }

    elif name == "Chroma":
        from backend.nn.chroma import IntegratedChromaTransformer2DModel

        # Its modulations depend on the depth, so it has all of its blocks.
        made = IntegratedChromaTransformer2DModel(
            **FLUX,
            depth=19,
            depth_single_blocks=38,
            guidance_out_dim=3072,
            guidance_hidden_dim=5120,
            guidance_n_layers=5,
        )

        def inputs(rows, latent, like):
            return {"x": latent(rows, 16), "timestep": like(rows), "context": like(rows, 512, 4096)}

    else:
        from backend.nn.mmditx import MMDiTX

        different = {
            "SD 3 medium": {"depth": 24, "qk_norm": None, "num_patches": 36864, "pos_embed_max_size": 192},
            "SD 3.5 large": {"depth": 38, "qk_norm": "rms", "num_patches": 36864, "pos_embed_max_size": 192},
        }[name]
        hidden = 64 * different["depth"]
        text = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": hidden}}
        made = MMDiTX(**MMDIT, **different, adm_in_channels=2048, context_embedder_config=text)

        def inputs(rows, latent, like):
            return {"x": latent(rows, 16), "t": like(rows), "y": like(rows, 2048), "context": like(rows, 154, 4096)}

    return made, inputs


DENOISERS = (*UNETS, "SD 3 medium", "SD 3.5 large", "Flux", "Chroma")


class Probe:
    """Runs the cases and writes their results."""

    def __init__(self, options, torch):
        self.options, self.torch = options, torch
        self.header = {"gpu": torch.cuda.get_device_name() if options.device == "cuda" else "none"}
        self.header |= {"torch": torch.__version__, "commit": os.environ.get("LORA_GUARD_COMMIT", "unknown")}

    def made(self, build, dtype):
        """Builds a module with random weights, from plain torch layers: in 16 bit Forge's own layers add nothing to
        them.
        """
        torch = self.torch
        with torch.device(self.options.device):
            torch.set_default_dtype(dtype)
            try:
                made = build()
            finally:
                torch.set_default_dtype(torch.float32)
        module = made[0] if isinstance(made, tuple) else made
        module.to(dtype).requires_grad_(False)
        for parameter in module.parameters():
            # Uninitialized memory may contain NaN, which is slow on some cards.
            parameter.data.normal_(0, 0.02)
        return made

    def peak(self, run):
        """Returns `(peak bytes, reserved bytes, seconds)` beyond those before. A first pass allocates kernels and
        workspaces that stay.
        """
        torch = self.torch
        run()
        if self.options.device != "cuda":
            return 0, 0, 0.0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved() - reserved, seconds

    def write(self, **row):
        print(json.dumps(row), flush=True)
        if self.options.out:
            with self.options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.header | row) + "\n")

    def cases(self):
        sizes = ((64, 64),) if self.options.small else SIZES
        for rows in (1,) if self.options.small else ROWS:
            yield from ((rows, width, height) for width, height in sizes if rows * width * height <= 2 * 2048 * 2048)

    def denoiser(self, name):
        torch = self.torch
        dtype = torch.float16 if name in UNETS else torch.bfloat16
        module, inputs = self.made(lambda: build_denoiser(name, torch), dtype)
        device = self.options.device

        def like(*shape):
            return torch.randn(shape, device=device, dtype=dtype)

        for rows, width, height in self.cases():
            given = inputs(rows, lambda n, c, w=width, h=height: like(n, c, h // 8, w // 8), like)
            self.case("denoiser", name, rows, width, height, lambda given=given: module(**given))

    def vae(self):
        from backend.nn.vae import IntegratedAutoencoderKL

        torch, device = self.torch, self.options.device
        for name, channels in (("VAE of SD", 4), ("VAE of Flux", 16)):
            blocks = {
                "down_block_types": ("DownEncoderBlock2D",) * 4,
                "up_block_types": ("UpDecoderBlock2D",) * 4,
                "block_out_channels": (128, 256, 512, 512),
                "layers_per_block": 2,
                "latent_channels": channels,
            }
            for dtype in (torch.bfloat16, torch.float32):
                module = self.made(lambda blocks=blocks: IntegratedAutoencoderKL(**blocks), dtype)
                for rows, width, height in self.cases():
                    if rows > 2 or (channels == 16 and rows > 1):
                        continue
                    latent = torch.randn(rows, channels, height // 8, width // 8, device=device, dtype=dtype)
                    picture = torch.randn(rows, 3, height, width, device=device, dtype=dtype)
                    kind = f"{name}, {str(dtype)[6:]}"
                    self.case("decode", kind, rows, width, height, lambda m=module, z=latent: m.decoder(z))
                    self.case("encode", kind, rows, width, height, lambda m=module, p=picture: m.encoder(p))

    def case(self, part, name, rows, width, height, run):
        row = {"part": part, "name": name, "rows": rows, "width": width, "height": height}
        try:
            with self.torch.inference_mode():
                peak, reserved, seconds = self.peak(run)
        except self.torch.cuda.OutOfMemoryError as error:
            self.write(**row, out_of_memory=str(error)[:120])
            return
        self.write(**row, peak_mb=round(peak / MB, 1), reserved_mb=round(reserved / MB, 1), seconds=round(seconds, 4))


def stand_ins():
    """Replaces diffusers, which GPU machines lack: these modules use only two of its decorators."""
    utilities = types.ModuleType("diffusers.configuration_utils")
    utilities.ConfigMixin, utilities.register_to_config = object, lambda function: function
    sys.modules["diffusers.configuration_utils"] = utilities


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, separated by commas; default: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    forge_gpu.import_forge()
    stand_ins()
    if options.device == "cpu":
        sys.argv += ["--always-cpu"]
    import torch

    probe = Probe(options, torch)
    wanted = [name for name in options.only.split(",") if name]
    for name in (*DENOISERS, "VAE"):
        if wanted and name not in wanted:
            continue
        probe.vae() if name == "VAE" else probe.denoiser(name)
        if options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
