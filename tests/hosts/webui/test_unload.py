"""Forge's wish to unload everything before an image, and the images for which nothing has changed."""

import logging
from types import SimpleNamespace

import pytest

from lib_lora_guard.hosts.webui.cond_caches import SharedCaches
from lib_lora_guard.hosts.webui.unload import UnloadRequests
from lib_lora_guard.memory.rules import Finding
from lib_lora_guard.runtime.rule_log import RuleLog


class Processing(SimpleNamespace):
    """Forge's `modules.processing` as far as it goes: the flag, and what it does before an image."""

    def __init__(self):
        super().__init__(need_global_unload=False, unloaded=0, prompts_forgotten=0, fails=None, takes_over=None)

    def manage_model_and_prompt_cache(self, p):
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error
        if self.takes_over is not None:
            # An image's own checkpoint and settings arrive here.
            self.takes_over()
        if self.need_global_unload:
            self.unloaded += 1
            self.prompts_forgotten += 1
        self.need_global_unload = False
        return p


class Scene:
    def __init__(self):
        self.processing = Processing()
        self.settings = {"inference": 1024, "pinned": False, "stream": False, "checkpoint": "a.safetensors"}
        self.told = []
        self.requests = UnloadRequests(
            self.processing, lambda: tuple(self.settings.items()), self.told.append, SharedCaches(self.processing)
        )

    def image(self, wants_unload=True):
        """How often Forge unloads for it."""
        before = self.processing.unloaded
        self.processing.need_global_unload |= wants_unload
        job = object()
        assert self.requests.before_image(self.processing.manage_model_and_prompt_cache, job) is job
        assert self.processing.need_global_unload is False
        return self.processing.unloaded - before


@pytest.fixture
def scene():
    return Scene()


def test_the_first_image_is_the_hosts(scene):
    assert scene.image() == 1
    assert scene.told == []


def test_the_first_image_without_a_request(scene):
    assert scene.image(wants_unload=False) == 0
    assert scene.image() == 0
    assert [finding.rule for finding in scene.told] == ["LG-R10"]


def test_nothing_changed_unloads_nothing_and_forgets_no_prompt(scene):
    scene.image()
    for _ in range(3):
        assert scene.image() == 0
    assert scene.processing.prompts_forgotten == 1
    assert all(isinstance(finding, Finding) and finding.rule == "LG-R10" for finding in scene.told)


@pytest.mark.parametrize(
    ("name", "value"),
    [("inference", 2048), ("pinned", True), ("stream", True), ("checkpoint", "b.safetensors")],
)
def test_what_has_changed_is_the_hosts_once(scene, name, value):
    scene.image()
    scene.settings[name] = value
    assert scene.image() == 1
    assert scene.told == []
    assert scene.image() == 0
    assert len(scene.told) == 1


def test_there_and_back_between_two_images_is_no_change(scene):
    scene.image()
    scene.settings["checkpoint"] = "b.safetensors"
    scene.settings["checkpoint"] = "a.safetensors"
    assert scene.image() == 0


def test_a_change_without_a_request_stays_the_hosts_business(scene):
    scene.image()
    scene.settings["inference"] = 4096
    assert scene.image(wants_unload=False) == 0
    assert scene.told == []


def test_what_an_image_brings_itself_counts_for_the_next(scene):
    """The checkpoint of the image's own overrides is taken over while the host prepares it."""
    scene.image()
    scene.processing.takes_over = lambda: scene.settings.update(checkpoint="override.safetensors")
    assert scene.image(wants_unload=False) == 0
    scene.processing.takes_over = None
    assert scene.image() == 0, "same as of the last image"
    scene.settings["checkpoint"] = "a.safetensors"
    assert scene.image() == 1, "put back after it"


@pytest.mark.parametrize("changes", [True, False])
@pytest.mark.parametrize("comes_back", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("no such checkpoint"), KeyboardInterrupt()])
def test_a_failed_load_leaves_the_next_image_to_the_host(scene, error, changes, comes_back):
    """The host has thrown the old model out by then, even where the old settings come back afterwards."""
    scene.image()
    if changes:
        scene.settings["checkpoint"] = "b.safetensors"
    scene.processing.need_global_unload = True
    scene.processing.fails = error
    with pytest.raises(type(error)) as raised:
        scene.requests.before_image(scene.processing.manage_model_and_prompt_cache, object())
    assert raised.value is error
    assert scene.processing.need_global_unload is True, "as the host leaves it"
    if comes_back:
        scene.settings["checkpoint"] = "a.safetensors"
    told = len(scene.told)
    assert scene.image(wants_unload=False) == 1
    assert len(scene.told) == told
    assert scene.image() == 0


def test_a_failed_load_that_nobody_wished_an_unload_for(scene):
    scene.image()
    scene.processing.fails = RuntimeError("broken file")
    with pytest.raises(RuntimeError, match="broken file"):
        scene.requests.before_image(scene.processing.manage_model_and_prompt_cache, object())
    assert scene.processing.need_global_unload is False
    assert scene.image() == 1, "the next request is the host's"


def test_arguments_and_result_pass_through(scene):
    found = scene.requests.before_image(lambda *a, **k: (a, k), 1, two=2)
    assert found == ((1,), {"two": 2})


def test_it_is_said_once_while_it_stays_the_same(caplog):
    caplog.set_level(logging.DEBUG, logger="lib_lora_guard")
    processing = Processing()
    requests = UnloadRequests(processing, lambda: 1, RuleLog().tell, SharedCaches(processing))
    for _ in range(4):
        processing.need_global_unload = True
        requests.before_image(processing.manage_model_and_prompt_cache, None)
    said = [record for record in caplog.records if "LG-R10" in record.getMessage()]
    assert len(said) == 1
    assert "nothing has changed" in said[0].getMessage()
    assert said[0].levelno == logging.DEBUG, "good news is no warning"
    assert processing.unloaded == 1
