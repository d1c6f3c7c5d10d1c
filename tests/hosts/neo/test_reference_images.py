"""Images that a prompt is encoded with: Neo hands them to the model while it encodes, so a remembered prompt must not be taken."""

import types

import pytest

from lib_lora_guard.hosts.neo import reference_images
from lib_lora_guard.hosts.neo.patchers import NeoPatchers
from lib_lora_guard.hosts.webui.cond_caches import SharedCaches
from lib_lora_guard.hosts.webui.conditioning import Conditioning


class Model:
    """Flux.2 of Neo: its images go to the denoiser with the prompt."""

    def __init__(self, arguments):
        self.ini_latent, self.ref_latents, self.arguments, self.encoded = None, [], arguments, []
        self.forge_objects = types.SimpleNamespace(
            clip=types.SimpleNamespace(patcher=types.SimpleNamespace(patches={}))
        )

    def encode(self, prompts):
        images = [*self.ref_latents]
        if self.ini_latent is not None:
            images.insert(0, self.ini_latent)
            self.ini_latent = None
        self.arguments.ref_latents = images
        self.encoded.append(prompts[0])
        return f"conditioning of {prompts[0]}"


class Processing:
    def __init__(self, conditioning, model, picture):
        self.conditioning, self.model, self.picture = conditioning, model, picture

    def cached_params(self, required_prompts, steps, extra_network_data, hires_steps):
        def original(processing, prompts, steps, data, hires_steps):
            return prompts, steps, hires_steps, data, self.picture

        return self.conditioning.cached_params(original, self, required_prompts, steps, extra_network_data, hires_steps)

    def get_conds_with_caching(self, function, prompts, steps, caches, extra_network_data, hires_steps=None):
        params = self.cached_params(prompts, steps, extra_network_data, hires_steps)
        if caches[0][0] != params:
            caches[0][:] = [params, function(prompts), {}]
        return caches[0][1]


@pytest.fixture
def world(monkeypatch):
    arguments = type("dynamic_args", (), {"ref_latents": []})
    model = Model(arguments)
    shared = types.SimpleNamespace(sd_model=model, opts=types.SimpleNamespace(persistent_cond_cache=True))
    monkeypatch.setitem(reference_images.sys.modules, "backend.args", types.SimpleNamespace(dynamic_args=arguments))
    monkeypatch.setitem(reference_images.sys.modules, "modules.shared", shared)
    cache = [["other", None, None]]
    host = types.SimpleNamespace(StableDiffusionProcessing=type("Shared", (), {"cached_c": cache[0]}))
    conditioning = Conditioning(
        shared,
        SharedCaches(host),
        lambda: "Automatic",
        patchers=NeoPatchers(),
        is_left_to_host=reference_images.are_there,
    )

    def image(prompt, picture=None):
        """Makes an image out of another; returns what the denoiser looks at."""
        if picture is not None:
            model.ini_latent = picture
        processing = Processing(conditioning, model, picture)
        everything = (model.encode, [prompt], 20, cache, {})
        found = conditioning.get_conds_with_caching(Processing.get_conds_with_caching, processing, *everything)
        assert found == f"conditioning of {prompt}"
        return arguments.ref_latents

    return types.SimpleNamespace(image=image, model=model)


def test_the_denoiser_looks_at_the_images_of_its_own_prompt(world):
    assert world.image("a cat") == []
    assert world.image("a dog", "first picture") == ["first picture"]
    assert world.image("a cat") == [], "not at the dog's"
    assert world.image("a dog", "second picture") == ["second picture"]
    assert world.image("a dog", "first picture") == ["first picture"]
    world.model.ref_latents = ["stitched"]
    assert world.image("a cat", "third picture") == ["third picture", "stitched"]


def test_without_images_prompts_are_remembered(world):
    for prompt in ("a cat", "a dog", "a cat"):
        world.image(prompt)
    assert world.model.encoded == ["a cat", "a dog"]
