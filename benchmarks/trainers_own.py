"""Runs the trainers' own network code on small models and holds the guard to it: sd-scripts and OneTrainer.

    python benchmarks/trainers_own.py --sd-scripts PATH --onetrainer PATH [--write docs/spellings.md]

PATH is a checkout of the project; nothing of it is copied or kept. Each row is one file: the trainer makes its network on
a small model, its factors get random numbers in place of training, the trainer saves the file in its own way, and every
layer is called with the trainer's forward pass in place. The same file on a copy of the model without the trainer, through
`LoraGuard` in each of the three modes, must give the same. The error is that over all layers, as a share of what the
trainer's network adds.

Needs diffusers, transformers, and of what OneTrainer needs `parse`; packages for pictures and servers are stood in for by
empty ones (`_importable`). Takes a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import io
import logging
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from support.named_models import module_of  # noqa: E402
from support.spelled import MAKERS, original  # noqa: E402

from benchmarks.pages import replaced  # noqa: E402
from lib_lora_guard import LoraGuard  # noqa: E402

HEADING = "## The trainers' own code"
MODES = ("merge", "bypass", "on_the_fly")
LIMIT = 1e-4


@dataclass
class Trained:
    """A model with a trainer's network at work in it, and the file that the trainer has saved.

    Attributes:
        base: the model without the network.
        hooked: the same model, whose layers the network has taken over.
        path: the file.
        modules: the number of modules that the trainer has made.
        strength: the network's multiplier.
        as_trained: DoRA in its trainer's meaning.
        family: the file is applied to the authors' layout of this model, "" for the model as it is.
    """

    base: torch.nn.Module
    hooked: torch.nn.Module
    path: Path
    modules: int
    strength: float = 1.0
    as_trained: bool = False
    family: str = ""


@dataclass(frozen=True)
class Found:
    """The modules used, and the error in each mode."""

    used: int
    modules: int
    errors: tuple[float, ...]

    @property
    def is_right(self) -> bool:
        """True if every module is used and every mode gives what the trainer gives."""
        return self.used == self.modules and all(error <= LIMIT for error in self.errors)


def fill(module: torch.nn.Module, scale: float) -> torch.nn.Module:
    """Gives every parameter random numbers; a magnitude or a norm's weight keeps near what it is."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * scale
            parameter.copy_(parameter * (1 + noise) if "dora_scale" in name or "norm" in name else noise)
    return module.eval().requires_grad_(False)


def layers_of(model: torch.nn.Module) -> dict[str, Any]:
    """The linear layers and convolutions of a model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}


def compared(trained: Trained) -> Found:
    """Calls every layer with the trainer's network and with the guard's, and compares."""
    model, truth = trained.base, layers_of(trained.hooked)
    if trained.family:
        model, truth = _in_original(trained)
    layers = layers_of(model)
    inputs = {name: _input_of(layer) for name, layer in layers.items()}
    with torch.no_grad():
        before = {name: layers[name](x) for name, x in inputs.items()}
        wanted = {name: truth[name](x) for name, x in inputs.items()}
    added = sum(float((wanted[name] - before[name]).double().norm() ** 2) for name in layers)
    assert added > 0.0, "the trainer's network changes nothing"
    guard, errors, left = LoraGuard(model), [], 0
    for mode in MODES:
        loras = [(trained.path, trained.strength)]
        left = guard.apply(loras, mode=mode, as_trained=trained.as_trained).loras[0].left_out.modules
        with torch.no_grad():
            wrong = (layers[name](x) - wanted[name] for name, x in inputs.items())
            errors.append((sum(float(difference.double().norm() ** 2) for difference in wrong) / added) ** 0.5)
        guard.remove()
    return Found(trained.modules - left, trained.modules, tuple(errors))


def _input_of(layer: Any) -> torch.Tensor:
    shape = (3, layer.in_features) if isinstance(layer, torch.nn.Linear) else (2, layer.in_channels, 5, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=layer.weight.dtype)


def _in_original(trained: Trained) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model in the authors' layout without the network, and its layers with it."""
    base = {name: parameter.detach() for name, parameter in trained.base.named_parameters()}
    hooked = {**base, **{f"{name}.weight": _weight_of(layer) for name, layer in layers_of(trained.hooked).items()}}
    models = []
    for state in (base, hooked):
        state = {f"diffusion_model.{name}": value for name, value in original(trained.family, state).items()}
        model = module_of({name: tuple(value.shape) for name, value in state.items()}).double()
        model.load_state_dict(state)
        models.append(model)
    return models[0], layers_of(models[1])


