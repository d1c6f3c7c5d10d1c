"""The parts that a WebUI loads late: all that fit are taken over, once, and what does not fit is named."""

import types

import pytest

from lib_lora_guard.hosts.webui.images import pass_of, steps_of
from lib_lora_guard.hosts.webui.lora_files import LoraFiles
from lib_lora_guard.hosts.webui.takeover import WebTakeover
from lib_lora_guard.runtime.hooks import HookSet
from lib_lora_guard.runtime.journal import Journal
from lib_lora_guard.runtime.live_settings import LiveSettings
from lib_lora_guard.runtime.rule_log import RuleLog


class Processing:
    """`StableDiffusionProcessing` as far as it is looked at."""

    def cached_params(self, required_prompts, steps, extra_network_data, hires_steps=None, use_old_scheduling=False):
        return required_prompts, steps, str(extra_network_data)

    def get_conds_with_caching(self, function, required_prompts, steps, caches, extra_network_data, hires_steps=None):
        return function(required_prompts)


def webui():
    """A WebUI's modules by name, fresh ones each time."""

    class StableDiffusionProcessing(Processing):
        cached_params = Processing.cached_params
        get_conds_with_caching = Processing.get_conds_with_caching

    networks = types.SimpleNamespace(
        __name__="networks",
        load_lora_for_models=lambda model, clip, lora, strength_model, strength_clip, filename="x", online_mode=False: (
            0
        ),
        load_lora_state_dict=lambda filename: {},
        load_networks=lambda names, te_multipliers=None, unet_multipliers=None, dyn_dims=None: names,
        available_networks={},
        available_network_aliases={},
        forbidden_network_aliases={},
        sd_models=types.SimpleNamespace(model_data=None),
        update_available_networks_by_names=None,
        list_available_networks=None,
    )
    processing = types.SimpleNamespace(
        __name__="modules.processing",
        StableDiffusionProcessing=StableDiffusionProcessing,
        manage_model_and_prompt_cache=lambda p: "managed",
        process_images_inner=lambda p: f"images of {p}",
        need_global_unload=False,
    )
    return {
        "networks": networks,
        "modules.processing": processing,
        "modules.shared": types.SimpleNamespace(),
        "modules.sd_models": types.SimpleNamespace(),
    }


@pytest.fixture
def web():
    stacks = types.SimpleNamespace(invalidate_all=None, is_current=lambda patcher: True)
    advice, strengths = types.SimpleNamespace(), types.SimpleNamespace(are_changed=False, restore=lambda: None)
    settings = LiveSettings()
    return WebTakeover(
        settings, LoraFiles(settings), stacks, strengths, Journal(lambda: None), RuleLog(), advice, lambda modules: 0
    )


def names(hooks):
    return sorted(hook.name for hook in hooks.hooks)


ALL = [
    "cached_params",
    "get_conds_with_caching",
    "load_lora_for_models",
    "load_lora_state_dict",
    "load_networks",
    "manage_model_and_prompt_cache",
    "process_images_inner",
]


def test_all_that_is_loaded_is_taken_over_once_and_given_back(web):
    modules, hooks = webui(), HookSet()
    before = modules["networks"].load_networks
    assert web.install(hooks, modules) == []
    assert names(hooks) == ALL
    assert web.install(hooks, modules) == []
    assert names(hooks) == ALL, "Reload UI lays nothing twice"
    assert modules["modules.processing"].process_images_inner("p") == "images of p"
    assert modules["modules.processing"].manage_model_and_prompt_cache("p") == "managed"
    hooks.restore()
    assert modules["networks"].load_networks is before


def test_a_module_that_is_loaded_again_is_taken_over_again(web):
    modules, hooks = webui(), HookSet()
    web.install(hooks, modules)
    modules["networks"] = webui()["networks"]
    assert web.install(hooks, modules) == []
    assert modules["networks"].load_networks.lora_guard_hook.active


