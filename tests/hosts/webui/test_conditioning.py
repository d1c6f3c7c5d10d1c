"""When a prompt is encoded anew: a small copy of what Forge does around it, with a text encoder that counts."""

import functools
import types
from collections import namedtuple

import pytest
import torch
from support.make import host_value, rand

from lib_lora_guard.adapters.patch_tuples import parse_value, value_of
from lib_lora_guard.hosts.webui.cond_caches import SharedCaches
from lib_lora_guard.hosts.webui.conditioning import Conditioning
from lib_lora_guard.runtime.hooks import HookSet
from lib_lora_guard.runtime.prompt_cache import PromptCache, PromptMemory

Scheduled = namedtuple("Scheduled", ["end_at_step", "cond"])


class Multicond:
    def __init__(self, batch):
        self.shape, self.batch = (len(batch),), batch


Multicond.__module__ = "modules.prompt_parser"


class Prompts(list):
    is_negative_prompt = False


class Use:
    """One `<lora:...>` of a prompt."""

    def __init__(self, *items):
        self.items = list(items)
        self.positional = [item for item in items if "=" not in item]
        self.named = dict(item.split("=") for item in items if "=" in item)

    def __eq__(self, other):
        return self.items == other.items

    __hash__ = None


class Processing:
    cached_c = [None, None, None]  # noqa: RUF012  # shared by all images, as in Forge
    cached_uc = [None, None, None]  # noqa: RUF012

    def __init__(self, shared):
        self.shared = shared
        self.cached_c, self.cached_uc = Processing.cached_c, Processing.cached_uc

    def clear_prompt_cache(self):
        self.cached_c, self.cached_uc = [None, None, None], [None, None, None]
        Processing.cached_c, Processing.cached_uc = [None, None, None], [None, None, None]

    def cached_params(self, required_prompts, steps, extra_network_data, hires_steps=None, use_old_scheduling=False):
        return (required_prompts, steps, hires_steps, use_old_scheduling, extra_network_data)

    def get_conds_with_caching(self, function, required_prompts, steps, caches, extra_network_data, hires_steps=None):
        params = self.cached_params(required_prompts, steps, extra_network_data, hires_steps, False)
        for cache in caches:
            if cache[0] is not None and cache[0] == params:
                self.shared.infotext.update(cache[2])
                return cache[1]
        caches[0][:] = [params, function(required_prompts), {"TI": f"embedding in {required_prompts[0]}"}]
        self.shared.infotext.update(caches[0][2])
        return caches[0][1]


class Txt2Img(Processing):
    cached_hr_c = [None, None, None]  # noqa: RUF012
    cached_hr_uc = [None, None, None]  # noqa: RUF012


MODULE = types.SimpleNamespace(StableDiffusionProcessing=Processing, StableDiffusionProcessingTxt2Img=Txt2Img)


class World:
    """A model, its text encoder's patches, and the two hooks."""

    def __init__(self, tokens=None):
        clip = types.SimpleNamespace(patcher=types.SimpleNamespace(lora_patches={}))
        self.model = type("Model", (), {})()
        self.model.forge_objects = types.SimpleNamespace(clip=clip)
        opts = types.SimpleNamespace(use_old_scheduling=False, persistent_cond_cache=True)
        self.shared = types.SimpleNamespace(sd_model=self.model, opts=opts, infotext={})
        self.mode, self.encoded, self.way = "Automatic", [], ""
        self.hooks = HookSet()
        self.loaded = "a.safetensors, its own text encoder"
        self.conditioning = Conditioning(
            self.shared, SharedCaches(MODULE), lambda: self.mode, tokens=tokens, loaded=lambda: self.loaded
        )
        self.hooks.add(Processing, "cached_params", self.conditioning.cached_params)
        self.hooks.add(Processing, "get_conds_with_caching", self.conditioning.get_conds_with_caching)
        for owner, name in ((Processing, "cached_c"), (Processing, "cached_uc"), (Txt2Img, "cached_hr_c")):
            setattr(owner, name, [None, None, None])

    def patch(self, patches):
        self.model.forge_objects.clip.patcher.lora_patches = patches

    def encode(self, prompts):
        self.encoded.append(self.way + prompts[0])
        cond = {"crossattn": rand(8, 16, seed=len(self.encoded)), "guidance": None, "scale": 3.5}
        return Multicond([[Scheduled(20, cond)]] * 2)

    def image(self, prompt, network_data=None, caches=None):
        return self.part_of(Processing(self.shared), prompt, network_data, caches)

    def part_of(self, processing, prompt, network_data=None, caches=None):
        conds = processing.get_conds_with_caching(
            self.encode, Prompts([prompt]), 20, caches or [processing.cached_c], network_data or {}
        )
        return conds.batch[0][0].cond["crossattn"]

    @property
    def memory(self):
        return self.conditioning._cache.of(self.model)


