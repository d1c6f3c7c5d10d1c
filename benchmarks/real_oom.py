"""Real out-of-memory situations on a GPU: a second process takes VRAM away until an operation fails.

    FORGE_ROOT=... python benchmarks/real_oom.py --out oom.jsonl [--seconds 300]

The operations are applying, changing, removing, unloading, moving and a step. Afterwards everything is compared with
its correct state. The model is a Flux of few blocks of the real width in Forge's own classes. It computes in fp32, so
that rounding cannot hide a wrong LoRA.

Each attempt makes a placement (all of the model on the card, or a part) and applies a stack. Then the ballast leaves
only some megabytes, and the operation and a step run. "layer" is a step in which all memory is taken away between a
layer's own product and its LoRA. Afterwards the memory is returned, and the stack is applied again and removed. Outputs
are compared with references made with enough memory, weights with the originals bit for bit.

An attempt ends in one of three ways; everything else is wrong:

- `image`: within LIMIT of its reference, relative to the LoRA's contribution;
- `words`: an error of ours, or an image reported to be without the LoRA;
- `host`: the host's own out-of-memory error, in a layer or a move without LoRAs.
"""

import argparse
import contextlib
import gc
import logging
import sys
import time
import traceback
from pathlib import Path

import gpu_rig
from ballast import Ballast
from gpu_rig import GB, MB, Denoiser

sys.path.insert(0, str(gpu_rig.HERE.parent / "tests"))

LIMIT = 1e-3
"""Relative to the LoRA's contribution to the model's output. Layers are held to 1e-4 (tests/support/measure.py); the
order of fp32 sums in consecutive layers adds to it. A strength that is 5 % wrong gives 5e-2.
"""

VARIANTS = (
    ("fp8", "Automatic"),
    ("nf4", "Automatic"),
    ("Q8_0", "Automatic"),
    ("bf16", "Automatic"),
    ("bf16", "Merge"),
    ("Q4_K", "Automatic"),
)
SMALL_VARIANTS = (("fp8", "Automatic"), ("nf4", "Automatic"), ("bf16", "Merge"), ("Q8_0", "Automatic"))
OPERATIONS = ("layer", "apply", "change", "restore", "move", "unload", "step")
BEFORE = dict.fromkeys(OPERATIONS, "first") | {"apply": "none"}
AFTER = dict.fromkeys(OPERATIONS, "first") | {"change": "other", "restore": "none"}
PLACES = ("whole", "swapped")
LEVELS_MB = {"layer": (32, 2, 0)}
OTHER_LEVELS_MB = (256, 64, 0)
"""Memory left to the process when the operation begins, or before a layer's LoRA."""
TARGETS = ("single_blocks.0.linear1", "double_blocks.0.img_mlp.0", "single_blocks.1.linear2")
COMFORT = 24 * GB


