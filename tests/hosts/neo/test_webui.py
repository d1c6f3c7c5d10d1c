"""Neo's LoRA extension and prompts, as far as they differ from Forge's: no ranks, a reader made with partial, names looked at first."""

import functools
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.make import write_kohya

from lib_lora_guard.files import safetensors_file
from lib_lora_guard.hosts.neo.patchers import LORAS, NeoPatchers, loras_of
from lib_lora_guard.hosts.neo.unread_file import UnreadFile
from lib_lora_guard.hosts.webui import lora_files
from lib_lora_guard.hosts.webui.cond_caches import SharedCaches
from lib_lora_guard.hosts.webui.conditioning import Conditioning
from lib_lora_guard.hosts.webui.lora_files import LoraFiles
from lib_lora_guard.hosts.webui.networks import ROWS, LoraStack
from lib_lora_guard.hosts.webui.probe import check_networks
from lib_lora_guard.runtime.hooks import HookSet, lay
from lib_lora_guard.runtime.image_words import ImageWords
from lib_lora_guard.runtime.live_settings import LiveSettings

MODULES = {"lora_unet_blocks_0_qkv": (96, 32), "lora_unet_blocks_0_proj": (32, 32)}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)


class Patcher:
    """A patcher of Neo's, cloned as its hook clones it."""

    def __init__(self, model):
        self.model, self.patches, self.patches_uuid, self.weight_wrapper_patches = model, {}, "an id", {}

    def clone(self):
        return NeoPatchers().clone(lambda patcher: type(self)(patcher.model), self)


class Clip:
    def __init__(self, patcher):
        self.patcher, self.cond_stage_model = patcher, patcher.model

    def clone(self):
        return Clip(self.patcher.clone())


NEOS_READING = {}
"""What Neo reads of a file."""


def load_torch_file(ckpt, safe_load=False):
    return dict(NEOS_READING[ckpt.rpartition("/")[2]])


class Web:
    """Neo's `networks`, which looks at the names of a file before it hands it over."""

    def __init__(self, folder, monkeypatch):
        module = self.networks = types.ModuleType("networks")
        self.model = types.SimpleNamespace(current_lora_hash="")
        self.unet = Patcher(torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([Block()])}))
        self.clip = Clip(Patcher(torch.nn.Linear(2, 2)))
        self.result, self.read = None, []
        module.load_lora_state_dict = functools.partial(load_torch_file, safe_load=True)
        module.load_networks, module.load_lora_for_models = self._load_networks, self._by_neo
        module.available_networks, module.forbidden_network_aliases = {}, set()
        module.available_network_aliases = {
            path.stem: types.SimpleNamespace(filename=str(path)) for path in folder.glob("*.safetensors")
        }
        module.update_available_networks_by_names = lambda names: None
        module.list_available_networks = lambda: None
        module.extra_network_lora = types.SimpleNamespace(errors={})
        module.sd_models = types.SimpleNamespace(model_data=types.SimpleNamespace(get_sd_model=lambda: self.model))
        settings = LiveSettings({"lora_guard_language": "en"})
        self.files = LoraFiles(settings, words=ImageWords(), patchers=NeoPatchers(), state_class=UnreadFile)
        check_networks(module)
        self.hooks = HookSet()
        stack = LoraStack(module, self.files, lambda: None)
        lay(ROWS, stack, {"networks": module}, self.hooks)

    def _load_networks(self, names, te_multipliers=None, unet_multipliers=None):
        module, unet, clip = self.networks, self.unet, self.clip
        for name, strength, te in zip(names, unet_multipliers, te_multipliers, strict=True):
            path = module.available_network_aliases[name].filename
            state = module.load_lora_state_dict(path)
            if any(key.startswith("lora_unet__") for key in state):
                raise AssertionError("Neo would take the file apart")
            unet, clip = module.load_lora_for_models(unet, clip, state, strength, te, filename=path, online_mode=False)
        self.result = unet

    def _by_neo(self, model, clip, lora, strength_model, strength_clip, filename="default", online_mode=False):
        self.read.append(lora)
        return model, clip

    def prompt(self, *loras):
        names, strengths = [name for name, _ in loras], [strength for _, strength in loras]
        self.networks.load_networks(names, strengths, strengths)
        return [(lora.filename.rpartition("/")[2], lora.strength) for lora in loras_of(self.result)]


@pytest.fixture
def web(tmp_path, monkeypatch):
    write_kohya(tmp_path / "a.safetensors", MODULES)
    write_kohya(tmp_path / "b.safetensors", {k.replace("lora_unet_", "lora_unet__"): v for k, v in MODULES.items()})
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    return Web(tmp_path, monkeypatch)


