"""LoRA on a Flux-sized model inside Forge's own backend, on a GPU with little free memory: the guard against stock
Forge.

    FORGE_ROOT=... python benchmarks/forge_gpu.py --storage fp8 --free-gb 12 --out results.jsonl

FORGE_ROOT needs only Forge's backend/, modules_forge/ and packages_3rdparty/. A second process holds all VRAM except
`--free-gb`. The model has Flux-dev's shapes with random weights (lib_lora_guard.demo.model on Forge's layers). The LoRA
changes all matrices of the blocks; its delta has 2 % of the weights' rms. One process runs every way in turn, each from
the unpatched model. The ways are `guard`, `fp16 LoRA` (Forge's on-the-fly merge) and `automatic` (Forge's merge, last
because it leaves its backups).

Printed and written per way:

- seconds to apply, to change the strength, to remove;
- seconds per step without and with the LoRA;
- VRAM and RAM peaks;
- the share of the LoRA that the layers' outputs show (1 = all of it) and its relative error against float64;
- the whole model's output against that of fp16 LoRA;
- whether all weights were restored.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
GB = 1024**3
WAYS = ("fp16 LoRA", "guard", "guard, merged", "automatic")
BALLAST = """
import sys, time, torch
leave = float(sys.argv[1])
free = torch.cuda.mem_get_info()[0]
held = torch.empty(int(free - (leave + 0.5) * 1024**3), dtype=torch.uint8, device="cuda")  # 0.5: the tester's own context
print("ready", flush=True)
time.sleep(3600)
"""


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", choices=["bf16", "fp8", "nf4", "Q8_0"], default="fp8")
    parser.add_argument("--free-gb", type=float, default=12.0)
    parser.add_argument("--swap", choices=["queue", "async", "async-shared"], default="queue")
    parser.add_argument(
        "--ways", default="guard,fp16 LoRA,automatic", help=f"of {'; '.join(WAYS)}; a semicolon separates them too"
    )
    parser.add_argument("--kind", choices=["lora", "loha", "lokr", "dora"], default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--loras", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a tenth of the blocks, to try the script itself")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


class RssPeak(threading.Thread):
    """Samples the peak of this process's RSS."""

    def __init__(self):
        super().__init__(daemon=True)
        import psutil

        self.process, self.peak, self.round, self.lock = psutil.Process(), 0, 0, threading.Lock()
        self.start()

    def restart(self):
        with self.lock:
            self.peak, self.round = 0, self.round + 1

    def run(self):
        while True:
            of_round, now = self.round, self.process.memory_info().rss
            with self.lock:
                if of_round == self.round:
                    # Otherwise it was read before the restart, when more may have been in use.
                    self.peak = max(self.peak, now)
            time.sleep(0.02)


def import_forge():
    """Imports Forge's backend without the packages that only its samplers need."""
    root = os.environ["FORGE_ROOT"]
    sys.path[:0] = [str(HERE.parent), root, str(Path(root) / "packages_3rdparty")]
    sys.argv = [sys.argv[0]]
    for name in (
        "diffusers",
        "diffusers.pipelines",
        "diffusers.pipelines.flux",
        "diffusers.pipelines.flux.pipeline_flux",
    ):
        stub = types.ModuleType(name)
        stub.FlowMatchEulerDiscreteScheduler, stub.calculate_shift = object, None
        sys.modules.setdefault(name, stub)


