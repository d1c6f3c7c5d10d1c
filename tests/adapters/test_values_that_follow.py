"""Large files whose values are read while the file is matched with a model."""

import struct
import types

import pytest
import torch
from safetensors.torch import save_file
from support.held_back import values_held_back
from support.make import rand, write_kohya
from support.raw_files import entry, safetensors_bytes

from lib_lora_guard.adapters import files
from lib_lora_guard.adapters.files import read_lora_file
from lib_lora_guard.errors import LoraFileError
from lib_lora_guard.files import reading
from lib_lora_guard.patching import room_to_read
from lib_lora_guard.units import GB

MODULES = {"lora_unet_blocks_0_qkv": (96, 32), "lora_unet_blocks_0_proj": (32, 32)}
OTHERS = {
    "DoRA": {"lora_unet_blocks_0_mlp.dora_scale": rand(32, 1, seed=8), "lora_unet_blocks_0_mlp.lora_up.weight": rand(32, 4, seed=7),
             "lora_unet_blocks_0_mlp.lora_down.weight": rand(4, 32, seed=9)},
    "LoHa": {f"lora_unet_blocks_0_mlp.hada_{name}": rand(*shape, seed=seed) for seed, (name, shape) in
             enumerate({"w1_a": (32, 4), "w1_b": (4, 32), "w2_a": (32, 4), "w2_b": (4, 32)}.items())},
}  # fmt: skip


@pytest.fixture
def gate(monkeypatch):
    """Every file is large, and nothing of a factor is read before the gate is opened."""
    with values_held_back(monkeypatch) as held_back:
        yield held_back


def values(file):
    return {key: [tensor.clone() for tensor in adapter.tensors()] for key, adapter in file.adapters.items()}


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    return all(torch.equal(a, b) for key in wanted for a, b in zip(found[key], wanted[key], strict=True))


def test_adapters_are_there_before_their_values(gate, tmp_path):
    write_kohya(tmp_path / "a.safetensors", MODULES, alpha=3.0)
    file = read_lora_file(tmp_path / "a.safetensors", values_may_follow=True)
    assert not file.coming.is_done
    assert [(one.rank, one.alpha) for one in file.adapters.values()] == [(4, 3.0)] * 2
    gate.open()
    file.wait()
    assert file.coming.is_done
    whole = read_lora_file(tmp_path / "a.safetensors")
    assert whole.coming is None
    assert equal(values(file), values(whole))


def test_a_value_that_is_not_finite_is_named_as_where_the_file_is_read_at_once(gate, tmp_path):
    up = rand(32, 4, seed=2)
    up[3, 1] = float("nan")
    tensors = {
        "lora_unet_blocks_0_mlp.lora_up.weight": up,
        "lora_unet_blocks_0_mlp.lora_down.weight": rand(4, 32, seed=6),
    }
    write_kohya(tmp_path / "a.safetensors", MODULES, extra=tensors)
    file = read_lora_file(tmp_path / "a.safetensors", values_may_follow=True)
    gate.open()
    with pytest.raises(LoraFileError, match="not finite") as late:
        file.wait()
    assert file.coming.has_failed
    with pytest.raises(LoraFileError) as at_once:
        read_lora_file(tmp_path / "a.safetensors")
    assert str(late.value) == str(at_once.value)
    with pytest.raises(LoraFileError, match="not finite"):
        file.wait()


def test_a_file_that_is_written_to_meanwhile_never_comes(gate, tmp_path):
    path = tmp_path / "a.safetensors"
    write_kohya(path, MODULES)
    file = read_lora_file(path, values_may_follow=True)
    path.write_bytes(path.read_bytes()[:-100])
    gate.open()
    with pytest.raises(LoraFileError, match=r"a\.safetensors: "):
        file.wait()


def test_a_kind_that_decides_by_its_values_is_not_made_before_they_are_there(gate, tmp_path, monkeypatch):
    """An OFT looks at its blocks. Memory that was not filled yet may hold anything."""
    blocks = {"lora_unet_blocks_0_mlp.oft_blocks": rand(8, 4, 4, seed=1, scale=0.1)}
    write_kohya(tmp_path / "a.safetensors", MODULES, extra=blocks)
    gate.open()
    memory = reading._memory
    monkeypatch.setattr(reading, "_memory", lambda *args: memory(*args).fill_(255))
    file = read_lora_file(tmp_path / "a.safetensors", values_may_follow=True)
    assert file.coming is None
    assert equal(values(file), values(read_lora_file(tmp_path / "a.safetensors")))


@pytest.mark.parametrize("kind", OTHERS)
def test_kinds_that_compute_with_their_values_wait_for_them(gate, tmp_path, kind):
    write_kohya(tmp_path / "a.safetensors", MODULES, extra=OTHERS[kind])
    gate.open()
    file = read_lora_file(tmp_path / "a.safetensors", values_may_follow=True)
    assert file.coming is None
    assert equal(values(file), values(read_lora_file(tmp_path / "a.safetensors")))


