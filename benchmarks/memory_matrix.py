"""The guard's prediction of an image's VRAM against the measured VRAM: one factor varied at a time.

    FORGE_ROOT=... python benchmarks/memory_matrix.py --out matrix.jsonl [--done earlier.jsonl] [--seconds 410]

About 40 cases, in one call of seven minutes; each row is on the disk before the next case begins (`--list`): Flux, SDXL and SD 1.5 in Forge's own classes with random weights, with the guard installed. A
ballast process leaves the stated VRAM. Torch's statistics give the peak of one load, apply and a few steps.

Predicted before the load, in MB:

- `weights_mb`: the weights on the card by Forge's placement with the guard's number (`forge_memory.Needs`);
- `promised_mb`: these, and a step's activations, the largest layer's cast, the factors and the modes' workspace, by the
  functions that the running guard plans with;
- `kept_free_mb`: what the guard keeps free beside the weights, for what torch takes from the card;
- `plan_mb`: the prediction of `lora-guard plan` (`planning.predict`), which places by parameters instead of layers.

Measured: `allocated_mb`, which promise and plan must match (5 %, at most 128 MB below), and `reserved_mb`, which the
card sees. `--small` tests the script itself, on the CPU too, without measurements.
"""

import argparse
import time
import traceback
from pathlib import Path

import gpu_rig
from ballast import Ballast
from gpu_rig import GB, Denoiser, mb
from memory_cases import CASES, SMALL_CASES, as_row, fits_in, scored, still_to_do

STEPS = 2


class Matrix:
    """Runs the cases."""

    def __init__(self, torch, options, ballast):
        from backend.modules import k_model

        from lib_lora_guard.hosts.forge import takeover as forge

        self.torch, self.options, self.ballast = torch, options, ballast
        self.k_model, self.forge = k_model, forge
        self.header = gpu_rig.header(torch)
        self.denoiser = self.built_as = None
        gpu_rig.warm_up(torch)

    def build(self, case):
        """Builds the case's model, unless the last case used the same."""
        if self.built_as == case.built_as:
            return
        self.denoiser = self.built_as = None
        self.ballast.leave(32 * GB)
        self.denoiser = Denoiser(self.torch, case.model, case.storage, "small" if self.options.small else "full")
        self.built_as = case.built_as
        self.stored = stored_parameters(self.denoiser)

    def run(self, case):
        """Returns the row of one case."""
        torch, denoiser = self.torch, self.denoiser
        from lib_lora_guard.settings import LoraMode

        loras = {f"lora{n}": denoiser.lora(100 + n, case.rank) for n in range(case.loras)}
        inputs = denoiser.inputs(case.size_px)
        denoiser.unload()
        free = self.ballast.leave(case.cap_gb * GB)
        takeover = self.forge.install()
        takeover.settings.options = {"lora_guard_mode": LoraMode(case.mode).value}
        takeover.install_loaded({"backend.modules.k_model": self.k_model})
        row = self.header | as_row(case) | {"predicted": None, "measured": None}
        try:
            patcher = denoiser.with_loras(loras)
            prediction = Prediction(denoiser, takeover, patcher, case, self.stored)
            row["predicted"] = predicted = prediction.numbers(free)
            measured = self.measure(patcher, inputs, takeover, case)
            row |= {"measured": measured | {"free_before_mb": mb(free)}}
            row |= scored(predicted, row["measured"])
            row["ok"] = row["promised"]["ok"]
        except torch.cuda.OutOfMemoryError as error:
            row |= {"ok": False, "out_of_memory": str(error)[:300]}
        except Exception as error:
            # Go on with the other cases; the model is built anew, since this case may have damaged it.
            row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
            traceback.print_exc()
            self.built_as = None
        finally:
            denoiser.unload()
            patcher = None
            denoiser.current = denoiser.patcher
            self.forge.uninstall()
        return row

    def measure(self, patcher, inputs, takeover, case):
        torch, denoiser = self.torch, self.denoiser
        card = Card(torch)

        def retries():
            # Number of times that torch had to free cached memory before an allocation succeeded.
            return torch.cuda.memory_stats().get("num_alloc_retries", 0) if card.has_card else 0

        retried = retries()
        started = time.perf_counter()
        denoiser.prepare(patcher, case.size_px)
        card.settle()
        loaded_s = time.perf_counter() - started
        loaded = card.peak()
        on_card, swapped = denoiser.bytes_on_card(), denoiser.bytes_outside()
        if denoiser.device.type == "cpu":
            on_card = swapped = 0
        steps, output = [], None
        for _ in range(STEPS):
            output = None
            started = time.perf_counter()
            output = denoiser.step(inputs)
            card.settle()
            steps.append(round(time.perf_counter() - started, 3))
        allocated, reserved = card.peak()
        factors = takeover.stacks.resident_bytes(patcher.lora_loader)
        report = takeover.stacks.report(patcher.lora_loader)
        denoiser.sampling.sampling_cleanup(patcher)
        return {
            "allocated_mb": mb(allocated),
            "reserved_mb": mb(reserved),
            "load_allocated_mb": mb(loaded[0]),
            "load_reserved_mb": mb(loaded[1]),
            "weights_mb": mb(on_card),
            "swapped_mb": mb(swapped),
            "factors_mb": mb(factors),
            "retries": retries() - retried,
            "load_s": round(loaded_s, 2),
            "steps_s": steps,
            "loras_applied": 0 if report is None else sum(lora.refused is None for lora in report.loras),
            "output_finite": gpu_rig.finite(torch, output),
        }