@pytest.fixture
def world():
    world = World()
    yield world
    world.hooks.restore()


def lora(*items):
    return {"lora": [Use(*items)]}


def on_text_encoder(value, strength=1.0, name="s.safetensors"):
    return {(name, strength, 1.0, False): {"layer.weight": [[strength, value, 1.0, None, None]]}}


def test_a_lora_that_the_text_encoder_does_not_see_encodes_nothing(world):
    for strength in ("1", "0.5", "0.25"):
        world.image("a cat", lora("style", strength, "unet=0.3", "dyn=4"))
    world.image("a cat")
    assert world.encoded == ["a cat"]


def test_what_lies_on_the_text_encoder_counts_by_tensor_and_strength(world):
    value = host_value("lora", (16, 16), 1)
    same_again = ("lora", tuple(value[1]))
    retrained = host_value("lora", (16, 16), 2)
    for patches in (
        {},
        on_text_encoder(value),
        on_text_encoder(same_again),
        on_text_encoder(value, 0.5),
        on_text_encoder(retrained, 0.5),
        on_text_encoder(retrained, 0.5, "other.safetensors"),
    ):
        world.patch(patches)
        world.image("a cat")
    assert len(world.encoded) == 5, "all but the one that is the same tensors again"
    world.patch({})
    world.image("a cat")
    assert len(world.encoded) == 5, "and that one is remembered"


def test_a_file_that_is_still_read_is_not_waited_for(world):
    def wait():
        pytest.fail("the text encoder could be placed meanwhile")

    files = [parse_value(host_value("lora", (16, 16), seed), {}) for seed in (1, 2)]
    for adapter, encoded in ((files[0], 1), (files[0], 1), (files[1], 2)):
        # Of each stack the host makes patches of its own.
        world.patch(on_text_encoder(value_of(adapter, wait)))
        world.image("a cat")
        assert len(world.encoded) == encoded


def test_a_strength_edited_in_place_is_seen(world):
    patches = on_text_encoder(host_value("lora", (16, 16), 1))
    world.patch(patches)
    world.image("a cat")
    next(iter(patches.values()))["layer.weight"][0][0] = 0.1
    world.image("a cat")
    assert len(world.encoded) == 2


def test_another_mode_and_arguments_that_others_read_encode_anew(world):
    world.patch(on_text_encoder(host_value("lora", (16, 16), 1)))
    for data, mode in (
        (lora("style", "1"), "Automatic"),
        (lora("style", "1"), "Merge"),
        (lora("style", "1", "lbw=MIDD"), "Merge"),
        (lora("style", "1", "1", "MIDD"), "Merge"),
        (lora("style", "0@0,1@1"), "Merge"),
        ({"hypernet": [Use("x", "1")]}, "Merge"),
        ({"hypernet": [Use("x", "0.5")]}, "Merge"),
    ):
        world.mode = mode
        world.image("a cat", data)
    assert len(world.encoded) == 7


