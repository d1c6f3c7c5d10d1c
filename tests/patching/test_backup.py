"""Originals come back bit for bit from the best memory there was for them, and nothing of them stays behind."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patching.kept_parameters import CPU, DISK_ONLY, DTYPES, NOTHING, assert_same, bits, parameter, spooled_files

from lib_lora_guard.errors import ModeError, RestoreError
from lib_lora_guard.memory.probe import BackupBudget
from lib_lora_guard.patching import backup
from lib_lora_guard.patching.backup import BackupStore, Budget, HeldBackup, Place, Where, choose_place, moved
from lib_lora_guard.units import GB, MB


@pytest.mark.parametrize(
    ("size", "budget", "place"),
    [
        (10, BackupBudget(10, 10, 10), Place(Where.VRAM, "spare VRAM")),
        (10, BackupBudget(9, 10, 10), Place(Where.RAM, "no spare VRAM")),
        (10, BackupBudget(9, 9, 10), Place(Where.DISK, "neither spare VRAM nor spare RAM")),
        (0, NOTHING, Place(Where.VRAM, "spare VRAM")),
    ],
)
def test_a_backup_goes_to_the_best_memory_with_room_for_it(size, budget, place):
    assert choose_place(size, budget) == place


def test_the_error_for_a_backup_without_room_names_free_memory_and_advice():
    with pytest.raises(ModeError) as error:
        choose_place(3 * MB, BackupBudget(MB, 2 * MB, MB // 2))
    assert str(error.value) == (
        "no place for a backup of 3.0 MB: spare are 1.0 MB VRAM, 2.0 MB RAM, 0.5 MB disk; "
        "free RAM or disk space, or use LoRA mode 'auto'"
    )


def test_a_parameter_in_ram_is_its_own_backup_whatever_the_budget(tmp_path):
    store, original = BackupStore(lambda: NOTHING, tmp_path / "spool"), parameter()
    kept = store.keep("a.weight", original)
    assert kept.place == Place(Where.RAM, "lies in RAM already")
    assert kept.parameter(CPU) is original
    assert (kept.bytes, store.bytes(), store.bytes(Where.RAM)) == (30, 30, 30)
    assert spooled_files(tmp_path) == []


def test_free_memory_is_asked_for_before_every_backup(on_gpu, tmp_path):
    budgets = [BackupBudget(100, 0, 0), BackupBudget(0, 100, 0), DISK_ONLY, NOTHING]
    store = BackupStore(lambda: budgets.pop(0), tmp_path / "spool")
    kept = [store.keep(f"{n}.weight", parameter(seed=n)) for n in range(3)]
    assert [k.place.where for k in kept] == [Where.VRAM, Where.RAM, Where.DISK]
    assert [store.bytes(where) for where in (Where.VRAM, Where.RAM, Where.DISK, Where.FILE)] == [30, 30, 30, 0]
    with pytest.raises(ModeError, match=r"^3\.weight: no place for a backup of 0\.0 MB: spare are 0\.0 MB VRAM"):
        store.keep("3.weight", parameter())
    assert store.bytes() == 90
    for n, k in enumerate(kept):
        assert_same(k.parameter(CPU), parameter(seed=n))


def test_free_memory_is_measured_again_after_256_mb_of_backups():
    """Between two measurements every backup counts against each place."""
    measured = []

    def measure():
        measured.append(None)
        return BackupBudget(10 * MB, 300 * MB, 1000 * MB)

    def kept(size_mb):
        return HeldBackup(
            "a",
            torch.nn.Parameter(torch.empty(size_mb * MB, dtype=torch.uint8, device="meta"), False),
            Place(Where.RAM, ""),
        )

    budget = Budget()
    budget.start(measure)
    assert budget() == BackupBudget(10 * MB, 300 * MB, 1000 * MB)
    budget.take(kept(100))
    assert budget() == BackupBudget(0, 200 * MB, 900 * MB)
    budget.take(kept(156))
    assert (budget().ram_spare_bytes, len(measured)) == (44 * MB, 1)
    budget.take(kept(1))
    assert (budget().ram_spare_bytes, len(measured)) == (300 * MB, 2)
    budget.start(measure)
    budget()
    assert len(measured) == 3


class Quantised(torch.nn.Parameter):
    """Like the parameters of GGUF and bitsandbytes: what the bytes mean stands in attributes."""


@pytest.mark.parametrize("kind", ["class", "attribute"])
def test_parameters_with_a_class_or_attributes_of_their_own_never_go_to_the_disk(on_gpu, tmp_path, kind):
    original = Quantised(torch.zeros(8), requires_grad=False) if kind == "class" else parameter()
    original.meaning = "scale 3"
    budgets = [BackupBudget(0, 100, GB), DISK_ONLY]
    store = BackupStore(lambda: budgets.pop(0), tmp_path / "spool")
    assert store.keep("a", original).parameter(CPU) is original
    with pytest.raises(ModeError, match=r"^a: no place for a backup of 0\.0 MB: .*0\.0 MB disk"):
        store.keep("a", original)
    assert spooled_files(tmp_path) == []


def test_a_moved_parameter_keeps_its_attributes_and_requires_grad():
    """The meta device stands for another one."""
    original = torch.nn.Parameter(torch.zeros(3), requires_grad=True)
    original.note = "kept"
    there = moved(original, torch.device("meta"))
    assert (there.device.type, there.requires_grad, there.note) == ("meta", True, "kept")
    assert moved(original, CPU) is original


def test_a_copy_that_ram_refuses_goes_to_the_disk(on_gpu, tmp_path, monkeypatch):
    def no_memory(parameter, device):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: planted")

    monkeypatch.setattr(backup, "moved", no_memory)
    budgets = [BackupBudget(0, GB, GB), BackupBudget(0, GB, 0)]
    store = BackupStore(lambda: budgets.pop(0), tmp_path / "spool")
    kept = store.keep("a", parameter())
    assert kept.place.where is Where.DISK
    assert_same(kept.parameter(CPU), parameter())
    with pytest.raises(ModeError, match=r"^a: no place .* 0\.0 MB RAM, 0\.0 MB disk"):
        store.keep("a", parameter())


def test_an_error_other_than_out_of_memory_passes_unchanged(on_gpu, tmp_path, monkeypatch):
    def broken(parameter, device):
        raise RuntimeError("planted")

    monkeypatch.setattr(backup, "moved", broken)
    with pytest.raises(RuntimeError, match="planted"):
        BackupStore(lambda: BackupBudget(0, GB, GB), tmp_path / "spool").keep("a", parameter())


@pytest.mark.parametrize("place", ["disk", "ram"])
def test_a_released_backup_raises_instead_of_restoring(on_gpu, tmp_path, place):
    budget = DISK_ONLY if place == "disk" else BackupBudget(0, GB, 0)
    kept = BackupStore(lambda: budget, tmp_path / "spool").keep("a.weight", parameter())
    kept.release()
    assert kept.is_released
    with pytest.raises(RestoreError, match=r"^a\.weight: its backup.* released.*; reload the checkpoint$"):
        kept.parameter(CPU)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_sequence_of_backups_keeps_bits_and_byte_counts(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequence") / "spool"
    budgets = {Where.VRAM: BackupBudget(GB, GB, GB), Where.RAM: BackupBudget(0, GB, GB), Where.DISK: DISK_ONLY}
    wanted = [Where.DISK]
    store = BackupStore(lambda: budgets[wanted[0]], folder)
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backup, "lies_in_ram", lambda parameter: False)
        for step in range(data.draw(st.integers(1, 25), label="steps")):
            action = data.draw(st.sampled_from(["keep", "keep", "restore", "release", "drop"]), label="action")
            if action == "keep":
                wanted[0] = data.draw(st.sampled_from([*budgets, Where.DISK]))
                shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=3), label="shape"))
                original = parameter(shape, data.draw(st.sampled_from(DTYPES)), seed=step)
                kept[step] = (store.keep(str(step), original), bits(original), original.shape, original.dtype)
            elif kept:
                key = data.draw(st.sampled_from(sorted(kept)), label="key")
                entry, expected, shape, dtype = kept[key]
                if action == "restore":
                    restored = entry.parameter(CPU)
                    assert (restored.shape, restored.dtype) == (shape, dtype)
                    assert torch.equal(bits(restored), expected)
                else:
                    if action == "release":
                        entry.release()
                    del kept[key], entry
                    gc.collect(0)
            held = [(k[0].place.where, k[0].bytes) for k in kept.values()]
            for where in Where:
                assert store.bytes(where) == sum(size for place, size in held if place is where)
            on_disk = [size for place, size in held if place is Where.DISK]
            assert len(list(folder.iterdir()) if folder.exists() else []) == bool(on_disk)
        for entry, expected, _, _ in kept.values():
            assert torch.equal(bits(entry.parameter(CPU)), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("where", [Where.VRAM, Where.RAM, Where.DISK], ids=str)
def test_backups_of_parameters_on_a_gpu(tmp_path, where):
    gpu = torch.device("cuda", 0)
    budgets = {Where.VRAM: BackupBudget(GB, GB, GB), Where.RAM: BackupBudget(0, GB, GB), Where.DISK: DISK_ONLY}
    store = BackupStore(lambda: budgets[where], tmp_path / "spool")
    original = torch.nn.Parameter(parameter((3000, 4000)).data.to(gpu), requires_grad=False)
    kept = store.keep("a", original)
    assert kept.place.where is where
    assert (kept.parameter(gpu) is original) == (where is Where.VRAM)
    assert_same(kept.parameter(gpu), original)
    assert torch.equal(bits(kept.parameter(CPU)), bits(original))
    assert isinstance(kept, HeldBackup) == (where is not Where.DISK)
