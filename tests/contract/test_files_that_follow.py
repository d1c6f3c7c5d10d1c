"""LoRA files whose values are read while Forge places the model, and what reads their patches sooner."""

import copy
import threading
import types
import weakref

import pytest
import torch
from safetensors.torch import load_file
from support.held_back import spoil, values_held_back
from support.make import rand, write_kohya

from contract.lora_files import MODULES, load, picture
from lib_lora_guard.errors import LoraFileError
from lib_lora_guard.hosts.forge.step_strengths import ForgeStepStrengths
from lib_lora_guard.hosts.webui.lora_files import LoraFiles
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.settings import LoraMode

WHY = "lora_unet_blocks_0_proj.lora_up.weight: it holds values that are not finite"


@pytest.fixture
def x():
    return rand(1, 16, 32, seed=5)


@pytest.fixture
def gate(monkeypatch):
    """Values of factors are read no sooner than the gate is opened."""
    with values_held_back(monkeypatch) as held_back:
        yield held_back


@pytest.fixture
def opened_by_placing(gate, host, monkeypatch):
    """Forge's placing of a model opens the gate."""
    place = host.base.ModelPatcher.forge_patch_model

    def forge_patch_model(*args, **kwargs):
        gate.open()
        return place(*args, **kwargs)

    monkeypatch.setattr(host.base.ModelPatcher, "forge_patch_model", forge_patch_model)
    return gate


def soon(call):
    """Calls after a while, in a thread."""
    timer = threading.Timer(0.05, call)
    timer.start()
    return timer


def patched(patcher, dense, deltas, x, strength):
    state = {key: value.clone() for key, value in dense.items()}
    for module, delta in deltas.items():
        state[f"blocks.0.{module.rpartition('_')[2]}.weight"] += strength * delta
    return torch.func.functional_call(patcher.model, state, (x,))


def value_on(patcher, key="blocks.0.proj.weight"):
    ((_, patches),) = patcher.lora_patches.items()
    return patches[key][0][1]


@pytest.fixture
def pair(opened_by_placing, guarded, tmp_path, x):
    """A stack of a file whose values never come, until it is mended, and of a good one; and what its pictures would be."""
    bad, good = tmp_path / "bad.safetensors", tmp_path / "good.safetensors"
    of_bad = write_kohya(bad, MODULES)
    intact = bad.read_bytes()
    spoil(bad)
    of_good = write_kohya(good, MODULES, seed=1)
    patcher, dense = guarded.build("fp32")
    base, files = picture(guarded, patcher, x).clone(), LoraFiles()
    # Before anything is on the model.
    wanted = {strength: patched(patcher, dense, of_good, x, strength) for strength in (0.3, 0.7, 0.9)}
    both = {module: of_bad[module] + 0.7 * of_good[module] for module in of_good}
    wanted["both"] = patched(patcher, dense, both, x, 1.0)

    def stack():
        changed, _ = load(files, patcher, bad)
        return load(files, changed, good, 0.7)[0]

    def is_right(found, which):
        return (found - wanted[which]).norm() <= 1e-4 * (wanted[which] - base).norm()

    return types.SimpleNamespace(stack=stack, is_right=is_right, mend=lambda: bad.write_bytes(intact))


def test_the_model_is_placed_meanwhile_and_the_picture_is_right(opened_by_placing, guarded, tmp_path, x):
    deltas = write_kohya(tmp_path / "style.safetensors", MODULES)
    patcher, dense = guarded.build("fp32")
    base = picture(guarded, patcher, x).clone()
    opened_by_placing.close()
    changed, _ = load(LoraFiles(), patcher, tmp_path / "style.safetensors", 0.7)
    assert type(value_on(changed)[1]) is not tuple
    guarded.memory.unload_all_models()
    wanted = patched(patcher, dense, deltas, x, 0.7)
    assert (picture(guarded, changed, x) - wanted).norm() <= 1e-4 * (wanted - base).norm()
    assert opened_by_placing.waited == [True]


