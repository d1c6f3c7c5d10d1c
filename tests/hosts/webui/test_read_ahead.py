"""LoRA files that are read in a thread while the host calculates their hashes."""

import threading

import pytest
from contract.lora_files import MODULES
from support.make import write_kohya

from lib_lora_guard.adapters import files
from lib_lora_guard.errors import LoraFileError
from lib_lora_guard.files import reading
from lib_lora_guard.hosts.webui import lora_files, read_ahead


@pytest.fixture
def world(web, tmp_path, monkeypatch):
    """The WebUI, with a list of each file that was read and of the thread that read it."""
    write_kohya(tmp_path / "a.safetensors", MODULES)
    write_kohya(tmp_path / "b.safetensors", MODULES, seed=1)
    (tmp_path / "broken.safetensors").write_bytes(b"no LoRA")
    web.read, web.is_read = [], threading.Event()
    for module in (lora_files, read_ahead):
        original = module.read_lora_file

        def read(path, *args, original=original, **kwargs):
            web.read.append((path.stem, threading.current_thread().name.partition("_")[0]))
            try:
                return original(path, *args, **kwargs)
            finally:
                web.is_read.set()

        monkeypatch.setattr(module, "read_lora_file", read)
    return web


AHEAD, HERE = "lora-guard-read-ahead", "MainThread"


def value(web):
    """The first number of the stack's factors."""
    return next(iter(next(iter(web.stack.values())).values()))[1][0].flatten()[0].item()


def test_a_new_file_is_read_once_while_it_is_hashed(world):
    was_read = []
    world.when_hashing = lambda entry: was_read.append(world.is_read.wait(10))
    assert world.image("<lora:a:1>").comments == {}
    assert was_read == [True], "before the host asked for it"
    assert world.read == [("a", AHEAD)]
    assert world.strengths() == [("a", 1.0)]
    world.image("<lora:a:0.5>")
    world.networks.list_available_networks()
    world.image("<lora:a:0.25>")
    assert world.read == [("a", AHEAD)], "it is kept, though the new list has no hash of it"
    world.image("<lora:a:0.5><lora:b:1>")
    assert world.read == [("a", AHEAD), ("b", AHEAD)]
    assert world.strengths() == [("a", 0.5), ("b", 1.0)]
    assert [thread.name for thread in threading.enumerate() if AHEAD in thread.name] == []


def test_a_file_whose_hash_is_known_is_read_where_it_is_needed(world):
    world.networks.list_available_networks()
    for entry in world.networks.available_network_aliases.values():
        entry.hash = "written by its trainer"
    world.image("<lora:a:1>")
    assert world.read == [("a", HERE)]


def test_a_broken_file_is_refused_with_the_same_words(world, monkeypatch):
    said = world.image("<lora:a:1><lora:broken:1>").comments
    assert world.strengths() == [("a", 1.0)]
    assert world.read == [("a", AHEAD), ("broken", AHEAD), ("broken", HERE)]
    world.networks.list_available_networks()
    monkeypatch.setenv("LORA_GUARD_READ_AHEAD", "0")
    assert world.image("<lora:a:0.5><lora:broken:1>").comments == said
    assert world.read[3:] == [("broken", HERE)]
    assert len(said) == 1


def test_a_file_that_changes_while_it_is_hashed_counts_as_it_is_then(world, tmp_path):
    world.image("<lora:b:1>")
    of_b = value(world)

    def replace(entry):
        assert world.is_read.wait(10)
        (tmp_path / "b.safetensors").replace(entry.filename)

    world.is_read.clear()
    world.when_hashing = replace
    world.image("<lora:a:1>")
    assert value(world) == of_b
    assert world.read[1:] == [("a", AHEAD), ("a", HERE)]


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_failed_while_it_came_is_read_once_more_for_the_same_prompt(world, monkeypatch, times):
    """From a share that was away for a moment, or that stays away."""
    for module in (files, reading):
        monkeypatch.setattr(module, "LARGE_FILE_BYTES", 1)
    errors = [OSError(5, "the share is away")] * times

    def fail(self, piece, file):
        if errors:
            raise errors.pop()
        read_piece(self, piece, file)

    read_piece = reading.Coming._read_piece
    monkeypatch.setattr(reading, "READERS", 1)
    monkeypatch.setattr(reading.ComingInOnePiece, "_read_piece", fail)
    monkeypatch.setattr(reading.Coming, "_read_piece", fail)
    assert world.image("<lora:a:1>").comments == {}
    # Whoever applies the patches says it of the image (tests/contract/test_files_that_follow.py).
    with pytest.raises(LoraFileError, match="the share is away"):
        value(world)
    again = world.image("<lora:a:1>").comments
    assert world.read == [("a", AHEAD), ("a", HERE)]
    assert ["the share is away" in said for said in again] == [True] * (times - 1)
    assert world.strengths() == [("a", 1.0)] * (2 - times)
    world.image("<lora:a:1>")
    assert len(world.read) == 2, "not in each image"


def test_without_memory_for_it_now_a_file_is_read_when_others_are_given_back(world, monkeypatch):
    monkeypatch.setattr(read_ahead, "_read", lambda path: world.read.append("no memory") or 1 / 0)
    world.image("<lora:a:1>")
    assert world.read == ["no memory", ("a", HERE)]
    assert world.strengths() == [("a", 1.0)]


def test_what_the_host_does_not_ask_for_is_not_kept(world):
    def fail(entry):
        assert world.is_read.wait(10)
        raise RuntimeError("the host failed")

    world.when_hashing = fail
    with pytest.raises(RuntimeError, match="the host failed"):
        world.networks.load_networks(["a"], [1.0], [1.0], [None])
    assert world.files._ahead._files == {}
    assert world.files.bytes == 0


def test_where_the_host_reads_files_itself_nothing_is_read_ahead(world, monkeypatch):
    monkeypatch.setattr(world.files, "is_host_reading", lambda: True)
    with pytest.raises(AssertionError, match="the host's own reader"):
        world.networks.load_networks(["a"], [1.0], [1.0], [None])
    assert world.read == []
