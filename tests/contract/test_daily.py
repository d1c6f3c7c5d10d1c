"""The daily surroundings of a LoRA: another stack on a loaded model, the host's moves, another mode at run time."""

import logging

import pytest
import torch
from support.machine_speed import times_slower
from support.make import host_value, rand
from support.measure import assert_same, fp32_limit, same_bits

from contract.host import REAL
from contract.stacks import FILE, lora_on_everything, reference, run, shapes, with_loras
from lib_lora_guard.hosts.forge import takeover as forge
from lib_lora_guard.hosts.forge.lora_loader_state import STATE
from lib_lora_guard.planning.mode import Mode
from lib_lora_guard.settings import LoraMode

WIDE = ["fp32", "bf16", "fp16"]


def merge_everything(host):
    host.guard.settings.options = {"lora_guard_mode": LoraMode.MERGE.value}


def ways(patcher):
    return {a.mode for key, a in patcher.lora_loader.lora_guard_state.engine.attached.items() if key.endswith("weight")}


@pytest.fixture
def placed(monkeypatch):
    """Counts the host's placements: each is the whole model moved, layer by layer."""
    counts = []

    def watch(host):
        original = host.memory.LoadedModel.model_load
        monkeypatch.setattr(
            host.memory.LoadedModel, "model_load", lambda *a, **k: (counts.append(1), original(*a, **k))[1]
        )
        return counts

    return watch


@pytest.mark.parametrize("storage", ["bf16", "fp8", "Q8_0"])
def test_a_change_of_the_stack_places_nothing_anew(guarded, placed, storage):
    patcher, dense = guarded.build(storage)
    base = run(patcher)
    counts = placed(guarded)
    for strength in (1.0, 0.5, 0.25):
        loras = [(FILE, lora_on_everything(dense), strength)]
        changed = with_loras(guarded, patcher, *loras)
        wanted = reference(patcher, dense, loras)
        assert_same(run(changed), wanted, base, fp32_limit(wanted, base))
        assert [one.model for one in guarded.memory.current_loaded_models] == [changed]
        assert changed.current_device == changed.load_device
    guarded.load(patcher)
    assert same_bits(run(patcher), base)
    assert counts == []


def test_a_load_that_fails_after_the_hand_over_is_healed_by_the_next(guarded, monkeypatch):
    patcher, dense = guarded.build("bf16")
    base = run(patcher)
    loras = [(FILE, lora_on_everything(dense), 0.8)]
    with_loras(guarded, patcher, ("old.safetensors", lora_on_everything(dense, 30), 1.0))
    clone = patcher.clone()
    clone.add_patches(filename=FILE, patches=loras[0][1], strength_patch=0.8)
    other, _ = guarded.build("fp32", seed=7)
    guarded.memory.unload_all_models()
    with_loras(guarded, patcher, ("old.safetensors", lora_on_everything(dense, 30), 1.0))

    def failing(*args, **kwargs):
        raise MemoryError("planted")

    monkeypatch.setattr(other, "forge_patch_model", failing)
    with pytest.raises(MemoryError):
        guarded.memory.load_models_gpu([clone, other])
    guarded.load(clone)
    wanted = reference(patcher, dense, loras)
    assert_same(run(clone), wanted, base, fp32_limit(wanted, base))
    with_loras(guarded, patcher, ("old.safetensors", lora_on_everything(dense, 30), 1.0))
    with pytest.raises(MemoryError):
        guarded.memory.load_models_gpu([patcher, other])
    guarded.load(patcher)
    assert same_bits(run(patcher), base), "taken off as well"


