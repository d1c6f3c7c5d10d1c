"""Originals come back bit for bit from wherever they were kept, and nothing of them stays behind."""

import gc
import os
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora_guard.errors import ModeError, RestoreError
from lib_lora_guard.memory.probe import BackupBudget
from lib_lora_guard.patching import backup, spool
from lib_lora_guard.patching.backup import BackupStore, HeldBackup, Place, Where, choose_place, moved
from lib_lora_guard.patching.spool import Spool
from lib_lora_guard.weights.storage import FP8_DTYPES, MB

CPU = torch.device("cpu")
GB = 1 << 30
DISK_ONLY = BackupBudget(0, 0, GB)
NOTHING = BackupBudget(0, 0, 0)
ROOT = Path(__file__).parents[2]
DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    *FP8_DTYPES,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def parameter(shape=(3, 5), dtype=torch.bfloat16, seed=0):
    """Any bits, NaNs among them."""
    numel, size = torch.Size(shape).numel(), torch.empty(0, dtype=dtype).element_size()
    bits = torch.randint(0, 256, (numel * size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if dtype == torch.bool:
        bits %= 2
    return torch.nn.Parameter(bits.view(dtype).reshape(shape), requires_grad=False)


def bits(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).clone()


def assert_same(a, b):
    assert type(a) is torch.nn.Parameter
    assert (a.shape, a.dtype, a.device, a.requires_grad) == (b.shape, b.dtype, b.device, b.requires_grad)
    assert torch.equal(bits(a), bits(b))


@pytest.fixture
def on_gpu(monkeypatch):
    """The parameters of these tests count as lying on a GPU, so that a place has to be found for them."""
    monkeypatch.setattr(backup, "lies_in_ram", lambda parameter: False)


@pytest.fixture
def spooling(on_gpu, tmp_path):
    return BackupStore(lambda: DISK_ONLY, tmp_path / "spool")


def spooled_files(tmp_path):
    folder = tmp_path / "spool"
    return sorted(folder.iterdir()) if folder.exists() else []


# Where


@pytest.mark.parametrize(
    ("size", "budget", "place"),
    [
        (10, BackupBudget(10, 10, 10), Place(Where.VRAM, "spare VRAM")),
        (10, BackupBudget(9, 10, 10), Place(Where.RAM, "no spare VRAM")),
        (10, BackupBudget(9, 9, 10), Place(Where.DISK, "neither spare VRAM nor spare RAM")),
        (0, NOTHING, Place(Where.VRAM, "spare VRAM")),
    ],
)
def test_the_best_place_with_room(size, budget, place):
    assert choose_place(size, budget) == place


def test_no_place_is_said_with_numbers_and_advice():
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


def test_the_budget_is_asked_before_every_backup(on_gpu, tmp_path):
    budgets = [BackupBudget(100, 0, 0), BackupBudget(0, 100, 0), DISK_ONLY, NOTHING]
    store = BackupStore(lambda: budgets.pop(0), tmp_path / "spool")
    kept = [store.keep(f"{n}.weight", parameter(seed=n)) for n in range(3)]
    assert [k.place.where for k in kept] == [Where.VRAM, Where.RAM, Where.DISK]
    assert [store.bytes(where) for where in Where] == [30, 30, 30]
    with pytest.raises(ModeError, match=r"^3\.weight: no place for a backup of 0\.0 MB: spare are 0\.0 MB VRAM"):
        store.keep("3.weight", parameter())
    assert store.bytes() == 90
    for n, k in enumerate(kept):
        assert_same(k.parameter(CPU), parameter(seed=n))


class Quantised(torch.nn.Parameter):
    """Like the parameters of GGUF and bitsandbytes: what the bytes mean stands in attributes."""


@pytest.mark.parametrize("kind", ["class", "attribute"])
def test_parameters_that_are_more_than_their_bytes_are_never_spooled(on_gpu, tmp_path, kind):
    original = Quantised(torch.zeros(8), requires_grad=False) if kind == "class" else parameter()
    original.meaning = "scale 3"
    budgets = [BackupBudget(0, 100, GB), DISK_ONLY]
    store = BackupStore(lambda: budgets.pop(0), tmp_path / "spool")
    assert store.keep("a", original).parameter(CPU) is original
    with pytest.raises(ModeError, match=r"^a: no place for a backup of 0\.0 MB: .*0\.0 MB disk"):
        store.keep("a", original)
    assert spooled_files(tmp_path) == []


def test_moving_keeps_attributes_and_requires_grad():
    """The meta device stands for another one."""
    original = torch.nn.Parameter(torch.zeros(3), requires_grad=True)
    original.note = "kept"
    there = moved(original, torch.device("meta"))
    assert (there.device.type, there.requires_grad, there.note) == ("meta", True, "kept")
    assert moved(original, CPU) is original


def test_less_ram_than_the_budget_said_leaves_the_disk(on_gpu, tmp_path, monkeypatch):
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


def test_other_failures_of_a_move_are_not_hidden(on_gpu, tmp_path, monkeypatch):
    def broken(parameter, device):
        raise RuntimeError("planted")

    monkeypatch.setattr(backup, "moved", broken)
    with pytest.raises(RuntimeError, match="planted"):
        BackupStore(lambda: BackupBudget(0, GB, GB), tmp_path / "spool").keep("a", parameter())


def test_a_failure_of_the_device_is_not_taken_for_a_lost_file(spooling, monkeypatch):
    """The meta device stands for a card: its chunks pass through RAM."""
    kept = spooling.keep("a", parameter())

    def broken(*args, **kwargs):
        raise ValueError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", broken)
        with pytest.raises(ValueError, match=r"^planted$"):
            kept.parameter(torch.device("meta"))
    assert kept.parameter(torch.device("meta")).device.type == "meta"
    assert_same(kept.parameter(CPU), parameter())


# Bit for bit through the disk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7,), (4, 6), (2, 3, 4, 5)], ids=str)
def test_every_dtype_and_shape_comes_back(spooling, dtype, shape):
    original = parameter(shape, dtype)
    kept = spooling.keep("a", original)
    # What has no bytes fits anywhere.
    assert kept.place.where is (Where.DISK if original.numel() else Where.VRAM)
    restored = kept.parameter(CPU)
    assert_same(restored, original)
    assert restored.is_contiguous()
    assert kept.bytes == original.numel() * original.element_size()


def test_a_tensor_without_bytes_in_a_file(tmp_path):
    file = Spool(tmp_path)
    first, empty = file.write("a", torch.ones(2)), file.write("b", torch.empty(0, 3, dtype=torch.bfloat16))
    read = file.read("b", empty, CPU)
    assert (read.shape, read.dtype) == ((0, 3), torch.bfloat16)
    file.free(first)
    assert file.bytes == 0
    file.free(empty)
    assert list(tmp_path.iterdir()) == []


def test_every_call_gives_a_parameter_of_its_own(spooling):
    kept = spooling.keep("a", parameter())
    first = kept.parameter(CPU)
    first.data.zero_()
    assert_same(kept.parameter(CPU), parameter())


LAYOUTS = {
    "channels last": lambda: parameter((4, 3, 5, 5)).data.to(memory_format=torch.channels_last),
    "transposed": lambda: parameter((4, 6)).data.t(),
    "columns of another": lambda: parameter((4, 6)).data[:, 1:4],
    "rows of another": lambda: parameter((6, 4)).data[2:5],
    "every second": lambda: parameter((9,)).data[1::2],
    "expanded": lambda: parameter((1, 4)).data.expand(5, 4),
    "permuted with gaps": lambda: parameter((4, 6, 8)).data[:, ::2].permute(2, 0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_memory(spooling, layout):
    original = torch.nn.Parameter(LAYOUTS[layout](), requires_grad=False)
    restored = spooling.keep("a", original).parameter(CPU)
    assert_same(restored, original)
    assert restored.stride() == original.detach().clone().stride()


@pytest.mark.parametrize("size", [1, 16, 17, 64])
def test_tensors_larger_than_a_chunk(spooling, monkeypatch, size):
    monkeypatch.setattr(spool, "CHUNK_BYTES", 16)
    original = parameter((size,), torch.uint8)
    assert_same(spooling.keep("a", original).parameter(CPU), original)


def test_a_file_that_takes_and_gives_little_at_a_time(spooling, monkeypatch):
    class Reluctant(spool.FileIO):
        def write(self, data):
            return super().write(data[:7])

        def readinto(self, data):
            return super().readinto(data[:5])

    monkeypatch.setattr(spool, "FileIO", Reluctant)
    original = parameter((40,), torch.float32)
    assert_same(spooling.keep("a", original).parameter(CPU), original)


def test_inference_mode_and_gradients(spooling):
    with torch.inference_mode():
        original = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        kept = spooling.keep("a", original)
        restored = kept.parameter(CPU)
    assert not restored.is_inference()
    restored.add_(1)
    trained = torch.nn.Parameter(torch.ones(3), requires_grad=True)
    assert spooling.keep("b", trained).parameter(CPU).requires_grad


# The file


def test_one_file_that_goes_with_its_last_backup(spooling, tmp_path):
    kept = [spooling.keep(str(n), parameter(seed=n)) for n in range(3)]
    (file,) = spooled_files(tmp_path)
    process = psutil.Process()
    assert file.name.startswith(f"lora-guard-{os.getpid()}-{round(process.create_time() * 1000)}-")
    assert file.stat().st_size == 90
    for k in kept[:2]:
        k.release()
        k.release()
    assert spooled_files(tmp_path) == [file]
    assert spooling.bytes() == 30
    assert_same(kept[2].parameter(CPU), parameter(seed=2))
    kept[2].release()
    assert spooled_files(tmp_path) == []
    again = spooling.keep("again", parameter(seed=9))
    assert_same(again.parameter(CPU), parameter(seed=9))
    assert len(spooled_files(tmp_path)) == 1


def test_two_stores_of_one_process_have_two_files(on_gpu, tmp_path):
    stores = [BackupStore(lambda: DISK_ONLY, tmp_path / "spool") for _ in range(2)]
    kept = [store.keep("a", parameter(seed=n)) for n, store in enumerate(stores)]
    assert len(spooled_files(tmp_path)) == 2
    BackupStore(lambda: DISK_ONLY, tmp_path / "spool")
    for n, k in enumerate(kept):
        assert_same(k.parameter(CPU), parameter(seed=n))


def test_backups_and_stores_that_are_dropped_leave_no_file(on_gpu, tmp_path):
    store = BackupStore(lambda: DISK_ONLY, tmp_path / "spool")
    kept, dropped = store.keep("a", parameter()), store.keep("b", parameter())
    del dropped
    gc.collect()
    assert store.bytes() == 30
    del store
    gc.collect()
    assert_same(kept.parameter(CPU), parameter())
    del kept
    gc.collect()
    assert spooled_files(tmp_path) == []


def test_room_of_released_backups_is_used_again(spooling, tmp_path):
    kept = [spooling.keep(str(n), parameter(seed=n)) for n in range(4)]
    for round_number in range(5):
        kept[1].release()
        kept[2].release()
        kept[1] = spooling.keep("1", parameter((4, 5), torch.int8, seed=1))
        kept[2] = spooling.keep("2", parameter((40,), torch.int8, seed=round_number))
    assert spooled_files(tmp_path)[0].stat().st_size == 120
    assert_same(kept[0].parameter(CPU), parameter(seed=0))
    assert_same(kept[1].parameter(CPU), parameter((4, 5), torch.int8, seed=1))
    assert_same(kept[2].parameter(CPU), parameter((40,), torch.int8, seed=4))
    assert_same(kept[3].parameter(CPU), parameter(seed=3))


def test_a_gap_that_is_too_small_is_left(spooling, tmp_path):
    kept = [spooling.keep(str(n), parameter(seed=n)) for n in range(3)]
    kept[1].release()
    larger = spooling.keep("larger", parameter((31,), torch.int8, seed=7))
    assert spooled_files(tmp_path)[0].stat().st_size == 90 + 31
    assert_same(larger.parameter(CPU), parameter((31,), torch.int8, seed=7))
    assert_same(kept[2].parameter(CPU), parameter(seed=2))


@pytest.mark.parametrize("place", ["disk", "ram"])
def test_a_released_backup_gives_nothing(on_gpu, tmp_path, place):
    budget = DISK_ONLY if place == "disk" else BackupBudget(0, GB, 0)
    kept = BackupStore(lambda: budget, tmp_path / "spool").keep("a.weight", parameter())
    kept.release()
    assert kept.is_released
    with pytest.raises(RestoreError, match=r"^a\.weight: its backup.* released.*; reload the checkpoint$"):
        kept.parameter(CPU)


def test_a_changed_file_is_found_out(spooling, tmp_path):
    kept = [spooling.keep(f"{n}.weight", parameter(seed=n)) for n in range(2)]
    (file,) = spooled_files(tmp_path)
    with file.open("r+b") as handle:
        handle.seek(35)
        byte = handle.read(1)[0]
        handle.seek(35)
        handle.write(bytes([byte ^ 1]))
    assert_same(kept[0].parameter(CPU), parameter(seed=0))
    with pytest.raises(RestoreError) as error:
        kept[1].parameter(CPU)
    message = str(error.value)
    assert message.startswith(f"1.weight: its backup in {file} cannot be read (checksum ")
    assert message.endswith("); reload the checkpoint")


def test_a_shortened_file_is_found_out(spooling, tmp_path):
    kept = spooling.keep("a.weight", parameter())
    (file,) = spooled_files(tmp_path)
    with file.open("r+b") as handle:
        handle.truncate(20)
    with pytest.raises(RestoreError, match=r"^a\.weight: .* cannot be read \(it ends 10 bytes early\); reload"):
        kept.parameter(CPU)


def test_a_disk_that_fails_while_reading(spooling, monkeypatch):
    class Failing(spool.FileIO):
        def readinto(self, data):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(spool, "FileIO", Failing)
    kept = spooling.keep("a.weight", parameter())
    with pytest.raises(RestoreError, match=r"^a\.weight: .*Input/output error\); reload the checkpoint$"):
        kept.parameter(CPU)


def test_a_disk_that_fills_up_while_writing(spooling, tmp_path, monkeypatch):
    class Full(spool.FileIO):
        room = 45

        def write(self, data):
            taken = super().write(data[: max(0, self.room - self.tell())])
            if not taken:
                raise OSError(28, "No space left on device")
            return taken

    monkeypatch.setattr(spool, "FileIO", Full)
    first, original = spooling.keep("first", parameter(seed=1)), parameter(seed=2)
    with pytest.raises(ModeError) as error:
        spooling.keep("b.weight", original)
    assert str(error.value) == (
        f"b.weight: its 0.0 MB cannot be backed up in {tmp_path / 'spool'} ([Errno 28] No space left on device); "
        "free disk space, name another folder, or use LoRA mode 'auto'"
    )
    assert spooling.bytes() == 30
    assert_same(first.parameter(CPU), parameter(seed=1))
    assert_same(original, parameter(seed=2))
    first.release()
    assert spooled_files(tmp_path) == []


def test_a_first_write_that_fails_leaves_no_file(spooling, tmp_path, monkeypatch):
    def full(file, chunk, checksum):
        raise MemoryError("planted")

    monkeypatch.setattr(spool, "_write", full)
    with pytest.raises(MemoryError, match="planted"):
        spooling.keep("a", parameter())
    assert spooled_files(tmp_path) == []


def test_two_gigabytes_of_the_disk_stay_free(spooling, tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(100 * GB, 0, 2 * GB + 20))
    with pytest.raises(ModeError, match=r"^a: its 0\.0 MB cannot be backed up in .*\(0\.0 MB may be used there\)"):
        spooling.keep("a", parameter())
    assert spooling.keep("b", parameter((2, 5))).bytes == 20


def test_a_folder_that_cannot_be_written(on_gpu, tmp_path):
    (tmp_path / "spool").write_text("a file where the folder should be", encoding="utf-8")
    store, original = BackupStore(lambda: DISK_ONLY, tmp_path / "spool"), parameter()
    with pytest.raises(ModeError, match=r"^a: its 0\.0 MB cannot be backed up in .*spool \(.*name another folder"):
        store.keep("a", original)
    assert_same(original, parameter())
    assert store.bytes() == 0


# Crashes

CHILD = """
import sys, torch
from pathlib import Path
from lib_lora_guard.memory.probe import BackupBudget
from lib_lora_guard.patching import backup
backup.lies_in_ram = lambda parameter: False
store = backup.BackupStore(lambda: BackupBudget(0, 0, 1 << 30), Path(sys.argv[1]))
kept = store.keep("a", torch.nn.Parameter(torch.arange(8.0)))
print("kept", flush=True)
sys.stdin.readline()
assert torch.equal(kept.parameter(torch.device("cpu")), torch.arange(8.0))
print("restored", flush=True)
"""


def start_child(folder):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline().strip() == "kept"
    return child


def test_live_files_of_others_stay_and_those_of_a_killed_process_go(on_gpu, tmp_path):
    folder = tmp_path / "spool"
    with start_child(folder) as killed, start_child(folder) as ending:
        files = spooled_files(tmp_path)
        assert len(files) == 2
        mine = BackupStore(lambda: DISK_ONLY, folder).keep("mine", parameter())
        assert set(files) < set(spooled_files(tmp_path)), "files of live processes stay"
        killed.kill()
        time.sleep(0.2)
        assert len(spooled_files(tmp_path)) == 3, "a killed process cleans nothing"
        if os.name == "posix":
            # Nobody has asked after the child: its number is still taken.
            assert psutil.Process(killed.pid).status() == psutil.STATUS_ZOMBIE
        else:
            killed.wait()
        BackupStore(lambda: DISK_ONLY, folder)
        left = spooled_files(tmp_path)
        assert len(left) == 2
        assert not any(f"-{killed.pid}-" in file.name for file in left)
        out, _ = ending.communicate("\n")
        assert out.strip() == "restored"
        assert ending.returncode == 0
        assert len(spooled_files(tmp_path)) == 1, "a process that ends takes its file along"
        assert_same(mine.parameter(CPU), parameter())


def test_what_is_stale(tmp_path):
    now_ms = round(psutil.Process().create_time() * 1000)
    pid = os.getpid()
    free_pid = next(n for n in range(99999, 0, -1) if not psutil.pid_exists(n))
    stay = [f"lora-guard-{pid}-{now_ms + 900}-ab.spool", f"lora-guard-{free_pid}-1-ab.txt", "lora-guard-x-1-ab.spool"]
    go = [f"lora-guard-{pid}-{now_ms - 60_000}-ab.spool", f"lora-guard-{free_pid}-{now_ms}-ab.spool"]
    for name in stay + go:
        (tmp_path / name).write_bytes(b"x")
    Spool(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(stay)


@pytest.mark.parametrize(
    ("error", "stays"), [(psutil.AccessDenied(1), True), (psutil.NoSuchProcess(1), False)], ids=["denied", "gone"]
)
def test_a_process_that_tells_nothing_counts_as_running(tmp_path, monkeypatch, error, stays):
    def no_answer(pid):
        raise error

    file = tmp_path / f"lora-guard-{os.getpid()}-1-ab.spool"
    file.write_bytes(b"x")
    monkeypatch.setattr(psutil, "Process", no_answer)
    spool.remove_stale_files(tmp_path)
    assert file.exists() is stays


def test_a_stale_file_that_cannot_be_deleted_is_left(tmp_path, monkeypatch):
    def in_use(self, missing_ok=False):
        raise PermissionError(13, "in use")

    (tmp_path / f"lora-guard-{os.getpid()}-1-ab.spool").write_bytes(b"x")
    monkeypatch.setattr(Path, "unlink", in_use)
    spool.remove_stale_files(tmp_path)
    spool.remove_stale_files(tmp_path / "no such folder")


# Sequences


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_sequence_keeps_the_bytes_and_the_books(data, tmp_path_factory):
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
                wanted[0] = data.draw(st.sampled_from([*Where, Where.DISK]))
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
@pytest.mark.parametrize("where", Where, ids=str)
def test_on_a_gpu(tmp_path, where):
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
