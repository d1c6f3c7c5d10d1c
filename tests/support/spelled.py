"""Small models of diffusers in both layouts, LoRAs trained on them in every published spelling, and how well each is read.

The truth is diffusers' own: the LoRA is PEFT's, on diffusers' model, and `fuse_lora` puts it in (LoKr: LyCORIS' own
difference). Which rows of an original checkpoint a parameter of diffusers is, diffusers' converters of checkpoints say:
they are given a checkpoint with a number of its own in every row.
"""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping

import diffusers
import lycoris
import torch
from diffusers.loaders import single_file_utils as checkpoints
from lycoris.config import PRESET
from peft import LoraConfig
from safetensors.torch import save_file

from lib_lora_guard import LoraGuard
from lib_lora_guard.errors import LoraGuardError

from .end_to_end import fill, lycoris_preset
from .layouts_of_2025 import cosmos, flux2, krea2, next_dit, wan
from .make import gen, rand
from .named_models import module_of
from .original_layouts import Checkpoint, bfl, ldm_unet, mmdit
from .small_models import MAKE, layers_of

STRENGTH, RANK, ALPHA = 0.8, 4, 6.0

State = Mapping[str, torch.Tensor]


def z_image():
    return diffusers.ZImageTransformer2DModel(
        in_channels=16, dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=10,
        axes_dims=[4, 4, 4], axes_lens=[16, 16, 16],
    )  # fmt: skip


def lumina2():
    return diffusers.Lumina2Transformer2DModel(
        in_channels=16, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=4, num_kv_heads=2,
        multiple_of=8, axes_dim_rope=(2, 2, 2), axes_lens=(16, 16, 16), cap_feat_dim=10,
    )  # fmt: skip


def krea_2():
    return diffusers.Krea2Transformer2DModel(
        in_channels=64, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=24, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip


def anima():
    return diffusers.CosmosTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=1, attention_head_dim=24, num_layers=2, text_embed_dim=12,
        adaln_lora_dim=4, max_size=(4, 8, 8), extra_pos_embed_type=None,
    )  # fmt: skip


def wan_2():
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=16, text_dim=10, freq_dim=8, ffn_dim=96,
        num_layers=2, image_dim=6, added_kv_proj_dim=24, rope_max_seq_len=32,
    )  # fmt: skip


def ernie_image():
    return diffusers.ErnieImageTransformer2DModel(
        hidden_size=16, num_attention_heads=2, num_layers=2, ffn_hidden_size=24, in_channels=4, out_channels=4,
        text_in_dim=10, rope_axes_dim=(2, 2, 4),
    )  # fmt: skip


def qwen_image():
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=10,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def flux_2():
    return diffusers.Flux2Transformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=10, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip


def _unet_converter(**config):
    def convert(tensors):
        whole = {"model.diffusion_model." + name: ids for name, ids in tensors.items()}
        return checkpoints.convert_ldm_unet_checkpoint(whole, {"layers_per_block": 1, **config})

    return convert


def _sd3_converter(tensors):
    made = checkpoints.convert_sd3_transformer_checkpoint_to_diffusers({**tensors, "pos_embed": torch.zeros(1, 4, 16)})
    return {name: ids for name, ids in made.items() if name != "pos_embed.pos_embed"}


UNET = {"channels": (8, 16), "per_level": 1}
CONVERT = {
    "SD 1.5": (lambda: ldm_unet(depths=(1, 0), mid_depth=1, context=768, **UNET), _unet_converter()),
    "SDXL": (
        lambda: ldm_unet(depths=(0, 2), mid_depth=2, context=2048, label=30, **UNET),
        _unet_converter(addition_embed_type="text_time"),
    ),
    "SD 3": (lambda: mmdit(16, 2, dual=(0,)), _sd3_converter),
    "Flux.1": (lambda: bfl(3072, 2, 1), checkpoints.convert_flux_transformer_checkpoint_to_diffusers),
    "Chroma": (lambda: bfl(3072, 2, 1, chroma=True), checkpoints.convert_chroma_transformer_checkpoint_to_diffusers),
    "Flux.2": (lambda: flux2(16, 2, 2), checkpoints.convert_flux2_transformer_checkpoint_to_diffusers),
    "Z-Image": (
        lambda: next_dit(24, 24, 2, 1, z_image=True),
        checkpoints.convert_z_image_transformer_checkpoint_to_diffusers,
    ),
    "Lumina 2": (lambda: next_dit(2304, 768, 2, 1, z_image=False), checkpoints.convert_lumina2_to_diffusers),
    "Krea 2": (lambda: krea2(32, 16, 16, 2), checkpoints.convert_krea2_transformer_checkpoint_to_diffusers),
    "Anima": (lambda: cosmos(24, 12, 2), checkpoints.convert_cosmos_transformer_checkpoint_to_diffusers),
    "Wan": (lambda: wan(24, 10, 6, 2), checkpoints.convert_wan_transformer_to_diffusers),
}
"""The original checkpoint (in the real width where a converter knows no other: names are all that is taken from it)."""
MAKERS: dict[str, Callable[[], torch.nn.Module]] = {
    "SD 1.5": MAKE["sd15"], "SDXL": MAKE["sdxl"], "SD 3": MAKE["sd3"], "Flux.1": MAKE["flux"], "Chroma": MAKE["chroma"],
    "Flux.2": flux_2, "Z-Image": z_image, "Lumina 2": lumina2, "Qwen-Image": qwen_image, "Krea 2": krea_2,
    "Anima": anima, "Wan": wan_2, "ERNIE-Image": ernie_image,
}  # fmt: skip
UNETS = ("SD 1.5", "SDXL")


