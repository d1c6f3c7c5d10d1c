"""Layers of other libraries x kinds of LoRA x modes: each is right, or refused by the layer's name before it is touched.

    python benchmarks/layers_matrix.py [-o docs/layers.md] [--only bitsandbytes ...]

Needs no GPU; libraries that are not installed are left out and named. A cell is right if the layer's output has changed by what the
library's own dequantised weight and an fp64 merge say, and if after the removal every output and every attribute of the
layer is as before. Exit code 1 if a case was silent (another change than it should be), late (an error after `apply`
succeeded) or raw (another error than one that names the layer).
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from patching.any_stack import REFERENCES, Patch
from support.make import host_value, rand
from support.reference import merge_reference

from lib_lora_guard.errors import LoraGuardError
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.planning.mode import Mode, Wish

OUT, IN = 256, 512
CONVOLUTION = (64, 32, 3, 3)
STRENGTH = 0.8
MODES = (Wish.AUTO, Wish.BYPASS, Wish.ON_THE_FLY, Wish.MERGE)
LETTERS = {Mode.BYPASS: "B", Mode.ON_THE_FLY: "F", Mode.MERGE: "M"}
REFUSED = "-"
KINDS: dict[str, Callable[[tuple[int, ...]], Patch]] = {
    "LoRA": lambda shape: Patch(host_value("lora", shape, 1)),
    "LoHa": lambda shape: Patch(host_value("loha", shape, 2, rank=2)),
    "LoKr": lambda shape: Patch(host_value("lokr", shape, 3)),
    "DoRA": lambda shape: Patch(host_value("lora", shape, 4, dora="output")),
    "IA3": lambda shape: Patch(("ia3_rows", (rand(shape[0], seed=5, scale=0.3),))),
    "GLoRA": lambda shape: Patch(host_value("glora" if len(shape) == 2 else "glora_conv", shape, 6)),
    "OFT": lambda shape: Patch(("oft", (rand(shape[0] // 4, 4, 4, seed=7, scale=0.2),))),
    "BOFT": lambda shape: Patch(("boft", (rand(2, shape[0] // 4, 4, 4, seed=8, scale=0.2),))),
    "difference": lambda shape: Patch(host_value("diff", shape, 9)),
}
PACKAGES = ("torch", "bitsandbytes", "torchao", "optimum-quanto", "sdnq", "comfy-kitchen", "hqq", "accelerate")


@dataclass(frozen=True)
class Layer:
    """One layer to try: `make` builds a module with the layer at "0", `dense` its weight as its library decodes it."""

    library: str
    name: str
    make: Callable[[], torch.nn.Module]
    dense: Callable[[Any], torch.Tensor]
    shape: tuple[int, ...] = (OUT, IN)
    dtype: torch.dtype = torch.float32


def linear(dtype: torch.dtype = torch.float32, **more: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(IN, OUT, **more)).requires_grad_(False).to(dtype)


def convolution() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(CONVOLUTION[1], CONVOLUTION[0], 3, padding=1)).requires_grad_(False)


def of_torch() -> list[Layer]:
    class Scaled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight, self.bias) * 1.0

    def scaled() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(Scaled(IN, OUT)).requires_grad_(False)

    def own_forward() -> torch.nn.Module:
        model = linear()
        before = model[0].forward
        model[0].forward = lambda x: before(x)
        return model

    def weight_normed() -> torch.nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.nn.Sequential(torch.nn.utils.weight_norm(linear()[0])).requires_grad_(False)

    def parametrised() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(linear()[0])).requires_grad_(False)

    def weight(layer: Any) -> torch.Tensor:
        return layer.weight

    return [
        Layer("torch", "Linear", linear, weight),
        Layer("torch", "Conv2d", convolution, weight, CONVOLUTION),
        Layer("torch", "subclass of Linear with a `forward` of its own", scaled, weight),
        Layer("torch", "Linear with a replaced `forward`", own_forward, weight),
        Layer("torch", "`weight_norm`", weight_normed, weight),
        Layer("torch", "parametrised `weight_norm`", parametrised, weight),
    ]


def of_accelerate() -> list[Layer]:
    import accelerate

    def offloaded() -> torch.nn.Module:
        return accelerate.cpu_offload(linear(), execution_device=torch.device("cpu"))

    return [Layer("accelerate", "`cpu_offload`", offloaded, lambda layer: layer._hf_hook.weights_map["weight"])]


def of_bitsandbytes() -> list[Layer]:
    import bitsandbytes as bnb

    def four_bits(**how: Any) -> Callable[[], torch.nn.Module]:
        def make() -> torch.nn.Module:
            plain = linear()[0]
            layer = bnb.nn.Linear4bit(IN, OUT, compute_dtype=torch.float32)
            layer.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, **how)
            layer.bias = plain.bias
            return torch.nn.Sequential(layer).requires_grad_(False).to("cpu")

        return make

    def eight_bits() -> torch.nn.Module:
        plain = linear()[0]
        layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
        layer.bias = plain.bias
        return torch.nn.Sequential(layer).requires_grad_(False).to("cpu")

    def dense4(layer: Any) -> torch.Tensor:
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)

    def dense8(layer: Any) -> torch.Tensor:
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return bnb.functional.int8_vectorwise_dequant(layer.weight.data, scales)

    return [
        Layer("bitsandbytes", "Linear4bit NF4", four_bits(quant_type="nf4", compress_statistics=False), dense4),
        Layer("bitsandbytes", "Linear4bit FP4, nested", four_bits(quant_type="fp4", compress_statistics=True), dense4),
        Layer("bitsandbytes", "Linear8bitLt", eight_bits, dense8),
    ]


def of_torchao() -> list[Layer]:
    from torchao import quantization as ao

    def made(config: Any, dtype: torch.dtype) -> Callable[[], torch.nn.Module]:
        def make() -> torch.nn.Module:
            model = linear(dtype)
            ao.quantize_(model, config())
            return model

        return make

    configs: list[tuple[str, Any, torch.dtype]] = [
        ("Int8WeightOnlyConfig", ao.Int8WeightOnlyConfig, torch.float32),
        ("Int8DynamicActivationInt8WeightConfig", ao.Int8DynamicActivationInt8WeightConfig, torch.float32),
        ("IntxWeightOnlyConfig", ao.IntxWeightOnlyConfig, torch.float32),
        ("Int8DynamicActivationIntxWeightConfig", ao.Int8DynamicActivationIntxWeightConfig, torch.float32),
        ("Float8WeightOnlyConfig", ao.Float8WeightOnlyConfig, torch.bfloat16),
    ]
    return [
        Layer("torchao", name, made(config, dtype), lambda layer: layer.weight.dequantize(), dtype=dtype)
        for name, config, dtype in configs
    ]


def of_quanto() -> list[Layer]:
    from optimum import quanto

    def made(plain: Callable[[], torch.nn.Module], freeze: bool, **how: Any) -> Callable[[], torch.nn.Module]:
        def make() -> torch.nn.Module:
            model = plain()
            quanto.quantize(model, **how)
            if "activations" in how:
                with torch.no_grad(), quanto.Calibration():
                    # In a range that the output with a LoRA fits into.
                    model(30 * rand(3, 5, IN, seed=11))
            if freeze:
                quanto.freeze(model)
            return model

        return make

    def dense(layer: Any) -> torch.Tensor:
        return layer.qweight.dequantize()

    found = [
        Layer("optimum-quanto", f"QLinear {name}", made(linear, True, weights=getattr(quanto, name)), dense)
        for name in ("qint8", "qfloat8", "qint4", "qint2")
    ]
    return [
        *found,
        Layer("optimum-quanto", "QLinear qint8, not frozen", made(linear, False, weights=quanto.qint8), dense),
        Layer("optimum-quanto", "QConv2d qint8", made(convolution, True, weights=quanto.qint8), dense, CONVOLUTION),
        Layer("optimum-quanto", "QLinear qint8, activations qint8", made(linear, True, weights=quanto.qint8, activations=quanto.qint8), dense),
    ]  # fmt: skip


def of_sdnq() -> list[Layer]:
    from sdnq.quantizer import sdnq_post_load_quant
    from sdnq.utils import get_sdnq_params

    def made(plain: Callable[[], torch.nn.Module], **how: Any) -> Callable[[], torch.nn.Module]:
        def make() -> torch.nn.Module:
            model = sdnq_post_load_quant(plain(), quant_conv=True, add_skip_keys=False, **how)
            assert hasattr(model[0], "sdnq_dequantizer"), "SDNQ has left the layer as it was"
            return model

        return make

    def dense(layer: Any) -> torch.Tensor:
        decode = layer.sdnq_dequantizer
        return decode(**get_sdnq_params(layer), skip_quantized_matmul=decode.use_quantized_matmul)

    found = [
        Layer("SDNQ", f"SDNQLinear {name}{', quantised product' if product else ''}", made(linear, weights_dtype=name, use_quantized_matmul=product), dense)
        for name in ("int8", "float8_e4m3fn", "uint8", "int6", "uint4", "float4_e2m1fn") for product in (False, True)
    ]  # fmt: skip
    return [
        *found,
        Layer("SDNQ", "SDNQLinear uint4, SVD", made(linear, weights_dtype="uint4", use_svd=True), dense),
        Layer("SDNQ", "SDNQConv2d int8", made(convolution, weights_dtype="int8"), dense, CONVOLUTION),
    ]


def of_comfy_kitchen() -> list[Layer]:
    from comfy_kitchen.tensor import QuantizedTensor

    def made(layout: str) -> Callable[[], torch.nn.Module]:
        def make() -> torch.nn.Module:
            model = linear()
            quantised = QuantizedTensor.from_float(model[0].weight.data, layout)
            model[0].weight = torch.nn.Parameter(quantised, requires_grad=False)
            return model

        return make

    layouts = (
        "TensorCoreFP8Layout",
        "TensorWiseINT8Layout",
        "TensorCoreMXFP8Layout",
        "TensorCoreNVFP4Layout",
        "TensorCoreConvRotW4A4Layout",
        "AsymW4A8Int8Layout",
    )
    return [Layer("comfy-kitchen", layout, made(layout), lambda layer: layer.weight.dequantize()) for layout in layouts]


def of_hqq() -> list[Layer]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def made(bits: int) -> Callable[[], torch.nn.Module]:
        def make() -> torch.nn.Module:
            config = BaseQuantizeConfig(nbits=bits, group_size=64)
            layer = HQQLinear(linear()[0], config, compute_dtype=torch.float32, device="cpu")
            return torch.nn.Sequential(layer).requires_grad_(False)

        return make

    return [
        Layer("hqq", f"HQQLinear {bits} bits", made(bits), lambda layer: layer.dequantize()) for bits in (8, 4, 3, 2)
    ]


FAMILIES = {
    "torch": of_torch,
    "accelerate": of_accelerate,
    "bitsandbytes": of_bitsandbytes,
    "torchao": of_torchao,
    "optimum-quanto": of_quanto,
    "SDNQ": of_sdnq,
    "comfy-kitchen": of_comfy_kitchen,
    "hqq": of_hqq,
}


def input_for(layer: Layer) -> torch.Tensor:
    shape = (3, 5, layer.shape[1]) if len(layer.shape) == 2 else (2, layer.shape[1], 7, 7)
    return rand(*shape, seed=11).to(layer.dtype)


def product(layer: Layer, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if len(layer.shape) == 2:
        return torch.nn.functional.linear(x.double(), weight)
    return torch.nn.functional.conv2d(x.double(), weight, padding=1)


def plain(output: torch.Tensor) -> torch.Tensor:
    return (output if type(output) is torch.Tensor else output.dequantize()).detach().clone()


def state(model: torch.nn.Module) -> list[object]:
    layer = model[0]
    # accelerate puts new parameters without numbers there at each call.
    parameters = {n: "meta" if p is not None and p.is_meta else id(p) for n, p in layer._parameters.items()}
    hooks = dict(layer._forward_hooks), dict(layer._forward_pre_hooks)
    return [type(layer), *hooks, vars(layer).get("forward"), set(vars(layer)), parameters]


@functools.cache
def patch_of(kind: str, shape: tuple[int, ...]) -> Patch:
    return KINDS[kind](shape)


def outcome(layer: Layer, kind: str, wish: Wish) -> tuple[str, str]:
    """Returns the letter of a case and what is wrong with it, if anything is."""
    model, x = layer.make(), input_for(layer)
    with torch.no_grad():
        base = plain(model(x))
    dense = layer.dense(model[0]).detach().double().reshape(layer.shape)
    before, patch = state(model), patch_of(kind, layer.shape)
    engine, access = Engine(), PlainAccess(model)
    access.shapes()
    request = LoraRequest("case", STRENGTH, {"0.weight": [patch.term(STRENGTH, 0)]})
    with torch.inference_mode(False), torch.no_grad():
        try:
            report = engine.change(access, [request], wish, leave_out=False)
        except LoraGuardError as error:
            with torch.no_grad():
                untouched = state(model) == before and torch.equal(plain(model(x)), base)
            wrong = "" if "0.weight" in str(error) else f"does not name the layer: {error}"
            return REFUSED, wrong or ("" if untouched else "refused, but it has touched the layer")
        except Exception as error:
            return "!", f"raw {type(error).__name__}: {str(error)[:80]}"
    if report.loras[0].used != 1:
        return "!", f"not applied and not refused: {report.loras[0].skipped}"
    letter, problems = LETTERS[engine.attached["0.weight"].mode], []
    change = merge_reference([patch.entry(STRENGTH)], dense, REFERENCES) - dense
    wanted = product(layer, change, x)
    own = product(layer, dense, x)
    bias = getattr(model[0], "bias", None)
    if isinstance(bias, torch.Tensor):
        own += bias.double().reshape(-1, *[1] * (len(layer.shape) - 2))
    # The library's own rounding of its activations meets the change of the weight as it meets the weight.
    noise = (
        2 * (base.double() - own).norm() * (1 + change.norm() / dense.norm())
        + 1e-3 * wanted.norm()
        + torch.finfo(layer.dtype).eps * 4 * own.norm()
    )
    for gradients in (False, True):
        try:
            with torch.set_grad_enabled(gradients):
                output = plain(model(x))
        except Exception as error:
            problems.append(f"late{' with gradients' if gradients else ''}, {type(error).__name__}: {str(error)[:60]}")
            continue
        off = (output.double() - base.double() - wanted).norm()
        if not off <= noise:
            problems.append(f"silent: off by {float(off / wanted.norm()):.2g} of the change")
    engine.change(access, [])
    with torch.no_grad():
        if state(model) != before or not torch.equal(plain(model(x)), base):
            problems.append("not as before after the removal")
    return letter, "; ".join(dict.fromkeys(problems))


def table(library: str, layers: list[Layer], wrong: list[str]) -> list[str]:
    lines = [f"| {library} | {' | '.join(KINDS)} |", f"| --- |{' --- |' * len(KINDS)}"]
    for layer in layers:
        cells = []
        try:
            layer.make()(input_for(layer))
        except Exception as error:
            lines.append(
                f"| {layer.name} | not tried: without a LoRA, {type(error).__name__} here |{' |' * (len(KINDS) - 1)}"
            )
            continue
        for kind in KINDS:
            found = [outcome(layer, kind, wish) for wish in MODES]
            wrong += [
                f"{library} {layer.name}, {kind}, {w.value}: {p}" for w, (_, p) in zip(MODES, found, strict=True) if p
            ]
            cells.append("".join(letter if not problem else "!" for letter, problem in found))
        lines.append(f"| {layer.name} | {' | '.join(f'`{cell}`' for cell in cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, help="the page whose table is replaced")
    parser.add_argument("--only", nargs="*", choices=list(FAMILIES))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    wrong: list[str] = []
    text: list[str] = []
    cases = 0
    for library, family in FAMILIES.items():
        if arguments.only and library not in arguments.only:
            continue
        try:
            layers = family()
        except ImportError as error:
            print(f"{library}: left out, {error}")
            continue
        text += [*table(library, layers, wrong), ""]
        cases += len(layers) * len(KINDS) * len(MODES)
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    text.append(f"{cases} cases, {len(wrong)} wrong. Versions: {', '.join(versions)}; on a CPU.")
    print("\n".join(wrong))
    print(text[-1])
    if arguments.o is not None:
        page = arguments.o.read_text(encoding="utf-8")
        start, end = "<!-- layers table -->\n", "<!-- end of layers table -->"
        head, tail = page.partition(start)[0], page.partition(end)[2]
        arguments.o.write_text(head + start + "\n".join(text) + "\n" + end + tail, encoding="utf-8")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
