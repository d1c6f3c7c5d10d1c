"""The guard as the reader of LoRA files in Forge: good, foreign and hostile ones."""

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.make import rand, write_kohya

from contract.lora_files import MODULES, TextEncoder, load, not_called, own_reader, picture
from lib_lora_guard.adapters.patch_tuples import OWN_KIND
from lib_lora_guard.hosts.webui.lora_files import LazyState, LoraFiles
from lib_lora_guard.models import fit
from lib_lora_guard.runtime.live_settings import LiveSettings


@pytest.fixture
def x():
    return rand(1, 16, 32, seed=5)


def test_a_file_is_applied_and_taken_off_again(guarded, tmp_path, x, caplog):
    caplog.set_level(logging.DEBUG)
    deltas = write_kohya(tmp_path / "style.safetensors", MODULES)
    patcher, dense = guarded.build("fp32")
    base = picture(guarded, patcher, x).clone()
    changed, clip = load(LoraFiles(), patcher, tmp_path / "style.safetensors", 0.7)
    assert (changed is not patcher, clip) == (True, None)
    state = {k: v.clone() for k, v in dense.items()}
    for module, delta in deltas.items():
        state[f"blocks.0.{module.rpartition('_')[2]}.weight"] += 0.7 * delta
    wanted = torch.func.functional_call(patcher.model, state, (x,))
    got = picture(guarded, changed, x)
    assert (got - wanted).norm() <= 1e-4 * (wanted - base).norm()
    assert torch.equal(picture(guarded, patcher, x), base)
    assert "style.safetensors: 2 keys for the U-Net" in caplog.text