def test_a_model_whose_patcher_the_host_gave_up_is_where_it_was(guarded, placed):
    """What happens where prompt and LoRA change together: the old patcher is nobody's when the text encoder comes."""
    patcher, dense = guarded.build("bf16")
    base = run(patcher)
    cast_before = [getattr(m, "parameters_manual_cast", None) for m in patcher.model.modules()]
    changed = with_loras(guarded, patcher, (FILE, lora_on_everything(dense), 0.5))
    layer = next(m for m in patcher.model.modules() if hasattr(m, "parameters_manual_cast"))
    loaded = guarded.memory.current_loaded_models[0]
    # As the host marks a layer that is swapped.
    layer.prev_parameters_manual_cast, layer.parameters_manual_cast = layer.parameters_manual_cast, True
    loaded.model_accelerated = True
    counts = placed(guarded)
    loras = [(FILE, lora_on_everything(dense), 0.8)]
    del changed
    other, _ = guarded.build("fp32", seed=7)
    counts.clear()
    guarded.memory.free_memory(0, torch.device("cpu"), [])
    assert [one.model.model for one in guarded.memory.current_loaded_models] == [other.model]
    changed = with_loras(guarded, patcher, *loras)
    assert counts == []
    assert guarded.memory.current_loaded_models[0] is loaded
    assert loaded.model is changed
    assert layer.parameters_manual_cast is True, "still known to be swapped"
    wanted = reference(patcher, dense, loras)
    assert_same(run(changed), wanted, base, fp32_limit(wanted, base))
    del loaded
    guarded.memory.unload_all_models()
    if hasattr(guarded.memory, "build_module_profile"):
        assert [getattr(m, "parameters_manual_cast", None) for m in patcher.model.modules()] == cast_before


def test_a_model_that_is_given_up_for_good_is_freed(guarded):
    import gc
    import weakref

    patcher, dense = guarded.build("bf16")
    changed = with_loras(guarded, patcher, (FILE, lora_on_everything(dense), 0.5))
    model = weakref.ref(patcher.model)
    del patcher, changed
    guarded.memory.free_memory(0, torch.device("cpu"), [])
    gc.collect()  # a model and its LoraLoader hold each other
    assert model() is None


def test_what_another_clone_has_put_into_the_model_goes_and_comes_with_it(guarded):
    """FreeU, ControlNet and others work on clones; some replace objects inside the model."""
    patcher, dense = guarded.build("fp32")
    if not hasattr(patcher, "add_object_patch"):
        pytest.skip("the double has no object patches")
    run(patcher)
    plain = patcher.model.blocks[0].norm
    other = torch.nn.LayerNorm(plain.normalized_shape[0])
    clone = with_loras(guarded, patcher, (FILE, lora_on_everything(dense), 1.0))
    with_object = clone.clone()
    with_object.add_object_patch("blocks.0.norm", other)
    guarded.load(with_object)
    assert patcher.model.blocks[0].norm is other
    guarded.load(clone)
    assert patcher.model.blocks[0].norm is plain
    guarded.load(with_object)
    guarded.memory.unload_all_models()
    assert patcher.model.blocks[0].norm is plain


def test_a_model_that_another_device_shall_run_is_placed_by_the_host(guarded, placed):
    patcher, _ = guarded.build("fp32")
    counts = placed(guarded)
    clone = patcher.clone()
    guarded.memory.current_loaded_models[0].device = torch.device("meta")
    guarded.load(clone)
    assert counts == [1]


def test_a_model_that_someone_moved_off_its_device_is_placed_by_the_host(guarded, monkeypatch):
    placement = guarded.guard.placement
    patcher, _ = guarded.build("fp32")
    loaded = guarded.memory.current_loaded_models[0]
    loaded.device = patcher.load_device = torch.device("cuda", 0)
    on_device = 0
    monkeypatch.setattr(
        guarded.memory,
        "module_size",
        lambda model, exclude_device=None, include_device=None: on_device if include_device is not None else 0,
    )
    assert placement._must_be_placed(loaded, patcher, 0, [])
    on_device = 1
    assert not placement._must_be_placed(loaded, patcher, 0, [])


