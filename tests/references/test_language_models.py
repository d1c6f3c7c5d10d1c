"""Text encoders that are language models, and UMT5: transformers' own small ones, LoRAs of PEFT on them, in every spelling."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import save_file
from support.end_to_end import fill
from support.make import gen
from support.named_models import module_of
from support.small_models import fused
from support.spelled import inputs_of, outputs_of

from lib_lora_guard import LoraGuard

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "vocab_size": 40, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16, "patch_size": 2,
    "fullatt_block_indexes": [0],
}  # fmt: skip


def qwen25_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    text = {key: value for key, value in SIZES.items() if key != "head_dim"}
    config = transformers.Qwen2_5_VLConfig(text_config={**text, "rope_scaling": rope}, vision_config=VISION)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def umt5():
    return transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40, feed_forward_proj="gated-gelu"
        )
    )


MAKE = {
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)),
    "gemma2": lambda: transformers.Gemma2Model(transformers.Gemma2Config(**SIZES)),
    "mistral": lambda: transformers.MistralModel(transformers.MistralConfig(**SIZES)),
    "qwen25_vl": qwen25_vl,
    "umt5": umt5,
}
IN_NEO = {
    "qwen3": ("qwen3_06b.", "text_encoders.qwen3_06b."),
    "gemma2": ("gemma2.model.", "text_encoders.gemma2.model."),
    "mistral": ("ministral3.model.", "text_encoders.ministral3.model."),
    "qwen25_vl": ("qwen25_7b.", "text_encoders.qwen25_7b."),
    "umt5": ("umt5xxl.transformer.", "text_encoders.umt5xxl.transformer."),
}
"""What stands before transformers' own names in Forge Neo, and in files that name them in full."""
STRENGTH = 0.8
TARGETS = ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "q", "o", "wi_0"]


def layers_path(name):
    """The part of a name that all classes share."""
    return name[name.index("layers.") :] if "layers." in name else name


@pytest.fixture(scope="module", params=MAKE)
def encoder(request):
    """The name, the encoder, PEFT's factors by layer, and its parameters with them fused in."""
    model = fill(MAKE[request.param]())
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "visual" not in name}
    trained = copy.deepcopy(model)
    layers = {n for n, m in trained.named_modules() if isinstance(m, torch.nn.Linear) and "visual" not in n}
    trained.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=[n for n in layers if n.split(".")[-1] in TARGETS])
    )
    factors = {}
    with torch.no_grad():
        for number, (name, parameter) in enumerate(p for p in trained.named_parameters() if ".lora_" in p[0]):
            parameter.copy_(torch.randn(parameter.shape, generator=gen(number)) * 0.3)
            layer, _, end = name.partition(".lora_")
            factors.setdefault(layer, {})[end[0]] = parameter.detach().clone()
    merged = {
        n.replace(".base_layer", ""): p for n, p in fused(trained, STRENGTH).named_parameters() if ".lora_" not in n
    }
    assert len(factors) >= 6
    return request.param, base, factors, {name: merged[name].detach() for name in base}


def spelled(name, layer):
    """One layer's name in the spellings of kohya, OneTrainer, diffusers, PEFT and ComfyUI."""
    short = layers_path(layer)
    yield from (f"{prefix}{short.replace('.', '_')}" for prefix in ("lora_te_", "lora_te1_"))
    yield from (f"{prefix}{layer.replace('.', '_')}" for prefix in ("lora_te_", "lora_te1_", "lycoris_"))
    yield from (f"text_encoder.{layer}", f"text_encoder.{short}", f"base_model.model.{layer}", layer)
    yield IN_NEO[name][1] + layer


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("in_neo", [False, True], ids=["transformers", "neo"])
def test_every_spelling(encoder, in_neo, number, tmp_path):
    name, base, factors, truth = encoder
    prefix = IN_NEO[name][0] if in_neo else ""
    shapes = {prefix + key: tuple(value.shape) for key, value in base.items()}
    if in_neo:
        # The denoiser lies beside it in whole checkpoints; its layers have other names.
        shapes["diffusion_model.layers.0.attention.out.weight"] = (16, 16)
    model = module_of(shapes)
    with torch.no_grad():
        for key, value in base.items():
            model.get_parameter(prefix + key).copy_(value)
    tensors = {}
    for layer, pair in factors.items():
        written = list(spelled(name, layer))[number]
        tensors |= {f"{written}.lora_B.weight": pair["B"], f"{written}.lora_A.weight": pair["A"]}
    save_file(tensors, tmp_path / "style.safetensors")
    guard = LoraGuard(model)
    report = guard.apply([(tmp_path / "style.safetensors", STRENGTH)], mode="merge")
    assert (report.loras[0].used, report.loras[0].skipped) == (len(factors), [])
    for key, value in truth.items():
        wrong = (model.get_parameter(prefix + key).double() - value.double()).norm()
        assert wrong <= 1e-4 * (value.double() - base[key].double()).norm() + 1e-7 * value.norm(), key
    for mode in ("bypass", "on_the_fly") if number == 5 else ():
        guard.apply([(tmp_path / "style.safetensors", STRENGTH)], mode=mode)
        wanted, before = outputs_of(model, truth, prefix), outputs_of(model, base, prefix)
        for layer, (module, x) in inputs_of(model).items():
            if f"{layer.removeprefix(prefix)}.weight" in truth:
                wrong = (module(x).double() - wanted[layer]).norm()
                assert wrong <= 1e-4 * (wanted[layer] - before[layer]).norm() + 1e-6 * before[layer].norm(), layer
    guard.remove()