@dataclasses.dataclass(frozen=True)
class Part:
    """A parameter of diffusers inside one of the original; `swapped`: with its halves changed over."""

    name: str
    swapped: bool


@functools.cache
def parts_of(family: str) -> dict[str, list[Part]]:
    """The parameters of diffusers that every original parameter consists of, top row first."""
    if family not in CONVERT:
        return {}
    layers, convert = CONVERT[family]
    tensors = Checkpoint(layers()).tensors
    owners = {int(row): name for name, ids in tensors.items() for row in ids.flatten()}
    found: dict[str, list[tuple[int, Part]]] = {}
    for name, ids in convert(dict(tensors)).items():
        rows = ids.flatten()
        part = Part(name, swapped=bool(rows[0] > rows[-1]))
        found.setdefault(owners[int(rows[0])], []).append((int(rows.min()), part))
    return {name: [part for _, part in sorted(parts, key=lambda p: p[0])] for name, parts in found.items()}


def original(family: str, state: State) -> dict[str, torch.Tensor]:
    """The parameters of a diffusers model in the original layout."""
    parts, made = parts_of(family), {}
    for name, inside in parts.items():
        pieces = [_turned(state[part.name], part) for part in inside]
        made[name] = pieces[0].flatten() if name.endswith("mod.lin") else torch.cat(pieces)
    named = {part.name for inside in parts.values() for part in inside}
    return made | {name: value for name, value in state.items() if name not in named}


def _turned(rows: torch.Tensor, part: Part) -> torch.Tensor:
    return torch.cat(rows.chunk(2)[::-1]) if part.swapped else rows


# ---- LoRAs and what they do

Factors = dict[str, tuple[torch.Tensor, torch.Tensor, float]]
"""up, down and alpha of each module."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A LoRA on a diffusers model, and the model's parameters without and with it."""

    factors: Factors
    lokr: dict[str, torch.Tensor]
    base: State
    fused: State
    fused_lokr: State


@functools.cache
def trained(family: str) -> Trained:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, about classes it makes itself
        model = fill(MAKERS[family]())
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    lokr, fused_lokr = _lokr(copy.deepcopy(model), base)
    layers = list(layers_of(model))
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers))
    factors: Factors = {}
    with torch.no_grad():
        for number, layer in enumerate(layers):
            module = model.get_submodule(layer)
            up, down = (module.lora_B["default"].weight, module.lora_A["default"].weight)
            for at, (weight, scale) in enumerate(((down, down[0].numel() ** -0.5), (up, 0.1))):
                weight.copy_(torch.randn(weight.shape, generator=gen(2 * number + at)) * scale)
            factors[layer] = up.detach().clone(), down.detach().clone(), ALPHA
    model.fuse_lora(lora_scale=STRENGTH)
    fused = {n.replace(".base_layer", ""): p.detach() for n, p in model.named_parameters() if ".lora_" not in n}
    assert fused.keys() == base.keys()
    return Trained(factors, lokr, base, fused, fused_lokr)


def _lokr(model, base):
    PRESET["spelled"] = lycoris_preset("Linear", "Conv2d")
    network = lycoris.create_lycoris(
        model, 1.0, preset="spelled", algo="lokr", factor=2, linear_dim=1, conv_dim=1, linear_alpha=1.0, conv_alpha=1.0
    )
    names = {module: name for name, module in model.named_modules()}
    network.apply_to()
    with torch.no_grad():
        for number, (key, parameter) in enumerate(network.named_parameters()):
            scale = parameter[0].numel() ** -0.5 if key.endswith(("_b", "lokr_w2")) else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=gen(700 + number)) * scale)
        fused = dict(base)
        for lora in network.loras:
            name = f"{names[lora.org_module[0]]}.weight"
            diff, _ = lora.get_diff_weight(1.0, base[name].shape)
            fused[name] = base[name] + STRENGTH * diff
    return {key: value.detach().clone() for key, value in network.state_dict().items()}, fused


def in_original(family: str, factors: Factors) -> Factors:
    """The same LoRA for the layers of the original layout: a fused layer has the factors of its parts side by side."""
    made: Factors = {}
    for name, inside in parts_of(family).items():
        module, _, last = name.rpartition(".")
        modules = [part.name.rpartition(".")[0] for part in inside]
        if last != "weight" or not all(m in factors for m in modules):
            continue
        pairs = [(_turned(factors[m][0], part), factors[m][1]) for m, part in zip(modules, inside, strict=True)]
        if len(pairs) == 1:
            made[module] = (*pairs[0], ALPHA)
        else:
            ups, downs = zip(*pairs, strict=True)
            made[module] = torch.block_diag(*ups), torch.cat(downs), ALPHA * len(pairs)
    return made or factors