def test_partly_on_the_device_it_is_handed_over_unless_all_of_it_fits_now(guarded, monkeypatch):
    placement = guarded.guard.placement
    patcher, _ = guarded.build("fp32")
    loaded = guarded.memory.current_loaded_models[0]
    loaded.device = patcher.load_device = torch.device("cuda", 0)
    outside, free, others = 400, 1000, 300
    monkeypatch.setattr(
        guarded.memory,
        "module_size",
        lambda model, exclude_device=None, include_device=None: others if include_device is not None else outside,
    )
    monkeypatch.setattr(guarded.memory, "get_free_memory", lambda device: free)

    def handed_over(needed, **kwargs):
        return not placement._must_be_placed(loaded, patcher, needed, **kwargs)

    assert not handed_over(600, staying=[]), "all of it fits now: the host may place it"
    assert handed_over(601, staying=[])
    other = type(loaded)(patcher.clone())
    other.device = loaded.device
    guarded.memory.current_loaded_models.append(other)
    assert not handed_over(900, staying=[]), "what another model holds can be had"
    assert handed_over(901, staying=[])
    assert handed_over(900, staying=[other.model]), "not what is needed at the same time"
    assert not handed_over(600, staying=[], grows=True), "outside it and not swapped: only the host can put it right"
    placement._away_bytes = lambda model: outside
    assert handed_over(600, staying=[], grows=True), "its swapped layers are brought back by the caller"
    assert not handed_over(600, staying=[]), "unless the caller does not"
    outside = 0
    assert handed_over(0, staying=[]), "all of it is there"


def test_a_no_op_costs_less_than_a_millisecond(guarded):
    import time

    patcher, dense = guarded.build("bf16")
    changed = with_loras(guarded, patcher, (FILE, lora_on_everything(dense), 1.0))
    times = []
    for _ in range(50):
        start = time.perf_counter()
        changed.refresh_loras()
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3 * times_slower()


@pytest.mark.parametrize("storage", WIDE)
def test_merged_it_is_the_merge_rounded_once_and_goes_back_bit_for_bit(guarded, storage):
    merge_everything(guarded)
    patcher, dense = guarded.build(storage)
    base = run(patcher)
    before = {k: p.data.clone() for k, p in patcher.model.named_parameters()}
    patches = {k: host_value("lora", s, n) for n, (k, s) in enumerate(shapes(dense).items()) if len(s) > 1}
    changed = with_loras(guarded, patcher, (FILE, patches, 0.8))
    assert ways(changed) == {Mode.MERGE}
    for key, value in patches.items():
        up, down, alpha = value[1][:3]
        delta = 0.8 * alpha / down.shape[0] * (up.flatten(1).double() @ down.flatten(1).double())
        wanted = (dense[key].double() + delta.reshape(dense[key].shape)).to(before[key].dtype)
        have = dict(patcher.model.named_parameters())[key].data
        # One rounding: in fp32 the sum itself may be off by its last bit.
        assert (have.double() - wanted.double()).abs().max() <= 2 * torch.finfo(have.dtype).eps * wanted.abs().max()
    guarded.load(patcher)
    assert all(torch.equal(p.data, before[k]) for k, p in patcher.model.named_parameters())
    assert same_bits(run(patcher), base)


@pytest.mark.parametrize("mode", [LoraMode.AUTOMATIC, LoraMode.MERGE])
def test_the_host_moves_originals_and_the_loras_come_back_with_the_model(guarded, mode):
    guarded.guard.settings.options = {"lora_guard_mode": mode.value}
    patcher, dense = guarded.build("bf16")
    base = run(patcher)
    originals = {k: p.data.clone() for k, p in patcher.model.named_parameters()}
    changed = with_loras(guarded, patcher, (FILE, lora_on_everything(dense), 0.8))
    with_lora = run(changed)
    seen = {}
    original_unpatch = type(changed).forge_unpatch_model

    def watched(self, target=None):
        seen.update({k: p.data.clone() for k, p in self.model.named_parameters()})
        return original_unpatch(self, target)

    type(changed).forge_unpatch_model = watched
    try:
        guarded.memory.unload_all_models()
    finally:
        type(changed).forge_unpatch_model = original_unpatch
    assert all(torch.equal(seen[k], originals[k]) for k in originals), "the host moved the originals"
    state = getattr(changed.lora_loader, STATE)
    assert not any(a.mode is Mode.MERGE for a in state.engine.attached.values())
    assert state.engine._backups.bytes() == 0, "no second copy of anything"
    guarded.load(changed)
    assert same_bits(run(changed), with_lora)
    guarded.load(patcher)
    assert same_bits(run(patcher), base)