def test_kinds_that_the_host_has_no_tuple_for_and_alpha_in_the_metadata(guarded, tmp_path, x):
    blocks = rand(8, 4, 4, seed=1, scale=0.3)
    save_file(
        {"lora_unet_blocks_0_proj.oft_blocks": blocks, "lora_unet_blocks_0_proj.alpha": torch.tensor(0.0)},
        str(tmp_path / "oft.safetensors"),
    )
    patcher, dense = guarded.build("fp32")
    changed, _ = load(LoraFiles(), patcher, tmp_path / "oft.safetensors")
    ((kind, _),) = [entry[1] for entry in next(iter(changed.lora_patches.values()))["blocks.0.proj.weight"]]
    assert kind == OWN_KIND
    skew = blocks - blocks.transpose(1, 2)
    eye = torch.eye(4)
    turn = torch.stack([(eye + s) @ torch.linalg.inv(eye - s) for s in skew])
    weight = dense["blocks.0.proj.weight"]
    turned = torch.bmm(turn.transpose(1, 2), weight.reshape(8, 4, 32)).reshape(32, 32)
    wanted = torch.func.functional_call(patcher.model, {**dense, "blocks.0.proj.weight": turned}, (x,))
    base = picture(guarded, patcher, x).clone()
    assert (picture(guarded, changed, x) - wanted).norm() <= 1e-4 * (wanted - base).norm()

    up, down = rand(32, 4, seed=2, scale=0.1), rand(4, 32, seed=3, scale=0.1)
    save_file(
        {"blocks.0.proj.lora_A.weight": down, "blocks.0.proj.lora_B.weight": up},
        str(tmp_path / "peft.safetensors"),
        metadata={"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 6, "use_rslora": True})},
    )
    changed, _ = load(LoraFiles(), patcher, tmp_path / "peft.safetensors")
    picture(guarded, patcher, x)
    wanted = torch.func.functional_call(patcher.model, {**dense, "blocks.0.proj.weight": weight + 3 * up @ down}, (x,))
    assert (picture(guarded, changed, x) - wanted).norm() <= 1e-4 * (wanted - base).norm()


def test_the_fallback_of_the_host_knows_our_kind_too(guarded, tmp_path):
    calculate = guarded.lora.extra_weight_calculators[OWN_KIND]
    save_file({"lora_unet_blocks_0_proj.oft_blocks": rand(8, 4, 4, seed=1, scale=0.3)}, str(tmp_path / "o.safetensors"))
    patcher, dense = guarded.build("fp32")
    changed, _ = load(LoraFiles(), patcher, tmp_path / "o.safetensors")
    ((_, content),) = [entry[1] for entry in next(iter(changed.lora_patches.values()))["blocks.0.proj.weight"]]
    weight = dense["blocks.0.proj.weight"]
    patched = calculate(weight.clone(), 1.0, content)
    assert patched.shape == weight.shape
    assert (patched - weight).norm() > 0.1 * weight.norm()


def make_hostile(path, kind):
    up, down = rand(32, 4, seed=2), rand(4, 32, seed=3)
    name = "lora_unet_blocks_0_proj"
    if kind == "truncated":
        write_kohya(path, MODULES)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "not finite":
        up[3, 1] = float("nan")
        save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, str(path))
    elif kind == "wrong shape":
        save_file({f"{name}.lora_up.weight": rand(48, 4, seed=2), f"{name}.lora_down.weight": down}, str(path))
    elif kind == "rank 0":
        save_file({f"{name}.lora_up.weight": up[:, :0], f"{name}.lora_down.weight": down[:0]}, str(path))
    elif kind == "sdxl":
        wide = {f"lora_unet_input_blocks_4_1_transformer_blocks_{n}_attn2_to_k": (640, 2048) for n in range(2)}
        write_kohya(path, wide)
    elif kind == "pickle":
        torch.save({"a": up}, path)
    elif kind == "a checkpoint":
        save_file({"blocks.0.proj.weight": rand(32, 32, seed=1)}, str(path))
    elif kind == "none of its keys":
        save_file({"x<script>\n.lora_up.weight": up, "x<script>\n.lora_down.weight": down}, str(path))
    else:
        raise ValueError(kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", r"bad\.safetensors NOT applied: expected \d+ bytes, found \d+"),
        ("not finite", r"bad\.safetensors NOT applied: .*lora_up\.weight: it holds values that are not finite"),
        (
            "wrong shape",
            r"bad\.safetensors NOT applied: made for another model: blocks\.0\.proj\.weight: up @ down gives",
        ),
        (
            "rank 0",
            r"bad\.safetensors NOT applied: blocks\.0\.proj\.weight: .*no pair of matrices; the file is damaged",
        ),
        ("pickle", r"bad\.safetensors NOT applied: expected .*found a zip archive.*convert it"),
        ("a checkpoint", r"bad\.safetensors NOT applied: no LoRA keys found among 1 tensors"),
        (
            "none of its keys",
            r"bad\.safetensors NOT applied: none of its 1 modules is in this model \(it has x<script>\?",
        ),
    ],
)
def test_a_hostile_file_is_named_and_the_others_are_applied(guarded, tmp_path, x, caplog, kind, message):
    make_hostile(tmp_path / "bad.safetensors", kind)
    write_kohya(tmp_path / "good.safetensors", MODULES)
    files = LoraFiles()
    patcher, _ = guarded.build("bf16")
    alone, _ = load(files, patcher, tmp_path / "good.safetensors")
    wanted = picture(guarded, alone, x).clone()
    changed, _ = load(files, patcher, tmp_path / "bad.safetensors")
    assert changed is patcher
    changed, _ = load(files, changed, tmp_path / "good.safetensors")
    assert torch.equal(picture(guarded, changed, x), wanted)
    (line,) = [r.getMessage() for r in caplog.records if "NOT applied" in r.getMessage()]
    assert re.search(message, line), line
    assert line.isprintable()


def test_a_lora_for_another_model_is_refused_by_name_for_both_parts(guarded, tmp_path, caplog, monkeypatch):
    from lib_lora_guard.models.architecture import Architecture

    make_hostile(tmp_path / "xl.safetensors", "sdxl")
    patcher, _ = guarded.build("bf16")
    clip = TextEncoder(guarded.build("bf16", seed=1)[0])
    # The small model of these tests is no known architecture.
    monkeypatch.setattr(fit, "detect_model", lambda shapes: Architecture.FLUX)
    assert load(LoraFiles(), patcher, tmp_path / "xl.safetensors", clip=clip) == (patcher, clip)
    assert "xl.safetensors NOT applied: made for SDXL, this is Flux; use a LoRA for Flux" in caplog.text


