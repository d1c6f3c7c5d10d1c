"""The LoRA names of a prompt in Forge: missing, moved and changed files, and who else reads them."""

import os
import sys
import types

import pytest
import torch
from support.make import rand, write_kohya

from contract.lora_files import MODULES, load, lora_extension, not_called, own_reader, picture
from lib_lora_guard.hosts.forge import takeover as forge
from lib_lora_guard.hosts.webui.lora_files import LoraFiles


@pytest.fixture
def x():
    return rand(1, 16, 32, seed=5)


def test_hooks_on_the_hosts_lora_extension_come_once_and_go(guarded, monkeypatch, tmp_path):
    networks = lora_extension(tmp_path)
    before = dict(vars(networks))
    monkeypatch.setitem(sys.modules, "networks", networks)
    assert forge.install_in_webui() == []
    hooked = networks.load_lora_for_models
    assert forge.install_in_webui() == []
    assert networks.load_lora_for_models is hooked is not before["load_lora_for_models"]
    forge.uninstall()
    assert vars(networks) == before
    networks.load_lora_for_models = lambda model: model
    forge.install()
    misfits = [str(misfit) for misfit in forge.install_in_webui()]
    assert misfits == ["networks.load_lora_for_models has no parameter filename, online_mode (it has model)"]


def test_a_wrapper_of_another_extension_and_a_module_loaded_again(guarded, monkeypatch, tmp_path):
    networks, calls = lora_extension(tmp_path), []

    def wrapped(*args, **kwargs):
        calls.append(args)
        return args[0], args[1]

    networks.load_lora_for_models, networks.load_lora_state_dict = wrapped, dict
    monkeypatch.setitem(sys.modules, "networks", networks)
    forge.install_in_webui()
    assert networks.load_lora_for_models is not wrapped
    networks.load_lora_for_models, networks.load_lora_state_dict = wrapped, dict
    forge.install_in_webui()
    assert hasattr(networks.load_lora_for_models, "lora_guard_hook"), "hooked again after a reload of the module"


def test_another_extensions_wrapper_around_ours_does_not_keep_the_guard_from_coming_back(
    guarded, monkeypatch, tmp_path
):
    import functools

    networks = lora_extension(tmp_path)
    monkeypatch.setitem(sys.modules, "networks", networks)
    forge.install_in_webui()
    ours = networks.load_lora_for_models
    networks.load_lora_for_models = functools.wraps(ours)(lambda *args, **kwargs: ours(*args, **kwargs))
    forge.uninstall()
    forge.install()
    forge.install_in_webui()
    assert networks.load_lora_for_models.lora_guard_hook.active


def test_a_missing_lora_is_named_and_the_others_are_applied(guarded, monkeypatch, tmp_path, caplog):
    networks = lora_extension(tmp_path)
    monkeypatch.setitem(sys.modules, "networks", networks)
    for name in ("good", "gone"):
        write_kohya(tmp_path / f"{name}.safetensors", MODULES)
    forge.install_in_webui()
    networks.load_networks(["gone", "good"], [1.0, 0.5], [1.0, 0.4], [None, None])
    (tmp_path / "gone.safetensors").unlink()
    networks.load_networks(["gone", "good", "never"], [1.0, 0.5, 0.9], [1.0, 0.4, 0.9], [None, 8, None])
    networks.load_networks(["good"])
    assert networks.loaded == [
        (["gone", "good"], [1.0, 0.5], [1.0, 0.4], [None, None]),
        (["good"], [0.5], [0.4], [8]),
        (["good"], None, None, None),
    ]
    assert networks.extra_network_lora.errors == {"gone": 1, "never": 1}, "Forge writes these under the picture"
    said = [r.getMessage() for r in caplog.records if "NOT applied" in r.getMessage()]
    assert [line.split(" ")[0] for line in said] == ["gone", "never"]
    assert guarded.guard.files.missing == {}, "of the last prompt"


def test_what_was_left_out_of_a_stack_is_known_until_the_next(guarded, monkeypatch, tmp_path):
    """A refused file leaves the patcher without patches, so the next one must not pass for the first of another stack."""
    networks = lora_extension(tmp_path)
    monkeypatch.setitem(sys.modules, "networks", networks)
    write_kohya(tmp_path / "good.safetensors", MODULES)
    (tmp_path / "broken.safetensors").write_bytes(b"no LoRA")
    (tmp_path / "broken2.safetensors").write_bytes(b"no LoRA")
    guard_files, (patcher, _) = guarded.guard.files, guarded.build("fp32")

    def build(names, *_):
        changed = patcher
        for name in names:
            path = str(tmp_path / f"{name}.safetensors")
            state = networks.load_lora_state_dict(path)
            changed, _ = networks.load_lora_for_models(changed, None, state, 1.0, 1.0, filename=path)

    networks.load_networks = build
    networks.load_lora_state_dict = own_reader(not_called)
    forge.install_in_webui()
    networks.load_networks(["broken", "broken2", "good", "nobody"])
    assert list(guard_files.left_out) == ["broken.safetensors", "broken2.safetensors"]
    assert list(guard_files.missing) == ["nobody"]
    networks.load_networks(["good"])
    assert (guard_files.left_out, guard_files.missing) == ({}, {})
    networks.load_networks(["broken"])
    networks.load_networks([])
    assert (guard_files.left_out, guard_files.missing) == ({}, {})


