"""The guard's plan of memory inside the host: what is replaced and given back, and that the CPU sees nothing of it."""

import functools
import importlib
import logging
import math

import pytest
import torch

from contract.host import REAL
from lib_lora_guard.hosts.forge import takeover as forge
from lib_lora_guard.planning import activations
from lib_lora_guard.planning.tokens import Picture, tokens_for

CPU = torch.device("cpu")
MB = 1 << 20
LATENT = [2, 16, 128, 96]
"""Two rows of a picture of 768 x 1024."""


@pytest.fixture
def k_model(host):
    return importlib.import_module("backend.modules.k_model")


@pytest.fixture
def takeover(host):
    yield forge.install()
    host.memory.current_loaded_models.clear()
    forge.uninstall()


def block(**shapes):
    module = torch.nn.Module()
    for path, shape in shapes.items():
        *owners, leaf = path.split("__")
        owner = module
        for name in owners:
            if not hasattr(owner, name):
                owner.add_module(name, torch.nn.Module())
            owner = getattr(owner, name)
        owner.register_parameter(leaf, torch.nn.Parameter(torch.zeros(shape), requires_grad=False))
    return module


def flux(width=64):
    """The names of Flux's denoiser in Forge, at a toy width."""
    double = {
        f"{stream}_{part}__weight": shape
        for stream in ("img", "txt")
        for part, shape in {
            "attn__qkv": (3 * width, width),
            "attn__proj": (width, width),
            "mlp__0": (4 * width, width),
            "mlp__2": (width, 4 * width),
            "mod__lin": (6 * width, width),
        }.items()
    }
    single = {
        "linear1__weight": (7 * width, width),
        "linear2__weight": (width, 5 * width),
        "modulation__lin__weight": (3 * width, width),
    }
    model = block(img_in__weight=(width, 64), txt_in__weight=(width, 4096), vector_in__in_layer__weight=(width, 768))
    model.double_blocks = torch.nn.ModuleList([block(**double) for _ in range(2)])
    model.single_blocks = torch.nn.ModuleList([block(**single) for _ in range(2)])
    return model


def unknown():
    return block(stem__weight=(8, 8), head__weight=(8, 8))


def built(k_model, model, dtype=torch.bfloat16):
    model.storage_dtype = model.computation_dtype = dtype
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)
    return k_model.KModel(model, None, k_predictor=torch.nn.Identity())


def patcher_of(host, model):
    return host.base.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def hooked(host):
    memory, patcher = host.memory, host.base.ModelPatcher
    budget = "compute_model_gpu_memory_when_using_cpu_swap"
    return ({budget: lambda: getattr(memory, budget)} if hasattr(memory, budget) else {}) | {
        "free_memory": lambda: memory.free_memory,
        "load_models_gpu": lambda: memory.load_models_gpu,
        "get_free_memory": lambda: memory.get_free_memory,
        "unload_model_clones": lambda: memory.unload_model_clones,
        "model_load": lambda: memory.LoadedModel.model_load,
        "model_unload": lambda: memory.LoadedModel.model_unload,
        "memory_required": lambda: patcher.memory_required,
    }


def test_everything_is_replaced_once_and_given_back(host, k_model):
    parts = {**hooked(host), "KModel.memory_required": lambda: k_model.KModel.memory_required}
    before = {name: part() for name, part in parts.items()}
    takeover = forge.install()
    try:
        for _ in range(2):
            takeover.install_loaded({"backend.modules.k_model": k_model})
        inside = {name: part() for name, part in parts.items()}
        for name in parts:
            assert inside[name] is not before[name], name
            assert inside[name].__wrapped__ is before[name], f"{name} is wrapped once"
            assert inside[name].lora_guard_hook.active
    finally:
        forge.uninstall()
    for name, part in parts.items():
        assert part() is before[name], name


def test_who_wraps_us_later_stays_and_is_passed_through(host, monkeypatch):
    original = host.memory.free_memory
    forge.install()
    ours, calls = host.memory.free_memory, []

    @functools.wraps(ours)
    def theirs(*args, **kwargs):
        calls.append(args)
        return ours(*args, **kwargs)

    monkeypatch.setattr(host.memory, "free_memory", theirs)
    forge.uninstall()
    assert host.memory.free_memory is theirs
    host.memory.free_memory(0, CPU)
    assert calls == [(0, CPU)]
    assert not ours.lora_guard_hook.active
    assert ours.__wrapped__ is original