def test_a_text_encoder_without_loras_does_the_same_in_every_mode(world):
    for mode in ("Automatic", "Merge", "fp16 LoRA", "Forge's own"):
        world.mode = mode
        world.image("a cat", lora("style", "1"))
    assert len(world.encoded) == 1


def test_alternating_prompts_are_encoded_once_each_and_are_the_same_numbers(world):
    first = {name: world.image(name).clone() for name in ("a", "b", "c")}
    for name in "abcabc":
        assert torch.equal(world.image(name), first[name])
        assert world.shared.infotext["TI"] == f"embedding in {name}"
    assert world.encoded == ["a", "b", "c"]


def test_what_a_user_of_a_conditioning_writes_into_it_does_not_stay(world):
    first = world.image("a").clone()
    world.image("b")
    world.image("a").zero_()
    world.image("b")
    assert torch.equal(world.image("a"), first)
    assert world.encoded == ["a", "b"]


def test_a_layer_of_the_text_encoder_that_another_extension_has_replaced_encodes_anew(world):
    """regional-prompter does its work in there."""
    clip = world.model.forge_objects.clip
    clip.cond_stage_model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for name in ("a", "b", "a"):
        world.image(name)
    clip.cond_stage_model[1].forward = lambda x: x
    for name, strength in (("a", "1"), ("a", "1"), ("a", "0.5"), ("b", "0.5"), ("a", "0.5")):
        world.image(name, lora("style", strength))
    assert world.encoded == ["a", "b", "a", "a", "b", "a"], "as Forge itself does"


def test_an_emptied_cache_means_that_all_is_encoded_anew(world):
    for name in ("a", "b"):
        world.image(name)
    Processing.cached_c[:] = [None, None, None]
    for name in ("b", "a", "b"):
        world.image(name)
    assert world.encoded == ["a", "b", "b", "a"]


def test_another_model_has_a_memory_of_its_own_and_takes_it_along(world):
    import gc

    world.image("a")
    world.image("b")
    old, world.model = world.model, type("Model", (), {})()
    world.model.forge_objects = old.forge_objects
    world.shared.sd_model = world.model
    Processing.cached_c[0] = "another checkpoint's"
    world.image("a")
    assert world.encoded == ["a", "b", "a"]
    del old
    gc.collect()
    assert len(world.conditioning._cache._memories) == 1


def test_hires_and_negative_prompts_do_not_answer_for_each_other(world):
    negative = Prompts(["a"])
    negative.is_negative_prompt = True
    processing = Processing(world.shared)
    caches = [processing.cached_c]
    caches[0][0] = "x"
    processing.get_conds_with_caching(world.encode, Prompts(["a"]), 20, caches, {})
    caches[0][0] = "y"
    processing.get_conds_with_caching(world.encode, negative, 20, caches, {})
    caches[0][0] = "z"
    processing.get_conds_with_caching(world.encode, Prompts(["a"]), 20, caches, {}, 40)
    assert len(world.encoded) == 3


def test_with_the_hosts_option_off_nothing_is_kept(world):
    world.shared.opts.persistent_cond_cache = False
    for name in "aba":
        world.image(name)
    assert world.encoded == ["a", "b", "a"]
    assert len(world.memory) == 0


def test_a_text_encoder_that_looks_otherwise_leaves_the_hosts_own_key(world):
    del world.model.forge_objects.clip.patcher
    for strength in ("1", "0.5"):
        world.image("a", lora("style", strength))
    assert world.encoded == ["a", "a"]


def test_the_memory_is_bounded_shares_what_a_batch_shares_and_lies_in_ram():
    tensor = torch.zeros(1000, dtype=torch.float32)
    one = Multicond([[Scheduled(20, tensor)]] * 8)
    memory = PromptMemory(limit_bytes=10_000)
    for key in range(5):
        memory.keep(key, one, {})
    assert (memory.bytes, len(memory)) == (8000, 2)
    assert memory.find(2) is None
    found, _ = memory.find(3)
    assert found.batch[0] is found.batch[7]
    memory.keep(9, one, {})
    assert memory.find(4) is None, "3 was used after it"
    memory.keep("huge", torch.zeros(5000), None)
    assert memory.find("huge") is None
    assert len(memory) == 2, "and it sends nothing away"


