"""The changes that other extensions make to a patcher, its LoraLoader and its layers, as forge-facts.md says, on
the double and on the real backend. tests/real_forge/neighbours.py asks the same in a running Forge."""

import copy
import sys

import pytest
import torch
from support.make import rand, write_kohya
from support.measure import assert_same, contribution_error, fp32_limit, same_bits

from contract.lora_files import MODULES, lora_extension
from contract.stacks import FILE, lora_on_everything, reference, run, shapes, with_loras
from lib_lora_guard.hosts.forge import takeover as forge

STORAGES = ["fp32", "bf16", "fp8", "Q8_0"]
LOW_RANK = ("lora", "loha", "lokr")


def built(host, storage):
    """`(patcher, dense, base output, bits of every parameter)`."""
    patcher, dense = host.build(storage)
    base = run(patcher)
    return patcher, dense, base, {k: p.data.clone() for k, p in patcher.model.named_parameters()}


def assert_removed(host, patcher, base, bits):
    host.load(patcher)
    assert same_bits(run(patcher), base)
    assert all(same_bits(p.data, bits[k]) for k, p in patcher.model.named_parameters())
    loader = patcher.lora_loader
    assert (loader.backup, loader.online_backup) == ({}, [])
    assert not any(hasattr(m, "forge_online_loras") for m in patcher.model.modules())


def is_the_reference(patcher, dense, base, loras):
    wanted = reference(patcher, dense, loras)
    assert_same(run(patcher), wanted, base, fp32_limit(wanted, base))


def low_rank(dense, seed=1):
    return {k: v for k, v in lora_on_everything(dense, seed).items() if v[0] in LOW_RANK}


def scaled(patches, factor):
    """The same LoRA with another strength per key: `factor(key)`."""
    return {k: (v[0], (v[1][0] * factor(k), *v[1][1:])) for k, v in patches.items()}


@pytest.mark.parametrize("storage", STORAGES)
def test_block_weights_under_a_key_with_the_time_in_mid_sampling(guarded, storage):
    patcher, dense, base, bits = built(guarded, storage)
    patches, per_block = low_rank(dense), {"blocks.0": 0.3}

    def factor(key):
        return next((f for part, f in per_block.items() if part in key), 1.5)

    changed = patcher.clone()
    changed.add_patches(filename=FILE, patches=patches, strength_patch=0.8)
    # Before the pass: strength 0 everywhere, and text in the place of the strength in the key.
    ((key, entries),) = changed.lora_patches.items()
    changed.lora_patches = {(key[0], "1,0,0.3", *key[2:]): {k: [(0, *e[1:]) for e in v] for k, v in entries.items()}}
    guarded.load(changed)
    assert same_bits(run(changed), base)
    weighed = scaled(patches, factor)
    for step, (on, wanted) in enumerate([(True, weighed), (False, None), (True, weighed)]):
        ((key, entries),) = changed.lora_patches.items()
        stamped = (f"{key[0]}_17000000{step}.5", *key[1:])
        changed.lora_patches[stamped] = {
            k: [(factor(k) if on else 0, *e[1:]) for e in v] for k, v in changed.lora_patches.pop(key).items()
        }
        changed.refresh_loras()
        changed.lora_patches[key] = changed.lora_patches.pop(stamped)
        if wanted is None:
            assert same_bits(run(changed), base), "strength 0"
        else:
            is_the_reference(changed, dense, base, [(FILE, wanted, 1.0)])
    assert_removed(guarded, patcher, base, bits)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("way", ["new key", "forced"])
def test_another_strength_at_every_step(guarded, storage, way):
    patcher, dense, base, bits = built(guarded, storage)
    patches = lora_on_everything(dense)
    changed = with_loras(guarded, patcher, (FILE, patches, 1.0))
    for strength in (0.2, 1.3, 0.0, -0.5, 0.7):
        if way == "new key":
            changed.lora_patches = {
                (k[0], strength, *k[2:]): {n: [[strength, *e[1:]] for e in v] for n, v in p.items()}
                for k, p in changed.lora_patches.items()
            }
            changed.refresh_loras()
        else:
            for entries in next(iter(changed.lora_patches.values())).values():
                entries[0][0] = strength
            changed.lora_loader.refresh(changed.lora_patches, torch.device("cpu"), force_refresh=True)
        if strength == 0:
            assert same_bits(run(changed), base)
        else:
            is_the_reference(changed, dense, base, [(FILE, patches, strength)])
    assert_removed(guarded, patcher, base, bits)