def test_what_is_left_out_is_said_again_for_every_image(guarded, tmp_path, caplog):
    make_hostile(tmp_path / "bad.safetensors", "wrong shape")
    patcher, _ = guarded.build("bf16")
    patcher.model.diffusion_model = None
    files = guarded.guard.files
    load(files, patcher, tmp_path / "bad.safetensors")
    caplog.clear()
    guarded.load(patcher)
    assert "still without bad.safetensors (made for another model: blocks.0.proj.weight" in caplog.text
    write_kohya(tmp_path / "good.safetensors", MODULES)
    load(files, patcher, tmp_path / "good.safetensors")
    caplog.clear()
    guarded.load(patcher)
    assert "still without" not in caplog.text


def test_a_wrong_shape_in_one_part_keeps_the_lora_off_the_other_too(guarded, tmp_path, caplog):
    write_kohya(tmp_path / "a.safetensors", {"lora_unet_blocks_0_proj": (32, 32), "lora_unet_blocks_1_proj": (48, 32)})
    patcher, _ = guarded.build("bf16")
    clip = TextEncoder(guarded.build("bf16", seed=1)[0])
    assert load(LoraFiles(), patcher, tmp_path / "a.safetensors", clip=clip) == (patcher, clip)
    assert "made for another model: blocks.1.proj.weight" in caplog.text


