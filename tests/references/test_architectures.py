"""LoRA files for real architectures, small: what diffusers, peft, kohya and LyCORIS write, against their own fused models."""

import copy
import functools

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.end_to_end import (
    assert_seen,
    check_in_modes,
    lycoris_preset,
    one_thread,  # noqa: F401  # a fixture for all tests here
    without_alpha,
    without_module,
)
from support.make import gen, rand
from support.measure import same_bits

pytest.importorskip("lycoris", reason="lycoris-lora writes the reference")
pytest.importorskip("peft", reason="peft writes the reference")
import lycoris
from diffusers import (
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils import convert_state_dict_to_diffusers
from lycoris.config import PRESET
from peft import LoraConfig, get_peft_model_state_dict
from support.small_models import (
    DENOISERS,
    MAKE,
    STRENGTH,
    delta_of,
    forward_of,
    fused,
    layers_of,
    model_of,
    small_lora,
    with_deltas,
)

from lib_lora_guard import LoraGuard
from lib_lora_guard.errors import LoraMismatchError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own, about classes it makes itself

MODES = ("auto", "on_the_fly", "merge")


@functools.cache
def output_of(name):
    """What the model gives without a LoRA; every test leaves it as it was."""
    return forward_of(name)(model_of(name))


def check(name, model, file, reference, tmp_path, used):
    forward, part, base = forward_of(name), ("to_q", "q_proj", "SelfAttention_q", "SelfAttention.q"), output_of(name)
    check_in_modes(model, file, reference, forward, strength=STRENGTH, used=used, modes=MODES, base=base)
    assert_seen(model, [(file, STRENGTH * 1.05)], reference, forward, base=base)
    layer = next(p for p in part if any(p in key for key in load_file(file)))
    assert_seen(model, [(without_module(file, tmp_path / "part", layer), STRENGTH)], reference, forward, base=base)
    assert_seen(model, [(without_alpha(file, tmp_path / "alpha"), STRENGTH)], reference, forward, base=base)


# ---- diffusers and peft


def adapted(model, **config):
    """A copy with an adapter of peft's on every layer, as the training scripts of diffusers add it."""
    model = copy.deepcopy(model)
    model.add_adapter(LoraConfig(target_modules=list(layers_of(model)), **config))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(p for p in model.named_parameters() if ".lora_" in p[0]):
            scale = parameter[0].numel() ** -0.5 if ".lora_A." in name else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=gen(50 + number)) * scale)
    return model.eval()


CONFIGS = {
    "alpha": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 6, "alpha_pattern": {"to_q": 3}, "rank_pattern": {"to_k": 2}},
}


WRITTEN = [(name, "alpha") for name in DENOISERS] + [(n, c) for n in ("sd15", "flux") for c in ("rslora", "patterns")]


@pytest.mark.parametrize(("name", "config"), WRITTEN)
def test_save_lora_adapter(name, config, tmp_path):
    model = model_of(name)
    trained = adapted(model, **CONFIGS[config])
    trained.save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    reference = forward_of(name)(fused(trained, STRENGTH))
    check(name, model, file, reference, tmp_path, used=len(layers_of(model)))


PIPELINES = {
    "sd15": (StableDiffusionPipeline, "unet"),
    "sdxl": (StableDiffusionXLPipeline, "unet"),
    "flux": (FluxPipeline, "transformer"),
    "sd3": (StableDiffusion3Pipeline, "transformer"),
    "clip_l": (StableDiffusionPipeline, "text_encoder"),
    "clip_g": (StableDiffusionXLPipeline, "text_encoder_2"),
}