class Card:
    """Peaks since its creation, relative to the memory in use then."""

    def __init__(self, torch):
        self.torch, self.has_card = torch, torch.cuda.is_available()
        self.before = (0, 0)
        if self.has_card:
            self.settle()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def settle(self):
        if self.has_card:
            self.torch.cuda.synchronize()

    def peak(self):
        """Returns `(allocated, reserved)`; zeros without a card."""
        if not self.has_card:
            return 0, 0
        found = self.torch.cuda.max_memory_allocated(), self.torch.cuda.max_memory_reserved()
        return tuple(now - then for now, then in zip(found, self.before, strict=True))


def stored_parameters(denoiser):
    """Returns the model as its file would show it to `lora-guard plan`, before Forge bakes anything."""
    from lib_lora_guard.checkpoints.model_header import DENOISER, Parameter
    from lib_lora_guard.weights import storage_of

    found = {}
    for name, parameter in denoiser.kmodel.named_parameters():
        stored = storage_of(parameter)
        size = gpu_rig.bytes_of(parameter)
        found[name] = Parameter(name, stored.shape, stored.format, size, stored.wide, DENOISER)
    return found


def facts_of(stored, case, compute_bytes):
    """Returns `(tokens, facts of the model)` as `lora-guard plan` has them for a file with these parameters."""
    from lib_lora_guard.checkpoints.model_header import Checkpoint
    from lib_lora_guard.commands.plan import model_facts
    from lib_lora_guard.models.architecture import detect_model
    from lib_lora_guard.planning.tokens import Picture, tokens_for

    architecture = detect_model({name: parameter.shape for name, parameter in stored.items()})
    assert architecture is not None, "the guard does not know this model"
    assert architecture.value == case.model, f"the guard takes this model for {architecture.value}"
    picture = Picture(case.size_px, case.size_px)
    tokens = tokens_for(architecture, picture)
    checkpoint = Checkpoint(None, stored, architecture, scales={})
    return tokens, model_facts(checkpoint, tokens, picture, compute_bytes)