def test_a_retrained_file_makes_the_host_build_its_stack_anew_once(guarded, monkeypatch, tmp_path, x):
    networks = lora_extension(tmp_path)
    monkeypatch.setitem(sys.modules, "networks", networks)
    path = tmp_path / "good.safetensors"
    write_kohya(path, MODULES, seed=1)
    forge.install_in_webui()
    files, (patcher, _) = guarded.guard.files, guarded.build("fp32")
    pictures, stale = [], []
    for seed in (1, 1, 2, 2):
        if seed == 2 and len(pictures) == 2:
            write_kohya(path, MODULES, seed=2)
            os.utime(path, ns=(1, 1))
        networks.load_networks(["good"])
        stale.append(networks.model.current_lora_hash != "as it was")
        networks.model.current_lora_hash = "as it was"
        changed, _ = load(files, patcher, path)
        pictures.append(picture(guarded, changed, x).clone())
    assert stale == [True, False, True, False], "and for the first image: whose stack was there before is not known"
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[2], pictures[3])
    assert (pictures[2] - pictures[0]).norm() > 0.1 * (pictures[0] - picture(guarded, patcher, x)).norm()


def test_another_way_of_reading_files_means_another_stack(guarded, monkeypatch, tmp_path):
    networks = lora_extension(tmp_path)
    monkeypatch.setitem(sys.modules, "networks", networks)
    write_kohya(tmp_path / "good.safetensors", MODULES)
    forge.install_in_webui()
    files, stale = guarded.guard.files, []
    for is_host_reading in (False, False, True, True, False):
        files.is_host_reading = lambda now=is_host_reading: now
        networks.model.current_lora_hash = "as it was"
        networks.load_networks(["good"])
        stale.append(networks.model.current_lora_hash != "as it was")
    assert stale[1:] == [False, True, False, True]
    files.is_host_reading = lambda: True
    assert files.load_state(lambda filename: "the host's", str(tmp_path / "good.safetensors")) == "the host's"
    assert files.load_for_models(lambda *args: args, 1, 2, 3, 4, 5, 6, True) == (1, 2, 3, 4, 5, 6, True)


def test_a_file_that_has_moved_is_found_and_missing_ones_cost_one_walk(guarded, monkeypatch, tmp_path):
    networks, walks, asked = lora_extension(tmp_path), [], []
    (tmp_path / "new").mkdir()
    write_kohya(tmp_path / "new" / "moved.safetensors", MODULES)
    networks.available_network_aliases["moved"] = types.SimpleNamespace(filename=str(tmp_path / "moved.safetensors"))

    def walk():
        walks.append(1)
        path = tmp_path / "new" / "moved.safetensors"
        networks.available_network_aliases["moved"] = types.SimpleNamespace(filename=str(path))

    networks.list_available_networks = walk
    networks.update_available_networks_by_names = asked.append
    monkeypatch.setitem(sys.modules, "networks", networks)
    forge.install_in_webui()
    networks.load_networks(["one", "moved", "two", "three"], [1.0] * 4, [1.0] * 4, [None] * 4)
    assert [names for names, *_ in networks.loaded] == [["moved"]]
    assert (len(walks), asked) == (1, [["one", "moved", "two", "three"]])
    assert sorted(guarded.guard.files.missing) == ["one", "three", "two"]


def test_in_the_mode_forges_own_nothing_of_an_earlier_stack_counts_as_left_out(guarded, tmp_path):
    patcher, _ = guarded.build("fp32")
    path = tmp_path / "bad.safetensors"
    write_kohya(path, {"lora_unet_blocks_0_proj": (48, 32)})
    files = LoraFiles()
    with files.announced_stack({}, False):
        load(files, patcher, path)
    assert list(files.left_out) == ["bad.safetensors"]
    files.is_host_reading = lambda: True
    with files.announced_stack({}, False):
        files.load_for_models(lambda *all: (patcher, None), patcher, None, {}, 1.0, 1.0, "good.safetensors")
    assert files.left_out == {}
