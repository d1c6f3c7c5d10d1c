"""planning.host_memory and replay.forge_memory against the host's own functions. On the double as far as it has them."""

import importlib
import random
import re
from types import SimpleNamespace

import pytest
import torch
from support.forge_arithmetic import Loaded, as_logged, evict, vae_encode_bytes
from support.live_memory import LiveMemory

from contract.host import REAL
from lib_lora_guard.hosts.forge import takeover as forge_host
from lib_lora_guard.planning import on_card
from lib_lora_guard.planning.host_memory import Latent, swap_budget_bytes, unet_estimate_bytes
from lib_lora_guard.replay import forge_memory as forge
from lib_lora_guard.replay.forge_memory import Layer, Request
from lib_lora_guard.units import GB

only_real = pytest.mark.skipif(not REAL, reason="the double has no arithmetic of its own")
META = torch.device("meta")
"""Stands for the GPU: tensors there have sizes and no data."""


def test_the_slider_as_it_comes(host):
    assert host.memory.minimum_inference_memory() == forge.DEFAULT_SLIDER_REST_BYTES


def test_unloading_everything_is_the_sentinel(host, monkeypatch):
    asked = []
    monkeypatch.setattr(host.memory, "free_memory", lambda wanted, *a, **k: asked.append(wanted))
    host.memory.unload_all_models()
    assert asked == [forge.SENTINEL_BYTES]


@only_real
def test_the_swap_budget_is_the_hosts(host):
    draw = random.Random(5)
    for _ in range(500):
        free, inference = draw.randrange(48 * GB), draw.randrange(-GB, 24 * GB)
        expected = host.memory.compute_model_gpu_memory_when_using_cpu_swap(free, inference)
        assert swap_budget_bytes(free, inference) == expected


@only_real
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("function", ["attention_pytorch", "attention_xformers", "attention_split"])
def test_the_estimate_of_a_step_is_the_hosts(host, monkeypatch, dtype, function):
    attention = importlib.import_module("backend.attention")
    k_model = importlib.import_module("backend.modules.k_model")
    monkeypatch.setattr(attention, "attention_function", getattr(attention, function))
    sliced = function == "attention_split"
    # Attention that is upcast is computed in fp32 where it is sliced.
    upcast = sliced and attention.get_attn_precision() == torch.float32
    for width, height, pictures in [(1024, 1024, 1), (896, 1152, 2), (512, 640, 5)]:
        latent = Latent.of(width, height, pictures)
        shape = [pictures * 2, 16, latent.height, latent.width]
        expected = k_model.KModel.memory_required(SimpleNamespace(computation_dtype=dtype), shape)
        mine = unet_estimate_bytes(latent, 4 if upcast else dtype.itemsize, sliced_attention=sliced)
        assert mine == pytest.approx(expected, rel=1e-12)


@only_real
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_vaes_requests_are_the_hosts(host, dtype):
    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(down_block_types=[0] * 4, latent_channels=16)
    vae = importlib.import_module("backend.patcher.vae").VAE(model, torch.device("cpu"), dtype)
    latent = Latent.of(1024, 768, 3)
    decode = vae.memory_used_decode((3, 16, latent.height, latent.width), dtype)
    assert forge.vae_decode_bytes(latent, dtype.itemsize) == decode
    assert vae_encode_bytes(1024, 768, dtype.itemsize) == vae.memory_used_encode((3, 3, 768, 1024), dtype)


class Norm(torch.nn.Module):
    """A norm of the model's own, as Flux has it: what cannot be swapped."""

    def __init__(self, width):
        super().__init__()
        self.weight = None
        self.scale = torch.nn.Parameter(torch.ones(width))


def layers_of(model):
    return [
        Layer(*(0 if t is None else t.numel() * t.element_size() for t in (m.weight, m.bias)))
        for m in model.modules()
        if hasattr(m, "parameters_manual_cast")
    ]


def with_norms(host, seed=0):
    patcher, _ = host.build("bf16", seed=seed)
    patcher.model.norms = torch.nn.ModuleList([Norm(32), Norm(48)])
    host.memory.current_loaded_models.clear()
    return patcher


@only_real
def test_a_model_is_laid_out_as_the_host_does(host):
    model = with_norms(host).model
    norms = sum(n.scale.numel() * n.scale.element_size() for n in model.norms)
    layers = layers_of(model)
    whole = sum(layer.weight_bytes + layer.extra_bytes for layer in layers) + norms
    assert len(layers) > 4
    for budget in (*range(0, int(whole) + 300, 97), whole, whole + 1):
        gpu, extras, cpu = host.memory.build_module_profile(model, budget)
        layout = forge.distribute(layers, budget, norms)
        assert layout.gpu_bytes == sum(m.total_mem for m in gpu) + sum(m.extra_mem for m in extras)
        assert layout.swapped_bytes == sum(m.total_mem for m in cpu) + sum(m.weight_mem for m in extras)