def test_another_extension_that_reads_the_patches_sooner_finds_their_values(gate, guarded, tmp_path):
    write_kohya(tmp_path / "style.safetensors", MODULES)
    tensors = load_file(tmp_path / "style.safetensors")
    patcher, _ = guarded.build("fp32")
    changed, _ = load(LoraFiles(), patcher, tmp_path / "style.safetensors")
    kind, content = value_on(changed)
    assert (kind, len(content), gate.waited) == ("lora", 5, [])
    timer = soon(gate.open)
    up, down, *_ = content
    timer.join()
    assert torch.equal(up, tensors["lora_unet_blocks_0_proj.lora_up.weight"])
    assert torch.equal(down, tensors["lora_unet_blocks_0_proj.lora_down.weight"])


def test_a_file_that_turns_out_to_be_spoiled_is_left_out_by_name_and_tried_again(
    opened_by_placing, guarded, tmp_path, x, caplog
):
    write_kohya(tmp_path / "bad.safetensors", MODULES)
    spoil(tmp_path / "bad.safetensors")
    write_kohya(tmp_path / "good.safetensors", MODULES, seed=1)
    patcher, _ = guarded.build("fp32")
    files = LoraFiles()
    alone, _ = load(files, patcher, tmp_path / "good.safetensors")
    wanted = picture(guarded, alone, x).clone()
    changed, _ = load(files, patcher, tmp_path / "bad.safetensors")
    changed, _ = load(files, changed, tmp_path / "good.safetensors")
    assert picture(guarded, changed, x).equal(wanted)
    report = guarded.guard.stacks.report(changed.lora_loader)
    assert [(one.label, one.refused is None) for one in report.loras] == [
        ("bad.safetensors", False),
        ("good.safetensors", True),
    ]
    assert report.loras[0].refused.startswith(WHY)
    assert "bad.safetensors NOT applied" in caplog.text
    # The file is read again for the next image, and is refused where all broken files are.
    assert files.has_failed(tmp_path / "bad.safetensors")
    again, _ = load(files, patcher, tmp_path / "bad.safetensors")
    assert again is patcher
    assert files.left_out["bad.safetensors"].startswith(WHY)


def test_a_file_that_is_there_again_counts_for_the_same_stack(opened_by_placing, guarded, tmp_path, x):
    path = tmp_path / "style.safetensors"
    deltas = write_kohya(path, MODULES)
    good = path.read_bytes()
    spoil(path)
    patcher, dense = guarded.build("fp32")
    base = picture(guarded, patcher, x).clone()
    files = LoraFiles()
    changed, _ = load(files, patcher, path, 0.7)
    assert picture(guarded, changed, x).equal(base)
    path.write_bytes(good)
    # Forge knows a stack by names and strengths, which are the same.
    changed, _ = load(files, patcher, path, 0.7)
    wanted = patched(patcher, dense, deltas, x, 0.7)
    assert (picture(guarded, changed, x) - wanted).norm() <= 1e-4 * (wanted - base).norm()


def test_the_other_loras_follow_their_schedules_beside_a_file_whose_values_never_came(pair, guarded, x):
    strengths, changed = ForgeStepStrengths(guarded.guard.stacks), pair.stack()
    picture(guarded, changed, x)
    for strength in (0.3, 0.9):
        strengths.set(changed, {1: strength})
        assert pair.is_right(changed.model(x), strength)
    strengths.restore()
    assert pair.is_right(changed.model(x), 0.7)
    # The same names and strengths, and the file is there.
    pair.mend()
    assert pair.is_right(picture(guarded, pair.stack(), x), "both")


def test_a_file_that_never_came_is_tried_again_after_forges_own_way_too(pair, guarded, x, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "commit", lambda *_: (_ for _ in ()).throw(RuntimeError("planted")))
        assert pair.is_right(picture(guarded, pair.stack(), x), 0.7)
    pair.mend()
    assert pair.is_right(picture(guarded, pair.stack(), x), "both")