def test_a_conditioning_of_unknown_parts_is_not_remembered():
    memory = PromptMemory()
    memory.keep("key", [object()], {})
    assert len(memory) == 0


class Sized(Prompts):
    def __init__(self, prompt, width):
        super().__init__([prompt])
        self.width = width


def test_another_size_is_another_conditioning(world):
    """SDXL's conditioning holds the size, and a hires pass brings another one than the picture's."""

    def image(prompt, width):
        Processing(world.shared).get_conds_with_caching(
            world.encode, Sized(prompt, width), 20, [Processing.cached_c], {}
        )

    for prompt, width in (("a cat", 1536), ("a dog", 1536), ("a cat", 2048), ("a cat", 1536)):
        image(prompt, width)
    assert world.encoded == ["a cat", "a dog", "a cat"]


def test_one_more_or_one_less_who_hooks_the_text_encoder_encodes_anew(world):
    encoder = torch.nn.Linear(2, 2)
    world.model.forge_objects.clip.cond_stage_model = encoder
    for prompt in ("a", "b", "a"):
        world.image(prompt)
    assert world.encoded == ["a", "b"]
    handle = encoder.register_forward_hook(lambda *all: None)
    for prompt in ("a", "b", "a"):
        world.image(prompt)
    assert world.encoded == ["a", "b", "a", "b"]
    handle.remove()
    world.image("a")
    assert len(world.encoded) == 4, "what was encoded without it is still known"


def test_a_function_without_a_name(world):
    world.image("a")
    world.encode = functools.partial(world.encode)
    assert world.image("b") is not None


def test_a_prompt_whose_loras_could_not_be_applied_is_not_remembered():
    world = World()
    world.conditioning._has_applied = lambda patcher: is_applied
    world.model.forge_objects.clip.patcher.lora_loader = object()
    try:
        is_applied = True
        world.image("first")
        is_applied = False
        world.image("a cat")
        is_applied = True
        world.image("a cat")
        world.image("a cat")
        assert world.encoded == ["first", "a cat", "a cat"]
    finally:
        world.hooks.restore()


class Words:
    """Tokenizers that take no notice of blanks between words."""

    def __init__(self):
        self.asked = []

    def are_same(self, some, others, how):
        self.asked.append((some, list(others), how.steps, how.hires_steps, how.old_scheduling))
        return [text.split() for text in some] == [text.split() for text in others]


@pytest.fixture
def words():
    world = World(Words())
    yield world
    world.hooks.restore()


def test_a_prompt_that_differs_in_blanks_alone_is_not_encoded_where_its_tokens_are_the_same(words):
    first = words.image("a cat").clone()
    assert torch.equal(words.image("a cat ", lora("style", "1")), first)
    assert words.shared.infotext["TI"] == "embedding in a cat"
    words.image("a dog").zero_()
    assert torch.equal(words.image("a  cat  "), first)
    assert not torch.equal(words.image("ac at"), first)
    assert words.encoded == ["a cat", "a dog", "ac at"]
    asked = [(some, others) for some, others, *_ in words.conditioning._tokens.asked]
    assert asked == [(["a cat"], ["a cat "]), (["a cat"], ["a  cat  "]), (["a cat"], ["ac at"])], "and of no dog"
    assert words.conditioning._tokens.asked[0][2:] == (20, None, (False,))
    assert len(words.memory) == 3, "one for each that was encoded"


def test_the_newest_of_several_is_looked_at_first_and_others_too(words):
    ours = {text: words.image(text).clone() for text in ("a cat", "ac at", "aca t")}
    for text, conds in ours.items():
        words.image("a dog")
        assert torch.equal(words.image(f" {text}"), conds)
    assert words.encoded == ["a cat", "ac at", "aca t", "a dog"]


