"""Backups on the disk: the same bits come back, and no file outlives its process."""

import gc
import itertools
import os
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch
from patching.kept_parameters import CPU, DISK_ONLY, DTYPES, assert_same, parameter, spooled_files
from support import warm
from support.waiting import wait_until

from lib_lora_guard.errors import ModeError, RestoreError
from lib_lora_guard.memory.probe import default_spool_dir
from lib_lora_guard.patching import spool
from lib_lora_guard.patching.backup import BackupStore, Where
from lib_lora_guard.patching.spool import Spool
from lib_lora_guard.units import GB

ROOT = Path(__file__).parents[2]


def test_an_error_of_the_device_does_not_count_as_a_lost_file(spooling, monkeypatch):
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7,), (4, 6), (2, 3, 4, 5)], ids=str)
def test_every_dtype_and_shape_is_read_back_bit_for_bit(spooling, dtype, shape):
    original = parameter(shape, dtype)
    kept = spooling.keep("a", original)
    # What has no bytes fits anywhere.
    assert kept.place.where is (Where.DISK if original.numel() else Where.VRAM)
    restored = kept.parameter(CPU)
    assert_same(restored, original)
    assert restored.is_contiguous()
    assert kept.bytes == original.numel() * original.element_size()


def test_an_empty_tensor_is_written_and_read(tmp_path):
    file = Spool(tmp_path)
    first, empty = file.write("a", torch.ones(2)), file.write("b", torch.empty(0, 3, dtype=torch.bfloat16))
    read = file.read("b", empty, CPU)
    assert (read.shape, read.dtype) == ((0, 3), torch.bfloat16)
    file.free(first)
    assert file.bytes == 0
    file.free(empty)
    assert list(tmp_path.iterdir()) == []


def test_every_read_gives_a_new_parameter(spooling):
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
def test_strides_are_kept_without_gaps_and_overlaps(spooling, layout):
    original = torch.nn.Parameter(LAYOUTS[layout](), requires_grad=False)
    restored = spooling.keep("a", original).parameter(CPU)
    assert_same(restored, original)
    assert restored.stride() == original.detach().clone().stride()


@pytest.mark.parametrize("size", [1, 16, 17, 64])
def test_tensors_around_the_size_of_a_chunk_are_read_back(spooling, monkeypatch, size):
    monkeypatch.setattr(spool, "CHUNK_BYTES", 16)
    original = parameter((size,), torch.uint8)
    assert_same(spooling.keep("a", original).parameter(CPU), original)


def test_partial_reads_and_writes_are_continued(spooling, monkeypatch):
    class Reluctant(spool.FileIO):
        def write(self, data):
            return super().write(data[:7])

        def readinto(self, data):
            return super().readinto(data[:5])

    monkeypatch.setattr(spool, "FileIO", Reluctant)
    original = parameter((40,), torch.float32)
    assert_same(spooling.keep("a", original).parameter(CPU), original)


def test_restored_parameters_are_no_inference_tensors_and_keep_requires_grad(spooling):
    with torch.inference_mode():
        original = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        kept = spooling.keep("a", original)
        restored = kept.parameter(CPU)
    assert not restored.is_inference()
    restored.add_(1)
    trained = torch.nn.Parameter(torch.ones(3), requires_grad=True)
    assert spooling.keep("b", trained).parameter(CPU).requires_grad


def test_the_file_is_deleted_with_its_last_backup(spooling, tmp_path):
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


@pytest.mark.skipif(os.name != "posix", reason="rights of this kind")
def test_only_their_owner_may_read_backups_and_each_user_has_a_folder(on_gpu, tmp_path):
    before = os.umask(0)
    try:
        kept = BackupStore(lambda: DISK_ONLY, tmp_path / "spool").keep("a", parameter())
        (file,) = spooled_files(tmp_path)
        assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        kept.release()
    finally:
        os.umask(before)
    assert default_spool_dir().name == f"lora-guard-spool-{os.getuid()}"


def test_the_last_backup_may_be_freed_in_the_middle_of_a_write(tmp_path, monkeypatch):
    """By the collector, which runs wherever it likes."""
    file, write = Spool(tmp_path), spool._write
    old = file.write("old", torch.ones(7))
    monkeypatch.setattr(spool, "_write", lambda *args: (file.free(old), write(*args))[1])
    new = file.write("new", torch.arange(9.0))
    assert file.read("new", new, torch.device("cpu")).tolist() == list(range(9))
    file.free(new)
    assert list(tmp_path.iterdir()) == []


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


def test_the_room_of_released_backups_in_the_file_is_used_again(spooling, tmp_path):
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