def test_forge_gets_no_patches_whose_values_never_came(pair, guarded, x, caplog):
    changed = pair.stack()
    # The user has chosen Forge's own way since the files were opened.
    guarded.guard.settings.options = {"lora_guard_mode": LoraMode.OWN.value}
    assert pair.is_right(picture(guarded, changed, x), 0.7)
    assert "bad.safetensors" in caplog.text
    assert "it holds values that are not finite" in caplog.text


def look_through(patches):
    """Looks at everything as Forge does before it loads a model with online LoRAs (`backend.utils.nested_compute_size`)."""
    if isinstance(patches, dict):
        return sum(look_through(patches[key]) for key in patches)
    if isinstance(patches, (list, tuple)):
        return sum(look_through(patches[place]) for place in range(len(patches)))
    return patches.nelement() if isinstance(patches, torch.Tensor) else 0


def test_forge_does_not_reserve_for_a_stack_with_a_file_whose_values_never_came(gate, guarded, tmp_path, x):
    """It would look into each patch, and end the image with the error of the file."""
    write_kohya(tmp_path / "bad.safetensors", MODULES)
    spoil(tmp_path / "bad.safetensors")
    deltas = write_kohya(tmp_path / "good.safetensors", MODULES, seed=1)
    patcher, dense = guarded.build("fp32")
    base = picture(guarded, patcher, x).clone()
    files = LoraFiles()
    good, _ = load(files, patcher, tmp_path / "good.safetensors", 0.7)
    changed, _ = load(files, patcher, tmp_path / "bad.safetensors")
    changed, _ = load(files, changed, tmp_path / "good.safetensors", 0.7)
    guarded.guard.settings.options = {"lora_guard_mode": LoraMode.OWN.value}
    timer = soon(gate.open)
    for one in (changed, good):
        if one.has_online_lora():
            look_through(one.lora_patches)
    timer.join()
    wanted = patched(patcher, dense, deltas, x, 0.7)
    assert (picture(guarded, changed, x) - wanted).norm() <= 1e-4 * (wanted - base).norm()


def test_a_copy_of_a_patch_waits_and_is_a_plain_tuple(gate, guarded, tmp_path):
    write_kohya(tmp_path / "style.safetensors", MODULES)
    patcher, _ = guarded.build("fp32")
    changed, _ = load(LoraFiles(), patcher, tmp_path / "style.safetensors")
    timer = soon(gate.open)
    copied = copy.deepcopy(value_on(changed))
    timer.join()
    assert type(copied) is tuple
    assert type(copied[1]) is tuple
    assert torch.equal(
        copied[1][0], load_file(tmp_path / "style.safetensors")["lora_unet_blocks_0_proj.lora_up.weight"]
    )


def test_a_file_whose_values_never_came_keeps_nothing_of_the_image_that_asked_for_them(gate, guarded, tmp_path):
    """Its error is kept as long as its patches are, and an error keeps all that was called when it was raised."""
    write_kohya(tmp_path / "bad.safetensors", MODULES)
    spoil(tmp_path / "bad.safetensors")
    patcher, _ = guarded.build("fp32")
    changed, _ = load(LoraFiles(), patcher, tmp_path / "bad.safetensors")
    gate.open()

    def image():
        latent = torch.zeros(1)
        (request,) = guarded.guard.stacks.reader.requests(changed.lora_patches)
        assert request.refused
        return weakref.ref(latent)

    assert image()() is None


def test_reading_a_patch_of_a_spoiled_file_says_what_is_wrong(gate, guarded, tmp_path):
    write_kohya(tmp_path / "bad.safetensors", MODULES)
    spoil(tmp_path / "bad.safetensors")
    patcher, _ = guarded.build("fp32")
    changed, _ = load(LoraFiles(), patcher, tmp_path / "bad.safetensors")
    gate.open()
    with pytest.raises(LoraFileError, match="not finite"):
        value_on(changed)[1][0]