@pytest.mark.parametrize("storage", STORAGES)
def test_frozen_patches_are_lists_of_sixteen(guarded, storage):
    patcher, dense, base, bits = built(guarded, storage)
    patches = {k: v for k, v in lora_on_everything(dense).items() if v[0] == "lora" and "conv" not in k}
    frozen = {}
    for n, (key, (_, (up, down, *_rest))) in enumerate(patches.items()):
        if n % 2:
            frozen[key] = ("diff", [rand(*shapes(dense)[key], seed=n, scale=0.1)] + [None] * 15)
        else:
            frozen[key] = ("lora", [up, down] + [None] * 14)
    plain = {k: (v[1][0],) if v[0] == "diff" else ("lora", (*v[1][:2], None, None, None)) for k, v in frozen.items()}
    other = ("b.safetensors", lora_on_everything(dense, 40), 0.5)
    for loras in ([], [other]):
        changed = patcher.clone()
        for name, values, strength in loras:
            changed.add_patches(filename=name, patches=values, strength_patch=strength)
        changed.add_patches(filename="frozen", patches=frozen, strength_patch=0.6, strength_model=1.0)
        guarded.load(changed)
        is_the_reference(changed, dense, base, [*loras, ("frozen", plain, 0.6)])
    assert_removed(guarded, patcher, base, bits)


@pytest.mark.parametrize("storage", STORAGES)
def test_two_clones_in_turns_with_a_calculator_of_their_own(guarded, storage):
    patcher, dense, base, bits = built(guarded, storage)

    def eight_bits(weight, strength, value):
        steps, low, high = value
        return weight + (strength * (steps.float() / 255 * (high - low) + low)).to(weight.dtype)

    guarded.lora.extra_weight_calculators["inpaint"] = eight_bits
    try:
        shape = shapes(dense)["blocks.0.proj.weight"]
        steps = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
        full = steps.float() / 255 * 0.4 - 0.2
        lora = (FILE, low_rank(dense), 0.5)
        plain = with_loras(guarded, patcher, lora)
        patched = plain.clone()
        value = ("inpaint", (steps, torch.tensor(-0.2), torch.tensor(0.2)))
        patched.add_patches(filename="inpaint.patch", patches={"blocks.0.proj.weight": value})
        for _ in range(3):
            guarded.load(patched)
            is_the_reference(patched, dense, base, [lora, ("inpaint", {"blocks.0.proj.weight": (full,)}, 1.0)])
            guarded.load(plain)
            is_the_reference(plain, dense, base, [lora])
    finally:
        del guarded.lora.extra_weight_calculators["inpaint"]
    assert_removed(guarded, patcher, base, bits)


# Not fp32 on the fly: there stock itself writes into the weight that it patches.
@pytest.mark.parametrize(
    ("storage", "online"), [("fp32", False), *((s, online) for s in ("bf16", "fp8") for online in (False, True))]
)
def test_a_pasted_refresh_from_inside_the_forward(guarded, storage, online):
    # The regional prompter runs its copy of `refresh` in the text encoder's first layer, with other strengths each time.
    patcher, dense, base, bits = built(guarded, storage)
    patches = {k: v for k, v in low_rank(dense).items() if "conv" not in k}
    pasted = copied(guarded.lora.LoraLoader.refresh)
    changed = with_loras(guarded, patcher, (FILE, patches, 1.0), online=online)
    seen = []

    def before(*_):
        for entries in next(iter(changed.lora_patches.values())).values():
            entries[0][0] = 0.25
        pasted(changed.lora_loader, changed.lora_patches, torch.device("cpu"), True)
        seen.append(1)

    handle = changed.model.blocks[0].norm.register_forward_pre_hook(before)
    run(changed)
    handle.remove()
    assert seen, "the neighbour was not at work"
    again = with_loras(guarded, patcher, (FILE, patches, 0.6), online=online)
    is_the_reference(again, dense, base, [(FILE, patches, 0.6)])
    assert_removed(guarded, patcher, base, bits)