class Prediction:
    """The predictions before the model is loaded."""

    def __init__(self, denoiser, takeover, patcher, case, stored):
        self.denoiser, self.takeover, self.patcher, self.case = denoiser, takeover, patcher, case
        self.stored, self.compute_bytes = stored, denoiser.compute.itemsize
        self.tokens, self.facts = facts_of(stored, case, self.compute_bytes)

    def numbers(self, free_bytes):
        from lib_lora_guard.planning.predict import predict
        from lib_lora_guard.planning.rates import RATES

        patches = self.patches()
        plan = predict(self.facts, patches, free_bytes, 1 << 40, RATES["H200"])[0]
        needs = self.needs()
        placed, swapped = self.placed(needs)
        facts = self.facts
        is_cast = swapped > 0 or not facts.wide
        cast = max(weight.values for weight in facts.weights) * facts.compute_bytes if is_cast else 0
        workspace = max((patch.guard.workspace_bytes for patch in patches), default=0)
        return {
            "promised_mb": mb(placed + facts.activation_bytes + cast + plan.factor_bytes + workspace),
            "plan_mb": mb(plan.vram_peak_bytes),
            "weights_mb": mb(placed),
            "plan_weights_mb": mb(plan.weights_on_gpu_bytes),
            "swapped_mb": mb(swapped),
            "kept_free_mb": mb(needs.free_bytes),
            "step_uses_mb": mb(facts.activation_bytes),
            "step_holds_mb": mb(facts.held_bytes),
            "estimate_mb": mb(needs.estimate_bytes),
            "cast_mb": mb(cast),
            "factors_mb": mb(plan.factor_bytes),
            "workspace_mb": mb(workspace),
        }

    def needs(self):
        """Returns the needs, as the takeover of `load_models_gpu` will compute them."""
        from lib_lora_guard.runtime.needs import Needs

        rows, *rest = self.denoiser.latent(self.case.size_px).shape
        # Forge's sampling_prepare passes two rows per image.
        estimate = self.patcher.memory_required([2 * rows, *rest])
        factors = self.takeover.loras.factor_bytes(self.patcher)
        if self.denoiser.device.type == "cpu":
            return Needs(self.denoiser.memory.minimum_inference_memory(), int(estimate), int(factors))
        return self.takeover.reservations.needs([self.patcher], self.denoiser.device, estimate, factors)

    def placed(self, needs):
        """Returns `(bytes on the card, swapped bytes)` by Forge's own functions with the guard's numbers."""
        memory, device, model = self.denoiser.memory, self.denoiser.device, self.patcher.model
        free, size = memory.get_free_memory(device), memory.module_size(model)
        if free - size - needs.free_bytes >= 0:
            return size, 0
        with self.takeover.eviction.planned(swapping_bytes=self.takeover.memory.swapping_bytes(model)):
            budget = memory.compute_model_gpu_memory_when_using_cpu_swap(free, needs.free_bytes)
        whole, extras, _ = memory.build_module_profile(model, budget)
        placed = sum(layer.total_mem for layer in whole) + sum(layer.extra_mem for layer in extras)
        return placed, size - placed

    def patches(self):
        """Returns the costs of the stack on each weight, by the guard's rules."""
        from lib_lora_guard.adapters import LoraAdapter, Term
        from lib_lora_guard.planning.costs import bypass_cost, on_the_fly_cost
        from lib_lora_guard.planning.mode import Mode, WeightFacts, Wish, choose_mode
        from lib_lora_guard.planning.predict import Patch

        wish = {"Automatic": Wish.AUTO, "fp16 LoRA": Wish.NEVER_MERGE, "Merge": Wish.PREFER_MERGE}[self.case.mode]
        found = []
        for name, (out, inner) in self.denoiser.layers.items():
            if not self.case.loras:
                break
            key = f"diffusion_model.{name}.weight"
            weight = self.stored[key]
            factors = [self._factor(out, self.case.rank), self._factor(self.case.rank, inner)]
            terms = [Term(LoraAdapter(*factors, alpha=1.0), 1.0) for _ in range(self.case.loras)]
            choice = choose_mode(WeightFacts(key, weight.shape, weight.format, weight.wide, True, True), terms, wish)
            mode = choice.mode
            shape, tokens = weight.shape, self.tokens.of(key, weight.shape)
            if mode is Mode.BYPASS:
                guard = bypass_cost(terms, choice.forms, shape, tokens, self.compute_bytes)
            else:
                guard = on_the_fly_cost(terms, shape, tokens > 0, self.compute_bytes)
            stored = weight.memory_bytes(self.compute_bytes)
            file_bytes = sum(term.adapter.bytes for term in terms)
            found.append(
                Patch(key, weight.values, stored, weight.format, weight.wide, True, mode, file_bytes, guard, guard)
            )
        return found

    def _factor(self, rows, columns):
        torch = self.denoiser.torch
        return torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines, a row a case; a case that is there is not run again")
    parser.add_argument("--done", type=Path, nargs="*", default=[], help="results of before: the same")
    parser.add_argument("--cases", default="", help="parts of the cases' names, separated by commas")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script itself")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case is begun that may end after this")
    options = parser.parse_args()
    started = time.perf_counter()
    cases = SMALL_CASES if options.small else CASES
    wanted = [part.strip() for part in options.cases.split(",") if part.strip()]
    cases = [case for case in cases if not wanted or any(part in case.name for part in wanted)]
    if options.list:
        print("\n".join(case.name for case in cases))
        return
    torch = gpu_rig.import_forge()
    rows = gpu_rig.read_lines(options.out, *options.done)
    with Ballast(torch) as ballast:
        matrix = Matrix(torch, options, ballast)
        todo = still_to_do(cases, rows, matrix.header["commit"])
        took, building = [], []
        for number, case in enumerate(todo):
            left = options.seconds - (time.perf_counter() - started)
            is_built = matrix.built_as == case.built_as
            if not fits_in(left, is_built, took, building):
                print(f"{len(todo) - number} cases left for another time", flush=True)
                break
            before = time.perf_counter()
            matrix.build(case)
            if not is_built:
                building.append(time.perf_counter() - before)
            before = time.perf_counter()
            row = matrix.run(case)
            took.append(time.perf_counter() - before)
            seconds = {"seconds": round(took[-1], 1), "build_seconds": round(building[-1], 1) if not is_built else 0}
            gpu_rig.write_line(options.out, row | seconds)


if __name__ == "__main__":
    main()
