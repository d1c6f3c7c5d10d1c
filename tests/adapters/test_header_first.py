"""A LoRA file is judged by its header: what is refused costs no more than that, and what no kind knows is not read."""

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import warm
from support.machine_speed import assert_within
from support.make import rand
from support.raw_files import entry, safetensors_bytes

from lib_lora_guard import LoraGuard
from lib_lora_guard.adapters import files as lora_files
from lib_lora_guard.adapters.files import LARGEST_TABLE, LONGEST_SETTINGS, read_lora_file
from lib_lora_guard.errors import LoraFileError
from lib_lora_guard.units import MB

ROOT = Path(__file__).resolve().parent.parent.parent
LORA = {"lin.lora_up.weight": rand(8, 2, seed=1), "lin.lora_down.weight": rand(2, 8, seed=2)}


@pytest.fixture
def guard():
    model = torch.nn.Sequential()
    model.lin = torch.nn.Linear(8, 8)
    model.requires_grad_(False)
    yield LoraGuard(model)
    del model  # which the guard holds weakly


@pytest.fixture
def reads(monkeypatch):
    """The names of all tensors that were read."""
    names, read = [], lora_files.read_tensors
    monkeypatch.setattr(lora_files, "read_tensors", lambda header, wanted: names.extend(wanted) or read(header, wanted))
    return names


def sparse(path, tensors, metadata=None):
    """A file of a real size whose values are a hole. `tensors`: {name: (dtype, shape, bytes)}."""
    header, at = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = entry(dtype, shape, (at, at + size))
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


def refused(guard, path):
    with pytest.raises(LoraFileError) as caught:
        guard.apply([(path, 1.0)])
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_checkpoint_is_refused_without_reading_a_tensor(tmp_path, guard, reads):
    save_file({"lin.weight": rand(8, 8, seed=1), "lin.bias": rand(8, seed=2)}, tmp_path / "model.safetensors")
    assert "no LoRA keys found among 2 tensors" in refused(guard, tmp_path / "model.safetensors")
    assert reads == []


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"other.lora_up.weight": rand(8, 2, seed=1)}, "other is incomplete (a lora without 'down')"),
        ({"lin.lora_up.weight": torch.tensor(1.0)}, "a single number where a factor belongs"),
        ({"lin.lokr_w1": rand(2, 2, seed=1), "lin.lokr_w2": rand(4, 4, seed=2)}, "lin"),
        ({"lin.lora_up.weight": torch.zeros(8, 2, dtype=torch.int32)}, "floating-point numbers were expected"),
    ],
)
def test_factors_that_contradict_each_other_are_refused_without_reading_them(tmp_path, guard, reads, extra, said):
    save_file({**LORA, **extra}, tmp_path / "a.safetensors")
    assert said in refused(guard, tmp_path / "a.safetensors")
    assert reads == []


def test_what_no_kind_knows_is_not_read(tmp_path, guard, reads):
    save_file({**LORA, "bundle_emb.style": rand(9, seed=4)}, tmp_path / "a.safetensors")
    guard.apply([(tmp_path / "a.safetensors", 1.0)])
    assert sorted(reads) == sorted(LORA)
    file = read_lora_file(tmp_path / "a.safetensors")
    assert file.unknown_keys == ("bundle_emb.style",)
    assert file.shapes["bundle_emb.style"] == (9,), "shapes tell which model the file was made for"


def test_factors_that_a_difference_stands_in_place_of_are_not_read(tmp_path, reads):
    save_file({**LORA, "lin.diff": rand(8, 8, seed=3)}, tmp_path / "a.safetensors")
    assert read_lora_file(tmp_path / "a.safetensors").adapters["lin", "weight"].kind == "diff"
    assert reads == ["lin.diff"]