def test_blanks_hide_nothing_else_of_the_key(words):
    """Another text encoder's LoRA, other sizes, steps, a negative prompt, other arguments, another model."""
    processing, cache = Processing(words.shared), [Processing.cached_c]

    def image(prompts, data=None, hires_steps=None):
        cache[0][0] = "other"
        processing.get_conds_with_caching(words.encode, prompts, 20, cache, data or {}, hires_steps)

    negative = Prompts(["a cat "])
    negative.is_negative_prompt = True
    image(Sized("a cat", 1024))
    for prompts, data, hires_steps in (
        (Sized("a cat ", 1536), None, None),
        (Sized(" a cat", 1024), lora("style", "1", "lbw=MIDD"), None),
        (Sized("a [cat]  ", 1024), None, None),
        (Sized("a [cat]", 1024), None, 40),
        (negative, None, None),
    ):
        image(prompts, data, hires_steps)
    words.patch(on_text_encoder(host_value("lora", (16, 16), 1)))
    image(Sized(" a  cat", 1024))
    words.mode = "Merge"
    image(Sized(" a cat ", 1024))
    words.patch({})
    words.mode = "Automatic"
    words.shared.sd_model = type("Model", (), {"forge_objects": words.model.forge_objects})()
    image(Sized("  a cat", 1024))
    assert len(words.encoded) == 9
    assert words.conditioning._tokens.asked == []


class Part:
    """A part of a prompt, as the WebUI's class with the long name."""

    def __init__(self, *schedules):
        self.schedules = list(schedules)


Part.__module__ = "modules.prompt_parser"


def of_parts(*ends):
    """What is encoded of a positive prompt that has one part with so many conditionings."""
    return lambda prompts: Multicond(
        [[Part(*(Scheduled(end, {"crossattn": torch.full((2, 2), end)}) for end in ends))]]
    )


def of_list(*ends):
    """The same of a negative prompt."""
    return lambda prompts: [[Scheduled(end, {"crossattn": torch.full((2, 2), end)}) for end in ends]]


@pytest.mark.parametrize("made_of", [of_parts, of_list])
@pytest.mark.parametrize(
    ("prompt", "ends", "is_encoded_again"),
    [("a cat", (20,), False), ("a [cat:dog:9]", (9, 20), True), ("a [cat]", (20,), True), ("{cat|dog}", (9, 20), True)],
    ids=["the same in all steps", "a schedule", "brackets", "an extension's own signs"],
)
def test_other_steps_encode_only_what_changes_between_steps(words, prompt, ends, is_encoded_again, made_of):
    encoded = []

    def image(steps, hires_steps=None, text=prompt):
        def encode(prompts):
            encoded.append(steps)
            return made_of(*ends)(prompts)

        processing = Processing(words.shared)
        processing.cached_c[0] = processing.cached_c[0] and "another prompt's"
        conds = processing.get_conds_with_caching(
            encode, Prompts([text]), steps, [processing.cached_c], {}, hires_steps
        )
        found = conds.batch[0][0].schedules if made_of is of_parts else conds[0]
        assert [int(one.cond["crossattn"][0, 0]) for one in found] == list(ends)
        return found[-1].end_at_step

    ended = [image(20), image(50), image(20, 30), image(4, text=f"{prompt} ")]
    assert encoded == ([20, 50, 20, 4] if is_encoded_again else [20])
    assert ended == ([20] * 4 if is_encoded_again else [20, 50, 30, 4])


def test_an_emptied_cache_forgets_other_ways_to_write_a_prompt_too(words):
    words.image("a cat")
    Processing.cached_c[:] = [None, None, None]
    words.image("a cat ")
    words.image("a cat")
    assert words.encoded == ["a cat", "a cat "]