class Said(logging.Handler):
    """Collects the keys of the guard's log messages."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.keys = []

    def emit(self, record):
        from lib_lora_guard.messages import message_of

        self.keys.append(getattr(message_of(record), "key", ""))


@contextlib.contextmanager
def listening():
    said, log = Said(), logging.getLogger("lib_lora_guard")
    before = log.level
    log.addHandler(said)
    log.setLevel(logging.INFO)
    try:
        yield said
    finally:
        log.removeHandler(said)
        log.level = before


class Scene:
    """One storage in one mode, with the correct outputs by stack, the original weights, and another model that needs
    the card.
    """

    def __init__(self, torch, options, ballast, storage, mode):
        from backend.modules import k_model

        from lib_lora_guard.hosts.forge import takeover as forge
        from lib_lora_guard.settings import LoraMode

        self.torch, self.ballast, self.storage, self.mode = torch, ballast, storage, mode
        self.size_px = 64 if options.small else 512
        self.denoiser = Denoiser(torch, "Flux", storage, "small" if options.small else "part", torch.float32)
        self.stacks = {
            "none": {},
            "first": {"a": self.denoiser.lora(1, 16, 0.1), "b": self.denoiser.lora(2, 8, 0.1)},
            "other": {"c": self.denoiser.lora(3, 32, 0.1)},
        }
        self.inputs = self.denoiser.inputs(self.size_px)
        self.between = between(self.denoiser, 64 if options.small else 8192)
        self.takeover = forge.install()
        self.takeover.install_loaded({"backend.modules.k_model": k_model})
        self.references = {}
        for name in dict.fromkeys(("Automatic", mode)):
            self.takeover.settings.options = {"lora_guard_mode": LoraMode(name).value}
            for stack in self.stacks:
                self.load(stack)
                self.references.setdefault(stack, []).append(self.output().clone())
        self.load("none")
        # On the model's device, so that comparing is fast; the ballast leaves a number of free bytes, so their size
        # does not matter.
        self.originals = {
            key: p.data.to(self.denoiser.device, copy=True) for key, p in self.denoiser.kmodel.named_parameters()
        }
        away = self.distance(self.references["none"][0], "first")
        assert away > 0.5, f"the references do not show the LoRA ({away:.2g})"

    def load(self, stack):
        self.denoiser.prepare(self.denoiser.with_loras(self.stacks[stack]), self.size_px)

    def output(self):
        return self.denoiser.step(self.inputs)

    def distance(self, output, stack):
        """Returns the distance from the nearest of the stack's references, relative to a LoRA's contribution."""
        none, first = self.references["none"][0].double(), self.references["first"][0].double()
        contribution = (first - none).norm()
        found = output.double()
        return float(min((found - one.double()).norm() / contribution for one in self.references[stack]))

    def place(self, place, before):
        """Unloads the model, then loads it with room for all of it or for almost nothing."""
        self.ballast.leave(COMFORT)
        self.denoiser.unload()
        if place == "swapped":
            # 1 GB and the factors are kept free for a step, so some hundred MB of weights stay.
            self.ballast.leave(int(1.4 * GB))
        self.load(before)
        self.output()

    def act(self, operation, level_mb):
        """Runs the operation and one step, which is the image."""
        if operation == "layer":
            with emptied_before_the_lora(self.layer_for(level_mb), level_mb * MB):
                return self.output()
        if operation == "move":
            self.denoiser.memory.load_models_gpu([self.between])
        if operation == "unload":
            self.denoiser.unload()
        if operation != "step":
            self.load(AFTER[operation])
        return self.output()

    def layer_for(self, level_mb):
        return self.denoiser.kmodel.diffusion_model.get_submodule(TARGETS[LEVELS_MB["layer"].index(level_mb)])

    def recover(self, stack):
        """Applies the stack again with enough memory, then removes it. Returns wrong states and wrong values, in words."""
        from support.measure import same_bits

        wrong_states, wrong_values = [], []
        self.ballast.leave(COMFORT)
        try:
            for name in (stack, "none"):
                self.load(name)
                away = self.distance(self.output(), name)
                if not away <= LIMIT:  # NaN is wrong too
                    wrong_values.append(f"output of {name!r} afterwards: {away:.2g}")
            for key, parameter in self.denoiser.kmodel.named_parameters():
                here = parameter.data.to(self.denoiser.device)
                if not same_bits(here, self.originals[key]):
                    wrong_values.append(f"{key} did not come back")
        except Exception as error:
            traceback.print_exc()
            wrong_states.append(f"no image even with memory: {type(error).__name__}: {error}"[:300])
        for name, layer in self.denoiser.kmodel.named_modules():
            if layer._forward_hooks or layer._forward_pre_hooks or getattr(layer, "forge_online_loras", None):
                wrong_states.append(f"something is left on {name}")
        return wrong_states, wrong_values

    def attempt(self, operation, place, level_mb):
        """Returns the row of one attempt."""
        row = {"storage": self.storage, "mode": self.mode, "operation": operation, "place": place, "left_mb": level_mb}
        started = time.perf_counter()
        with listening() as said:
            try:
                self.place(place, BEFORE[operation])
            except Exception as error:
                traceback.print_exc()
                why = f"not set up: {type(error).__name__}: {error}"[:300]
                found = {"end": "wrong", "on_the_cpu": 0, "wrong_states": [why], "wrong_values": []}
                return row | found | {"seconds": round(time.perf_counter() - started, 2)}
            if operation == "layer" and place == "swapped":
                # Then its factors have to be copied too.
                self.takeover.stacks.drop_device_copies(self.denoiser.current.lora_loader)
            said.keys.clear()
            row["free_mb"] = gpu_rig.mb(self.ballast.leave(2 * GB if operation == "layer" else level_mb * MB))
            row |= self.judged(operation, level_mb, said)
            row["on_the_cpu"] = said.keys.count("memory.on_the_cpu")
            row["said"] = sorted(set(said.keys) - {""})[:8]
        states, values = self.recover(AFTER[operation])
        row["wrong_states"] = [*row.get("wrong_states", []), *states][:5]
        row["wrong_values"] = [*row.get("wrong_values", []), *values][:5]
        return row | {"seconds": round(time.perf_counter() - started, 2)}

    def judged(self, operation, level_mb, said):
        from lib_lora_guard.errors import LoraGuardError
        from lib_lora_guard.memory.out_of_memory import is_out_of_memory

        try:
            output = self.act(operation, level_mb)
            away = self.distance(output, AFTER[operation])
        except LoraGuardError as error:
            said = {"end": "words", "error": f"{type(error).__name__}: {error}"[:300]}
            return said | ({"because": because(error.__cause__)} if error.__cause__ is not None else {})
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if not is_out_of_memory(error):
                traceback.print_exc()
                return {"end": "wrong", "error": why, "wrong_states": [f"an error of another kind: {why}"]}
            if in_guards_layers(error):
                return {"end": "wrong", "error": why, "wrong_states": ["out of memory in a LoRA, without words"]}
            return {"end": "host", "error": why, "where": where(error)}
        if away <= LIMIT:
            return {"end": "image", "distance": away}
        if "host.without" in said.keys and self.distance(output, "none") <= LIMIT:
            return {"end": "words", "error": "made without the LoRA, and said so"}
        return {"end": "wrong", "distance": away, "wrong_values": [f"image: {away:.2g} off"]}

    def close(self):
        from lib_lora_guard.hosts.forge import takeover as forge

        self.ballast.leave(COMFORT)
        self.denoiser.unload()
        self.denoiser.current = self.denoiser.patcher
        forge.uninstall()


def between(denoiser, width):
    """Returns a model of four square layers that needs the card between two images; 0.5 GB at a width of 8192."""
    from backend.patcher.base import ModelPatcher

    torch = denoiser.torch
    with denoiser.operations.using_forge_operations(device=denoiser.memory.cpu, dtype=torch.float16):
        layers = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(4))
    for layer in layers:
        del layer.dummy
        layer.weight = torch.nn.Parameter(torch.zeros(width, width, dtype=torch.float16), requires_grad=False)
    layers.storage_dtype = layers.computation_dtype = torch.float16
    return ModelPatcher(layers, load_device=denoiser.device, offload_device=denoiser.memory.cpu)


def in_guards_layers(error):
    """True if memory ran out in the guard's own part of a layer or of a change, which must raise one of our errors."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).parent.name in ("patching", "adapters")