@pytest.mark.parametrize(
    ("break_it", "why", "left"),
    [
        (
            lambda m: setattr(m["networks"], "load_lora_for_models", lambda model: model),
            "networks.load_lora_for_models has no parameter filename, online_mode (it has model)",
            [name for name in ALL if not name.startswith("load_")],
        ),
        (
            lambda m: setattr(
                m["modules.processing"].StableDiffusionProcessing, "get_conds_with_caching", lambda self, function: 0
            ),
            "modules.processing.StableDiffusionProcessing.get_conds_with_caching has no parameter required_prompts, steps, "
            "caches, extra_network_data, hires_steps (it has self, function)",
            [name for name in ALL if name not in ("cached_params", "get_conds_with_caching")],
        ),
    ],
)
def test_a_part_that_does_not_fit_is_named_and_the_others_are_taken_over(web, break_it, why, left):
    modules, hooks = webui(), HookSet()
    break_it(modules)
    assert [str(misfit) for misfit in web.install(hooks, modules)] == [why]
    assert names(hooks) == left


def test_a_webui_that_has_loaded_nothing_yet_is_left_alone(web):
    hooks = HookSet()
    assert web.install(hooks, {}) == []
    assert hooks.hooks == []


@pytest.mark.parametrize(
    ("request_of", "steps"),
    [
        ({"steps": 20}, 20),
        ({"steps": 20, "denoising_strength": 0.7}, 20),
        ({"steps": 20, "init_images": ["one"], "denoising_strength": 0.4}, 8),
        ({"steps": 20, "init_images": ["one"], "denoising_strength": None}, 20),
        ({"steps": 20, "is_hr_pass": True, "denoising_strength": 0.5, "hr_second_pass_steps": 0}, 10),
        ({"steps": 20, "is_hr_pass": True, "denoising_strength": 0.5, "hr_second_pass_steps": 30}, 15),
    ],
)
def test_the_steps_of_a_pass(request_of, steps):
    assert steps_of(types.SimpleNamespace(**request_of)) == steps
    assert pass_of(types.SimpleNamespace(**request_of)) == (steps, False)


BASE, REFINER = types.SimpleNamespace(sd_checkpoint_info="base"), types.SimpleNamespace(sd_checkpoint_info="refiner")
REFINED = {"steps": 20, "refiner_checkpoint_info": "refiner", "refiner_switch_at": 0.8}
HIRES = {
    "enable_hr": True,
    "is_hr_pass": False,
    "hr_checkpoint_info": None,
    "denoising_strength": 0.5,
    "hr_second_pass_steps": 0,
}


@pytest.mark.parametrize(
    ("request_of", "calls", "is_last"),
    [
        (REFINED | {"sd_model": BASE}, 16, True),
        (REFINED | {"sd_model": REFINER}, 4, True),
        (REFINED | {"sd_model": BASE, "refiner_switch_at": None}, 0, True),
        # Without a second pass its checkpoint says nothing.
        (HIRES | {"steps": 20, "enable_hr": False, "hr_checkpoint_info": "other"}, 20, False),
        ({"steps": 20, "refiner_checkpoint_info": None, "refiner_switch_at": 0.8}, 20, False),
        # The refiner takes over in the second pass.
        (REFINED | HIRES | {"sd_model": BASE}, 20, False),
        (REFINED | HIRES | {"sd_model": BASE, "is_hr_pass": True}, 8, True),
        (HIRES | {"steps": 20, "hr_checkpoint_info": "other"}, 20, True),
        (HIRES | {"steps": 20, "is_hr_pass": True, "hr_checkpoint_info": "other"}, 10, True),
        # A detailer's own checkpoint.
        ({"steps": 20, "override_settings": {"sd_model_checkpoint": "other"}}, 20, True),
        ({"steps": 20, "override_settings": {"CLIP_stop_at_last_layers": 2}}, 20, False),
    ],
)
def test_a_pass_ends_where_another_checkpoint_takes_over(request_of, calls, is_last):
    assert pass_of(types.SimpleNamespace(**request_of)) == (calls, is_last)