def _weight_of(layer: Any) -> torch.Tensor:
    """The weight that a layer runs with, from what it gives for one input after the other."""
    shape = (layer.in_features,) if isinstance(layer, torch.nn.Linear) else (layer.in_channels, *layer.kernel_size)
    assert isinstance(layer, torch.nn.Linear) or layer.stride == layer.kernel_size
    count = int(torch.tensor(shape).prod())
    with torch.no_grad():
        ones = torch.eye(count, dtype=layer.weight.dtype).reshape(count, *shape)
        given = layer(ones) - layer(torch.zeros_like(ones[:1]))
    return given.reshape(count, -1).T.reshape(layer.weight.shape)


# ---- the trainers' code


def _importable(name: str) -> types.ModuleType:
    """Imports a module of a trainer. Packages that are missing (cv2, torchvision, ...) are stood in for by empty ones."""
    for _ in range(40):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in ("networks", "library", "modules"):
                raise
            sys.modules[error.name] = _Empty(error.name)
    raise ImportError(name)


class _Empty(types.ModuleType):
    """A package that is not there: every name in it is a class without content."""

    __path__: Sequence[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def commit_of(checkout: Path) -> str:
    """The commit that a checkout is of, and its date."""
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%H of %cs"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class Whole(torch.nn.Module):
    """A pipeline's models under their names in diffusers."""

    def __init__(self, **parts: torch.nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def clip(width: int) -> torch.nn.Module:
    """One layer of a CLIP text encoder; 768 is CLIP-L, 1280 CLIP-G."""
    config = transformers.CLIPTextConfig(
        hidden_size=width, num_hidden_layers=1, num_attention_heads=width // 64, intermediate_size=64, vocab_size=50
    )
    return transformers.CLIPTextModel(config)


# ---- sd-scripts

SD_STRENGTH = 0.8


def _of_sd_scripts(
    folder: Path, model: torch.nn.Module, make: Callable[[torch.nn.Module], Any], load: Callable[..., Any] | None = None
) -> Trained:
    """Makes a network of sd-scripts on a model, and saves it by the network's own `save_weights`.

    Args:
        folder: for the file.
        model: what the network is for.
        make: makes the network on a model.
        load: makes the network that sd-scripts itself loads the file into, where that is not the one it has trained.
    """
    base = fill(model, 0.2).double()
    hooked = copy.deepcopy(base)
    network = make(hooked)
    if hasattr(network, "unet_ofts"):
        # It calculates in fp32 whatever the layer is.
        base, hooked = base.float(), hooked.float()
    parts = network.unet_ofts if hasattr(network, "unet_ofts") else [*network.text_encoder_loras, *network.unet_loras]
    network.apply_to(*_parts_of(hooked), True, True)
    fill(network, 0.1).to(next(base.parameters()).dtype)
    # A suffix other than safetensors: that way needs neither the trainer's hashes nor its image code.
    network.save_weights(str(folder / "own.pt"), None, None)
    state = torch.load(folder / "own.pt", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "own.safetensors")
    if load is not None:
        hooked = copy.deepcopy(base)
        loaded, _ = load(SD_STRENGTH, None, None, [], hooked, weights_sd=state)
        loaded.apply_to([], hooked, False, True)
        loaded.load_state_dict(state)
        loaded.double().eval().requires_grad_(False)
    strength = 1.0 if isinstance(network, _importable("networks.dylora").DyLoRANetwork) else SD_STRENGTH
    return Trained(base, hooked, folder / "own.safetensors", len(parts), strength)


def _parts_of(model: torch.nn.Module) -> tuple[list[torch.nn.Module], torch.nn.Module]:
    """The text encoders and the denoiser of a model."""
    if not isinstance(model, Whole):
        return [], model
    encoders = [part for name, part in model.named_children() if name.startswith("text_encoder")]
    return encoders, model.get_submodule("unet")


class _LastOfRange:
    """In place of `random`: DyLoRA's forward pass draws a rank each time, and the file is for the whole of it."""

    randint = staticmethod(lambda first, last: last)


def _unet(folder: Path, name: str, family: str, **options: Any) -> Trained:
    widths = {"SD 1.5": (768,), "SDXL": (768, 1280)}[family]
    encoders = {f"text_encoder{'_2' * n}": clip(width) for n, width in enumerate(widths)}
    model = Whole(unet=MAKERS[family](), **encoders)
    code: Any = _importable(f"networks.{name}")
    if name == "dylora":
        code.random = _LastOfRange

    def make(hooked: torch.nn.Module) -> Any:
        texts, unet = _parts_of(hooked)
        texts = texts if len(texts) > 1 else texts[0]
        network = code.OFTNetwork if name == "oft" else code.LoRANetwork if name != "dylora" else code.DyLoRANetwork
        return network(texts, unet, multiplier=SD_STRENGTH, **options)

    return _of_sd_scripts(folder, model, make)


def _flux(folder: Path, name: str, *, chroma: bool = False, is_loaded: bool = False, **options: Any) -> Trained:
    width = 64
    if chroma:
        models = _importable("library.chroma_models")
        params = models.ChromaParams(
            in_channels=16, context_in_dim=24, hidden_size=width, mlp_ratio=4.0, num_heads=2, depth=2,
            depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10_000, qkv_bias=True, guidance_embed=True,
            approximator_in_dim=16, approximator_depth=1, approximator_hidden_size=24, _use_compiled=False,
        )  # fmt: skip
        model = models.Chroma(params)
    else:
        models = _importable("library.flux_models")
        params = models.FluxParams(
            in_channels=16, vec_in_dim=24, context_in_dim=24, hidden_size=width, mlp_ratio=4.0, num_heads=2, depth=2,
            depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10_000, qkv_bias=True, guidance_embed=True,
        )  # fmt: skip
        model = models.Flux(params)
    code: Any = _importable(f"networks.{name}")
    if name == "oft_flux":
        code = _narrowed(code, width)
        return _of_sd_scripts(folder, model, lambda m: code.OFTNetwork([], m, multiplier=SD_STRENGTH, **options))

    class Network(code.LoRANetwork):
        """The widths of a fused layer's parts are numbers in the class: those of the small model."""

        @classmethod
        def get_qkv_mlp_split_dims(cls) -> list[int]:
            return [width] * 3 + [4 * width]

    load = code.create_network_from_weights if is_loaded else None
    return _of_sd_scripts(folder, model, lambda m: Network([], m, multiplier=SD_STRENGTH, **options), load)


@functools.cache
def _narrowed(code: types.ModuleType, width: int) -> types.ModuleType:
    """sd-scripts' OFT for Flux with the real model's width in its source, 3072, replaced by the small model's."""
    source = Path(str(code.__file__)).read_text(encoding="utf-8")
    narrowed = types.ModuleType("oft_flux_narrowed")
    source = source.replace("12288", str(4 * width)).replace("3072", str(width))
    exec(compile(source, str(code.__file__), "exec"), narrowed.__dict__)
    return narrowed


def _sd3(folder: Path, **options: Any) -> Trained:
    models = _importable("library.sd3_models")
    model = models.MMDiT(
        input_size=None, patch_size=2, in_channels=16, depth=2, adm_in_channels=24, context_embedder_in_features=24,
        context_embedder_out_features=128, pos_embed_max_size=8, num_patches=64, qk_norm="rms",
        x_block_self_attn_layers=[0], attn_mode="torch",
    )  # fmt: skip
    code = _importable("networks.lora_sd3")
    return _of_sd_scripts(folder, model, lambda m: code.LoRANetwork([], m, multiplier=SD_STRENGTH, **options))


def _lumina(folder: Path, **options: Any) -> Trained:
    models = _importable("library.lumina_models")
    model = models.NextDiT(
        patch_size=2, in_channels=4, dim=96, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=2, multiple_of=32,
        qk_norm=True, cap_feat_dim=24, axes_dims=[8, 8, 8], axes_lens=[16, 16, 16],
    )  # fmt: skip
    code = _importable("networks.lora_lumina")
    nothing = [torch.nn.Identity()]  # It wants one text encoder.
    return _of_sd_scripts(folder, model, lambda m: code.LoRANetwork(nothing, m, multiplier=SD_STRENGTH, **options))


def _anima(folder: Path, **options: Any) -> Trained:
    models = _importable("library.anima_models")
    model = models.Anima(
        max_img_h=64, max_img_w=64, max_frames=8, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1,
        model_channels=64, num_blocks=2, num_heads=4, crossattn_emb_channels=48, pos_emb_cls="rope3d",
        use_adaln_lora=True, adaln_lora_dim=8, use_llm_adapter=False,
    )  # fmt: skip
    code = _importable("networks.lora_anima")
    return _of_sd_scripts(folder, model, lambda m: code.LoRANetwork([], m, multiplier=SD_STRENGTH, **options))


RANKED = {"lora_dim": 4, "alpha": 2.0}
SD_SCRIPTS: dict[tuple[str, str, str], Callable[[Path], Trained] | str] = {
    ("`networks/lora.py`", "SD 1.5, with its text encoder", "LoRA, LoCon"): lambda f: _unet(
        f, "lora", "SD 1.5", **RANKED, conv_lora_dim=2, conv_alpha=1.0
    ),
    ("`networks/lora.py`", "SDXL, with both text encoders", "LoRA, LoCon"): lambda f: _unet(
        f, "lora", "SDXL", **RANKED, conv_lora_dim=2, conv_alpha=1.0, is_sdxl=True
    ),
    ("`networks/lora_fa.py`", "SD 1.5, with its text encoder", "LoRA-FA"): lambda f: _unet(
        f, "lora_fa", "SD 1.5", **RANKED, conv_lora_dim=2, conv_alpha=1.0
    ),
    ("`networks/dylora.py`", "SD 1.5, with its text encoder", "DyLoRA"): lambda f: _unet(
        f, "dylora", "SD 1.5", **RANKED, apply_to_conv=True, unit=1
    ),
    ("`networks/oft.py`", "SD 1.5", "OFT, bound not reached"): lambda f: _unet(
        f, "oft", "SD 1.5", dim=4, alpha=10.0, enable_all_linear=True, enable_conv=True
    ),
    ("`networks/oft.py`", "SD 1.5", "OFT at its bound"): lambda f: _unet(
        f, "oft", "SD 1.5", dim=4, alpha=1e-3, enable_all_linear=True, enable_conv=True
    ),
    ("`networks/lora_flux.py`", "Flux.1", "LoRA"): lambda f: _flux(f, "lora_flux", **RANKED, in_dims=[4] * 5),
    ("`networks/lora_flux.py`", "Flux.1", "LoRA, `split_qkv`, single blocks, as sd-scripts loads its file"): lambda f: (
        _flux(f, "lora_flux", **RANKED, split_qkv=True, train_blocks="single", is_loaded=True)
    ),
    ("`networks/lora_flux.py`", "Flux.1", "LoRA, `split_qkv`, double blocks"): lambda f: _flux(
        f, "lora_flux", **RANKED, split_qkv=True, train_blocks="double"
    ),
    ("`networks/lora_flux.py`", "Chroma", "LoRA"): lambda f: _flux(f, "lora_flux", chroma=True, **RANKED),
    ("`networks/oft_flux.py`", "Flux.1", "OFT, bound not reached"): lambda f: _flux(
        f, "oft_flux", dim=4, alpha=10.0, enable_all_linear=True
    ),
    ("`networks/oft_flux.py`", "Flux.1", "OFT at its bound"): lambda f: _flux(
        f, "oft_flux", dim=4, alpha=1e-3, enable_all_linear=True
    ),
    ("`networks/lora_sd3.py`", "SD 3.5", "LoRA"): lambda f: _sd3(f, **RANKED, emb_dims=[4] * 6),
    ("`networks/lora_lumina.py`", "Lumina 2", "LoRA"): lambda f: _lumina(f, **RANKED),
    ("`networks/lora_anima.py`", "Anima", "LoRA"): lambda f: _anima(f, **RANKED),
    ("`networks/lora_hunyuan_image.py`", "HunyuanImage", "LoRA"): "its model has one size, 17 billion parameters",
}
"""What makes each row, by code, model and kind; a sentence where it cannot be run."""


# ---- OneTrainer

FORMATS = ("LEGACY_LORA", "KOHYA_LORA", "DIFFUSERS_LORA", "ORIGINAL_LORA", "COMFY_LORA")
"""The formats in which OneTrainer saves a LoRA."""
UNETS: dict[str, Callable[[], torch.nn.Module]] = {
    "SD 1.5": lambda: UNet2DConditionModel(
        block_out_channels=(8, 8, 16, 16), norm_num_groups=4, cross_attention_dim=768, attention_head_dim=4
    ),
    "SDXL": lambda: UNet2DConditionModel(
        block_out_channels=(8, 8, 16), norm_num_groups=4, cross_attention_dim=2048, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=30,
    ),
}  # fmt: skip
"""U-Nets of the real number of blocks: OneTrainer's names for the authors' layout are made for it."""
WHOLE = {*((family, form) for family in UNETS for form in ("ORIGINAL_LORA", "COMFY_LORA")), ("SDXL", "KOHYA_LORA")}
"""Files in the authors' names, which need such a U-Net."""
FAMILIES = {
    "SD 1.5": ("StableDiffusionModel", "STABLE_DIFFUSION_15", "stableDiffusion.StableDiffusionLoRASaver"),
    "SDXL": ("StableDiffusionXLModel", "STABLE_DIFFUSION_XL_10_BASE", "stableDiffusionXL.StableDiffusionXLLoRASaver"),
    "SD 3": ("StableDiffusion3Model", "STABLE_DIFFUSION_35", "stableDiffusion3.StableDiffusion3LoRASaver"),
    "Flux.1": ("FluxModel", "FLUX_DEV_1", "flux.FluxLoRASaver"),
    "Chroma": ("ChromaModel", "CHROMA_1", "chroma.ChromaLoRASaver"),
    "Flux.2": ("Flux2Model", "FLUX_2", "flux2.Flux2LoRASaver"),
    "Z-Image": ("ZImageModel", "Z_IMAGE", "zImage.ZImageLoRASaver"),
    "Qwen-Image": ("QwenModel", "QWEN", "qwen.QwenLoRASaver"),
    "Krea 2": ("Krea2Model", "KREA_2", "krea2.Krea2LoRASaver"),
    "Anima": ("AnimaModel", "ANIMA", "anima.AnimaLoRASaver"),
    "ERNIE-Image": ("ErnieModel", "ERNIE", "ernie.ErnieLoRASaver"),
}
"""OneTrainer's class for a model, its name there, and what saves its LoRA."""
LORA = {"peft_type": "LORA"}
LOKR = {"peft_type": "LOKR", "lokr_dim": 2, "lokr_decompose_factor": 4}
OFT = {"peft_type": "OFT_2", "oft_block_size": 8}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": LORA,
    "DoRA": {**LORA, "lora_decompose": True},
    "DoRA by output": {**LORA, "lora_decompose": True, "lora_decompose_output_axis": True},
    "LoHa": {"peft_type": "LOHA"},
    "LoKr": LOKR,
    "LoKr, both sides in factors": {**LOKR, "lokr_dim": 1, "lokr_decompose_both": True},
    "LoKr, Tucker": {**LOKR, "lokr_use_tucker": True},
    "LoKr, whole sides": {**LOKR, "lokr_full_matrix": True},
    "LoKr with DoRA": {**LOKR, "lokr_weight_decompose": True},
    "LoKr with DoRA by output": {**LOKR, "lokr_weight_decompose": True, "lokr_dora_on_output": True},
    "OFT": {**OFT, "oft_scaled": False},
    "OFT, scaled": {**OFT, "oft_scaled": True},
    "OFT, one block for all": {**OFT, "oft_scaled": False, "oft_block_share": True},
}


def _of_onetrainer(folder: Path, family: str, kind: str, form: str) -> Trained:
    """Makes OneTrainer's network on a small model of diffusers, and saves it by OneTrainer's own saver."""
    of_model, of_type, of_saver = FAMILIES[family]
    enums = _importable("modules.util.enum.ModelType")
    model_format = _importable("modules.util.enum.ModelFormat").ModelFormat[form]
    config = _importable("modules.util.config.TrainConfig").TrainConfig.default_values()
    options = {"lora_rank": 4, "lora_alpha": 2.0, "train_device": "cpu", **KINDS[kind]}
    for name, value in options.items():
        assert hasattr(config, name), name
        setattr(config, name, enums.PeftType[value] if name == "peft_type" else value)
    config.output_model_format = model_format
    pipeline = getattr(_importable(f"modules.model.{of_model}"), of_model)(enums.ModelType[of_type])
    pipeline.train_config = config
    base = fill((UNETS if (family, form) in WHOLE else MAKERS)[family](), 0.2).double()
    hooked = copy.deepcopy(base)
    part = pipeline.model_type.denoising_model_part()
    groups = pipeline.fusion_groups()
    fuse = groups is not None and model_format.needs_qkv_fusion()
    without = None
    if fuse and kind.startswith(("LoHa", "LoKr")):
        config.layer_filter_regex, without = True, ["^(?!norm_out)"]
    wrapper = _importable("modules.module.LoRAModule").LoRAModuleWrapper(
        hooked, part, config, without, fusion_spec=groups, fuse=fuse
    )
    setattr(pipeline, part, hooked)
    setattr(pipeline, f"{part}_lora", wrapper)
    for number, module in enumerate(wrapper.lora_modules.values()):
        inner = getattr(module, "module", module)
        with torch.no_grad():
            for at, (name, parameter) in enumerate(inner.named_parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(50 * number + at)) * 0.1
                parameter.data = parameter.data.double()
                parameter.copy_(parameter * (1 + noise) if "dora_scale" in name else noise)
    wrapper.hook_to_module()
    saver = of_saver.rpartition(".")[2]
    path = folder / "own.safetensors"
    getattr(_importable(f"modules.modelSaver.{of_saver}"), saver)().save(pipeline, model_format, str(path), None)
    # Of what is fused in the file, some kinds cannot be cut into the layers of diffusers.
    return Trained(base, hooked, path, len(wrapper.lora_modules), as_trained=True, family=family if fuse else "")


# ---- the page


def _cell(make: Callable[[], Trained]) -> tuple[str, bool]:
    """What stands in a table for one file, and whether it is as it should be."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trained = make()
    except Exception as error:
        why = " ".join(str(error).split())[:90].replace("|", "/")
        return f"not run: {type(error).__name__}: {why}", True
    try:
        found = compared(trained)
    except Exception as error:
        return f"**{type(error).__name__}: {' '.join(str(error).split())[:200]}**", False
    text = f"{found.used}/{found.modules}, {max(found.errors):.0e}"
    return (text if found.is_right else f"**{text}**"), found.is_right


class Page:
    """The section of the document, and whether all of it is right."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.is_right = folder, True

    def cell(self, label: str, make: Callable[[], Trained]) -> str:
        """One file's cell, which is printed too."""
        text, is_right = _cell(make)
        self.is_right &= is_right
        print(f"{label}: {text}", file=sys.stderr)
        return text

    def of_sd_scripts(self) -> Iterator[str]:
        """The lines of sd-scripts' table."""
        yield "| code | model | kind | modules used, error |"
        yield "| --- | --- | --- | --- |"
        for (code, model, kind), make in SD_SCRIPTS.items():
            if isinstance(make, str):
                cell = f"not run: {make}"
            else:
                cell = self.cell(f"{code}, {model}, {kind}", functools.partial(make, self.folder))
            yield f"| {code} | {model} | {kind} | {cell} |"

    def of_onetrainer(
        self, first: str, rows: dict[str, tuple[str, str]], forms: Sequence[str] = FORMATS
    ) -> Iterator[str]:
        """The lines of a table of OneTrainer.

        Args:
            first: the heading of its first column.
            rows: model and kind by label.
            forms: the formats that are the other columns.
        """
        yield f"| {first} | " + " | ".join(f"`{form}`" for form in forms) + " |"
        yield "| --- |" + " --- |" * len(forms)
        for label, (family, kind) in rows.items():
            cells = [
                self.cell(
                    f"{family}, {kind}, {form}", functools.partial(_of_onetrainer, self.folder, family, kind, form)
                )
                for form in forms
            ]
            yield f"| {label} | " + " | ".join(cells) + " |"


def section(page: Page, sd_scripts: Path | None, onetrainer: Path | None) -> Iterator[str]:
    """The lines of the section; a project whose checkout is not given is left out."""
    yield f"""{HEADING}

Made by `python benchmarks/trainers_own.py --sd-scripts PATH --onetrainer PATH --write docs/spellings.md`, which runs the
network code of the two projects: it makes the file, saves it and calculates what every layer should give. A cell says how
many of the trainer's modules are used, and the largest error in the modes merge, bypass and on the fly, over all layers, as
a share of what the trainer's network adds (at most {LIMIT:.0e}). The models are small and random, and in fp64, but for sd-scripts'
OFT, which calculates in fp32.
"""
    if sd_scripts is not None:
        sys.path.insert(0, str(sd_scripts))
        yield f"### sd-scripts, commit {commit_of(sd_scripts)}\n"
        yield from page.of_sd_scripts()
        yield """
The models are sd-scripts' own classes in the authors' layout, for the U-Nets diffusers'. The multiplier is 0.8. Flux's width
stands in the network code as a number; the small model's is put in its place. DyLoRA's forward pass draws a rank; here it
is the whole. `split_qkv` saves the alpha of one part beside the rank of all four, so sd-scripts applies a quarter of what it
has trained of such a layer when it loads its own file; the guard reads the file as sd-scripts does.
"""
    if onetrainer is not None:
        sys.path.insert(0, str(onetrainer))
        yield f"### OneTrainer, commit {commit_of(onetrainer)}\n"
        yield from page.of_onetrainer("LoRA for", {family: (family, "LoRA") for family in FAMILIES})
        yield ""
        yield from page.of_onetrainer("Flux.1", {kind: ("Flux.1", kind) for kind in KINDS})
        yield ""
        yield from page.of_onetrainer("SD 1.5", {kind: ("SD 1.5", kind) for kind in KINDS}, FORMATS[:3])
        yield """
The models are diffusers', on which OneTrainer trains; files whose query, key and value are fused are applied to the authors'
layout of the same model. DoRA is applied with `as_trained`. `norm_out.linear` is not trained where a LoHa or LoKr is saved in
the authors' names: there OneTrainer changes the halves of a LoRA over and leaves those of LoHa and LoKr, so that such a file
moves the wrong half of `final_layer.adaLN_modulation.1` in every program that goes by its names.
"""


def main() -> int:
    """Prints the section, or writes it into a document; 1 if a file is not read as its trainer means it."""
    parser = argparse.ArgumentParser(description="The guard against sd-scripts' and OneTrainer's own code.")
    parser.add_argument("--sd-scripts", type=Path, help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--onetrainer", type=Path, help="a checkout of Nerogar/OneTrainer")
    parser.add_argument("--write", type=Path, help="write the section into this document")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        page = Page(Path(folder))
        made = "\n".join(section(page, arguments.sd_scripts, arguments.onetrainer))
    if arguments.write:
        arguments.write.write_text(replaced(arguments.write.read_text("utf-8"), HEADING, made), encoding="utf-8")
    else:
        print(made)
    return 0 if page.is_right else 1


if __name__ == "__main__":
    sys.exit(main())