def test_the_copy_in_ram_is_the_backup_of_what_the_host_brings_to_the_gpu(guarded):
    """Without a GPU: the engine is told of the values from before the move, and the parameters are stand-ins on 'meta'."""
    from lib_lora_guard.memory.probe import BackupBudget
    from lib_lora_guard.patching.backup import BackupStore, Where

    store = BackupStore(lambda: BackupBudget(0, 0, 0))
    offloaded = rand(4, 4, seed=1)
    on_gpu = torch.nn.Parameter(torch.empty(4, 4, device="meta"), requires_grad=False)
    backup = store.keep("w", on_gpu, offloaded)
    assert backup.place.where is Where.RAM
    assert backup.parameter(torch.device("cpu")).data_ptr() == offloaded.data_ptr()
    from lib_lora_guard.errors import ModeError

    for other in (rand(4, 5, seed=1), rand(4, 4, seed=1).half(), None):
        with pytest.raises(ModeError, match="no place for a backup"):
            store.keep("w", on_gpu, other)


@pytest.mark.parametrize("storage", ["bf16", "fp8"])
def test_another_mode_is_carried_out_at_the_next_image_of_the_same_stack(guarded, storage):
    patcher, dense = guarded.build(storage)
    base = run(patcher)
    linear = {k: host_value("lora", s, n) for n, (k, s) in enumerate(shapes(dense).items()) if len(s) == 2}
    loras = [(FILE, linear, 0.8)]
    changed = with_loras(guarded, patcher, *loras)
    wanted = reference(patcher, dense, loras)
    pictures = {}
    for mode in (LoraMode.AUTOMATIC, LoraMode.MERGE, LoraMode.FP16, LoraMode.OWN, LoraMode.AUTOMATIC):
        guarded.guard.settings.options = {"lora_guard_mode": mode.value}
        guarded.load(changed)
        pictures[mode] = run(changed)
        merged = mode is LoraMode.MERGE and storage == "bf16"
        if mode is LoraMode.OWN:
            assert ways(changed) == set()
            assert changed.lora_loader.backup, "the host's own merge is there"
            continue
        assert ways(changed) == {Mode.MERGE if merged else Mode.BYPASS}
        limit = 0.1 if merged else fp32_limit(wanted, base)  # merged, bf16 rounds the sum of weight and LoRA
        assert_same(pictures[mode], wanted, base, limit)
    guarded.load(patcher)
    assert same_bits(run(patcher), base)


@pytest.mark.parametrize("storage", ["fp8", "scaled_fp8", "Q8_0", *(["Q4_0", "Q4_K"] if REAL else [])])
def test_merging_on_low_bit_weights_is_refused_with_what_it_would_leave(guarded, storage, caplog):
    merge_everything(guarded)
    patcher, dense = guarded.build(storage)
    base = run(patcher)
    loras = [(FILE, lora_on_everything(dense), 0.8)]
    changed = with_loras(guarded, patcher, *loras)
    wanted = reference(patcher, dense, loras)
    # What is stored wide is merged and rounded once.
    limit = 0.02 if storage in ("Q8_0", "Q4_0", "Q4_K") else fp32_limit(wanted, base)
    assert_same(run(changed), wanted, base, limit)
    said = [r.getMessage() for r in caplog.records if "merging was asked for" in r.getMessage()]
    assert len(said) == 1
    if storage == "Q4_K":
        assert "cannot be written back" in said[0]
    else:
        key = said[0].split("measured on ")[1].split(")")[0]
        told = float(said[0].split("cosine ")[1].split(" ")[0])
        assert 0.3 < told <= 1.0
        if storage == "fp8":
            up, down, alpha = loras[0][1][key][1][:3]
            delta = 0.8 * alpha / down.shape[0] * (up @ down)
            left = (dense[key] + delta).to(torch.float8_e4m3fn).float() - dense[key]
            assert abs(told - float(torch.cosine_similarity(left.flatten(), delta.flatten(), dim=0))) < 0.006
    with_loras(guarded, patcher, (FILE, lora_on_everything(dense), 0.5))
    assert len([r for r in caplog.records if "merging was asked for" in r.getMessage()]) == 1, "said once"