@pytest.mark.parametrize("storage", ["bf16", "fp8"])
def test_a_pasted_refresh_counts_at_once(guarded, storage):
    patcher, dense, base, _ = built(guarded, storage)
    patches = {k: v for k, v in low_rank(dense).items() if "conv" not in k}
    changed = with_loras(guarded, patcher, (FILE, patches, 1.0), online=True)
    for entries in next(iter(changed.lora_patches.values())).values():
        entries[0][0] = 0.25
    pasted = copied(guarded.lora.LoraLoader.refresh)
    pasted(changed.lora_loader, changed.lora_patches, torch.device("cpu"), True)
    error = contribution_error(run(changed), reference(patcher, dense, [(FILE, patches, 0.25)]), base)
    assert error < 0.1, "Forge's own path rounds, but it is this LoRA once"


def test_strengths_written_on_the_layers_of_a_stack_that_asks_for_online(guarded):
    # The regional prompter asks for online patches on wide storage, which Forge never does, and writes strengths per region.
    patcher, dense, base, bits = built(guarded, "bf16")
    patcher.model.storage_dtype = torch.bfloat16  # as Forge's U-Nets have it
    patches = {k: v for k, v in low_rank(dense).items() if "conv" not in k}
    changed = with_loras(guarded, patcher, (FILE, patches, 1.0), online=True)
    assert changed.has_online_lora()
    for module in changed.model.modules():
        for entry in (getattr(module, "forge_online_loras", None) or {}).get("weight") or ():
            entry[0] = 0.25
    error = contribution_error(run(changed), reference(patcher, dense, [(FILE, patches, 0.25)]), base)
    assert error < 0.1
    assert_removed(guarded, patcher, base, bits)


def copied(refresh):
    """The host's own function behind whatever wraps it."""
    while hasattr(refresh, "__wrapped__"):
        refresh = refresh.__wrapped__
    return refresh


@pytest.mark.parametrize("storage", ["bf16", "fp8"])
@pytest.mark.parametrize("when", ["before the LoRA", "after the LoRA"])
def test_a_layer_whose_forward_another_extension_has_replaced(guarded, storage, when):
    patcher, dense, base, bits = built(guarded, storage)
    operations, patches = guarded.operations, low_rank(dense)

    def forward(self, x):
        if self.parameters_manual_cast:
            weight, bias = operations.weights_manual_cast(self, x)[:2]
        else:
            weight, bias = operations.get_weight_and_bias(self)
        return torch.nn.functional.linear(x, weight, bias)

    layer = patcher.model.blocks[0].proj
    if when == "before the LoRA":
        layer.forward = forward.__get__(layer)
    changed = with_loras(guarded, patcher, (FILE, patches, 0.8))
    layer.forward = forward.__get__(layer)
    is_the_reference(changed, dense, base, [(FILE, patches, 0.8)])
    another = with_loras(guarded, patcher, (FILE, patches, 0.3))
    is_the_reference(another, dense, base, [(FILE, patches, 0.3)])
    assert_removed(guarded, patcher, base, bits)


@pytest.mark.parametrize("storage", ["bf16", "fp8"])
def test_refresh_wrapped_by_others_before_and_after_us(host, storage):
    loader, calls = host.lora.LoraLoader, []
    stock = loader.refresh

    def wrapping(inner, name, **extra):
        def refresh(self, *args, **kwargs):
            calls.append(name)
            return inner(self, *args, **{**kwargs, **extra})

        return refresh

    loader.refresh = wrapping(stock, "before")
    try:
        forge.install()
        ours = loader.refresh
        loader.refresh = wrapping(ours, "after", force_refresh=True)
        patcher, dense, base, bits = built(host, storage)
        patches = lora_on_everything(dense)
        calls.clear()
        for strength in (0.5, 0.9):
            changed = with_loras(host, patcher, (FILE, patches, strength))
            is_the_reference(changed, dense, base, [(FILE, patches, strength)])
            changed.refresh_loras()
            is_the_reference(changed, dense, base, [(FILE, patches, strength)])
        assert "after" in calls
        assert_removed(host, patcher, base, bits)
    finally:
        host.memory.current_loaded_models.clear()
        forge.uninstall()
        loader.refresh = stock


