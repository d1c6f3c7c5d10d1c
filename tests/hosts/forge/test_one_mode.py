"""The mode of an image is that of its begin: another client may change it at any moment, and every model has the one."""

import types

import pytest
import torch
from contract.host import Host
from support.make import host_value
from support.webui import Request, Web

from lib_lora_guard.hosts.forge import takeover as forge
from lib_lora_guard.runtime.live_settings import LOW_BITS_OPTION, LiveSettings
from lib_lora_guard.settings import LoraMode

MODE = "lora_guard_mode"
AUTOMATIC, FP16, MERGE, OWN = LoraMode
PATCHES = {"blocks.0.proj.weight": host_value("lora", (32, 32), 5)}
TOKENS = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(1))


class Scene:
    """Forge's double with a text encoder and a U-Net that have one LoRA, and a WebUI that makes images of them."""

    def __init__(self, folder, monkeypatch):
        self.host = Host()
        self.guard = forge.install()
        self.models = [self._with_lora(seed) for seed in (0, 1)]
        self.web = Web(folder, monkeypatch)
        self.web.hooks.restore()
        modules = {name: self.web.modules[name] for name in ("modules.processing", "modules.sd_models")}
        modules["modules.shared"] = types.SimpleNamespace()
        assert self.guard.web.install(self.guard.hooks, modules) == []
        self.guard.settings.options = self.options = {}

    def _with_lora(self, seed):
        patcher = self.host.build("bf16", seed)[0].clone()
        patcher.add_patches(filename="/loras/a.safetensors", patches=PATCHES)
        return patcher

    def picture(self, between=lambda: None):
        """What both models make of one pass; `between` is called when the first has its LoRA and the second has not."""
        values = []
        for patcher, then in zip(self.models, (between, lambda: None), strict=True):
            with torch.inference_mode():
                values.append(self.host.load(patcher).model(TOKENS.bfloat16()))
            then()
        return torch.stack(values)

    def image(self, between=lambda: None, request=Request, **how):
        """Makes a request's images; returns each pass as a picture."""
        made = []
        self.web.after = lambda p: made.append(self.picture(between))
        self.web.image("", request, **how)
        return made

    def reference(self, mode):
        self.options[MODE] = mode.value
        return self.image()[0]


@pytest.fixture
def scene(tmp_path, monkeypatch):
    made = Scene(tmp_path, monkeypatch)
    yield made
    made.guard.settings.options = {}
    made.host.memory.current_loaded_models.clear()
    forge.uninstall()
    made.host.close()


@pytest.mark.parametrize("first", LoraMode)
def test_every_pass_of_an_image_has_the_mode_of_its_begin(scene, first):
    wanted = {mode: scene.reference(mode) for mode in LoraMode}
    assert len({value.float().numpy().tobytes() for value in wanted.values()}) >= 2, "a mode shows in the picture"
    others = [mode for mode in LoraMode if mode is not first] * 4
    scene.options[MODE] = first.value

    def by_another_client():
        scene.options[MODE] = others.pop().value

    passes = scene.image(by_another_client, n_iter=3, hr_prompt="")
    assert len(passes) == 6
    assert all(torch.equal(one, wanted[first]) for one in passes)
    last = scene.options[MODE]
    assert torch.equal(scene.image()[0], wanted[LoraMode(last)]), "the next image has what was set meanwhile"


def test_the_hosts_own_choice_of_16_bit_loras_counts_from_the_next_image_on(scene):
    modes = []

    def change():
        modes.append(scene.guard.settings.mode())
        scene.options[LOW_BITS_OPTION] = "Automatic (fp16 LoRA)"

    scene.image(change, n_iter=2)
    assert modes == [AUTOMATIC, AUTOMATIC]
    assert scene.guard.settings.mode() is FP16


def test_a_detailers_image_has_the_mode_of_the_image_around_it_or_its_own():
    settings = LiveSettings({MODE: MERGE.value})
    with settings.image():
        settings.options = {MODE: FP16.value}
        with settings.image():
            assert settings.mode() is MERGE, "changed by another client"
        with settings.image({MODE: OWN.value, "other": 1}):
            assert settings.mode() is OWN, "wanted by the detailer's own request"
        assert settings.mode() is MERGE
    assert settings.mode() is FP16


def test_an_image_that_ends_early_keeps_nothing(scene):
    scene.options[MODE] = MERGE.value
    with pytest.raises(RuntimeError, match="stopped"):
        scene.image(n_iter=2, stop_at=0)
    scene.options[MODE] = OWN.value
    assert scene.guard.settings.mode() is OWN


def test_the_options_of_a_request_are_its_own(scene):
    scene.options[MODE] = MERGE.value
    modes = []

    def request(prompt, **how):
        made = Request(prompt, **how)
        made.override_settings = {MODE: FP16.value}
        return made

    def outer():
        if not modes:
            modes.append(scene.guard.settings.mode())
            scene.image(lambda: modes.append(scene.guard.settings.mode()), request)
            modes.append(scene.guard.settings.mode())

    scene.image(outer)
    assert modes == [MERGE, FP16, MERGE]
