"""A WebUI that makes images of tags: it reads them, loads LoRAs, makes batches and a second pass, and shows comments, as Forge does.

Sources: `modules/processing.py`, `modules/extra_networks.py` and `extensions-builtin/sd_forge_lora` of Forge.
"""

import html
import logging
import re
import sys
import types
from dataclasses import dataclass, field

import torch

from lib_lora_guard.hosts.webui.lora_files import LoraFiles
from lib_lora_guard.hosts.webui.takeover import WebTakeover
from lib_lora_guard.messages import message_of
from lib_lora_guard.runtime.hooks import HookSet
from lib_lora_guard.runtime.image_words import ImageWords
from lib_lora_guard.runtime.journal import Journal
from lib_lora_guard.runtime.live_settings import LiveSettings
from lib_lora_guard.runtime.rule_log import RuleLog


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)


class Patcher:
    """A model with a stack by file and strength: the same key again replaces what was there, as in Forge."""

    def __init__(self, model, stack=None):
        self.model = self.cond_stage_model = model
        self.lora_patches = dict(stack or {})

    def clone(self):
        return Patcher(self.model, self.lora_patches)

    def add_patches(self, *, filename, patches, strength_patch=1.0, strength_model=1.0, online_mode=False):
        self.lora_patches[filename, strength_patch, strength_model, online_mode] = patches
        return list(patches)


class Params:
    """A tag, split as `modules.extra_networks.ExtraNetworkParams` splits it."""

    def __init__(self, items=None):
        self.items = items or []
        parts = [item.split("=", 2) for item in self.items]
        self.positional = [item for item, part in zip(self.items, parts, strict=True) if len(part) != 2]
        self.named = {part[0]: part[1] for part in parts if len(part) == 2}


class Entry:
    """A file in the list of LoRAs: `network.NetworkOnDisk`. It is hashed when it is first in a prompt."""

    def __init__(self, web, path):
        self.web, self.filename, self.hash = web, str(path), None

    def read_hash(self):
        if not self.hash:
            self.web.when_hashing(self)
            self.hash = "8 hexadecimal digits"


@dataclass(repr=False)
class Request:
    """`StableDiffusionProcessing`: without a hash, as a dataclass is that can be compared."""

    prompt: str
    n_iter: int = 1
    hr_prompt: str | None = None
    is_hr_pass: bool = False
    comments: dict = field(default_factory=dict)
    stop_at: int | None = None

    def comment(self, text):
        self.comments[text] = 1


@dataclass
class OldRequest:
    """The same in a WebUI without comments."""

    prompt: str
    n_iter: int = 1
    hr_prompt: str | None = None
    is_hr_pass: bool = False
    stop_at: int | None = None


def page(request):
    """What stands under the image: `modules.ui_common.plaintext_to_html` of Forge, of the comments one on a line."""
    text = "".join(f"{comment}\n" for comment in request.comments)
    return "<p class='comments'>" + "<br>\n".join(html.escape(line) for line in text.split("\n")) + "</p>"


