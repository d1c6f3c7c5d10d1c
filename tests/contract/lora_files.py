"""LoRA files for the contract suite, and a LoRA extension like Forge's."""

import types

MODULES = {"lora_unet_blocks_0_qkv": (96, 32), "lora_unet_blocks_0_proj": (32, 32)}


class TextEncoder:
    """What Forge hands over as `clip`: a patcher under another attribute's name."""

    def __init__(self, patcher):
        self.patcher = patcher
        self.cond_stage_model = patcher.model

    def clone(self):
        return TextEncoder(self.patcher.clone())

    def add_patches(self, **kwargs):
        return self.patcher.add_patches(**kwargs)


def not_called(*args, **kwargs):
    raise AssertionError("the host's own reader was asked")


def own_reader(read):
    """`read` as the host's own reader: another's would be listened to."""

    def load_lora_state_dict(filename):
        return read(filename)

    return load_lora_state_dict


def load(files, patcher, path, strength=1.0, clip=None):
    state = files.load_state(own_reader(not_called), str(path))
    return files.load_for_models(not_called, patcher, clip, state, strength, strength, str(path))


def picture(host, patcher, x):
    host.load(patcher)
    return patcher.model(x)


def lora_extension(folder):
    """A module like Forge's `networks`, which knows the LoRAs in `folder` and notes what it is asked for."""

    module = types.ModuleType("networks")
    module.loaded = []

    def load_lora_for_models(model, clip, lora, strength_model, strength_clip, filename="default", online_mode=False):
        return model, clip

    def load_networks(names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
        module.loaded.append((list(names), te_multipliers, unet_multipliers, dyn_dims))

    def update_available_networks_by_names(names):
        for path in folder.glob("*.safetensors"):
            if path.stem in names:
                module.available_network_aliases[path.stem] = types.SimpleNamespace(filename=str(path))

    model = types.SimpleNamespace(current_lora_hash="as it was")
    module.load_lora_for_models, module.load_lora_state_dict = load_lora_for_models, lambda filename: {}
    module.load_networks, module.list_available_networks = load_networks, lambda: None
    module.update_available_networks_by_names = update_available_networks_by_names
    module.available_networks, module.available_network_aliases, module.forbidden_network_aliases = {}, {}, {}
    module.sd_models = types.SimpleNamespace(model_data=types.SimpleNamespace(get_sd_model=lambda: model))
    module.extra_network_lora = types.SimpleNamespace(errors={})
    module.model = model
    return module
