"""LoRA files that are kept in RAM: which stay, and how many bytes are given back. (What they do to models: tests/contract.)"""

from contract.lora_files import MODULES
from support.make import write_kohya

from lib_lora_guard.hosts.webui.lora_files import LazyState, LoraFiles


def read(files, path):
    return files._read(str(path), LazyState(str(path), dict))


def test_dropping_what_is_unused_keeps_the_present_stack_and_counts_the_rest(tmp_path):
    sizes = {}
    for name in "abc":
        write_kohya(tmp_path / f"{name}.safetensors", MODULES)
        sizes[name] = (tmp_path / f"{name}.safetensors").stat().st_size
    files = LoraFiles()
    kept = read(files, tmp_path / "a.safetensors")
    read(files, tmp_path / "b.safetensors")
    files._last_stack, files._in_stack = files._in_stack, set()
    read(files, tmp_path / "a.safetensors")
    read(files, tmp_path / "c.safetensors")
    assert files.bytes == sum(sizes.values())
    assert files.drop_unused() == sizes["b"]
    assert files.bytes == sizes["a"] + sizes["c"]
    assert read(files, tmp_path / "a.safetensors") is kept, "of the present stack"
    assert files.drop_unused() == 0
