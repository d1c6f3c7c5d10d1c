"""The formats of baked GGUF weights: the table of `planning.gguf_baked` against the host, and that with the guard every
decision counts a model as it will lie."""

import types

import pytest
import torch
from faults.models import bnb_parameter
from support.live_memory import LiveMemory
from support.make import Net

from contract.host import K_WIDTH, REAL, WIDTH
from lib_lora_guard.hosts.forge import takeover as forge
from lib_lora_guard.planning.gguf_baked import FORGE_BLOCKS, baked_bytes, growth_bytes
from lib_lora_guard.weights.storage import storage_of

only_real = pytest.mark.skipif(not REAL, reason="the double bakes Q8_0 alone, which does not grow")
FORMS = sorted(FORGE_BLOCKS) if REAL else ["Q8_0"]
CPU, META = torch.device("cpu"), torch.device("meta")
"""META stands for the GPU: tensors there have sizes and no data."""
BAKING_TEMPORARY = 3.9
"""Memory that baking a tensor needs for a moment, the new tensor included, as a multiple of its bytes in the file. 145 MB for
the largest of Flux: no step needs less, so the guard does not count it."""


def size_of(parameter):
    return parameter.data.numel() * parameter.data.element_size()


def matrix(host, form, rows=64, columns=512):
    return host._gguf_parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)), form)


def not_loaded(host, form, load_device=CPU):
    """A patcher as it is after reading a file: nothing is baked yet."""
    is_k = form.endswith("_K")
    plain = Net(K_WIDTH if is_k else WIDTH, depth=1 if is_k else 2, seed=0)
    state, settings = host._stored(plain, form)
    with host.operations.using_forge_operations(**settings), torch.random.fork_rng(devices=[]):
        model = Net(K_WIDTH if is_k else WIDTH, depth=len(plain.blocks))
    model.load_state_dict(state, strict=False)
    model.requires_grad_(False)
    return host.base.ModelPatcher(model, load_device=load_device, offload_device=CPU)


def growth_of(model):
    return sum(
        growth_bytes(p.gguf_cls.__name__, size_of(p))
        for p in model.parameters()
        if getattr(p, "gguf_cls", None) is not None
    )


@only_real
def test_the_table_has_every_type_that_the_host_bakes(host):
    assert set(FORGE_BLOCKS) == {cls.__name__ for cls in host.gguf.quants_mapping.values()}
    import gguf

    for name, blocks in FORGE_BLOCKS.items():
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        # BF16 has values and no blocks.
        assert (blocks.values, blocks.stored_bytes) == (block, size), name


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_takes_what_the_table_says_before_and_after(host, form):
    weight, blocks = matrix(host, form), FORGE_BLOCKS[form]
    stored = size_of(weight)
    assert stored == 64 * 512 // blocks.values * blocks.stored_bytes
    assert not weight.baked
    weight.gguf_cls.bake(weight)
    assert size_of(weight) == baked_bytes(form, stored) == 64 * 512 // blocks.values * blocks.baked_bytes
    # For good: not again, and not back where it is moved or copied.
    weight.gguf_cls.bake(weight)
    assert size_of(weight) == size_of(weight.to("meta")) == baked_bytes(form, stored)
    assert weight.to("meta").baked


@only_real
def test_one_type_grows(host):
    assert {form for form in FORMS if growth_bytes(form, 1 << 30)} == {"Q4_K"}
    assert baked_bytes("Q4_K", 144 * 7) == 160 * 7
    assert [baked_bytes(form, 1000) for form in ("F32", "F16", "IQ4_XS")] == [1000] * 3


@only_real
@pytest.mark.parametrize("form", FORMS)
def test_what_baking_takes_for_a_moment(host, form):
    first, weight = matrix(host, form), matrix(host, form)
    first.gguf_cls.bake(first)
    stored = size_of(weight)
    with LiveMemory(weight.data) as live:
        weight.gguf_cls.bake(weight)
    assert live.peak_bytes <= BAKING_TEMPORARY * stored
    if form == "Q4_K":
        assert live.peak_bytes / stored == pytest.approx(BAKING_TEMPORARY, rel=0.01)


@only_real
def test_the_host_places_by_the_file_and_bakes_where_each_weight_lies(host, monkeypatch):
    patcher = not_loaded(host, "Q4_K", META)
    memory, stored = host.memory, host.memory.module_size(patcher.model)
    growth = growth_of(patcher.model)
    assert growth > 10_000
    place_on_card(memory, monkeypatch, free=stored + 700, rest=700)
    memory.load_models_gpu([patcher])
    memory.current_loaded_models.clear()
    # All of it is on the card, and the 700 bytes for a step are gone.
    assert memory.module_size(patcher.model, include_device=META) == stored + growth


