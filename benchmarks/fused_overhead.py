"""The processor's time of a layer's short way beyond its product, in microseconds: all but what the kernels take.

    python benchmarks/fused_overhead.py

The kernels are a stub that returns a weight; the layer is Forge's or Neo's by the double in tests/, on the CPU with copies of factors
kept as on a card. Of a step of Flux on a fast card the processor's time is what counts: it has 304 such layers. "nf4 of a class" is a
weight of a class with a `__torch_function__`, as bitsandbytes' is. And, where Triton is installed, a kernel's launch, without Triton's
part of it.
"""

import importlib
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

from lib_lora_guard.adapters import LoraAdapter, Term  # noqa: E402
from lib_lora_guard.hosts.forge.raw_weights import ForgeWeight  # noqa: E402
from lib_lora_guard.hosts.neo.raw_weights import NeoWeight  # noqa: E402
from lib_lora_guard.kernels import probe, stored  # noqa: E402
from lib_lora_guard.patching import device_cache, fused, low_rank, marked_class  # noqa: E402
from lib_lora_guard.patching.bypass import Bypass, call_of_layer  # noqa: E402
from lib_lora_guard.patching.fused_choice import FusedChoice, Twin  # noqa: E402

ROUNDS, CALLS, WIDTH, TOKENS = 15, 2000, 8, 16


def keep_as_on_a_card():
    """Lets the CPU's factors be joined and kept."""

    def get(self, device, dtype, make):
        return (
            self._values.setdefault((device, dtype), None)
            or self._values.__setitem__((device, dtype), make())
            or get(self, device, dtype, make)
        )

    device_cache.DeviceCache.get = get
    device_cache.DeviceCache.known = lambda self, device, dtype: self._values.get((device, dtype))
    low_rank.joins_on = lambda device: True


def microseconds(call):
    """The median of several rounds."""
    found = []
    with torch.inference_mode():
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            found.append((time.perf_counter() - begin) / CALLS * 1e6)
    return statistics.median(found)


def bypass_of(raw):
    terms = (Term(LoraAdapter(up=torch.randn(WIDTH, 4), down=torch.randn(4, WIDTH), alpha=1.0), 0.7),)
    hook = Bypass("layer.weight", terms, (WIDTH, WIDTH))
    if raw is not None:
        hook.fused = fused.Fused(raw, hook.program.one_pass, FusedChoice(Twin()))
    return hook


class OfAClass(torch.nn.Parameter):
    """Asks itself about each use, as the weights of bitsandbytes do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def launch_us():
    """Returns microseconds by storage of a launch without Triton's part; none where there is no Triton."""
    try:
        from lib_lora_guard.kernels.launch import Kernel

        generator, found = torch.Generator().manual_seed(0), {}
        for kind in ("nf4 64 by bf16", "fp8 e4m3", "Q8_0 baked by bf16"):
            one = probe.sample(kind, 64, 256, torch.bfloat16, generator, torch.device("cpu"))
            factors = probe.sample_factors(64, 256, 16, False, torch.bfloat16, generator, torch.device("cpu"))
            kernel = Kernel(kind, torch.bfloat16, 16, True, False)
            kernel._handle = lambda grid, arguments: None
            found[kind] = microseconds(lambda kernel=kernel, one=one, factors=factors: kernel(one, factors))
    except ImportError:
        return {}
    return found


def weights():
    """`(name, parameter)` of each storage, as the hosts hold it."""
    plain = torch.randn(WIDTH, WIDTH)
    yield "fp8", torch.nn.Parameter(plain.to(torch.float8_e4m3fn), requires_grad=False)
    four = torch.nn.Parameter(torch.zeros(WIDTH * WIDTH // 2, 1, dtype=torch.uint8), requires_grad=False)
    state = type("State", (), {})()
    state.absmax, state.nested, state.shape, state.dtype = torch.ones(1), False, plain.shape, torch.bfloat16
    state.quant_type, state.blocksize = "nf4", 64
    four.bnb_quantized, four.quant_state = True, state
    yield "nf4", four
    classed = OfAClass(four.data, requires_grad=False)
    classed.bnb_quantized, classed.quant_state = True, state
    yield "nf4 of a class", classed
    blocks = torch.nn.Parameter(torch.zeros(WIDTH, 34, dtype=torch.uint8), requires_grad=False)
    blocks.gguf_cls, blocks.real_shape = type("Q8_0", (), {}), torch.Size((WIDTH, 32))
    blocks.computation_dtype, blocks.baked = torch.bfloat16, True
    yield "Q8_0", blocks


def main():
    torch.set_num_threads(1)
    keep_as_on_a_card()
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16)
    weight, bias = torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16), torch.randn(WIDTH, dtype=torch.bfloat16)
    # The stub: what a kernel returns, made before.
    fused.fused_weight = lambda stored, factors, dtype: weight
    product = microseconds(lambda: torch.nn.functional.linear(x, weight, bias))
    print(f"product {product:.1f}")
    plain = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
    alone = microseconds(lambda: plain(x))
    hook = bypass_of(None)
    hook.attach(plain)
    print(
        f"torch's layer beyond the product {alone - product:.1f}, with a bypass {microseconds(lambda: plain(x)) - product:.1f}"
    )
    for kind, us in launch_us().items():
        print(f"launch, {kind}: {us:.1f}")
    sys.path.insert(0, str(ROOT / "tests" / "neo_double"))
    operations = importlib.import_module("backend.operations")
    for host, raw in (("Forge", ForgeWeight(lambda: False)), ("Neo", NeoWeight(lambda: False))):
        for name, parameter in weights():
            layer = operations.ForgeOperations.Linear(WIDTH, WIDTH)
            layer.weight, layer.bias = parameter, torch.nn.Parameter(bias, requires_grad=False)
            hook = bypass_of(raw)
            hook.attach(layer)
            marked_class.mark(layer, "bench", call=call_of_layer)
            calls = []
            fused.fused_weight = lambda *a, calls=calls: calls.append(0) or weight
            with torch.inference_mode():
                layer(x)
            assert calls, "the long way went"
            fused.fused_weight = lambda stored, factors, dtype: weight
            print(
                f"{host} {name}: short way beyond the product {microseconds(lambda layer=layer: layer(x)) - product:.1f}"
            )


if __name__ == "__main__":
    assert stored
    main()