@only_real
@pytest.mark.parametrize("spare", [-3000, -1200, -1, 0, 500])
def test_what_the_host_prints_when_it_places_a_model(host, monkeypatch, capsys, spare):
    """The whole of load_models_gpu, with a card of a few kilobytes: its lines are ours."""
    patcher = with_norms(host)
    patcher.load_device = META
    memory = host.memory
    size = memory.module_size(patcher.model)
    rest, hard, estimate = 700, 60, 900
    free = size + rest + hard + spare
    monkeypatch.setattr(memory, "vram_state", memory.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(memory, "get_free_memory", lambda *a, **k: (free, 0) if k.get("torch_free_too") else free)
    monkeypatch.setattr(memory, "current_inference_memory", rest)
    asked = []
    unload = memory.free_memory
    monkeypatch.setattr(memory, "free_memory", lambda wanted, *a, **k: (asked.append(wanted), unload(wanted, *a, **k)))
    monkeypatch.setattr(memory, "bake_gguf_model", lambda model: None)
    layers, norms = layers_of(patcher.model), sum(n.scale.nbytes for n in patcher.model.norms)
    capsys.readouterr()
    memory.load_models_gpu([patcher], memory_required=estimate, hard_memory_preservation=hard)
    memory.current_loaded_models.clear()
    said = capsys.readouterr().out
    wanted = forge.request_bytes(Request(size, 0, rest, estimate, hard))
    assert asked == [pytest.approx(wanted)]
    assert f"Trying to free {as_logged(wanted)} for meta" in said
    placed = forge.place(free, size, 0, rest, hard)
    assert f"Model Require: {as_logged(size)}, " in said
    assert f"Inference Require: {as_logged(rest + hard)}, Remaining: {as_logged(placed.remaining_bytes)}, " in said
    if placed.swap_budget_bytes is None:
        assert spare >= 0
        assert "All loaded to GPU." in said
    else:
        assert spare < 0
        layout = forge.distribute(layers, placed.swap_budget_bytes, norms)
        line = re.search(r"Swap Loaded \(\w+ method\): (.+ MB), GPU Loaded: (.+ MB)", said)
        assert line.groups() == (as_logged(layout.swapped_bytes), as_logged(layout.gpu_bytes))


@only_real
def test_the_host_places_by_the_guards_rule_what_the_guard_plans(host, monkeypatch, capsys):
    memory, rest, room = host.memory, 700, [0]
    model = with_norms(host).model
    size, layers, norms = memory.module_size(model), layers_of(model), sum(n.scale.nbytes for n in model.norms)
    takeover = forge_host.install()
    more = []
    try:
        with monkeypatch.context() as patch:
            patch.setattr(on_card, "SWAPPING_BYTES", 100)
            patch.setattr(memory, "vram_state", memory.VRAMState.NORMAL_VRAM)
            patch.setattr(memory, "get_free_memory", lambda *a, **k: (room[0], 0) if k else room[0])
            patch.setattr(memory, "current_inference_memory", rest)
            patch.setattr(memory, "bake_gguf_model", lambda model: None)
            for short in range(1, int(size), 3001):
                room[0] = size + rest - short
                patcher = with_norms(host)
                patcher.load_device = META
                capsys.readouterr()
                # The card is none of CUDA's here: nobody but this test plans for it.
                with takeover.eviction.planned():
                    memory.load_models_gpu([patcher])
                memory.current_loaded_models.clear()
                said = capsys.readouterr().out
                layout = forge.distribute(layers, max((size - short) / 1.3, size - short - 100), norms)
                line = re.search(r"Swap Loaded \(\w+ method\): (.+ MB), GPU Loaded: (.+ MB)", said)
                assert line.groups() == (as_logged(layout.swapped_bytes), as_logged(layout.gpu_bytes))
                by_forge = forge.distribute(layers, swap_budget_bytes(room[0], rest), norms)
                more.append(layout.gpu_bytes - by_forge.gpu_bytes)
    finally:
        forge_host.uninstall()
    assert min(more) >= 0
    assert max(more) > 0


class Placed:
    """A LoadedModel that only says when it goes."""

    def __init__(self, name, size, device):
        self.size, self.device = size, device
        self.model = SimpleNamespace(model=type(name, (), {})())

    def model_unload(self, avoid_model_moving=False):
        Placed.free += self.size


@only_real
@pytest.mark.parametrize("wanted", [0, 99, 100, 105, 130, 131, 160, 1000, 1e30])
def test_the_host_unloads_in_that_order(host, monkeypatch, capsys, wanted):
    here, there = torch.device("meta"), torch.device("cpu")
    sizes = {"Newest": 40, "Middle": 30, "Elsewhere": 500, "Oldest": 5}
    Placed.free = 100
    models = [Placed(name, size, there if name == "Elsewhere" else here) for name, size in sizes.items()]
    held = [m.model for m in models]  # a model that nobody else holds is thrown out before
    monkeypatch.setattr(
        host.memory, "get_free_memory", lambda *a, **k: (Placed.free, 0) if k.get("torch_free_too") else Placed.free
    )
    monkeypatch.setattr(host.memory, "vram_state", host.memory.VRAMState.NORMAL_VRAM)
    host.memory.current_loaded_models[:] = models
    host.memory.free_memory(wanted, here, [models[0]])
    left = [m.model for m in host.memory.current_loaded_models]
    host.memory.current_loaded_models.clear()
    mine = evict(
        [Loaded(name, size, can_go=name not in ("Newest", "Elsewhere")) for name, size in sizes.items()], 100, wanted
    )
    assert [name for name, model in zip(sizes, held, strict=True) if model not in left] == sorted(
        mine.unloaded, key=list(sizes).index
    )
    assert re.findall(r"Unload model (\w+)", capsys.readouterr().out) == list(mine.unloaded)
    assert mine.free_bytes == Placed.free


@only_real
def test_a_layer_merged_in_fp32_takes_three_copies(host):
    rows, columns, rank = 960, 640, 4
    weight = torch.zeros(rows, columns, dtype=torch.bfloat16)
    factors = (torch.ones(rows, rank), torch.ones(rank, columns), 4.0, None, None, None)
    with LiveMemory(weight, *factors[:2]) as live:
        host.lora.merge_lora_to_weight([[0.5, ("lora", factors), 1.0, None, None]], weight, "x", torch.float32)
    # The factors are copied too: 4 * (960 + 640) values of 614400.
    assert live.peak_bytes / forge.merge_copy_bytes(rows * columns) == pytest.approx(forge.MERGE_COPIES, abs=0.02)
