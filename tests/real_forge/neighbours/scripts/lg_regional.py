"""As sd-webui-regional-prompter: replaces `networks.load_networks`, sets `online_lora` to False after every image, writes
the attributes of the LoraLoader itself through a `refresh` of its own, from inside the text encoder's forward, and
changes strengths on the layers between two calls of the U-Net.

Setting: `{"text": factor}` for the pasted refresh, `{"regions": [factor for cond, factor for uncond]}`.
"""

import lg_neighbours
import torch
from backend import operations, utils
from backend.args import dynamic_args
from backend.patcher import lora as patcher_lora
from modules import sd_models, shared

if lg_neighbours.wanted("regional"):

    class Regional(lg_neighbours.script_class()):
        called = "regional"

        def process(self, p, setting="", **kwargs):
            settings = self.read(setting)
            if not settings:
                dynamic_args["online_lora"] = False
                return
            import networks

            networks.load_networks = load_networks
            dynamic_args["online_lora"] = True
            STATE.clear()
            STATE.update(settings, text_strengths={}, layer_strengths={})

        def process_batch(self, p, setting="", **kwargs):
            if not STATE:
                return
            first = next(m for n, m in p.sd_model.forge_objects.clip.cond_stage_model.named_modules() if n.endswith("layers.0.self_attn.q_proj"))  # fmt: skip
            first.forward = text_layer.__get__(first)
            if "regions" in STATE:
                p.sd_model.forge_objects.unet.set_model_unet_function_wrapper(by_region)

        def postprocess(self, p, processed, setting="", **kwargs):
            dynamic_args["online_lora"] = False
            STATE.clear()


STATE = {}


def load_networks(names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
    """Forge's own steps, with the rule for `online` turned around: wide storage is patched on the fly."""
    import networks

    lg_neighbours.work("regional load_networks")
    model = sd_models.model_data.get_sd_model()
    networks.loaded_networks.clear()
    networks.update_available_networks_by_names([n for n in names if n not in networks.available_network_aliases])
    files = [networks.available_network_aliases.get(name) for name in names]
    for name, file in zip(names, files, strict=True):
        network = networks.load_network(name, file)
        network.mentioned_name = name
        networks.loaded_networks.append(network)
    wide = model.forge_objects.unet.model.storage_dtype in (torch.float32, torch.float16, torch.bfloat16)
    online = wide and dynamic_args.get("online_lora", False)
    targets = [[f.filename, u, t, online] for f, u, t in zip(files, unet_multipliers, te_multipliers, strict=True)]
    if model.current_lora_hash == str(targets):
        return
    model.current_lora_hash = str(targets)
    unet, clip = model.forge_objects_original.unet, model.forge_objects_original.clip
    for filename, for_unet, for_text, online_mode in targets:
        state = networks.load_lora_state_dict(filename)
        unet, clip = networks.load_lora_for_models(
            unet, clip, state, for_unet, for_text, filename=filename, online_mode=online_mode
        )
    model.forge_objects.unet, model.forge_objects.clip = unet, clip
    model.forge_objects_after_applying_lora = model.forge_objects.shallow_copy()


def text_layer(self, x):
    """In place of the forward of the text encoder's first projection, and for ever."""
    if "text" in STATE:
        weigh_text(STATE["text"])
    if self.parameters_manual_cast:
        weight, bias, signal = operations.weights_manual_cast(self, x)
        with operations.main_stream_worker(weight, bias, signal):
            return torch.nn.functional.linear(x, weight, bias)
    weight, bias = operations.get_weight_and_bias(self)
    return torch.nn.functional.linear(x, weight, bias)


def weigh_text(factor):
    patcher = shared.sd_model.forge_objects.clip.patcher
    for identifier, patches in patcher.lora_patches.items():
        for key, entries in patches.items():
            strength = STATE["text_strengths"].setdefault((identifier[0], key), entries[0][0])
            entries[0][0] = strength * factor
    lg_neighbours.work("regional refresh")
    pasted_refresh(patcher.lora_loader, patcher.lora_patches, patcher.offload_device)


def pasted_refresh(loader, lora_patches, offload_device):
    """Forge's refresh in words of our own: undo, then patch, and write down what was done. It never asks whether there is
    anything to do."""
    stack = {}
    for identifier, patches in lora_patches.items():
        for key, entries in patches.items():
            stack.setdefault((key, identifier[3]), []).extend(entries)
    devices = patcher_lora.get_parameter_devices(loader.model)
    for layer in set(loader.online_backup):
        del layer.forge_online_loras
    for key, weight in loader.backup.items():
        parameter = weight if isinstance(weight, torch.nn.Parameter) else torch.nn.Parameter(weight, False)
        utils.set_attr_raw(loader.model, key, parameter)
    loader.online_backup, loader.backup = [], {}
    patcher_lora.set_parameter_devices(loader.model, parameter_devices=devices)
    for (key, online), entries in stack.items():
        layer, name, weight = utils.get_attr_with_parent(loader.model, key)
        if online:
            if not hasattr(layer, "forge_online_loras"):
                layer.forge_online_loras = {}
            layer.forge_online_loras[name] = entries
            loader.online_backup.append(layer)
            continue
        loader.backup.setdefault(key, weight.to(device=offload_device))
        merged = patcher_lora.merge_lora_to_weight(entries, weight, key, computation_dtype=torch.float32)
        utils.set_attr_raw(loader.model, key, torch.nn.Parameter(merged, requires_grad=False))
    patcher_lora.set_parameter_devices(loader.model, parameter_devices=devices)
    loader.loaded_hash = str(list(lora_patches.keys()))


def by_region(apply, params):
    """One call of the U-Net per cond, with the strengths of its region written on the layers before."""
    kinds, c = params["cond_or_uncond"], params["c"]
    size = params["input"].shape[0] // len(kinds)
    outputs = []
    for n, kind in enumerate(kinds):
        part = slice(n * size, (n + 1) * size)
        weigh_layers(STATE["regions"][kind])
        own = {
            k: v[part] if isinstance(v, torch.Tensor) and v.shape[0] == size * len(kinds) else v for k, v in c.items()
        }
        outputs.append(apply(params["input"][part], params["timestep"][part], **own))
    return torch.cat(outputs)


def weigh_layers(factor):
    lg_neighbours.work("regional strengths")
    for name, module in shared.sd_model.forge_objects.unet.model.named_modules():
        entries = (getattr(module, "forge_online_loras", None) or {}).get("weight")
        if not entries:
            continue
        original = STATE["layer_strengths"].setdefault(name, [entry[0] for entry in entries])
        for entry, strength in zip(entries, original, strict=True):
            entry[0] = strength * factor