def dotted(prefix: str, factors: Factors, middle: str = "") -> dict[str, torch.Tensor]:
    """PEFT's and diffusers' keys; alpha over rank is in the factors, as these files have none."""
    return {
        f"{prefix}{module}.{key}{middle}.weight": value
        for module, (up, down, alpha) in factors.items()
        for key, value in (("lora_A", down), ("lora_B", up * (alpha / down.shape[0])))
    }


def flattened(prefix: str, factors: Factors) -> dict[str, torch.Tensor]:
    """kohya's keys."""
    return {
        f"{prefix}{module.replace('.', '_')}.{key}": value
        for module, (up, down, alpha) in factors.items()
        for key, value in (("lora_down.weight", down), ("lora_up.weight", up), ("alpha", torch.tensor(alpha)))
    }


SPELLINGS: dict[str, Callable[[str, Trained], dict[str, torch.Tensor]]] = {
    "diffusers, PEFT: `transformer.`": lambda f, t: dotted("unet." if f in UNETS else "transformer.", t.factors),
    "PEFT: `base_model.model.`": lambda f, t: dotted("base_model.model.", t.factors),
    "DiffSynth: `.default.`, no prefix": lambda f, t: dotted("", t.factors, ".default"),
    "ai-toolkit: `diffusion_model.` and diffusers' names": lambda f, t: dotted("diffusion_model.", t.factors),
    "ComfyUI, BFL, ai-toolkit: `diffusion_model.`": lambda f, t: dotted("diffusion_model.", in_original(f, t.factors)),
    "kohya, musubi: `lora_unet_`": lambda f, t: flattened("lora_unet_", in_original(f, t.factors)),
    "kohya, musubi: `lora_unet_` and diffusers' names": lambda f, t: flattened("lora_unet_", t.factors),
    "OneTrainer: `lora_transformer_`": lambda f, t: flattened("lora_transformer_", t.factors),
    "LyCORIS, SimpleTuner: LoKr, `lycoris_`": lambda f, t: t.lokr,
}
"""Files by spelling, in the original's names unless they say diffusers'."""
OF_TRANSFORMERS = ("OneTrainer: `lora_transformer_`",)


def inputs_of(model):
    """The layers of a model by name, each with an input."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    return {
        name: (
            m,
            rand(3, m.in_features, seed=9) if isinstance(m, torch.nn.Linear) else rand(2, m.in_channels, 5, 5, seed=9),
        )
        for name, m in layers.items()
    }


def outputs_of(model, state, prefix):
    """What the layers give with the weights of `state`, in float64."""
    made = {}
    for name, (layer, x) in inputs_of(model).items():
        if f"{name.removeprefix(prefix)}.weight" not in state:
            continue
        weight, bias = (state.get(f"{name.removeprefix(prefix)}.{part}") for part in ("weight", "bias"))
        bias = None if bias is None else bias.double()
        call = torch.nn.functional.linear if isinstance(layer, torch.nn.Linear) else torch.nn.functional.conv2d
        made[name] = call(x.double(), weight.double(), bias)
    return made


@dataclasses.dataclass(frozen=True)
class Found:
    """How a file was read: modules used, modules in it, and the error over all parameters of the model."""

    used: int
    modules: int
    error: float
    refused: str = ""


def read_back(family: str, spelling: str, folder, *, in_diffusers: bool = False, mode: str = "merge") -> Found:
    """Applies a file in one spelling to a model in one layout, and compares.

    Merged, every parameter; in another mode, what every layer gives for one input.
    """
    of = trained(family)
    tensors = SPELLINGS[spelling](family, of)
    modules = len({key.rsplit(".lo", 1)[0].removesuffix(".alpha") for key in tensors})
    path = folder / "style.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    convert = dict if in_diffusers else functools.partial(original, family)
    base = convert(of.base)
    truth = convert(of.fused_lokr if tensors is of.lokr else of.fused)
    prefix = "" if in_diffusers else "diffusion_model."
    model = module_of({prefix + name: tuple(value.shape) for name, value in base.items()})
    with torch.no_grad():
        for name, value in base.items():
            model.get_parameter(prefix + name).copy_(value)
    guard = LoraGuard(model)
    try:
        report = guard.apply([(path, STRENGTH)], mode=mode)
        got = {name: p.detach().double() for name, p in model.named_parameters()}
        outputs = {} if mode == "merge" else {name: layer(x).double() for name, (layer, x) in inputs_of(model).items()}
    except LoraGuardError as error:
        return Found(0, modules, 1.0, str(error))
    finally:
        guard.remove()
    if mode != "merge":
        got, truth, base, prefix = outputs, outputs_of(model, truth, prefix), outputs_of(model, base, prefix), ""
    wrong = sum(float((got[prefix + name] - value.double()).norm() ** 2) for name, value in truth.items())
    added = sum(float((value.double() - base[name].double()).norm() ** 2) for name, value in truth.items())
    left = report.loras[0].skipped + report.loras[0].lost
    return Found(modules - len(left), modules, (wrong / added) ** 0.5)