def test_a_copy_of_values_that_are_not_there_yet_is_never_taken(gate, tmp_path, monkeypatch):
    write_kohya(tmp_path / "a.safetensors", MODULES)
    make, made = files._make, []

    def scaled(*args):
        adapter = make(*args)
        made.append(adapter)
        return adapter.map(lambda tensor: tensor * 2)

    monkeypatch.setattr(files, "_make", scaled)
    gate.open()
    file = read_lora_file(tmp_path / "a.safetensors", values_may_follow=True)
    assert file.coming is None
    assert equal(values(file), values(read_lora_file(tmp_path / "a.safetensors")))


def test_the_switch_reads_all_at_once(gate, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_GUARD_READ_AHEAD", "0")
    write_kohya(tmp_path / "a.safetensors", MODULES)
    gate.open()
    assert read_lora_file(tmp_path / "a.safetensors", values_may_follow=True).coming is None


def test_a_small_file_is_there_at_once(tmp_path):
    save_file(
        {"lora_unet_x.lora_up.weight": rand(8, 4, seed=1), "lora_unet_x.lora_down.weight": rand(4, 8, seed=2)},
        tmp_path / "a.safetensors",
    )
    assert read_lora_file(tmp_path / "a.safetensors", values_may_follow=True).coming is None


def write_raw(path, tensors):
    """Writes tensors, `{name: (format, shape, bytes)}`, one after the other as they come."""
    header, data = {}, b""
    for name, (form, shape, raw) in tensors.items():
        header[name] = entry(form, shape, (len(data), len(data) + len(raw)))
        data += raw
    path.write_bytes(safetensors_bytes(header, data))


@pytest.mark.parametrize("form", ["F16", "BF16", "F32"])
def test_what_lies_between_the_tensors_is_no_value_of_theirs(gate, tmp_path, form):
    """An alpha of another type, whose bytes would be NaN as values of the factors."""
    alpha, size = bytes.fromhex("c07fc07f00001040"), 4 if form == "F32" else 2
    up, down = (form, (8, 4), bytes(32 * size)), (form, (4, 8), bytes(32 * size))
    name = "lora_unet_x"
    write_raw(
        tmp_path / "a.safetensors",
        {f"{name}.lora_down.weight": down, f"{name}.alpha": ("F64", (), alpha), f"{name}.lora_up.weight": up},
    )
    gate.open()
    file = read_lora_file(tmp_path / "a.safetensors", values_may_follow=True)
    assert file.coming is not None
    file.wait()
    assert [one.alpha for one in file.adapters.values()] == list(struct.unpack("<d", alpha))


def test_tensors_that_begin_between_two_values_are_read_at_once(gate, tmp_path):
    """Legal in a file: something of one byte before tensors of two."""
    up, down, alpha = ("F16", (8, 4), bytes(64)), ("F16", (4, 8), bytes(64)), ("U8", (1,), b"\x04")
    names = [f"lora_unet_{module}" for module in "xyz"]
    tensors = [{f"{n}.lora_down.weight": down, f"{n}.alpha": alpha, f"{n}.lora_up.weight": up} for n in names]
    write_raw(tmp_path / "a.safetensors", {name: one for each in tensors for name, one in each.items()})
    gate.open()
    file = read_lora_file(tmp_path / "a.safetensors", values_may_follow=True)
    assert file.coming is None
    assert [one.alpha for one in file.adapters.values()] == [4.0] * 3


def test_a_tensor_without_values_hides_none_that_begins_where_it_does(gate, tmp_path):
    """It has the same start as the next one, and may come behind it in the header."""
    x, y = "lora_unet_x.lora_{}.weight", "lora_unet_y.lora_{}.weight"
    header = {
        x.format("up"): entry("F32", (8, 4), (0, 128)),
        x.format("down"): entry("F32", (4, 8), (128, 256)),
        y.format("up"): entry("F32", (8, 0), (128, 128)),
        y.format("down"): entry("F32", (0, 8), (128, 128)),
    }
    data = rand(64, seed=1)
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, data.numpy().tobytes()))
    gate.open()
    file = read_lora_file(tmp_path / "a.safetensors", values_may_follow=True)
    file.wait()
    assert equal(values(file), values(read_lora_file(tmp_path / "a.safetensors")))
    assert torch.equal(file.adapters["lora_unet_x", "weight"].down.flatten(), data[32:])


@pytest.mark.parametrize(("system", "counts"), [("Linux", True), ("Darwin", True), ("Windows", False)])
def test_what_is_still_to_be_read_is_no_room_for_another_file(gate, tmp_path, monkeypatch, system, counts):
    """Linux gives any address, and kills the process once it writes there."""
    snapshot = types.SimpleNamespace(alive_ram_bytes=10 * GB, system=system)
    monkeypatch.setattr(room_to_read, "take_snapshot", lambda _: snapshot)
    room = room_to_read.room_now_bytes(0)
    write_kohya(tmp_path / "a.safetensors", MODULES)
    file = read_lora_file(tmp_path / "a.safetensors", values_may_follow=True)
    size = sum(adapter.bytes for adapter in file.adapters.values())
    assert room - room_to_read.room_now_bytes(0) == size * counts
    gate.open()
    file.wait()
    assert room_to_read.room_now_bytes(0) == room
