"""ControlLora and other readers of a model's weights get them with their LoRAs."""

import importlib

import safetensors.torch
import torch
from safetensors.torch import load_file
from support.make import Net, host_value, rand
from support.measure import contribution_error, same_bits
from support.reference import merge_reference

from contract.host import REAL
from contract.savers import (
    WIDTH,
    Setup,
    Whole,
    close_to,
    filled,
    made,
    patcher_of,
    truth,
)
from lib_lora_guard.hosts.forge import takeover as forge


def control_setup(host):
    """`(whole model, its plain state, control)`, tiny; the control model is the first part of the model."""
    controlnet = importlib.import_module("backend.patcher.controlnet")
    if not REAL:
        config = {"width": WIDTH}
        state = filled(Net(WIDTH), torch.bfloat16, 1)
        model = made(host, lambda: Net(WIDTH), state, torch.bfloat16)
        model.config = config
        weights = {"blocks.0.proj.weight": rand(WIDTH, WIDTH, seed=77)}
    else:
        from backend.nn.unet import IntegratedUNet2DConditionModel

        config = {"in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True, "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 32, "use_linear_in_transformer": True}  # fmt: skip
        state = filled(IntegratedUNet2DConditionModel(**config), torch.bfloat16, 1)
        model = made(host, lambda: IntegratedUNet2DConditionModel(**config), state, torch.bfloat16)
        # Forge's loader does so too.
        model._internal_dict = config
        weights = {"input_hint_block.0.weight": rand(16, 3, 3, 3, seed=77), "input_blocks.0.0.weight": rand(32, 4, 3, 3, seed=78), "middle_block.0.in_layers.2.up": rand(64, 2, seed=79), "lora_controlnet": torch.tensor([])}  # fmt: skip
    whole = Whole(model)
    whole.storage_dtype, whole.computation_dtype, whole.predictor = torch.bfloat16, torch.float32, None
    return whole, state, controlnet.ControlLora(weights)


def test_a_control_lora_sees_merged_weights_and_shares_the_others(host, saving):
    saving()
    whole, state, control = control_setup(host)
    net, first = whole.diffusion_model, "blocks.0." if not REAL else "input_blocks.1."
    patched = {k: v for k, v in state.items() if k.startswith(first) or k == "input_blocks.0.0.weight"}
    lora = {f"diffusion_model.{k}": host_value("lora", tuple(v.shape), n) if v.dim() in (2, 4) else (rand(*v.shape, seed=n, scale=0.1),) for n, (k, v) in enumerate(patched.items())}  # fmt: skip
    clone = patcher_of(host, whole).clone()
    clone.add_patches(filename="a", patches=lora, strength_patch=0.7)
    host.load(clone)
    with torch.inference_mode():
        control.pre_run(whole, lambda percent: percent)
    found = dict(control.control_model.named_parameters())
    own = [k for k in control.control_weights if k in state]
    merged = shared = 0
    for key, value in state.items():
        if key not in found:
            continue
        if key in own:
            assert same_bits(found[key], control.control_weights[key].to(torch.bfloat16)), key
        elif key in patched:
            wanted = merge_reference([[0.7, lora[f"diffusion_model.{key}"], 1.0, None, None]], value.double())
            assert close_to(found[key], wanted, torch.bfloat16) <= 0.51, key
            assert contribution_error(found[key], wanted, value) < 0.2, "the LoRA is not in it"
            merged += 1
        else:
            assert found[key].data_ptr() == net.get_parameter(key).data_ptr(), f"{key} is a copy"
            shared += 1
    assert merged > 5
    assert shared > 5 or not REAL
    assert own
    assert all(same_bits(net.get_parameter(k), v) for k, v in state.items() if v.dim() > 1), "the model was changed"


def test_everything_is_stocks_again_afterwards(host, saving, tmp_path):
    base = importlib.import_module("backend.diffusion_engine.base")
    controlnet = importlib.import_module("backend.patcher.controlnet")
    utils = importlib.import_module("backend.utils")
    places = [(utils, "get_state_dict_after_quant"), (safetensors.torch, "save_file"), (controlnet.ControlLora, "pre_run")]  # fmt: skip
    places += [(base.ForgeDiffusionEngine, name) for name in ("save_unet", "save_checkpoint")]
    before = [getattr(*place) for place in places]
    takeover = saving()
    inside = [getattr(*place) for place in places]
    assert all(a is not b for a, b in zip(before, inside, strict=True))
    count = len(takeover.hooks.hooks)
    saving()
    assert [getattr(*place) for place in places] == inside
    assert len(takeover.hooks.hooks) == count
    safetensors.torch.save_file({"a": torch.ones(3)}, tmp_path / "other.safetensors", {"by": "others"})
    assert torch.equal(load_file(tmp_path / "other.safetensors")["a"], torch.ones(3))
    forge.uninstall()
    assert [getattr(*place) for place in places] == before


def test_another_forge_is_left_alone_and_said(host, saving, monkeypatch, caplog, tmp_path):
    base = importlib.import_module("backend.diffusion_engine.base")
    utils = importlib.import_module("backend.utils")
    controlnet = importlib.import_module("backend.patcher.controlnet")
    with monkeypatch.context() as patched:
        patched.delattr(utils, "get_state_dict_after_quant")
        patched.delattr(controlnet, "ControlLora")
        saving()
    assert "WITHOUT its LoRAs" in caplog.text
    assert "backend.utils.get_state_dict_after_quant is missing" in caplog.text
    assert "a ControlLora will see the model without its LoRAs" in caplog.text
    assert not hasattr(base.ForgeDiffusionEngine.save_unet, "lora_guard_hook")
    forge.uninstall()
    caplog.clear()

    class Elsewhere(base.ForgeDiffusionEngine):
        def save_unet(self, filename):
            raise NotImplementedError

    saving()
    assert "will take as much memory as it does in Forge itself: Elsewhere.save_unet does not call" in caplog.text
    assert not hasattr(safetensors.torch.save_file, "lora_guard_hook")
    setup = Setup(host).apply()
    setup.engine.save_unet(str(tmp_path / "merged.safetensors"))
    wanted = truth(setup.states[0], setup.net)
    for key, value in load_file(tmp_path / "merged.safetensors").items():
        assert close_to(value, wanted[key], setup.dtype) <= 0.51
    del Elsewhere.save_unet


def test_merges_suspended_for_a_move_are_saved_too(host, saving, tmp_path):
    saving()
    setup = Setup(host).apply()
    setup.engine.save_checkpoint(str(tmp_path / "before.safetensors"))
    host.memory.unload_all_models()
    norm = setup.net.blocks[0].norm.weight
    assert same_bits(norm, setup.states[0]["blocks.0.norm.weight"]), "nothing was suspended, nothing is tested"
    setup.engine.save_checkpoint(str(tmp_path / "after.safetensors"))
    before, after = load_file(tmp_path / "before.safetensors"), load_file(tmp_path / "after.safetensors")
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)
