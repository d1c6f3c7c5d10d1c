"""From "Generate" to the first step inside Forge's own backend, with little VRAM: the guard against stock Forge.

    FORGE_ROOT=... python benchmarks/first_step.py --free-gb 12 --out results.jsonl

Measures the cost of a change of LoRA, strength or prompt, in seconds and in bytes over the bus. Three modules with
random weights use the GPU in the order of an image: prompt, steps, decode. Their sizes are those of T5-XXL (4.6 G,
fp8), Flux-dev (11.9 G parameters, fp8) and a VAE decoder (bf16). The WebUI itself does not run on this machine. So
Forge's cache of the last conditioning, whose key contains every LoRA, is rebuilt here in a few lines.

`--changes N` measures how much of the model stays on the GPU over N changes of the LoRA. `--alternate N` measures the
bytes over the bus of N whole images. Each has a new prompt, every second one another LoRA, and the decode requests the
memory that Forge requests for 1024x1024.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import forge_gpu  # noqa: E402  # lies beside this file

WAYS = ("guard", "fp16 LoRA", "automatic")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", choices=["fp8", "nf4", "bf16"], default="fp8")
    parser.add_argument("--free-gb", type=float, default=12.0)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--changes", type=int, default=0)
    parser.add_argument("--alternate", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a tenth of the sizes, to try the script itself")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.kind, options.rank, options.loras, options.steps, options.swap = "lora", 16, 2, 1, "queue"
    return options


class Use:
    """One `<lora:name:strength>` of a prompt, as Forge's parser passes it on."""

    def __init__(self, name, strength):
        self.items = self.positional = [name, str(strength)]
        self.named = {}


class Processing:
    """Forge's cache of the last conditioning."""

    def __init__(self):
        self.cache = [None, None, None]

    def cached_params(self, required_prompts, steps, extra_network_data, hires_steps=None, use_old_scheduling=False):
        return (
            (required_prompts, steps, [[use.items for use in extra_network_data["lora"]]])
            if not isinstance(extra_network_data, tuple)
            else (required_prompts, steps, extra_network_data)
        )

    def get_conds_with_caching(self, function, required_prompts, steps, caches, extra_network_data, hires_steps=None):
        params = self.cached_params(required_prompts, steps, extra_network_data, hires_steps, False)
        for cache in caches:
            if cache[0] is not None and cache[0] == params:
                return cache[1]
        caches[0][:] = [params, function(required_prompts), {}]
        return caches[0][1]


def module_named_processing():
    """Returns a module with Forge's name for the class, new for every way."""
    owner = type("StableDiffusionProcessing", (Processing,), dict(vars(Processing)))
    return types.SimpleNamespace(StableDiffusionProcessing=owner)