def where(error):
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}: {frames[-1].name}" if frames else "?"


def because(error):
    """Describes the cause of one of our errors, with its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    way = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-6:])
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200]} ({way})"


@contextlib.contextmanager
def emptied_before_the_lora(layer, left_bytes):
    """Takes all memory except `left_bytes` right after the layer's own product, and returns it after the layer."""
    import torch

    hog = []

    def take(*_):
        if torch.cuda.is_available():
            spared = torch.empty(left_bytes, dtype=torch.uint8, device="cuda")
            for size in (256 * MB, 32 * MB, 2 * MB, MB // 2, MB // 32, 512):
                with contextlib.suppress(torch.cuda.OutOfMemoryError):
                    while True:
                        hog.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            del spared

    def give_back(*_):
        hog.clear()

    handles = [
        layer.register_forward_hook(take, prepend=True),
        layer.register_forward_hook(give_back, always_call=True),
    ]
    try:
        yield
    finally:
        hog.clear()
        for handle in handles:
            handle.remove()


def plan_of(mode):
    """Returns `(operation, place, level)` of one variant, those with most memory first. A merged layer adds nothing in
    its call.
    """
    operations = [operation for operation in OPERATIONS if operation != "layer" or mode != "Merge"]
    return [
        (operation, place, LEVELS_MB.get(operation, OTHER_LEVELS_MB)[depth])
        for depth in range(len(OTHER_LEVELS_MB))
        for place in PLACES
        for operation in operations
    ]


def sweep(scene, options, header, ends_at):
    """Runs all operations and placements of one variant, with less and less memory."""
    rows = []
    plan = [one for one in plan_of(scene.mode) if not options.small or one[1:] in (("whole", 0), ("swapped", 0))]
    for operation, place, level in plan:
        longest = max((row["seconds"] for row in rows), default=10.0)
        if time.perf_counter() + longest > ends_at:
            print(f"{len(plan) - len(rows)} attempts left out for want of time", flush=True)
            break
        rows.append(scene.attempt(operation, place, level))
        gpu_rig.write_line(options.out, header | rows[-1])
    return rows


def summary(rows):
    """Counts the attempts by their end."""
    ends = [row["end"] for row in rows]
    return {
        "attempts": len(rows),
        "images": ends.count("image"),
        "on_the_cpu": sum(row["on_the_cpu"] > 0 for row in rows),
        "words": ends.count("words"),
        "host": ends.count("host"),
        "wrong_states": sum(bool(row["wrong_states"]) for row in rows),
        "wrong_values": sum(bool(row["wrong_values"]) for row in rows),
    }


def run_attempts(options):
    torch = gpu_rig.import_forge()
    header = gpu_rig.header(torch)
    wanted = [part.strip() for part in options.storages.split(",") if part.strip()]
    variants = [v for v in (SMALL_VARIANTS if options.small else VARIANTS) if not wanted or v[0] in wanted]
    every, started = [], time.perf_counter()
    with Ballast(torch) as ballast:
        gpu_rig.warm_up(torch)
        for number, (storage, mode) in enumerate(variants):
            # Time that one variant does not use goes to the next ones.
            now = time.perf_counter()
            share = (options.seconds - (now - started)) / (len(variants) - number)
            ballast.leave(COMFORT)
            scene = Scene(torch, options, ballast, storage, mode)
            # Objects from before an attempt need not be traversed after it.
            gc.collect()
            gc.freeze()
            try:
                rows = sweep(scene, options, header, now + share)
            finally:
                gc.unfreeze()
                scene.close()
            every += rows
            gpu_rig.write_line(options.out, header | {"summary": f"{storage}, {mode}", **summary(rows)})
            del scene
    total = header | {"summary": "all", **summary(every)}
    gpu_rig.write_line(options.out, total)
    return bool(total["wrong_states"] or total["wrong_values"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--storages", default="", help="separated by commas; default: all")
    parser.add_argument("--seconds", type=float, default=300.0, help="no attempt is begun that may end after this")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script itself")
    options = parser.parse_args()
    return run_attempts(options)


if __name__ == "__main__":
    sys.exit(main())