def test_a_tensor_that_no_gap_holds_goes_to_the_end_of_the_file(spooling, tmp_path):
    kept = [spooling.keep(str(n), parameter(seed=n)) for n in range(3)]
    kept[1].release()
    larger = spooling.keep("larger", parameter((31,), torch.int8, seed=7))
    assert spooled_files(tmp_path)[0].stat().st_size == 90 + 31
    assert_same(larger.parameter(CPU), parameter((31,), torch.int8, seed=7))
    assert_same(kept[2].parameter(CPU), parameter(seed=2))


def test_a_changed_bit_in_the_file_raises(spooling, tmp_path):
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


def test_a_shortened_file_raises(spooling, tmp_path):
    kept = spooling.keep("a.weight", parameter())
    (file,) = spooled_files(tmp_path)
    with file.open("r+b") as handle:
        handle.truncate(20)
    with pytest.raises(RestoreError, match=r"^a\.weight: .* cannot be read \(it ends 10 bytes early\); reload"):
        kept.parameter(CPU)


def test_a_read_error_of_the_disk_raises_with_advice(spooling, monkeypatch):
    class Failing(spool.FileIO):
        def readinto(self, data):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(spool, "FileIO", Failing)
    kept = spooling.keep("a.weight", parameter())
    with pytest.raises(RestoreError, match=r"^a\.weight: .*Input/output error\); reload the checkpoint$"):
        kept.parameter(CPU)


def test_a_disk_that_fills_up_while_writing_changes_nothing(spooling, tmp_path, monkeypatch):
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


def test_a_folder_that_cannot_be_written_raises_with_advice(on_gpu, tmp_path):
    (tmp_path / "spool").write_text("a file where the folder should be", encoding="utf-8")
    store, original = BackupStore(lambda: DISK_ONLY, tmp_path / "spool"), parameter()
    with pytest.raises(ModeError, match=r"^a: its 0\.0 MB cannot be backed up in .*spool \(.*name another folder"):
        store.keep("a", original)
    assert_same(original, parameter())
    assert store.bytes() == 0


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
    child = warm.start(CHILD, folder, cwd=ROOT)
    assert child.stdout.readline().strip() == "kept"
    return child


def test_files_of_running_processes_stay_and_those_of_a_killed_one_are_deleted(on_gpu, tmp_path):
    folder = tmp_path / "spool"
    with start_child(folder) as killed, start_child(folder) as ending:
        files = spooled_files(tmp_path)
        assert len(files) == 2
        mine = BackupStore(lambda: DISK_ONLY, folder).keep("mine", parameter())
        assert set(files) < set(spooled_files(tmp_path)), "files of live processes stay"
        killed.kill()
        if os.name == "posix":
            # This process has not asked after the child: its number is still taken.
            dead = psutil.Process(killed.pid)
            wait_until(lambda: dead.status() == psutil.STATUS_ZOMBIE, "it does not die")
        else:
            killed.wait()
        assert len(spooled_files(tmp_path)) == 3, "a killed process cleans nothing"
        BackupStore(lambda: DISK_ONLY, folder)
        left = spooled_files(tmp_path)
        assert len(left) == 2
        assert not any(f"-{killed.pid}-" in file.name for file in left)
        out, _ = ending.communicate("\n")
        assert out.strip() == "restored"
        assert ending.returncode == 0
        assert len(spooled_files(tmp_path)) == 1, "a process that ends takes its file along"
        assert_same(mine.parameter(CPU), parameter())


def test_a_file_is_stale_if_its_process_is_gone(tmp_path):
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
def test_a_process_that_may_not_be_queried_counts_as_running(tmp_path, monkeypatch, error, stays):
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


def test_a_region_that_the_collector_frees_while_a_place_is_looked_for_does_no_harm(tmp_path):
    """Copying a set to a tuple allocates in the middle, where the collector may run; so does adding up its members."""
    disk, tensor = Spool(tmp_path), parameter()

    class Holder:
        def __init__(self, region):
            self.region, self.itself = region, self

        def __del__(self):
            disk.free(self.region)

    usual = gc.get_threshold()
    for find, allocations in itertools.product((lambda: disk._free_start(8), lambda: disk.bytes), range(6)):
        regions = [disk.write("key", tensor) for _ in range(24)]
        gc.disable()
        for region in regions[::2]:
            Holder(region)
        try:
            gc.set_threshold(gc.get_count()[0] + allocations)
            gc.enable()
            find()
        finally:
            gc.set_threshold(*usual)
            gc.enable()
            gc.collect(0)
        for region in regions:
            disk.free(region)
    assert disk.bytes == 0