def place_on_card(memory, monkeypatch, free, rest):
    monkeypatch.setattr(memory, "vram_state", memory.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(memory, "get_free_memory", lambda *a, **k: (free, 0) if k.get("torch_free_too") else free)
    monkeypatch.setattr(memory, "current_inference_memory", rest)


@only_real
@pytest.mark.parametrize("short", [False, True])
def test_with_the_guard_what_is_placed_still_fits_when_it_is_baked(host, monkeypatch, capsys, short):
    patcher = not_loaded(host, "Q4_K", META)
    memory = host.memory
    baked = memory.module_size(patcher.model) + growth_of(patcher.model)
    free = baked + 700 - (1 if short else 0)
    place_on_card(memory, monkeypatch, free=free, rest=700)
    takeover = forge.install()
    try:
        capsys.readouterr()
        memory.load_models_gpu([patcher])
        on_card = memory.module_size(patcher.model, include_device=META)
    finally:
        memory.current_loaded_models.clear()
        forge.uninstall()
    assert takeover is not None
    said = capsys.readouterr().out
    assert f"Model Require: {baked / 2**20:.2f} MB" in said
    assert ("All loaded to GPU" in said) is not short
    assert on_card <= free - 700
    assert (on_card == baked) is not short


@pytest.mark.parametrize("form", ["bf16", "Q8_0", *(["Q4_K", "Q6_K"] if REAL else [])])
def test_a_model_counts_the_same_before_and_after_its_first_load(host, form):
    patcher = not_loaded(host, form)
    by_host = host.memory.module_size(patcher.model)
    growth = growth_of(patcher.model)
    assert (growth > 0) is (form == "Q4_K")
    forge.install()
    try:
        before = host.memory.module_size(patcher.model)
        elsewhere = host.memory.module_size(patcher.model, exclude_device=CPU)
        host.load(patcher)
        after = host.memory.module_size(patcher.model)
    finally:
        host.memory.current_loaded_models.clear()
        forge.uninstall()
    assert before == after == by_host + growth
    assert elsewhere == 0
    assert host.memory.module_size(patcher.model) == after, "baked is baked, counted once, without the guard too"


@only_real
def test_the_hosts_three_numbers_of_a_layer_grow_together(host):
    patcher = not_loaded(host, "Q4_K")
    layer = next(m for m in patcher.model.modules() if getattr(getattr(m, "weight", None), "gguf_cls", None))
    whole, weight, rest = host.memory.module_size(layer, return_split=True)
    growth = growth_bytes("Q4_K", size_of(layer.weight))
    forge.install()
    try:
        found = host.memory.module_size(layer, None, None, True)
        here, there = (host.memory.module_size(layer, include_device=device) for device in (CPU, META))
        outside = host.memory.module_size(layer, CPU)
        # Where the host lays out a model that is loaded again, it asks layer by layer.
        layer.weight.gguf_cls.bake(layer.weight)
        baked = host.memory.module_size(layer, return_split=True)
    finally:
        forge.uninstall()
    assert growth > 0
    assert found == baked == (whole + growth, weight + growth, rest)
    assert (here, there, outside) == (whole + growth, 0, 0)


@only_real
def test_a_model_is_walked_through_once_for_its_size(host, monkeypatch):
    """The host asks for every model in every load, and one that is not baked is looked at a second time: in the same list."""
    model, walks = not_loaded(host, "Q4_K").model, []
    walk = model.named_parameters
    monkeypatch.setattr(model, "named_parameters", lambda *a, **k: walks.append(1) or walk(*a, **k), raising=False)
    forge.install()
    try:
        for is_baked in (False, True):
            model.gguf_baked = is_baked
            walks.clear()
            host.memory.module_size(model)
            assert len(walks) == 1
    finally:
        forge.uninstall()


@only_real
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_scales_of_four_bit_weights_count_as_what_they_are(host, quant_type):
    """Held to the host's own factors: what the guard adds to them is what it knows better."""
    layer = torch.nn.Linear(512, 256, bias=False)
    layer.weight = bnb_parameter(layer.weight.data)
    layer.weight.quant_type = quant_type
    packed, blocks = 512 * 256 // 2, 512 * 256 // 64
    assert host.memory.module_size(layer) == pytest.approx(packed * 1.1)
    forge.install()
    try:
        assert host.memory.module_size(layer) == pytest.approx(packed + 4 * blocks)
        assert host.memory.module_size(layer, return_split=True)[1] == pytest.approx(packed + 4 * blocks)
        assert host.memory.module_size(layer, include_device=META) == 0
        layer.weight.quant_state.state2 = types.SimpleNamespace(absmax=torch.zeros(8), code=torch.zeros(256))
        layer.weight.quant_state.absmax = torch.zeros(blocks, dtype=torch.uint8)
        assert host.memory.module_size(layer) == pytest.approx(packed + blocks + 4 * (8 + 256))
        assert storage_of(layer.weight).bytes == packed + blocks + 4 * (8 + 256)
    finally:
        forge.uninstall()


@only_real
def test_a_weight_that_is_packed_on_its_way_to_the_card_counts_as_packed(host):
    layer = torch.nn.Linear(512, 256, bias=False, dtype=torch.float16)
    layer.weight.quant_type, layer.weight.blocksize = "nf4", 64
    values = 512 * 256
    assert host.memory.module_size(layer) == pytest.approx(values * 0.55)
    forge.install()
    try:
        assert host.memory.module_size(layer) == pytest.approx(values // 2 + 4 * values // 64)
    finally:
        forge.uninstall()
