"""A bake removes what killed bakes have left in its folder, and nothing of one that runs."""

import os

import psutil
import pytest

from lib_lora_guard.baking import unfinished as module
from lib_lora_guard.baking.unfinished import remove_abandoned, unfinished
from lib_lora_guard.recorder.processes import own_start_ms


def dead_pid():
    return next(n for n in range(99999, 0, -1) if not psutil.pid_exists(n))


def test_only_files_of_dead_processes_of_this_machine_go(tmp_path):
    system = module._system()
    stay = [
        unfinished(tmp_path / "model.safetensors").name,
        f"model.safetensors.{dead_pid()}-1-{'0' * 8}-12345678.partial",  # of another machine
        "model.safetensors.12345678.partial",  # of a version that named nothing
        f"model.safetensors.{dead_pid()}-1-{system}-12345678.safetensors",
        f"{'x' * 41}.{dead_pid()}-1-{system}-12345678.partial",
        "model.safetensors",
    ]
    go = [
        f"model.safetensors.{dead_pid()}-1-{system}-12345678.partial",
        f"名.safetensors.{os.getpid()}-{own_start_ms() - 60_000}-{system}-12345678.partial",  # a number given out again
    ]
    for n, name in enumerate(stay + go):
        (tmp_path / name).write_bytes(bytes(100 + n))
    assert remove_abandoned(tmp_path) == (2, 106 + 107)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)
    assert remove_abandoned(tmp_path) == (0, 0)
    assert remove_abandoned(tmp_path / "none") == (0, 0)


def test_a_container_with_numbers_of_its_own_is_another_system(monkeypatch):
    names = set()
    for machine, number in (("a", 1), ("a", 2), ("b", 1)):
        monkeypatch.setattr(module, "machine_name", lambda machine=machine: machine)
        monkeypatch.setattr(os, "stat", lambda path, number=number: os.stat_result([0, number] + [0] * 8))
        names.add(module._system())
    assert len(names) == 3


def test_what_cannot_be_deleted_is_not_counted(tmp_path, monkeypatch):
    path = tmp_path / f"a.{dead_pid()}-1-{module._system()}-12345678.partial"
    path.mkdir()
    assert remove_abandoned(tmp_path) == (0, 0)
    assert path.is_dir()


@pytest.mark.parametrize("name", ["a.safetensors", "长" * 80 + ".safetensors"])
def test_a_name_fits_every_file_system_and_lies_beside_the_new_file(tmp_path, name):
    made = unfinished(tmp_path / name)
    assert made.parent == tmp_path
    assert len(made.name.encode()) < 255
    assert module._NAME.fullmatch(made.name)
    assert made != unfinished(tmp_path / name)