def test_unknown_keys_are_counted_and_the_rest_is_applied(guarded, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    extra = {"lora_unet_middle.lora_up.weight": rand(8, 4, seed=1), "lora_unet_middle.lora_down.weight": rand(4, 8, seed=2), "bundle_emb.a": rand(2, seed=3)}  # fmt: skip
    write_kohya(tmp_path / "s.safetensors", MODULES, extra=extra)
    patcher, _ = guarded.build("bf16")
    changed, _ = load(LoraFiles(), patcher, tmp_path / "s.safetensors")
    assert set(next(iter(changed.lora_patches.values()))) == {"blocks.0.qkv.weight", "blocks.0.proj.weight"}
    assert (
        "s.safetensors: 2 of its keys have no place in this model and are left out (first: bundle_emb.a)" in caplog.text
    )


def test_a_file_is_read_once_copied_never_and_read_again_when_it_has_changed(guarded, tmp_path, monkeypatch):
    from lib_lora_guard.hosts.webui import lora_files as forge_files

    path, reads = tmp_path / "s.safetensors", []
    read = forge_files.read_lora_file
    monkeypatch.setattr(forge_files, "read_lora_file", lambda *a, **k: reads.append(a) or read(*a, **k))
    write_kohya(path, MODULES)
    files = LoraFiles()
    patcher, _ = guarded.build("bf16")
    first, _ = load(files, patcher, path, 1.0)
    guarded.load(first)
    held = [term for a in first.lora_loader.lora_guard_state.engine.attached.values() for term in a.terms]
    ours = {id(t) for entries in next(iter(first.lora_patches.values())).values() for t in entries[0][1][1] if isinstance(t, torch.Tensor)}  # fmt: skip
    assert {id(t) for term in held for t in term.adapter.tensors()} == ours, "no second copy in RAM"
    load(files, patcher, path, 0.5)
    assert len(reads) == 1
    write_kohya(path, MODULES, rank=8)
    load(files, patcher, path, 0.5)
    assert len(reads) == 2


def test_from_image_to_image_nothing_is_parsed_and_adapters_stay(guarded, tmp_path, monkeypatch):
    from lib_lora_guard.hosts.forge import patches as forge_patches

    parsed, parse = [], forge_patches.parse_value
    monkeypatch.setattr(forge_patches, "parse_value", lambda *a: parsed.append(a) or parse(*a))
    write_kohya(tmp_path / "s.safetensors", MODULES)
    files = LoraFiles()
    patcher, _ = guarded.build("fp8")
    seen = []
    for strength in (1.0, 0.5, 0.5, None, 1.0):
        changed = patcher if strength is None else load(files, patcher, tmp_path / "s.safetensors", strength)[0]
        guarded.load(changed)
        attached = changed.lora_loader.lora_guard_state.engine.attached
        if strength is not None:
            seen.append({key: one.terms[0].adapter for key, one in attached.items()})
    assert parsed == []
    assert all(one[key] is seen[0][key] for one in seen for key in seen[0])


def test_an_unexpected_failure_hands_the_file_to_the_host(guarded, tmp_path, monkeypatch, caplog):
    from lib_lora_guard.hosts.webui import lora_files as forge_files

    def broken(*args):
        raise RuntimeError("planted")

    write_kohya(tmp_path / "s.safetensors", MODULES)
    monkeypatch.setattr(forge_files, "fit_file", broken)
    patcher, _ = guarded.build("bf16")
    asked = []
    files, path = LoraFiles(), str(tmp_path / "s.safetensors")
    result = files.load_for_models(
        lambda *a: asked.append(a) or ("host", "host"),
        patcher,
        None,
        files.load_state(own_reader(dict), path),
        1.0,
        1.0,
        path,
    )
    assert result == ("host", "host")
    assert asked[0][0] is patcher
    assert "Forge's own reader is used" in caplog.text


def test_the_host_maps_a_file_only_when_something_looks_inside(tmp_path):
    write_kohya(tmp_path / "s.safetensors", MODULES)
    loads = []
    state = LoraFiles().load_state(
        own_reader(lambda name: loads.append(name) or {"a": 1}), str(tmp_path / "s.safetensors")
    )
    assert isinstance(state, LazyState)
    assert loads == []
    assert dict(state) == {"a": 1}
    assert len(loads) == 1
    assert LoraFiles().load_state(lambda name: {"b": 2}, "not a file") == {"b": 2}


def test_tensors_that_another_extension_has_changed_count_and_not_the_file(guarded, tmp_path):
    path = tmp_path / "s.safetensors"
    write_kohya(path, MODULES)
    files = LoraFiles()
    state = dict(load_file(str(path)))
    state = {k: torch.zeros_like(v) if k.endswith("lora_up.weight") else v for k, v in state.items()}
    patcher, _ = guarded.build("bf16")
    changed, _ = files.load_for_models(not_called, patcher, None, state, 1.0, 1.0, str(path))
    entries = next(iter(changed.lora_patches.values()))
    assert all(float(e[0][1][1][0].abs().max()) == 0 for e in entries.values())


def test_the_files_of_one_stack_stay_whatever_their_size(guarded, tmp_path, monkeypatch):
    from lib_lora_guard.hosts.webui import lora_files as forge_files

    reads, read = [], forge_files.read_lora_file
    monkeypatch.setattr(forge_files, "read_lora_file", lambda path, **k: reads.append(path.name) or read(path, **k))
    for name in "abc":
        write_kohya(tmp_path / f"{name}.safetensors", MODULES)
    files = LoraFiles(LiveSettings({"lora_guard_kept_files_mb": 0}))
    patcher, _ = guarded.build("bf16")
    for strength in (1.0, 0.5):
        changed = patcher
        for name in "abc":
            changed, _ = load(files, changed, tmp_path / f"{name}.safetensors", strength)
    assert reads == ["a.safetensors", "b.safetensors", "c.safetensors"]
    for name in "cca":
        load(files, patcher, tmp_path / f"{name}.safetensors")
    assert reads[3:] == ["a.safetensors"], "what the last two stacks do not use is given back"


def test_as_trained_is_a_setting_of_the_takeover_and_the_tuples_stay_the_hosts(guarded, tmp_path, x, monkeypatch):
    up, down = rand(32, 4, seed=2, scale=0.1), rand(4, 32, seed=3, scale=0.1)
    name = "lora_unet_blocks_0_proj"
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.dora_scale": rand(32, 1, seed=4).abs() + 0.5}  # fmt: skip
    save_file(tensors, str(tmp_path / "d.safetensors"))
    patcher, dense = guarded.build("fp32")
    weight, base = dense["blocks.0.proj.weight"], picture(guarded, patcher, x).clone()
    patched = weight + up @ down
    pictures = {}
    for as_trained, norm in ((False, weight), (True, patched)):
        monkeypatch.setattr(guarded.guard.settings, "as_trained", as_trained)
        new = patched * tensors[f"{name}.dora_scale"] / norm.norm(dim=1, keepdim=True)
        wanted = torch.func.functional_call(patcher.model, {**dense, "blocks.0.proj.weight": new}, (x,))
        changed, _ = load(LoraFiles(), patcher, tmp_path / "d.safetensors", 1.0)
        assert next(iter(changed.lora_patches.values()))["blocks.0.proj.weight"][0][1][0] == "lora"
        pictures[as_trained] = picture(guarded, changed, x).clone()
        assert (pictures[as_trained] - wanted).norm() <= 1e-4 * (wanted - base).norm()
        picture(guarded, patcher, x)
    assert (pictures[True] - pictures[False]).norm() > 0.01 * (pictures[True] - base).norm()