def test_loras_lie_on_the_patcher_and_not_in_its_patches(web):
    assert web.prompt(("a", 0.5), ("b", -1.0)) == [("a.safetensors", 0.5), ("b.safetensors", -1.0)]
    assert web.result.patches == {}
    assert not loras_of(web.unet), "the first patcher stays as it is"
    assert loras_of(web.result.clone()) == loras_of(web.result)
    assert {key for lora in loras_of(web.result) for key in lora.terms} == {
        "blocks.0.qkv.weight",
        "blocks.0.proj.weight",
    }
    assert web.read == []


def test_a_file_that_is_no_lora_and_a_name_that_is_none_leave_the_others_alone(web):
    assert web.prompt(("a", 0.5), ("page", 1.0), ("nobody", 1.0), ("b", 1.0)) == [
        ("a.safetensors", 0.5),
        ("b.safetensors", 1.0),
    ]
    assert set(web.files.left_out) == {"page.safetensors"}
    assert set(web.files.missing) == {"nobody"}


def test_the_same_lora_twice_counts_twice_as_in_neo(web, lines):
    assert web.prompt(("a", 0.5), ("a", 0.5)) == [("a.safetensors", 0.5)] * 2
    assert lines.about("once") == []


def test_a_nunchaku_model_is_left_to_neo_which_is_said(web, lines):
    web.unet.__class__ = type("NunchakuPatcher", (Patcher,), {})
    web.prompt(("a", 1.0))
    assert len(web.read) == 1
    assert len(lines.about("nunchaku")) == 1
    assert not hasattr(web.result, LORAS)