class Web:
    """The WebUI. `after(request)` is called in each pass, once the LoRAs are chosen, `when_hashing(entry)` for a new file."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.stack, self.after, self.tracebacks = folder, None, lambda request: None, []
        self.when_hashing = lambda entry: None
        self.sd_model = types.SimpleNamespace(current_lora_hash="")
        self.unet, self.clip = Patcher(torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([Block()])})), None
        self.networks = self._networks()
        self.modules = {
            "networks": self.networks,
            "extra_networks_lora": self._extra_networks_lora(),
            "modules.extra_networks": types.SimpleNamespace(extra_network_registry={}, extra_network_aliases={}),
            "modules.sd_samplers_common": types.SimpleNamespace(
                __name__="modules.sd_samplers_common",
                Sampler=type("Sampler", (), {"launch_sampling": lambda self, steps, f: f()}),
            ),
            "modules.script_callbacks": types.SimpleNamespace(
                on_cfg_denoiser=lambda call: None, on_app_started=lambda call: None
            ),
            "modules.processing": self._processing(),
            "modules.shared": types.SimpleNamespace(),
            "modules.sd_models": types.SimpleNamespace(),
        }
        for name, module in self.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        self.network = self.modules["extra_networks_lora"].ExtraNetworkLora()
        self.networks.extra_network_lora = self.network
        self.settings = LiveSettings({"lora_guard_language": "en"})
        self.words = ImageWords(self.settings.language)
        self.files = LoraFiles(self.settings, words=self.words)
        stacks = types.SimpleNamespace(invalidate_all=lambda: None, is_current=lambda patcher: True)
        strengths = types.SimpleNamespace(are_changed=False, restore=lambda: None)
        self.takeover = WebTakeover(
            self.settings, self.files, stacks, strengths, Journal(lambda: None), RuleLog(), None, lambda modules: 0
        )
        self.hooks = HookSet()
        assert self.takeover.install(self.hooks, self.modules) == []

    def _networks(self):
        web, module = self, types.ModuleType("networks")

        def load_lora_for_models(
            model, clip, lora, strength_model, strength_clip, filename="default", online_mode=False
        ):
            raise AssertionError("the host's own reader")

        def load_lora_state_dict(filename):
            raise AssertionError("the host's own reader")

        def load_networks(names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
            found = [module.available_network_aliases.get(name) for name in names]
            for entry in found:
                entry.read_hash()
            module.loaded_networks[:] = [
                types.SimpleNamespace(mentioned_name=name, network_on_disk=entry)
                for name, entry in zip(names, found, strict=True)
            ]
            targets = [[e.filename, u, t] for e, u, t in zip(found, unet_multipliers, te_multipliers, strict=True)]
            if web.sd_model.current_lora_hash == str(targets):
                return
            web.sd_model.current_lora_hash = str(targets)
            patcher, clip = web.unet, web.clip
            for filename, unet, text in targets:
                state = module.load_lora_state_dict(filename)
                patcher, clip = module.load_lora_for_models(patcher, clip, state, unet, text, filename=filename)
            web.stack = patcher.lora_patches

        def list_available_networks():
            for path in web.folder.glob("*.safetensors"):
                module.available_network_aliases[path.stem] = Entry(web, path)

        module.load_lora_for_models, module.load_lora_state_dict = load_lora_for_models, load_lora_state_dict
        module.load_networks, module.list_available_networks = load_networks, list_available_networks
        module.update_available_networks_by_names = lambda names: list_available_networks()
        module.available_networks, module.available_network_aliases, module.forbidden_network_aliases = {}, {}, {}
        module.loaded_networks = []
        module.sd_models = types.SimpleNamespace(model_data=types.SimpleNamespace(get_sd_model=lambda: web.sd_model))
        return module

    def _extra_networks_lora(self):
        networks = self.networks

        class ExtraNetworkLora:
            def __init__(self):
                self.errors = {}

            def activate(self, p, params_list):
                self.errors.clear()
                names, texts, unets, ranks = [], [], [], []
                for params in params_list:
                    names.append(params.positional[0])
                    text = float(params.positional[1]) if len(params.positional) > 1 else 1.0
                    text = float(params.named.get("te", text))
                    unet = float(params.positional[2]) if len(params.positional) > 2 else text
                    unet = float(params.named.get("unet", unet))
                    rank = int(params.positional[3]) if len(params.positional) > 3 else None
                    rank = int(params.named["dyn"]) if "dyn" in params.named else rank
                    texts.append(text)
                    unets.append(unet)
                    ranks.append(rank)
                networks.load_networks(names, texts, unets, ranks)

            def deactivate(self, p):
                if self.errors:
                    p.comment("Networks with errors: " + ", ".join(f"{k} ({v})" for k, v in self.errors.items()))
                    self.errors.clear()

        return types.SimpleNamespace(
            __name__="extra_networks_lora", ExtraNetworkLora=ExtraNetworkLora, networks=networks
        )

    def _processing(self):
        web = self

        class StableDiffusionProcessing:
            def cached_params(self, required_prompts, steps, extra_network_data, hires_steps=None, use_old=False):
                return required_prompts, steps, str(extra_network_data)

            def get_conds_with_caching(
                self, function, required_prompts, steps, caches, extra_network_data, hires_steps=None
            ):
                return function(required_prompts)

        def process_images_inner(p):
            for n in range(p.n_iter):
                web.activate(p, p.prompt)
                web.after(p)
                if p.stop_at == n:
                    raise RuntimeError("stopped")
                if p.hr_prompt is not None:
                    p.is_hr_pass = True
                    web.activate(p, p.hr_prompt)
                    web.after(p)
                    p.is_hr_pass = False
            if hasattr(p, "comment"):
                web.network.deactivate(p)
            return p

        return types.SimpleNamespace(
            __name__="modules.processing",
            StableDiffusionProcessing=StableDiffusionProcessing,
            manage_model_and_prompt_cache=lambda p: None,
            process_images_inner=process_images_inner,
            need_global_unload=False,
        )

    def activate(self, p, prompt):
        """As `modules.extra_networks.activate`: an error of the network is printed, and the image is made without it."""
        tags = [Params(found.split(":")) for found in re.findall(r"<lora:([^>]+)>", prompt)]
        try:
            self.network.activate(p, tags)
        except Exception as error:
            self.tracebacks.append(error)

    def image(self, prompt, request=Request, **how):
        """Makes the images of a prompt; returns the request."""
        p = request(prompt, **how)
        self.modules["modules.processing"].process_images_inner(p)
        assert self.tracebacks == []
        return p

    def strengths(self):
        """The files of the present stack on the U-Net by name, with their strengths."""
        return [(re.split(r"[\\/]", key[0])[-1].removesuffix(".safetensors"), key[1]) for key in self.stack]


class Lines(logging.Handler):
    """The log, as the panel keeps it."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.levelname, str(message_of(record))))

    def about(self, words):
        return [line for _, line in self.lines if words in line]