class Bench:
    """One model in Forge and the measurements on it."""

    def __init__(self, options):
        import torch
        from backend import memory_management, operations, stream
        from backend.modules.k_model import KModel
        from backend.patcher.unet import UnetPatcher
        from backend.sampling import sampling_function

        from lib_lora_guard.demo import model as shapes

        self.torch, self.memory, self.operations, self.sampling = (
            torch,
            memory_management,
            operations,
            sampling_function,
        )
        self.options, self.shapes = options, shapes
        torch.set_grad_enabled(False)
        memory_management.current_inference_memory = 1024 * 1024 * 1024
        stream.stream_activated = options.swap.startswith("async")
        memory_management.PIN_SHARED_MEMORY = options.swap == "async-shared"
        self.rss = RssPeak()
        self.shape = shapes.FluxShape(3072, 24, 2, 4, 4096, 768, 64) if options.small else shapes.FLUX_DEV
        inner = self.build()
        inner.storage_dtype = {"nf4": "nf4", "Q8_0": "gguf", "bf16": torch.bfloat16}.get(
            options.storage, torch.float8_e4m3fn
        )
        inner.computation_dtype = torch.bfloat16
        predictor = types.SimpleNamespace(percent_to_sigma=lambda x: x)
        self.model = KModel(model=inner, diffusers_scheduler=None, k_predictor=predictor, config=None).requires_grad_(
            False
        )
        cpu = memory_management.cpu
        self.base = UnetPatcher(self.model, load_device=torch.device("cuda:0"), offload_device=cpu, current_device=cpu)
        self.layers = {f"diffusion_model.{n}": s for n, s in self.layer_shapes.items()}
        names = list(self.layers)
        self.probed = names[:: max(1, len(names) // 10)]
        self.inputs = shapes.random_inputs(self.shape, 4096, 512, torch.bfloat16, "cuda")
        self.loras = [self.lora(100 + i) for i in range(options.loras)]
        self.lora_bytes = sum(
            t.numel() * t.element_size()
            for lora in self.loras
            for v in lora.values()
            for t in v[1]
            if hasattr(t, "numel")
        )

    def build(self):
        torch, storage = self.torch, self.options.storage
        with torch.device("meta"):
            plain = self.shapes.FluxShaped(self.shape)
        self.layer_shapes = self.shapes.lora_layers(plain)
        sizes = {k: tuple(v.shape) for k, v in plain.state_dict().items()}
        dtype = torch.float8_e4m3fn if storage == "fp8" else torch.bfloat16
        family = {"nf4": "nf4", "Q8_0": "gguf"}.get(storage)
        with self.operations.using_forge_operations(
            device=self.memory.cpu, dtype=dtype, manual_cast_enabled=storage == "fp8", bnb_dtype=family
        ):
            model = self.shapes.FluxShaped(self.shape)
        generator = torch.Generator("cuda").manual_seed(0)
        state = {}
        for key, size in sizes.items():
            weight = torch.randn(size, generator=generator, device="cuda") * 0.02
            if key.endswith("scale"):
                state[key] = torch.ones(size, dtype=torch.bfloat16)
            elif key.endswith("bias") or len(size) == 1:
                state[key] = self.gguf(weight.cpu(), "F32") if storage == "Q8_0" else weight.to(torch.bfloat16).cpu()
            elif storage == "Q8_0":
                state[key] = self.gguf(weight, "Q8_0")
            else:
                state[key] = weight.to(dtype).cpu()
        torch.cuda.empty_cache()
        model.load_state_dict(state, strict=True)
        for name, parameter in list(model.named_parameters()):
            if name.endswith("scale"):
                parameter.data = parameter.data.to(torch.bfloat16)
        if storage == "nf4":
            for layer in model.modules():
                if hasattr(layer, "reload_weight"):
                    layer.weight = layer.weight.to("cuda").to("cpu")
        return model

    def gguf(self, weight, kind):
        import gguf
        from backend.operations_gguf import ParameterGGUF

        from lib_lora_guard.weights import Q8_0Codec

        data = Q8_0Codec().encode(weight)["data"].cpu() if kind == "Q8_0" else weight.float().cpu()
        tensor = types.SimpleNamespace(
            tensor_type=gguf.GGMLQuantizationType[kind], shape=tuple(reversed(weight.shape)), data=data.numpy()
        )
        return ParameterGGUF(tensor)

    def lora(self, seed):
        torch, rank = self.torch, self.options.rank
        generator = torch.Generator("cuda").manual_seed(seed)
        size = (0.02 * 0.02 / rank**0.5) ** 0.5  # delta rms = 2 % of the weights' rms

        def normal(*shape, scale=size):
            return (torch.randn(shape, generator=generator, device="cuda") * scale).to(torch.bfloat16).cpu()

        patches = {}
        for name, (out, inner) in self.layers.items():
            if self.options.kind == "lora":
                patches[name + ".weight"] = (
                    "lora",
                    (normal(out, rank), normal(rank, inner), float(rank) / 2, None, None),
                )
            elif self.options.kind == "dora":
                # Near the norms of the random weights (0.02 per value), as at the start of a training.
                size_of_rows = normal(out, 1, scale=0.02).float().add_(1).mul_(0.02 * inner**0.5)
                patches[name + ".weight"] = (
                    "lora",
                    (normal(out, rank), normal(rank, inner), float(rank) / 2, None, size_of_rows),
                )
            elif self.options.kind == "lokr":
                sides = normal(8, 8, scale=0.02), normal(out // 8, inner // 8, scale=0.02)
                patches[name + ".weight"] = "lokr", (*sides, 1.0, None, None, None, None, None, None)
            else:
                s = (0.0004 / rank) ** 0.25
                factors = [
                    normal(out, rank, scale=s),
                    normal(rank, inner, scale=s),
                    normal(out, rank, scale=s),
                    normal(rank, inner, scale=s),
                ]
                patches[name + ".weight"] = (
                    "loha",
                    (factors[0], factors[1], float(rank) / 2, factors[2], factors[3], None, None, None),
                )
        return patches

    def patcher(self, strength, online):
        patcher = self.base
        for i, lora in enumerate(self.loras):
            patcher = patcher.clone()
            patcher.add_patches(filename=f"lora{i}", patches=lora, strength_patch=strength, online_mode=online)
        return patcher

    def phase(self, patcher, forward=True, after=None):
        """Loads as a sampler does and runs some steps; returns the numbers of this phase alone."""
        torch = self.torch
        self.current = patcher  # as Forge's sd_model does: a patcher without references is unloaded without being moved
        gc.collect()
        rss_before = self.rss.process.memory_info().rss
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.rss.restart()
        started = time.perf_counter()
        self.sampling.sampling_prepare(patcher, torch.empty(1, 16, 128, 128))
        torch.cuda.synchronize()
        result = {"seconds": round(time.perf_counter() - started, 3)}
        steps, output = [], None
        with torch.inference_mode():
            for _ in range(self.options.steps if forward else 0):
                started = time.perf_counter()
                output = self.model.diffusion_model(*self.inputs)
                torch.cuda.synchronize()
                steps.append(round(time.perf_counter() - started, 3))
            answers = after() if after else None
        self.sampling.sampling_cleanup(patcher)
        on_gpu = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.device.type == "cuda")
        result |= {
            "step": min(steps) if steps else None,
            "steps": steps,
            "vram_peak_gb": round(torch.cuda.max_memory_allocated() / GB, 2),
            "rss_peak_gb": round(self.rss.peak / GB, 2),
            "rss_growth_gb": round(max(0, self.rss.peak - rss_before) / GB, 2),
            "weights_on_gpu_gb": round(on_gpu / GB, 3),
        }
        output = None if output is None else output.float().cpu()
        return (result, output, answers) if after else (result, output)

    def unload(self):
        self.memory.unload_all_models()
        gc.collect()
        self.memory.soft_empty_cache()

    def probe(self):
        """Returns the probed layers' outputs for fixed inputs, in bf16 as in an image."""
        torch, answers = self.torch, {}
        for index, name in enumerate(self.probed):
            x = torch.randn(
                1, 512, self.layers[name][1], generator=torch.Generator("cuda").manual_seed(index), device="cuda"
            ).to(torch.bfloat16)
            answers[name] = self.model.get_submodule(name)(x).double().cpu()
        return answers

    def share(self, without, with_lora, strength):
        """Returns the share and the relative error of the LoRA in the layers' outputs, against float64."""
        torch, shares, errors = self.torch, [], []
        for index, name in enumerate(self.probed):
            x = (
                torch.randn(
                    1, 512, self.layers[name][1], generator=torch.Generator("cuda").manual_seed(index), device="cuda"
                )
                .to(torch.bfloat16)
                .double()
            )
            true = sum(strength * self.contribution(name, lora[name + ".weight"], x) for lora in self.loras)
            found = with_lora[name] - without[name]
            shares.append(float((found * true).sum() / (true * true).sum()))
            errors.append(float((found - true).norm() / true.norm()))
        return round(sum(shares) / len(shares), 4), round(sum(errors) / len(errors), 4)

    def contribution(self, name, value, x):
        """Returns `x @ delta^T` in float64, without forming the delta if its factors suffice."""
        kind, content = value
        if kind == "lora" and content[4] is not None:
            # DoRA as Forge defines it: the norm is that of the weight without the LoRA. Plain storages only.
            weight = self.model.get_submodule(name).weight.data.cuda().double()
            up, down, alpha = content[0].cuda().double(), content[1].cuda().double(), content[2]
            patched = (weight + up @ down * (alpha / down.shape[0])) * (
                content[4].cuda() / weight.norm(dim=1, keepdim=True)
            )
            return (x @ (patched - weight).T).cpu()
        if kind == "lokr":
            return (x @ self.torch.kron(content[0].cuda().double(), content[1].cuda().double()).T).cpu()
        if kind == "lora":
            up, down, alpha = content[0].cuda().double(), content[1].cuda().double(), content[2]
            return (x @ down.T @ up.T * (alpha / down.shape[0])).cpu()
        a, b, alpha, c, d = (t.double() if hasattr(t, "double") else t for t in content[:5])
        return x.cpu() @ ((a @ b) * (c @ d)).T * (alpha / b.shape[0])

    def fingerprint(self):
        """Returns one number per weight: the sum of its stored bytes, weighted by their position modulo a prime."""
        torch, result = self.torch, {}
        for name, parameter in self.model.named_parameters():
            data = parameter.data.contiguous().view(-1).view(torch.uint8)
            total = 0
            for start in range(0, data.numel(), 1 << 23):
                chunk = data[start : start + (1 << 23)].to("cuda").long()
                place = torch.arange(start, start + chunk.numel(), device="cuda") % 65521 + 1
                total += int((chunk * place).sum())
            result[name] = total
        return result

    def run_way(self, way, before, prints, base_probe, online_output):
        torch = self.torch
        from lib_lora_guard.hosts.forge import takeover as forge

        online = way == "fp16 LoRA"
        # Stock Forge moves a little more of the model to the CPU at every change, so each way starts from a fresh
        # placement.
        self.unload()
        on_gpu_without = torch.cuda.memory_allocated()
        fresh, _ = self.phase(self.base)
        if way.startswith("guard"):
            takeover = forge.install()
            if way == "guard, merged":
                from lib_lora_guard.settings import LoraMode

                takeover.settings.options = {"lora_guard_mode": LoraMode.MERGE.value}
        try:
            applied, output, with_lora = self.phase(self.patcher(1.0, online), after=self.probe)
            changed, _, with_changed = self.phase(self.patcher(0.8, online), after=self.probe)
            result = {"way": way, "without": fresh, "apply": applied, "change": changed}
            result["share"], result["error"] = self.share(base_probe, with_lora, 1.0)
            result["share_at_0.8"], _ = self.share(base_probe, with_changed, 0.8)
            if way.startswith("guard"):
                self.unload()
                result["rss_gb_unloaded"] = round(self.rss.process.memory_info().rss / GB, 2)
                left = torch.cuda.memory_allocated() - on_gpu_without
                result["mb_left_on_gpu_after_unload"] = round(left / 2**20, 1)
                reloaded, again = self.phase(self.patcher(1.0, online))
                result["reload"] = reloaded
                result["same_output_after_reload"] = bool(torch.equal(output, again))
            removed, gone = self.phase(self.base)
            result["remove"] = removed
            result["output_back"] = bool(torch.equal(gone, before))
            result["changed_weights_after_removal"] = sum(v != prints[k] for k, v in self.fingerprint().items())
            contribution = (online_output if online_output is not None else output) - before
            result["output_vs_fp16_lora"] = round(
                float((output - before - contribution).norm() / contribution.norm()), 4
            )
            result["contribution"] = round(float(contribution.norm() / before.norm()), 4)
        finally:
            if way.startswith("guard"):
                forge.uninstall()
        return result, output


def main():
    options = arguments()
    ballast = subprocess.Popen([sys.executable, "-c", BALLAST, str(options.free_gb)], stdout=subprocess.PIPE, text=True)
    try:
        assert "ready" in ballast.stdout.readline(), "the ballast process did not get its memory"
        import_forge()
        import torch

        bench = Bench(options)
        header = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        commit = os.environ.get("LORA_GUARD_COMMIT", "unknown")
        header |= {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": commit,
            "lora_mb": round(bench.lora_bytes / 2**20, 1),
        }
        base, before, base_probe = bench.phase(bench.base, after=bench.probe)
        prints = bench.fingerprint()
        results = {**header, "base": base, "ways": []}
        online_output = None
        ways = [w.strip() for w in options.ways.split(";" if ";" in options.ways else ",")]
        # fp16 LoRA first: the others are compared with its output.
        for way in sorted(ways, key=WAYS.index):
            try:
                result, output = bench.run_way(way, before, prints, base_probe, online_output)
            except torch.cuda.OutOfMemoryError as error:
                # Stock Forge runs out of memory at tight settings; later ways would not be comparable.
                results["ways"].append({"way": way, "out_of_memory": str(error)[:200]})
                break
            if way == "fp16 LoRA":
                online_output = output
            results["ways"].append(result)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(results) + "\n")
    finally:
        ballast.kill()


if __name__ == "__main__":
    main()