class Daily(forge_gpu.Bench):
    """Runs whole images or single changes and measures them."""

    def __init__(self, options):
        super().__init__(options)
        from backend.patcher.base import ModelPatcher

        torch, cpu, gpu = self.torch, self.memory.cpu, torch_device(self.torch)
        part = 0.1 if options.small else 1
        self.text_encoder = self.stack(text_encoder_layers(max(2, int(24 * part))), torch.float8_e4m3fn)
        self.vae = self.stack(vae_layers(), torch.bfloat16)
        # The guard recognizes the models by these class names.
        for model, module, name in (
            (self.text_encoder, "backend.patcher.clip", "JointTextEncoder"),
            (self.vae, "backend.nn.vae", "IntegratedAutoencoderKL"),
        ):
            model.__class__ = type(name, (torch.nn.ModuleList,), {"__module__": module})
        self.decode_bytes = 2 * 1024**3
        self.clip_patcher = ModelPatcher(self.text_encoder, load_device=gpu, offload_device=cpu)
        self.vae_patcher = ModelPatcher(self.vae, load_device=gpu, offload_device=cpu)
        self.lora_stacks = {
            name: self.one_lora(name, lora) for name, lora in zip(("first", "second"), self.loras, strict=True)
        }
        clip = types.SimpleNamespace(patcher=self.clip_patcher)
        model = type("Model", (), {})()
        model.forge_objects = types.SimpleNamespace(clip=clip)
        opts = types.SimpleNamespace(use_old_scheduling=False, persistent_cond_cache=True)
        self.shared = types.SimpleNamespace(sd_model=model, opts=opts)
        self.online, self.moved, self.encoded = False, Moved(torch), 0

    def stack(self, shapes, dtype):
        torch = self.torch
        with self.operations.using_forge_operations(
            device=self.memory.cpu, dtype=dtype, manual_cast_enabled=dtype != torch.bfloat16
        ):
            layers = [
                torch.nn.Linear(inner, out, bias=False)
                if len(shape) == 2
                else torch.nn.Conv2d(inner, out, shape[2], padding=shape[2] // 2)
                for shape in shapes
                for out, inner in [shape[:2]]
            ]
        for layer, shape in zip(layers, shapes, strict=True):
            # Forge's Linear has no weight until a checkpoint is loaded.
            weight = (torch.randn(shape, device="cuda") * 0.02).to(dtype).cpu()
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            if len(shape) == 4:
                layer.bias = torch.nn.Parameter(torch.zeros(shape[0], dtype=dtype), requires_grad=False)
        model = torch.nn.ModuleList(layers).requires_grad_(False)
        model.storage_dtype, model.computation_dtype = dtype, torch.bfloat16
        return model

    def one_lora(self, name, lora):
        return lambda strength: self.with_lora(name, lora, strength)

    def with_lora(self, name, lora, strength):
        clone = self.base.clone()
        clone.add_patches(filename=name, patches=lora, strength_patch=strength, online_mode=self.online)
        return clone

    def encode(self, prompts):
        torch = self.torch
        self.encoded += 1
        self.memory.load_model_gpu(self.clip_patcher)
        x = torch.randn(1, 256, 4096, device="cuda", dtype=torch.bfloat16)
        for q, k, v, o, wi, wg, wo in zip(*[iter(self.text_encoder)] * 7, strict=True):
            x = x + o(q(x) + k(x) + v(x)) * 1e-3
            x = x + wo(wi(x) * wg(x)) * 1e-3
        return {"crossattn": x.float()}

    def image(self, processing, prompt, lora=None, strength=1.0):
        """Runs one image; returns seconds and moved bytes up to the end of the first step and for the whole image."""
        torch = self.torch
        # Like Forge, keep only the patchers of the running image; the same stack uses the same patcher.
        if self.stack_now != (lora, strength):
            self.stack_now = (lora, strength)
            self.current = self.base if lora is None else self.lora_stacks[lora](strength)
        data = {"lora": [] if lora is None else [Use(lora, strength)]}
        gc.collect()
        torch.cuda.synchronize()
        started, moved, encoded = time.perf_counter(), self.moved.bytes, self.encoded
        with torch.inference_mode():
            conds = processing.get_conds_with_caching(self.encode, [prompt], 20, [processing.cache], data)
            self.sampling.sampling_prepare(self.current, torch.empty(1, 16, 128, 128))
            prepared = self.moved.bytes
            self.model.diffusion_model(*self.inputs)
            torch.cuda.synchronize()
            first_step = time.perf_counter() - started
            in_step = self.moved.bytes - prepared
            self.sampling.sampling_cleanup(self.current)
            self.memory.load_models_gpu([self.vae_patcher], memory_required=self.decode_bytes)
            x = torch.randn(1, 16, 128, 128, device="cuda", dtype=torch.bfloat16)
            for number, layer in enumerate(self.vae):
                x = layer(x) if number % 5 else torch.nn.functional.interpolate(layer(x), scale_factor=1 + (number > 0))
            torch.cuda.synchronize()
        del conds
        return {
            "to_first_step_s": round(first_step, 3),
            "image_s": round(time.perf_counter() - started, 3),
            "moved_before_step_gb": round((prepared - moved) / forge_gpu.GB, 3),
            "moved_in_step_gb": round(in_step / forge_gpu.GB, 3),
            "encoded": self.encoded - encoded,
            "on_gpu_gb": round(self.on_gpu() / forge_gpu.GB, 3),
        }

    def on_gpu(self):
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.device.type == "cuda")

    def start(self, way):
        from lib_lora_guard.hosts.forge import takeover as forge

        self.unload()
        self.online, self.stack_now = way == "fp16 LoRA", None
        module = module_named_processing()
        if way == "guard":
            from backend.modules import k_model

            takeover = forge.install()
            modules = {"modules.processing": module, "modules.shared": self.shared, "backend.modules.k_model": k_model}
            takeover.web.install(takeover.hooks, modules)
            takeover.install_loaded(modules)
        return module.StableDiffusionProcessing()

    def stop(self):
        from lib_lora_guard.hosts.forge import takeover as forge

        self.current = self.base
        self.unload()
        forge.uninstall()

    def run_images(self, way):
        processing = self.start(way)
        events = [
            ("without LoRA", "a cat", None, 1.0),
            ("first LoRA", "a cat", "first", 1.0),
            ("same again", "a cat", "first", 1.0),
            ("strength", "a cat", "first", 0.8),
            ("another LoRA", "a cat", "second", 1.0),
            ("prompt", "a dog", "second", 1.0),
            ("prompt of before", "a cat", "second", 1.0),
            ("prompt and LoRA", "a fish", "first", 1.0),
        ]
        again = {"strength": ("a cat", "first", 0.6), "another LoRA": ("a cat", "first", 1.0)}
        again |= {"prompt": ("a bird", "second", 1.0), "prompt of before": ("a dog", "second", 1.0)}
        again |= {"prompt and LoRA": ("a horse", "second", 0.9)}
        result, before = [], None
        try:
            for name, *how in events:
                if before is not None:
                    # The last counted image may have had another stack than the one this event changes.
                    self.image(processing, *before)
                before = how
                timed = self.image(processing, *how)
                entry = {"event": name, **{k: v for k, v in timed.items() if not k.startswith("moved")}}
                if name in again or name == "same again":
                    # Counting takes time, so it has a separate image of the same kind.
                    with self.moved:
                        counted = self.image(processing, *again.get(name, how))
                    entry |= {k: v for k, v in counted.items() if k.startswith("moved")}
                result.append(entry)
                print(way, json.dumps(entry), flush=True)
        finally:
            self.stop()
        return result

    def run_alternating(self, way, images):
        """Counts every image as a whole; the first one, which loads everything, is listed separately."""
        processing, rows = self.start(way), []
        self.decode_bytes = 2178 * 128 * 128 * 64 * 2
        try:
            for number in range(images + 1):
                before, started = self.moved.bytes, time.perf_counter()
                lora = ("first", "second")[number // 2 % 2]
                with self.moved:
                    entry = self.image(processing, f"prompt {number}", lora, 1.0)
                moved = round((self.moved.bytes - before) / forge_gpu.GB, 3)
                seconds = round(time.perf_counter() - started, 2)
                rows.append({"lora": lora, "moved_gb": moved, "seconds": seconds, "on_gpu_gb": entry["on_gpu_gb"]})
                print(way, json.dumps(rows[-1]), flush=True)
        finally:
            self.stop()
        later = rows[1:]
        return {
            "images": len(later),
            "first_image": rows[0],
            "moved_gb": round(sum(row["moved_gb"] for row in later), 2),
            "seconds": round(sum(row["seconds"] for row in later), 1),
            "rows": later,
        }

    def run_changes(self, way, changes):
        processing = self.start(way)
        shares, seconds = [], []
        try:
            for number in range(changes + 1):
                lora, strength = ("first", "second")[number % 2], 1.0 - 0.01 * number
                self.current = self.lora_stacks[lora](strength)
                started = time.perf_counter()
                self.sampling.sampling_prepare(self.current, self.torch.empty(1, 16, 128, 128))
                self.torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
                self.sampling.sampling_cleanup(self.current)
                shares.append(self.on_gpu())
        finally:
            self.stop()
        del processing
        mb = 2**20
        return {
            "changes": changes,
            "on_gpu_first_mb": round(shares[0] / mb, 1),
            "on_gpu_last_mb": round(shares[-1] / mb, 1),
            "on_gpu_least_mb": round(min(shares) / mb, 1),
            "median_change_s": round(sorted(seconds[1:])[len(seconds) // 2], 3),
        }


def torch_device(torch):
    return torch.device("cuda:0")


def text_encoder_layers(blocks):
    return [
        shape for _ in range(blocks) for shape in [(4096, 4096)] * 4 + [(10240, 4096), (10240, 4096), (4096, 10240)]
    ]


def vae_layers():
    widths = [(16, 512)] + [(512, 512)] * 10 + [(512, 256)] + [(256, 256)] * 4 + [(256, 3)]
    return [(out, inner, 3, 3) for inner, out in widths]


class Moved:
    """Counts the bytes copied between RAM and the GPU while it is entered."""

    def __init__(self, torch):
        from torch.utils._python_dispatch import TorchDispatchMode

        self.bytes, counter = 0, self

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                # In inference mode `to` is dispatched as such, elsewhere as the copy it consists of.
                name = function._schema.name
                source = args[1] if name == "aten::copy_" else args[0] if args else None
                counts = name in ("aten::copy_", "aten::_to_copy", "aten::to")
                if counts and isinstance(source, torch.Tensor) and source.device.type != result.device.type:
                    counter.bytes += source.numel() * source.element_size()
                return result

        self._kind, self._mode = Counting, None

    def __enter__(self):
        self._mode = self._kind()
        self._mode.__enter__()

    def __exit__(self, *error):
        self._mode.__exit__(*error)


def main():
    options = arguments()
    ballast = subprocess.Popen(
        [sys.executable, "-c", forge_gpu.BALLAST, str(options.free_gb)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert "ready" in ballast.stdout.readline(), "the ballast process did not get its memory"
        forge_gpu.import_forge()
        import torch

        bench = Daily(options)
        header = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        header |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        header |= {"commit": os.environ.get("LORA_GUARD_COMMIT", "unknown")}
        for way in [w.strip() for w in options.ways.split(",")]:
            try:
                if options.alternate:
                    found = bench.run_alternating(way, options.alternate)
                elif options.changes:
                    found = bench.run_changes(way, options.changes)
                else:
                    found = bench.run_images(way)
            except torch.cuda.OutOfMemoryError as error:
                found = {"out_of_memory": str(error)[:200]}
            print(way, json.dumps(found) if options.changes or options.alternate else "done", flush=True)
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**header, "way": way, "result": found}) + "\n")
    finally:
        ballast.kill()


if __name__ == "__main__":
    main()
