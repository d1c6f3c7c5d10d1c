"""One setting on cards of 8, 12 and 24 GB: is the image the same?

    FORGE_ROOT=... python benchmarks/one_setting.py --out pictures.jsonl

A Flux-sized denoiser and Flux's VAE in Forge's own classes, with random weights and the guard installed; a ballast
process leaves the stated VRAM. Each cap uses the same noise, the same few Euler steps, the same two LoRAs, the VAE as
Forge loads it, and 8-bit pixels. The result is compared with that of the largest cap: the goal is a difference of at
most one grey level. Without the LoRAs the pixels must differ by more, else the comparison proves nothing. `--small`
tests the script itself, on the CPU too.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import gpu_rig
from ballast import Ballast
from gpu_rig import GB, Denoiser

GOAL_LEVELS = 1
SEED = 7


class Vae:
    """Flux's decoder with random weights, as Forge has it."""

    def __init__(self, denoiser, small):
        from backend.nn.vae import IntegratedAutoencoderKL
        from backend.patcher.base import ModelPatcher

        torch, self.memory, self.device = denoiser.torch, denoiser.memory, denoiser.device
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (32, 32, 32, 32) if small else (128, 256, 512, 512),
            "layers_per_block": 1 if small else 2,
            "latent_channels": 16,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }
        with denoiser.operations.using_forge_operations(device=denoiser.memory.cpu, dtype=torch.bfloat16):
            made = IntegratedAutoencoderKL(**blocks)
        generator = torch.Generator().manual_seed(SEED)
        for name, parameter in made.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
            is_scale = name.endswith("weight") and parameter.dim() == 1
            parameter.data = (torch.ones_like(drawn) if is_scale else drawn).to(torch.bfloat16)
        made.requires_grad_(False)
        made.storage_dtype = made.computation_dtype = torch.bfloat16
        self.model, self.torch = made, torch
        self.patcher = ModelPatcher(made, load_device=self.device, offload_device=denoiser.memory.cpu)

    def pixels(self, latent):
        """Decodes to uint8 `(3, height, width)` on the CPU."""
        torch, (_, _, height, width) = self.torch, latent.shape
        # Forge's request before it decodes.
        self.memory.load_models_gpu([self.patcher], memory_required=2178 * height * width * 64 * 2)
        with torch.inference_mode():
            picture = self.model.decode(latent.to(torch.bfloat16))[0].float()
        return ((picture / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


class Studio:
    """Makes images with different amounts of free VRAM."""

    def __init__(self, torch, options, ballast):
        from backend.modules import k_model

        from lib_lora_guard.hosts.forge import takeover as forge

        self.torch, self.options, self.ballast, self.forge, self.k_model = torch, options, ballast, forge, k_model
        self.size_px = 64 if options.small else options.size
        ballast.leave(32 * GB)
        self.denoiser = Denoiser(torch, "Flux", options.storage, "small" if options.small else "full")
        self.vae = Vae(self.denoiser, options.small)
        self.loras = {"a": self.denoiser.lora(1, 16, 0.1), "b": self.denoiser.lora(2, 32, 0.1)}
        gpu_rig.warm_up(torch)

    def picture(self, cap_gb, with_loras):
        """Returns `(pixels, row)` of one image, with `cap_gb` of free VRAM before anything is loaded."""
        torch, denoiser = self.torch, self.denoiser
        denoiser.unload()
        free = self.ballast.leave(cap_gb * GB)
        takeover = self.forge.install()
        takeover.install_loaded({"backend.modules.k_model": self.k_model})
        started = time.perf_counter()
        try:
            patcher = denoiser.with_loras(self.loras if with_loras else {}, strength=0.8)
            denoiser.prepare(patcher, self.size_px)
            swapped = denoiser.bytes_outside() if denoiser.device.type == "cuda" else 0
            report = takeover.stacks.report(patcher.lora_loader)
            latent = self.sampled()
            denoiser.sampling.sampling_cleanup(patcher)
            pixels = self.vae.pixels(latent)
        finally:
            # Unload before the patcher is released: a patcher without references stays on the card, and the next case
            # would have less.
            denoiser.unload()
            patcher = None
            denoiser.current = denoiser.patcher
            self.forge.uninstall()
        row = {
            "cap_gb": cap_gb,
            "free_mb": gpu_rig.mb(free),
            "with_loras": with_loras,
            "swapped_mb": gpu_rig.mb(swapped),
            "loras_applied": 0 if report is None else sum(lora.refused is None for lora in report.loras),
            "latent_finite": gpu_rig.finite(torch, latent),
            "levels_used": int(pixels.unique().numel()),
            "seconds": round(time.perf_counter() - started, 1),
        }
        return pixels, row

    def sampled(self):
        """Runs Euler steps from noise to a latent of the usual magnitude."""
        torch, inputs = self.torch, self.denoiser.inputs(self.size_px, seed=SEED)
        x = inputs.pop("x").float()
        times = torch.linspace(1, 0, self.options.steps + 1).tolist()
        for now, after in itertools.pairwise(times):
            inputs["timestep"] = torch.full_like(inputs["timestep"], now)
            velocity = self.denoiser.step(inputs | {"x": x.to(self.denoiser.compute)}).float()
            # Random weights give a velocity of any magnitude; only its direction matters.
            x = x + (after - now) * velocity / velocity.std().clamp(min=1e-6)
        return x / x.std()


def difference(one, other):
    """Returns the largest difference in grey levels, and the share of values that differ."""
    apart = (one.int() - other.int()).abs()
    return {"largest": int(apart.max()), "share_that_differs": round(float((apart > 0).float().mean()), 6)}


def verdict(against, without):
    """Compares the differences with the goal.

    Args:
        against: Differences of every other cap from the largest.
        without: Difference of the image without LoRAs.
    """
    largest = max((found["largest"] for found in against.values()), default=0)
    return {
        "largest_difference": largest,
        "without_lora": without,
        "ok": bool(against) and largest <= GOAL_LEVELS < without["largest"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caps", default="24,12,8", help="GB of free VRAM; the first is what the others are held to")
    parser.add_argument("--storage", choices=["fp8", "nf4", "Q8_0", "Q4_K", "bf16"], default="fp8")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script itself")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch = gpu_rig.import_forge()
    caps = [float(cap) for cap in options.caps.split(",")]
    header = gpu_rig.header(torch) | {"storage": options.storage, "steps": options.steps, "small": options.small}
    with Ballast(torch) as ballast:
        studio = Studio(torch, options, ballast)
        header |= {"size_px": studio.size_px}
        pictures, rows = {}, []
        for cap in caps:
            pictures[cap], row = studio.picture(cap, with_loras=True)
            rows.append(row)
            print(row, flush=True)
        plain, row = studio.picture(caps[0], with_loras=False)
        rows.append(row)
        first = pictures[caps[0]]
        against = {f"{cap:g}": difference(pictures[cap], first) for cap in caps[1:]}
        found = verdict(against, difference(plain, first))
    gpu_rig.write_line(options.out, header | {"caps_gb": caps, "runs": rows, "against_first": against, **found})
    return not found["ok"]


if __name__ == "__main__":
    sys.exit(main())