def test_what_the_guard_cannot_read_neo_gets_as_a_dict_of_its_own(web, lines, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("planted")

    monkeypatch.setitem(NEOS_READING, "b.safetensors", {"lora_unet__x.alpha": torch.ones(1)})
    monkeypatch.setattr(web.files, "_match", fail)
    web.prompt(("b", 1.0))
    (lora,) = web.read
    assert type(lora) is dict, "Neo pops what it has read"
    assert list(lora) == ["lora_unet_x.alpha"]
    assert len(lines.about("Forge's own reader is used")) == 1


def test_what_a_patcher_asks_for_is_compared_by_factors_and_strength(web):
    patchers = NeoPatchers()
    web.prompt(("a", 0.5))
    first = list(patchers.entries(web.result))
    web.prompt(("a", 0.5))
    assert list(patchers.entries(web.result)) == first, "the same file, the same factors"
    web.prompt(("a", 0.25))
    assert list(patchers.entries(web.result)) != first
    web.result.patches = {"blocks.0.qkv.weight": []}
    web.result.patches = {"blocks.0.qkv.weight": [1]}
    assert list(patchers.entries(web.result))[-1] == ("an id", {})


class Processing:
    """Neo's: there is no old scheduling any more."""

    width = height = 64
    cached_c = ["nothing yet", None]  # noqa: RUF012

    def cached_params(self, required_prompts, steps, extra_network_data, hires_steps):
        picture = self.init_latent.tolist() if isinstance(self, Img2Img) else None
        return (
            required_prompts,
            steps,
            hires_steps,
            extra_network_data,
            picture,
        )

    def get_conds_with_caching(self, function, required_prompts, steps, caches, extra_network_data, hires_steps=None):
        params = self.cached_params(required_prompts, steps, extra_network_data, hires_steps)
        if caches[0][0] != params:
            caches[0][:2] = [params, function(required_prompts)]
        return caches[0][1]


class Img2Img(Processing):
    """An image out of another, which a VAE encodes with noise."""

    def __init__(self, init_latent):
        self.init_latent = init_latent


def test_a_prompt_is_encoded_again_only_where_the_text_encoders_loras_change(web):
    clip, encoded = web.clip, []
    model = types.SimpleNamespace(forge_objects=types.SimpleNamespace(clip=clip))
    opts = types.SimpleNamespace(persistent_cond_cache=True)

    class Model:
        forge_objects = model.forge_objects

    shared = types.SimpleNamespace(sd_model=Model(), opts=opts)
    caches = SharedCaches(types.SimpleNamespace(StableDiffusionProcessing=Processing))
    conditioning = Conditioning(shared, caches, lambda: "Automatic", patchers=NeoPatchers())
    hooks = HookSet()
    hooks.add(Processing, "cached_params", conditioning.cached_params)
    hooks.add(Processing, "get_conds_with_caching", conditioning.get_conds_with_caching)

    def image(strength, processing=None):
        web.prompt(("a", strength))
        setattr(clip.patcher, LORAS, loras_of(web.result) if strength > 1 else ())
        uses = [types.SimpleNamespace(items=["a", str(strength)], positional=["a", str(strength)], named={})]
        return (processing or Processing()).get_conds_with_caching(
            lambda prompts: encoded.append(prompts) or len(encoded),
            ["a cat"],
            20,
            [Processing.cached_c],
            {"lora": uses},
        )

    try:
        assert [image(0.5), image(0.25), image(2.0), image(2.0), image(3.0), image(0.5)] == [1, 1, 2, 2, 3, 1]
        assert [image(0.25, Img2Img(picture)) for picture in (torch.ones(1), torch.rand(1))] == [4, 4]
        assert [image(2.0, Img2Img(torch.rand(1))), image(0.25)] == [5, 1]
    finally:
        hooks.restore()


@pytest.fixture
def headers(monkeypatch):
    """The names of the files whose headers are read."""
    read, found = safetensors_file.read_header, []

    def read_header(path, *args):
        found.append(Path(path).name)
        return read(path, *args)

    monkeypatch.setattr(safetensors_file, "read_header", read_header)
    return found


def test_the_names_that_neo_asks_for_cost_no_reading_of_their_own(web, headers):
    web.prompt(("a", 0.5))
    assert headers == ["a.safetensors"]
    web.prompt(("a", 0.5), ("b", 1.0))
    assert headers == ["a.safetensors", "b.safetensors"], "the one that is kept is not read again"


def test_a_file_of_which_neo_asks_the_names_alone_is_not_kept(web):
    with web.files.announced_stack({}, is_empty=False):
        names = list(web.networks.load_lora_state_dict(web.networks.available_network_aliases["b"].filename))
    assert len(names) == 6
    assert all(name.startswith("lora_unet_blocks_0_") for name in names), "as Neo spells them"
    assert (web.files._named, web.files.bytes) == (None, 0)


def test_names_that_are_asked_for_outside_a_stack_read_no_values(web, headers, monkeypatch):
    monkeypatch.setattr(lora_files, "read_lora_file", lambda *args, **options: pytest.fail("read for nothing"))
    state = web.networks.load_lora_state_dict(web.networks.available_network_aliases["b"].filename)
    assert (len(state), headers) == (6, ["b.safetensors"])
    assert web.files._named is None


def test_a_file_that_changes_after_neo_has_seen_its_names_is_read_as_it_is_then(web, tmp_path):
    path = tmp_path / "a.safetensors"
    with web.files.announced_stack({}, is_empty=False):
        state = web.networks.load_lora_state_dict(str(path))
        assert len(state) == 6
        write_kohya(path, {"lora_unet_blocks_0_proj": (32, 32)})
        patcher, _ = web.networks.load_lora_for_models(web.unet, None, state, 1.0, 1.0, filename=str(path))
    assert [list(lora.terms) for lora in loras_of(patcher)] == [["blocks.0.proj.weight"]]


def test_a_file_whose_values_never_came_is_read_once_more_and_not_twice(web, headers):
    web.prompt(("a", 0.5))
    ((key, file),) = web.files._kept.items()
    web.files._kept[key] = replace(file, coming=types.SimpleNamespace(has_failed=True))
    web.prompt(("a", 0.25))
    assert headers == ["a.safetensors"] * 2
    assert web.files._kept[key].coming is None


def test_files_for_nunchaku_are_neos_to_read(web, headers, monkeypatch):
    web.unet.__class__ = type("NunchakuPatcher", (Patcher,), {})
    web.prompt(("a", 1.0))
    monkeypatch.setattr(lora_files, "read_lora_file", lambda *args, **options: pytest.fail("read for nothing"))
    web.prompt(("b", 1.0))
    assert headers == ["a.safetensors", "b.safetensors"]
    assert len(web.read) == 2


def test_a_model_is_walked_once_for_a_stack_and_again_for_the_next(web, monkeypatch):
    walked, shape_of = [], lora_files.shape_of
    monkeypatch.setattr(lora_files, "shape_of", lambda parameter: walked.append(parameter) or shape_of(parameter))
    parameters = 6  # of the model's two layers, and of the text encoder's one
    for images in (1, 2):
        web.prompt(("a", 0.5), ("b", 1.0))
        assert len(walked) == images * parameters