def test_fp16_lora_merges_nothing_that_can_be_had_otherwise(guarded):
    patcher, dense = guarded.build("bf16")
    base = run(patcher)
    patches = {k: (rand(*s, seed=n, scale=0.02),) for n, (k, s) in enumerate(shapes(dense).items()) if len(s) == 2}
    loras = [(FILE, patches, 0.8)]
    changed = with_loras(guarded, patcher, *loras)
    assert ways(changed) == {Mode.MERGE}, "as large as the weight"
    guarded.guard.settings.options = {"lora_guard_mode": LoraMode.FP16.value}
    guarded.load(changed)
    assert ways(changed) == {Mode.ON_THE_FLY}
    model = reference(patcher, dense, loras)
    assert_same(run(changed), model, base, 0.1)  # the reference rounds what the automatic mode merges to bf16
    guarded.load(patcher)
    assert same_bits(run(patcher), base)


def test_forges_own_mode_is_forges_own(guarded, host):
    """The same numbers as without the guard, and nothing of the guard's on the model."""
    patcher, dense = guarded.build("bf16")
    guarded.guard.settings.options = {"lora_guard_mode": LoraMode.OWN.value}
    linear = {k: host_value("lora", s, n) for n, (k, s) in enumerate(shapes(dense).items()) if len(s) == 2}
    changed = with_loras(guarded, patcher, (FILE, linear, 0.8))
    assert guarded.guard.stacks.is_left_to_host(changed)
    own = run(changed)
    guarded.load(patcher)
    assert changed.lora_loader.backup == {}
    forge.uninstall()
    try:
        assert same_bits(run(with_loras(host, patcher, (FILE, linear, 0.8))), own)
        host.load(patcher)
    finally:
        guarded.guard = forge.install()


def test_a_merge_that_cannot_be_suspended_stays_and_the_next_change_is_right(guarded, monkeypatch, caplog):
    from lib_lora_guard.patching.merge_attachment import MergeAttachment

    merge_everything(guarded)
    patcher, dense = guarded.build("bf16")
    base = run(patcher)
    changed = with_loras(guarded, patcher, (FILE, lora_on_everything(dense), 0.8))
    with_lora = run(changed)
    original, calls = MergeAttachment.suspend, []

    def failing(self):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError("planted")
        original(self)

    monkeypatch.setattr(MergeAttachment, "suspend", failing)
    caplog.set_level(logging.ERROR)
    guarded.memory.unload_all_models()
    assert len({id(r) for r in caplog.records if r.levelno >= logging.ERROR}) == 1
    monkeypatch.setattr(MergeAttachment, "suspend", original)
    guarded.load(changed)
    assert same_bits(run(changed), with_lora)
    guarded.load(patcher)
    assert same_bits(run(patcher), base)


@pytest.mark.parametrize("is_new_patcher", [False, True])
def test_switched_off_and_on_again_the_guard_takes_the_hosts_merge_off(guarded, is_new_patcher):
    """On low-bit storage the host's merge has lost most of the LoRA by then."""
    patcher, dense = guarded.build("fp8")
    loras = [(FILE, lora_on_everything(dense), 0.8)]
    changed = with_loras(guarded, patcher, *loras)
    good = run(changed)
    forge.uninstall()
    guarded.guard = forge.install()
    again = with_loras(guarded, patcher, *loras) if is_new_patcher else guarded.load(changed)
    assert same_bits(run(again), good)
    assert guarded.guard.stacks.report(again.lora_loader).loras[0].refused is None


def test_a_report_is_of_the_stack_it_was_made_for(guarded):
    patcher, dense = guarded.build("bf16")
    changed = with_loras(guarded, patcher, (FILE, lora_on_everything(dense), 0.8))
    stacks = guarded.guard.stacks
    assert stacks.is_reported(changed)
    assert stacks.is_current(changed)
    assert not stacks.is_reported(patcher)