@pytest.mark.parametrize(("form", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_formats_without_arithmetic_are_refused_only_where_they_are_needed(tmp_path, guard, form, bits):
    def write(up):
        tensors = {
            "lin.lora_up.weight": (up, (8, 4), 8 * 4 * bits // 8 if up == form else 128),
            "lin.lora_down.weight": ("F32", (4, 8), 128),
            "stray": (form, (4, 8), 4 * 8 * bits // 8),
        }
        return sparse(tmp_path / f"{up}.safetensors", tensors)

    assert guard.apply([(write("F32"), 1.0)]).loras[0].used == 1
    assert refused(guard, write(form)) == (
        f"{form}.safetensors: lin.lora_up.weight: it is stored as {form}, which cannot be calculated with; get the file in F16 or "
        "BF16, or convert it"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes")
def test_a_lora_larger_than_memory_is_refused_with_both_numbers(tmp_path, guard, reads):
    values = 1 << 37
    tensors = {
        "lin.lora_up.weight": ("F32", (8, values), 32 * values),
        "lin.lora_down.weight": ("F32", (values, 8), 32 * values),
    }
    said = refused(guard, sparse(tmp_path / "a.safetensors", tensors))
    assert said.startswith(f"a.safetensors: its tensors take {64 * values // MB} MB of RAM and ")
    assert " MB are left; close other programs, make the page file at least " in said
    assert reads == []


def test_the_room_is_asked_for_large_files_and_counts_needed_tensors_alone(tmp_path, monkeypatch):
    save_file({**LORA, "other": rand(4000, seed=3)}, tmp_path / "a.safetensors")
    needed = 4 * (16 + 16)
    asked = []
    read_lora_file(tmp_path / "a.safetensors", room=asked.append)
    assert asked == []
    monkeypatch.setattr(lora_files, "UNCOUNTED_BYTES", 0)
    read_lora_file(tmp_path / "a.safetensors", room=lambda wanted: asked.append(wanted) or needed)
    assert asked == [needed]
    with pytest.raises(LoraFileError, match=r"a\.safetensors: its tensors take 0 MB of RAM and 0 MB are left"):
        read_lora_file(tmp_path / "a.safetensors", room=lambda wanted: needed - 1)
    assert len(read_lora_file(tmp_path / "a.safetensors", room=lambda wanted: None).adapters) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits of one process")
def test_memory_that_ends_while_a_file_is_read_is_said_in_a_line(tmp_path):
    """The limit of the process is one that the system does not tell."""
    size = 600 << 20
    tensors = {
        "lin.diff": ("F32", (size // 32, 8), size),
    }
    sparse(tmp_path / "a.safetensors", tensors)
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from lib_lora_guard.adapters.files import read_lora_file
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), -1))
try:
    read_lora_file({str(tmp_path / "a.safetensors")!r})
except Exception as error:
    print(type(error).__name__, error)
"""
    shown = warm.run(code)
    assert shown.stdout.startswith(
        "LoraFileError a.safetensors: lin.diff: reading it needs 600 MB of RAM, and the system gives no more; close"
    ), shown.stdout + shown.stderr


# ---- headers of no LoRA's size


def test_more_tensors_than_a_lora_has_are_refused(tmp_path, guard):
    count = LARGEST_TABLE.tensors + 1
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({f"{n}.alpha": entry("F32", (0,), (0, 0)) for n in range(count)}))
    assert refused(guard, path).startswith("a.safetensors: expected at most 16384 tensors, found more: a LoRA has some")


def test_longer_names_than_a_lora_has_are_refused(tmp_path, guard):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"." * LARGEST_TABLE.characters + ".alpha": entry("F32", (0,), (0, 0))}))
    assert refused(guard, path).startswith("a.safetensors: expected names and shapes of at most 4000000 characters")


def test_metadata_of_any_length_is_no_part_of_the_table(tmp_path, guard):
    tags = json.dumps({"folder": {f"tag {n} " + "x" * 200: n for n in range(30_000)}})
    assert len(tags) > LARGEST_TABLE.characters
    save_file(LORA, tmp_path / "a.safetensors", metadata={"ss_tag_frequency": tags})
    assert guard.apply([(tmp_path / "a.safetensors", 1.0)]).loras[0].used == 1


def test_too_many_entries_of_metadata_are_refused(tmp_path, guard):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"__metadata__": {str(n): "" for n in range(10_001)}}))
    assert "expected at most 10000 names, found more; the file is damaged" in refused(guard, path)


def test_settings_of_no_real_length_are_refused_and_not_parsed(tmp_path, guard):
    settings = "[" + "{}," * (LONGEST_SETTINGS // 3) + "{}]"
    save_file(LORA, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": settings})
    assert refused(guard, tmp_path / "a.safetensors").startswith(
        f"a.safetensors: its adapter settings have {len(settings)} characters, 1048576 at most are read; save the LoRA again"
    )


def table(names, shape=(0,)):
    """A header of empty tensors. Put together as text: `json` takes a second for the largest."""
    described = json.dumps(entry("F32", shape, (0, 0)))
    return "{" + ", ".join([f'"{name}": {described}' for name in names]) + "}"


BOMBS = {
    "dots": lambda: table(["." * 3_900_000 + ".alpha"]),
    "dots, over the limit": lambda: table(["." * 80_000_000 + ".alpha"]),
    "tensors": lambda: table(f"{n}.lora_up.weight" for n in range(16_000)),
    "tensors of a kind": lambda: json.dumps(
        {
            f"{n}.{side}": entry("F32", shape, (0, 0))
            for n in range(8_000)
            for side, shape in (("lora_up.weight", (0, 1)), ("lora_down.weight", (1, 0)))
        }
    ),
    "tensors, over the limit": lambda: table(f"{n}.lora_up.weight" for n in range(500_000)),
    "metadata": lambda: '{"__metadata__": {' + ", ".join([f'"{n}": ""' for n in range(500_000)]) + "}}",
    "long metadata": lambda: '{"__metadata__": {"ss_tag_frequency": "' + "x" * 60_000_000 + '\U0001f600"}}',
}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("bomb", BOMBS)
def test_memory_stays_within_eight_headers_and_64_mb(bomb, tmp_path):
    path = tmp_path / "a.safetensors"
    text = BOMBS[bomb]().encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    code = f"""
import gc, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from lib_lora_guard.adapters.files import read_lora_file
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) << 10
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before, cpu = status("VmRSS"), time.process_time()
try:
    read_lora_file({str(path)!r})
except ValueError as error:
    assert type(error).__name__ == "LoraFileError", error
print(status("VmHWM") - before, time.process_time() - cpu)
"""
    # Forked off a process that has torch: what that one has freed and kept is a few MB, and may be used again unseen.
    run = warm.run(code)
    assert run.returncode == 0, run.stderr
    peak, seconds = map(float, run.stdout.split())
    assert peak <= 8 * len(text) + 64 * MB, f"{peak / MB:.0f} MB for a header of {len(text) / MB:.1f} MB"
    assert_within(seconds, 6)  # a third of it at most where this was written


# ---- names that the system cannot have


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "a\0b.safetensors", "\ud800.safetensors", ""])
def test_a_name_that_no_file_can_have_is_a_line(name, guard):
    said = refused(guard, name)
    # No name at all is the folder that the program is in.
    assert said.endswith(
        "no such file; check its name and folder, or refresh the list"
        if name
        else "this is a folder; give a file in it"
    )