@pytest.mark.parametrize("storage", STORAGES)
def test_a_replaced_module_to_and_modules_moved_by_others(guarded, storage, monkeypatch):
    moved, to = [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, **k: (moved.append(self), to(self, *a, **k))[1])
    patcher, dense, base, bits = built(guarded, storage)
    lora = (FILE, lora_on_everything(dense), 0.7)
    changed = with_loras(guarded, patcher, lora)
    changed.model.to(torch.device("cpu"))
    for module in changed.model.modules():
        module.to(device="cpu")
    assert moved
    is_the_reference(changed, dense, base, [lora])
    assert_removed(guarded, patcher, base, bits)


def test_a_clone_for_every_pass_changes_nothing(guarded):
    patcher, dense, base, bits = built(guarded, "bf16")
    lora = (FILE, lora_on_everything(dense), 0.7)
    changed = with_loras(guarded, patcher, lora)
    with_lora, steps = run(changed), guarded.guard.stacks.report(patcher.lora_loader)
    for _ in range(5):
        changed = guarded.load(changed.clone())
        assert same_bits(run(changed), with_lora)
    assert guarded.guard.stacks.report(patcher.lora_loader) is steps, "nothing was applied again"
    assert_removed(guarded, patcher, base, bits)


@pytest.mark.parametrize("storage", STORAGES)
def test_all_models_unloaded_and_the_memory_state_flipped(guarded, storage):
    patcher, dense, base, bits = built(guarded, storage)
    lora = (FILE, lora_on_everything(dense), 0.7)
    changed = with_loras(guarded, patcher, lora)
    for _ in range(2):
        for loaded in list(guarded.memory.current_loaded_models):
            guarded.memory.current_loaded_models.remove(loaded)
            loaded.model_unload()
        guarded.load(changed)
        is_the_reference(changed, dense, base, [lora])
    assert_removed(guarded, patcher, base, bits)


def test_patches_written_by_others_are_not_written_to(guarded):
    # Block weights and schedules read their own entries again: the guard must leave them as they are.
    patcher, dense, base, bits = built(guarded, "fp8")
    changed = patcher.clone()
    changed.add_patches(filename=FILE, patches=lora_on_everything(dense), strength_patch=0.7)
    before = copy.deepcopy(changed.lora_patches)
    guarded.load(changed)
    run(changed)
    assert list(changed.lora_patches) == list(before)
    for key, patches in before.items():
        for name, entries in patches.items():
            now = changed.lora_patches[key][name]
            assert [e[0] for e in now] == [e[0] for e in entries]
            assert all(same_bits(a, b) for e, f in zip(now, entries, strict=True) for a, b in tensors(e[1], f[1]))
    assert_removed(guarded, patcher, base, bits)


def tensors(a, b):
    a, b = ((v[1] if isinstance(v[0], str) else v) for v in (a, b))
    return [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("order", ["before", "after"])
def test_tensors_from_a_replaced_reader_count_whoever_came_first(guarded, monkeypatch, tmp_path, x, order):
    path = tmp_path / "good.safetensors"
    write_kohya(path, MODULES)
    networks = lora_extension(tmp_path)
    monkeypatch.setitem(sys.modules, "networks", networks)
    from safetensors.torch import load_file

    networks.load_lora_state_dict = load_file

    def halved(inner):
        return lambda filename: {k: v * 0.5 if "lora_up" in k else v for k, v in inner(filename).items()}

    if order == "before":
        networks.load_lora_state_dict = halved(networks.load_lora_state_dict)
    forge.install_in_webui()
    if order == "after":
        networks.load_lora_state_dict = halved(networks.load_lora_state_dict)
    patcher, _ = guarded.build("fp32")

    def picture(strength, state):
        changed, _ = networks.load_lora_for_models(
            patcher, None, state, strength, strength, filename=str(path), online_mode=False
        )
        guarded.load(changed)
        with torch.inference_mode():
            return changed.model(x).clone()

    with torch.inference_mode():
        base = patcher.model(x).clone()
    by_neighbour = picture(1.0, networks.load_lora_state_dict(str(path)))
    plain = picture(0.5, load_file(str(path)))
    assert (plain - base).norm() > 1e-2 * base.norm()
    assert_same(by_neighbour, plain, base)