def test_prompts_that_are_no_list_of_texts_are_encoded_as_by_the_host(words):
    for prompts in (("a cat",), ["a cat", 1]):
        for mark in ("x", "y"):
            Processing.cached_c[0] = mark
            Processing(words.shared).get_conds_with_caching(words.encode, prompts, 20, [Processing.cached_c], {})
    assert words.encoded == ["a cat", "a cat"]


def test_the_switches_for_bug_reports(monkeypatch):
    encoded = {"LORA_GUARD_BLANKS": ["a cat", "a cat "], "LORA_GUARD_PROMPTS": ["a cat", "a cat ", "a cat", "a cat"]}
    for name, wanted in encoded.items():
        with monkeypatch.context() as environment:
            environment.setenv(name, "0")
            world = World(Words())
        try:
            for prompt in ("a cat", "a cat ", "a cat"):
                world.image(prompt)
            world.image("a cat", lora("style", "1"))
            assert world.encoded == wanted
        finally:
            world.hooks.restore()


def emptied(processing):
    """Forge's `manage_model_and_prompt_cache` after a setting has changed, with the guard around it."""
    SharedCaches(MODULE).emptied_in_place(lambda p: p.clear_prompt_cache(), processing)
    return processing


@pytest.mark.parametrize("then", ["a cat", "a cat "])
def test_what_the_first_image_after_an_unload_encodes_is_there_for_the_next(words, then):
    """As at the begin of each session: the next one has the first LoRA."""
    words.image("a cat")
    first = emptied(Processing(words.shared))
    made = words.part_of(first, "a cat").clone()
    assert first.cached_c is Processing.cached_c
    assert torch.equal(words.image(then, lora("style", "1")), made)
    assert words.encoded == ["a cat", "a cat"], "once before and once after"


def test_the_switch_leaves_an_unload_to_the_host(world, monkeypatch):
    monkeypatch.setenv("LORA_GUARD_PROMPTS", "0")
    first = emptied(Processing(world.shared))
    assert first.cached_c is not Processing.cached_c


def test_an_unload_empties_the_caches_of_the_hires_pass_as_well(world):
    Txt2Img.cached_hr_c[:] = ["key of another text encoder", object(), {}]
    caches = Txt2Img.cached_hr_c, Processing.cached_c
    emptied(Txt2Img(world.shared))
    assert Txt2Img.cached_hr_c == [None, None, None]
    assert (Txt2Img.cached_hr_c, Processing.cached_c) == caches
    Txt2Img.cached_hr_c[:] = mine = ["key", object(), {}]
    SharedCaches(MODULE).emptied_in_place(lambda p: None, Txt2Img(world.shared))
    assert Txt2Img.cached_hr_c == mine, "nothing was emptied"


def test_a_cache_that_was_never_filled_says_nothing_of_what_is_remembered(words):
    """CFG 1 makes no negative conditioning, and the first image has its negative prompt encoded first."""
    for text in ("ugly", "blurred", "ugly"):
        words.image(text, caches=[Processing.cached_uc])
    assert words.encoded == ["ugly", "blurred"]
    words.image("a cat")
    words.image("a cat ", lora("style", "1"))
    words.image("blurred", caches=[Processing.cached_uc])
    assert words.encoded == ["ugly", "blurred", "a cat"]


def test_a_pass_with_caches_of_its_own_neither_gives_nor_takes_nor_empties(words):
    """A detailer's pass has them; and an image whose encoding an extension has changed in a way that no key tells."""
    plain = words.image("a cat").clone()
    own, words.way = [[None, None]], "changed "
    for prompt in ("a cat", "a cat"):
        assert not torch.equal(words.image(prompt, caches=own), plain)
    words.image("a dog", caches=own)
    words.way = ""
    assert torch.equal(words.image("a cat ", lora("style", "1")), plain)
    words.image("a dog")
    assert torch.equal(words.image("a cat"), plain)
    assert words.encoded == ["a cat", "changed a cat", "changed a dog", "a dog"]


