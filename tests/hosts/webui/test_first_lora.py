"""What is made ready for the first LoRA of a checkpoint, and when."""

import types

import pytest
import torch
from support.make import rand
from support.short_way import bnb_parameter

from lib_lora_guard.hosts.forge.raw_weights import ForgeWeight
from lib_lora_guard.hosts.webui import first_lora
from lib_lora_guard.hosts.webui.first_lora import FirstLora
from lib_lora_guard.hosts.webui.lora_files import LoraFiles

CARD = torch.device("meta")


class Model(torch.nn.Module):
    def __init__(self, *weights):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in weights)
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)

    def raw_weights(self):
        return [(layer, ForgeWeight(lambda: False)) for layer in self.layers]

    def compute_dtype(self):
        return torch.bfloat16


def checkpoint(model):
    unet = types.SimpleNamespace(model=model, load_device=CARD)
    clip = types.SimpleNamespace(cond_stage_model=torch.nn.Linear(2, 2))
    return types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=unet, clip=clip))


@pytest.fixture
def asked(monkeypatch):
    """The kernels that are asked for, and the threads that are begun."""
    found = types.SimpleNamespace(kernels=[], threads=[])
    monkeypatch.setattr(first_lora.CHOICE, "expect", lambda *what: found.kernels.append(what))
    monkeypatch.setattr(
        first_lora.threading,
        "Thread",
        lambda target, name, daemon: types.SimpleNamespace(start=lambda: found.threads.append(target)),
    )
    return found


def test_kernels_names_and_operators_are_there_before_the_first_lora(asked, monkeypatch):
    fp8 = rand(16, 16, seed=1).to(torch.float8_e4m3fn)
    model, files, defined = Model(fp8, fp8, fp8), LoraFiles(), []
    model.layers[1].scale_weight = torch.nn.Parameter(torch.tensor(0.5))
    monkeypatch.setattr(first_lora, "define_operators", lambda: defined.append(True))
    loaded = checkpoint(model)
    assert FirstLora(lambda model: model, files).after_reading(lambda path: loaded, "flux.safetensors") is loaded
    assert [(list(kinds), *rest) for kinds, *rest in asked.kernels] == [
        (["fp8 e4m3", "fp8 e4m3 scaled"], CARD, torch.bfloat16)
    ]
    target = files._targets[model]
    assert "names" not in vars(target)
    (work,) = asked.threads
    work()
    assert defined == [True]
    assert {"names", "architecture"} <= vars(target).keys()


def test_weights_that_get_their_form_when_they_are_placed_are_looked_at_after_the_image(asked):
    parameter = bnb_parameter(rand(16, 64, seed=1))[0]
    parameter.bnb_quantized = False
    model = Model(torch.zeros(2, 2))
    model.layers[0].weight = parameter
    loaded, first = checkpoint(model), FirstLora(lambda model: model, LoraFiles())
    first.after_reading(lambda: loaded)
    assert [list(kinds) for kinds, *_ in asked.kernels] == [[]]
    parameter.bnb_quantized = True
    for _ in range(2):
        first.after_image(types.SimpleNamespace(sd_model=loaded))
    assert [list(kinds) for kinds, *_ in asked.kernels] == [[], ["nf4 64 by fp32"]]


def test_gguf_is_expected_as_forge_will_lay_it_out(asked):
    model = Model(torch.zeros(2, 2))
    blocks = torch.nn.Parameter(torch.zeros(4, 144, dtype=torch.uint8), requires_grad=False)
    blocks.gguf_cls, blocks.real_shape = type("Q4_K", (), {}), (4, 256)
    blocks.computation_dtype, blocks.baked = torch.bfloat16, False
    model.layers[0].weight = blocks
    FirstLora(lambda model: model, LoraFiles()).after_reading(lambda: checkpoint(model))
    assert [list(kinds) for kinds, *_ in asked.kernels] == [["Q4_K baked by bf16"]]
    # Not before it is laid out.
    assert ForgeWeight(lambda: False).stored(model.layers[0]) is None


@pytest.mark.parametrize("found", [None, object()])
def test_a_checkpoint_of_another_host_is_handed_on(asked, found):
    first = FirstLora(lambda model: model, LoraFiles())
    assert first.after_reading(lambda: found) is found
    first.after_image("a request")
    assert not asked.kernels
    assert not asked.threads