@pytest.mark.parametrize("required", [0, 3 * MB, -5, math.nan, 1e30])
def test_on_the_cpu_loading_gets_what_it_was_asked_with(host, monkeypatch, caplog, required):
    seen, original = [], host.memory.load_models_gpu

    @functools.wraps(original)
    def spy(models, memory_required=0, hard_memory_preservation=0):
        seen.append((list(models), memory_required, hard_memory_preservation))
        return original(models, memory_required, hard_memory_preservation)

    patcher, _ = host.build("bf16")
    host.memory.current_loaded_models.clear()
    monkeypatch.setattr(host.memory, "load_models_gpu", spy)
    caplog.set_level(logging.INFO, logger="lib_lora_guard")
    takeover = forge.install()
    try:
        assert not takeover.memory.plans_for(CPU)
        for _ in range(2):
            host.memory.load_models_gpu([patcher], memory_required=required, hard_memory_preservation=7)
        assert [one.model for one in host.memory.current_loaded_models] == [patcher]
    finally:
        host.memory.current_loaded_models.clear()
        forge.uninstall()
    assert all(models == [patcher] and hard == 7 for models, _, hard in seen)
    assert all(given == required or (math.isnan(given) and math.isnan(required)) for _, given, _ in seen)
    assert not any("LG-R" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("asked", [0, 10**9, -1.5, 1e30])
@pytest.mark.parametrize("free_all", [False, True])
def test_on_the_cpu_freeing_is_the_hosts(host, monkeypatch, asked, free_all):
    seen, original = [], host.memory.free_memory

    @functools.wraps(original)
    def spy(memory_required, device, keep_loaded=(), free_all=False):
        seen.append((memory_required, device, list(keep_loaded), free_all))
        return original(memory_required, device, list(keep_loaded), free_all)

    monkeypatch.setattr(host.memory, "free_memory", spy)

    def left(guarded):
        patcher, _ = host.build("bf16")
        if guarded:
            forge.install()
        try:
            host.memory.load_models_gpu([patcher])
            seen.clear()
            host.memory.free_memory(asked, CPU, [], free_all=free_all)
            return len(host.memory.current_loaded_models), list(seen)
        finally:
            host.memory.current_loaded_models.clear()
            if guarded:
                forge.uninstall()

    assert left(True) == left(False)
    assert seen == [(asked, CPU, [], free_all)]


def test_on_the_cpu_free_memory_is_the_hosts_number(host, takeover):
    hook = host.memory.get_free_memory.lora_guard_hook
    for arguments in ((), (CPU,)):
        assert abs(host.memory.get_free_memory(*arguments) - hook.original(*arguments)) < 512 * MB
    if REAL:
        total, by_torch = host.memory.get_free_memory(CPU, torch_free_too=True)
        assert total >= 0
        assert by_torch >= 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_of_flux_is_what_was_measured(host, takeover, k_model, dtype):
    model = built(k_model, flux(), dtype)
    forges = model.memory_required(input_shape=LATENT)
    takeover.install_loaded({"backend.modules.k_model": k_model})
    found = model.memory_required(input_shape=LATENT)
    tokens = 2 * (128 * 96 // 4 + 512)
    used = 22.5 * tokens * 64 * dtype.itemsize + activations.FIXED_BYTES
    assert found == pytest.approx(max(activations.LEAST_BYTES, used) * 1.99, rel=1e-6)
    assert isinstance(found, int)
    assert found != forges
    assert model.memory_required(input_shape=LATENT) == found
    # A larger picture, and more of them, need more.
    wide = model.memory_required([2, 16, 512, 512])
    assert wide == pytest.approx((22.5 * 2 * (256 * 256 + 512) * 64 * dtype.itemsize + 10 * MB) * 1.99, rel=1e-6)
    assert model.memory_required([4, 16, 512, 512]) > 1.9 * wide


def test_flux_is_asked_for_one_row_a_picture(host, takeover, k_model):
    """The host asks for the prompt and the negative prompt; Flux runs without the second."""
    takeover.install_loaded({"backend.modules.k_model": k_model})
    model = built(k_model, flux())
    patcher = patcher_of(host, model)
    big = [2, 16, 512, 512]
    assert patcher.memory_required(big) == model.memory_required([1, *big[1:]])
    assert patcher.memory_required([6, *big[1:]]) == model.memory_required([3, *big[1:]])
    assert patcher.memory_required([3, *big[1:]]) == model.memory_required([2, *big[1:]])
    assert big == [2, 16, 512, 512]
    one = activations.step(
        tokens_for("Flux", Picture(4096, 4096)), Picture(4096, 4096), {"a": (64, 64)}, torch.bfloat16.itemsize
    )
    assert patcher.memory_required(big) == one.held_bytes


def test_what_is_stored_otherwise_is_copied_for_its_product(host, takeover, k_model):
    """The largest layer once, in the dtype of the calculation; layers that are in it already are used as they lie."""
    takeover.install_loaded({"backend.modules.k_model": k_model})
    largest = 7 * 64 * 64

    def asked(computed, stored=None, extra=None):
        model = flux()
        for layer in (model.double_blocks[0].img_mod.lin, model.single_blocks[1].linear1):
            layer.weight.data = layer.weight.data.to(stored or computed)
        if extra is not None:
            model.table = torch.nn.Parameter(extra, requires_grad=False)
        return built(k_model, model, computed).memory_required(LATENT)

    for computed in (torch.bfloat16, torch.float32):
        plain = asked(computed)
        assert asked(computed, torch.float8_e4m3fn) - plain == largest * computed.itemsize
        # A GTX 16xx computes 16-bit weights in fp32.
        assert asked(computed, torch.float16) - plain == largest * computed.itemsize
        assert asked(computed, extra=torch.zeros(10 * largest, dtype=torch.int64)) == plain


def test_a_model_of_nobodys_keeps_the_hosts_number(host, takeover, k_model):
    model = built(k_model, unknown())
    forges = {rows: model.memory_required([rows, *LATENT[1:]]) for rows in (1, 2, 4)}
    takeover.install_loaded({"backend.modules.k_model": k_model})
    patcher = patcher_of(host, model)
    for rows, expected in forges.items():
        assert model.memory_required([rows, *LATENT[1:]]) == int(expected)
        assert patcher.memory_required([rows, *LATENT[1:]]) == int(expected)


def test_after_switching_off_the_host_estimates(host, k_model):
    model = built(k_model, flux())
    forges = model.memory_required(LATENT)
    takeover = forge.install()
    takeover.install_loaded({"backend.modules.k_model": k_model})
    ours = model.memory_required(LATENT)
    forge.uninstall()
    assert model.memory_required(LATENT) == forges != ours
    assert patcher_of(host, model).memory_required(LATENT) == forges