@pytest.mark.parametrize(
    ("name", "old_names"), [*((name, False) for name in PIPELINES), ("sd15", True), ("clip_l", True)]
)
def test_save_lora_weights_of_a_pipeline(name, old_names, tmp_path):
    pipeline, component = PIPELINES[name]
    model = model_of(name)
    trained = adapted(model, r=4, lora_alpha=6)
    state = get_peft_model_state_dict(trained, adapter_name="default")
    if old_names:
        state = convert_state_dict_to_diffusers(state)
    metadata = trained.peft_config["default"].to_dict()
    pipeline.save_lora_weights(
        tmp_path, **{f"{component}_lora_layers": state, f"{component}_lora_adapter_metadata": metadata}
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    reference = forward_of(name)(fused(trained, STRENGTH))
    check(name, model, file, reference, tmp_path, used=len(layers_of(model)))


# ---- kohya's names, written by us


KOHYA = {"clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5": "lora_te3_"}


@pytest.mark.parametrize("name", MAKE)
def test_kohya(name, tmp_path):
    model, tensors, deltas = model_of(name), {}, {}
    for number, (layer, module) in enumerate(layers_of(model).items()):
        inner = layer if not name.startswith("clip") else "text_model." + layer.removeprefix("text_model.")
        key = KOHYA.get(name, "lora_unet_") + inner.replace(".", "_")
        up, down = small_lora(tuple(module.weight.shape), number)
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(2.0)}
        deltas[layer] = [(0, delta_of(up, down, 2.0))]
    save_file(tensors, tmp_path / "style.safetensors")
    reference = forward_of(name)(with_deltas(model, deltas))
    check(name, model, tmp_path / "style.safetensors", reference, tmp_path, used=len(deltas))


# ---- LyCORIS

ALGOS = {
    "locon": {"algo": "locon"},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr", "factor": 2, "linear_dim": 1, "conv_dim": 1},
}


@pytest.mark.parametrize(
    ("name", "algo"),
    [*((name, algo) for name in DENOISERS for algo in ("loha", "lokr")), ("sd15", "locon"), ("flux", "locon")],
)
def test_lycoris(name, algo, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESET, "these tests", lycoris_preset("Linear", "Conv2d"))
    model = model_of(name)
    own = copy.deepcopy(model)
    options = {"linear_dim": 4, "conv_dim": 4, "linear_alpha": 3.0, "conv_alpha": 3.0, **ALGOS[algo]}
    network = lycoris.create_lycoris(own, 1.0, preset="these tests", **options)
    network.apply_to()
    with torch.no_grad():
        for number, (key, parameter) in enumerate(network.named_parameters()):
            inputs = key.endswith(("_b", "lora_down.weight", "lokr_w2"))
            scale = parameter[0].numel() ** -0.5 if inputs else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=gen(80 + number)) * scale)
    file = tmp_path / "style.safetensors"
    network.eval().save_weights(str(file), None, None)
    # As it runs: its merge applies alpha / rank twice for LoHa and LoKr.
    network.set_multiplier(STRENGTH)
    reference = forward_of(name)(own)
    assert len(network.loras) == len(layers_of(model))
    check(name, model, file, reference, tmp_path, used=len(network.loras))


# ---- the wrong architecture

FILES = {
    "SDXL": {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048)},
    "SD 1.x": {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768)},
    "Flux": {"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072)},
    "SD 3": {"lora_unet_joint_blocks_0_x_block_attn_qkv": (4608, 1536)},
}
ARE = {"sd15": "SD 1.x", "sdxl": "SDXL", "flux": "Flux", "chroma": "Chroma", "sd3": "SD 3"}


# A file for Flux and one for Chroma have the same names and sizes.
FOREIGN = [(n, f) for n, own in ARE.items() for f in FILES if f != own and (own, f) != ("Chroma", "Flux")]


@pytest.mark.parametrize(("name", "made_for"), FOREIGN)
def test_a_lora_for_another_architecture_is_refused_in_words(name, made_for, tmp_path):
    model, tensors = model_of(name), {}
    for key, (rows, columns) in FILES[made_for].items():
        tensors |= {f"{key}.lora_up.weight": rand(rows, 1, seed=1), f"{key}.lora_down.weight": rand(1, columns, seed=2)}
    save_file(tensors, tmp_path / "style.safetensors")
    bits = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(LoraMismatchError) as caught:
        LoraGuard(model).apply([(tmp_path / "style.safetensors", 1.0)])
    is_now = ARE[name]
    assert str(caught.value) == (
        f"style.safetensors: made for {made_for}, this is {is_now}; use a LoRA for {is_now}, or load a {made_for} model"
    )
    assert all(same_bits(p, old) for p, old in zip(model.parameters(), bits, strict=True))