def test_what_an_image_encodes_after_an_extension_has_emptied_the_caches_is_its_own(world):
    """The extension empties them for this image alone; the next one is encoded as the host does."""
    world.image("a cat")
    changed = Processing(world.shared)
    changed.clear_prompt_cache()
    world.part_of(changed, "a cat")
    world.image("a dog")
    world.image("a cat")
    assert world.encoded == ["a cat", "a cat", "a dog", "a cat"]


def test_a_detailers_pass_whose_image_is_unloaded_for_keeps_its_own_caches(world):
    inner = Processing(world.shared)
    inner.cached_c = [None, None]
    emptied(inner)
    assert inner.cached_c is not Processing.cached_c
    assert inner.cached_uc is Processing.cached_uc


def test_a_host_without_a_hires_pass_and_one_without_caches():
    module = types.SimpleNamespace(StableDiffusionProcessing=type("P", (), {"cached_c": ["key", 1, {}]}))
    caches = SharedCaches(module)
    assert not caches.look()
    assert caches.are_shared([module.StableDiffusionProcessing.cached_c])
    module.StableDiffusionProcessing.cached_c = [None, None, None]
    assert caches.look()
    assert not caches.look()
    assert SharedCaches(types.SimpleNamespace()).emptied_in_place(lambda p, q: p + q, 1, q=2) == 3


def read_again(world, entry):
    """Another model object for a checkpoint of the host's list."""
    world.shared.sd_model = type(
        "Model", (), {"forge_objects": world.model.forge_objects, "sd_checkpoint_info": entry}
    )()


def test_a_checkpoint_that_a_refiner_took_away_and_that_is_read_again_has_its_prompts(words):
    base, refiner = type("CheckpointInfo", (), {})(), type("CheckpointInfo", (), {})()
    for prompt in ("a cat", "a cat ", " a cat"):
        for words.loaded, entry in (("base", base), ("refiner", refiner)):
            Processing.cached_c[0] = "the other checkpoint's"
            read_again(words, entry)
            words.image(prompt, lora("style", "1"))
    assert words.encoded == ["a cat", "a cat"], "once for each"
    read_again(words, type("CheckpointInfo", (), {})())
    Processing.cached_c[0] = "the other checkpoint's"
    words.image("a cat  ")
    assert len(words.encoded) == 3, "the file's entry is another one: the list was read anew"


@pytest.mark.parametrize("text", ["a cat", "a [cat]"])
def test_a_hires_pass_with_other_text_encoders_encodes_anew(words, text):
    """The host's key does not hold them. A refiner may have the same ones: what the host's own cache gives it is the host's business."""
    read_again(words, type("CheckpointInfo", (), {})())
    processing = Processing(words.shared)

    def image(hires_steps, loaded, prompt):
        words.loaded = loaded
        processing.get_conds_with_caching(words.encode, Prompts([prompt]), 20, [Processing.cached_c], {}, hires_steps)
        return len(words.encoded)

    first = image(None, "own", text)
    assert image(None, "refiner", text) == first == 1, "the host's own cache"
    assert image(40, "t5 fp8", text) == 2
    assert image(40, "own", text) == (2 if text == "a cat" else 3), "without a schedule it is the first pass's"
    count = len(words.encoded)
    for loaded in ("t5 fp8", "own"):
        assert image(40, loaded, f"{text} ") == count
    assert image(None, "t5 fp8", f" {text}") == (count if text == "a cat" else count + 1)


def test_the_prompts_of_other_models_give_way_the_oldest_first():
    cache, models = PromptCache(limit_bytes=10_000), [type("Model", (), {})() for _ in range(3)]
    for model in models:
        cache.of(model).keep("key", torch.zeros(1000), {})
    assert [len(cache.of(model)) for model in models] == [1, 0, 1], "12 kB were one too many"
    cache.of(models[1]).keep("key", torch.zeros(1000), {})
    assert [len(cache.of(models[place])) for place in (1, 2, 0)] == [1, 1, 0], "the first was asked for before the last"
    assert cache.forget() == 8000
