"""A module's name as trainers and tools write it."""


def dotted(*prefixes):
    return lambda name: "".join(prefixes) + name


def flat(prefix):
    return lambda name: prefix + name.replace(".", "_")


SPELLINGS = {
    "model": dotted(),
    "kohya": flat("lora_unet_"),
    "kohya text": flat("lora_te_text_model_"),
    "kohya double": flat("lora_unet__"),
    "lycoris": flat("lycoris_"),
    "peft": dotted("base_model.model."),
    "diffusers": dotted("transformer."),
    "unet": dotted("unet."),
    "bfl": dotted("diffusion_model."),
    "checkpoint": dotted("model.diffusion_model."),
    "compiled": dotted("_orig_mod."),
    "parallel": dotted("module."),
    "doubled": dotted("diffusion_model.", "diffusion_model."),
    "all": dotted("base_model.model.", "diffusion_model.", "_orig_mod.", "module."),
    "onetrainer": dotted("lora_transformer_"),
    "onetrainer flat": flat("lora_transformer_"),
    "oft": flat("oft_unet_"),
    "text": dotted("text_encoder."),
    "trailing": lambda name: f"lora_unet_{name.replace('.', '_')}_",
    "inner": lambda name: f"base_model.model.{name}.base_layer",
    "processor": lambda name: f"unet.{name}.processor",
    "unknown": lambda name: f"other.model.{name}.deeper",
    "digits": lambda name: name.replace("0", "7"),
}
WITH_PLACE = frozenset(
    (
        "model",
        "kohya",
        "lycoris",
        "peft",
        "bfl",
        "checkpoint",
        "compiled",
        "parallel",
        "doubled",
        "all",
        "kohya double",
        "trailing",
    )
)
"""Spellings whose modules are found in every model of these files."""


DOTTED = ("model", "peft", "compiled", "parallel", "text")


def for_place(spelling, place, model):
    """A spelling in which a module has its place: parts of a fused weight, and bare names, are only known in some."""
    if place.name == place.key and spelling == "trailing":
        return "kohya"
    if model == "clip" and spelling not in DOTTED:
        return "model"
    if place.rows is not None and place.name.startswith("transformer_blocks"):
        return "diffusers" if spelling in ("bfl", "checkpoint", "model", "doubled") else "peft"
    return "diffusers" if place.rows is not None and "." in place.name else spelling


def key(spelling, name, end, is_flat=False):
    """The tensor's name; `is_flat`: without a dot before the field."""
    module = SPELLINGS[spelling](name)
    return f"{module}_{end}" if is_flat else f"{module}.{end}"
