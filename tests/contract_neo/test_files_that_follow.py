"""LoRA files whose values are read while Neo places the model."""

import types
from pathlib import Path

import pytest
from contract.lora_files import MODULES, load
from contract.stacks import run
from support.held_back import spoil, values_held_back
from support.make import write_kohya
from support.measure import assert_same, fp32_limit

from lib_lora_guard.adapters import files as lora_files
from lib_lora_guard.hosts.neo.patchers import NeoPatchers, requests_of
from lib_lora_guard.hosts.webui.lora_files import LoraFiles
from lib_lora_guard.runtime.host import FittedLora


@pytest.fixture
def slow(host, monkeypatch):
    """Values of factors are read no sooner than Neo places the model."""
    load_model = host.base.ModelPatcher.load
    with values_held_back(monkeypatch) as held_back:

        def place(*args, **kwargs):
            held_back.open()
            return load_model(*args, **kwargs)

        monkeypatch.setattr(host.base.ModelPatcher, "load", place)
        yield held_back


def test_the_model_is_placed_meanwhile_and_the_picture_is_right(slow, guarded, tmp_path):
    deltas = write_kohya(tmp_path / "style.safetensors", MODULES)
    patcher, dense = guarded.build("fp32")
    base = run(patcher)
    slow.close()
    changed, _ = load(LoraFiles(patchers=NeoPatchers()), patcher, tmp_path / "style.safetensors", 0.7)
    assert slow.waited == []
    state = dict(dense)
    for module, delta in deltas.items():
        key = f"blocks.0.{module.rpartition('_')[2]}.weight"
        state[key] = state[key] + 0.7 * delta
    plain = guarded.build("fp32")[0].model
    plain.load_state_dict(state, strict=False)
    wanted = run(type("Patcher", (), {"model": plain})())
    assert_same(run(guarded.load(changed)), wanted, base, fp32_limit(wanted, base))
    assert slow.waited == [True]


def test_a_file_that_turns_out_to_be_spoiled_is_left_out_by_name(slow, guarded, tmp_path, lines):
    write_kohya(tmp_path / "bad.safetensors", MODULES)
    spoil(tmp_path / "bad.safetensors")
    write_kohya(tmp_path / "good.safetensors", MODULES, seed=1)
    patcher, _ = guarded.build("fp32")
    files = LoraFiles(patchers=NeoPatchers())
    alone, _ = load(files, patcher, tmp_path / "good.safetensors")
    wanted = run(guarded.load(alone))
    changed, _ = load(files, patcher, tmp_path / "bad.safetensors")
    changed, _ = load(files, changed, tmp_path / "good.safetensors")
    assert run(guarded.load(changed)).equal(wanted)
    report = guarded.report(changed)
    assert [(one.label, one.refused is None) for one in report.loras] == [
        ("bad.safetensors", False),
        ("good.safetensors", True),
    ]
    why = "lora_unet_blocks_0_proj.lora_up.weight: it holds values that are not finite"
    assert report.loras[0].refused.startswith(why)
    # The file is read again for the next image, and is refused where all broken files are.
    again, _ = load(files, patcher, tmp_path / "bad.safetensors")
    assert again is patcher
    assert files.left_out["bad.safetensors"].startswith(why)


def test_any_error_of_a_thread_that_reads_leaves_one_lora_out_and_not_the_image():
    def wait():
        raise MemoryError("no more")

    failed = lora_files.LoraFile(Path("bad.safetensors"), {}, (), coming=types.SimpleNamespace(wait=wait))
    stack = (FittedLora("bad.safetensors", {}, 0.5, file=failed), FittedLora("good.safetensors", {}, 0.7))
    assert [(one.label, one.strength, one.refused) for one in requests_of(stack)] == [
        ("bad.safetensors", 0.5, "MemoryError: no more"),
        ("good.safetensors", 0.7, None),
    ]
