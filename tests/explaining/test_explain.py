"""A pasted log is explained: the cause first, with its numbers and the next step, whatever the file is."""

import io
import json
from types import SimpleNamespace

import pytest
from explaining.logs import LOGS, NEO, loaded, start
from support.machine_speed import CpuTime

from lib_lora_guard import cli
from lib_lora_guard.commands import explain as command
from lib_lora_guard.commands import page
from lib_lora_guard.explaining import explain
from lib_lora_guard.explaining.host_lines import LINES
from lib_lora_guard.explaining.reading import HEAD_BYTES, TAIL_BYTES, lines_of
from lib_lora_guard.explaining.rules import RULES


@pytest.mark.parametrize("name", LOGS)
def test_a_log_is_explained(name):
    one = LOGS[name]
    found = explain(one.text.encode())
    assert [finding.name for finding in found.findings] == one.names
    for finding in found.findings:
        wanted = one.facts.get(finding.name, {})
        numbers = {key: value for key, value in wanted.items() if isinstance(value, float)}
        assert {key: finding.said.facts[key] for key in numbers} == pytest.approx(numbers)
        assert {key: finding.said.facts[key] for key in wanted if key not in numbers} == {
            key: value for key, value in wanted.items() if key not in numbers
        }
        for text in (finding.said, finding.do, finding.said.text("zh"), finding.do.text("zh")):
            assert "{" not in text
            assert text.isprintable()
    bad = [finding for finding in found.findings if not finding.is_harmless]
    assert (found.answer().key == "explain.answer") is bool(bad)
    assert found.host is not None


@pytest.mark.parametrize("host", ["Forge Neo", "an older Forge", "Written by: Forge, "])
def test_the_host_is_named(host):
    said = {str(explain(one.text.encode()).host) for one in LOGS.values()}
    assert any(host in line for line in said)
    assert any("12 GB of VRAM and 32 GB of RAM, NVIDIA GeForce RTX 3060, torch 2.4.0+cu124" in line for line in said)


TEXT = LOGS["patching of 190 seconds"].text


@pytest.mark.parametrize(
    "raw",
    [
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        b"\xef\xbb\xbf" + TEXT.encode(),
        b"\xff\xfe" + TEXT.encode("utf-16-le"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        "".join(f"\x1b[32m{line}\x1b[0m\n" for line in TEXT.splitlines()).encode(),
        b"\x1b]0;webui\x07" + TEXT.encode() + b"\xff\xfe\x00\x9b",
        TEXT.encode("utf-16-le"),
        "".join(f"\u2190[32m{line}\u2190[0m\n" for line in TEXT.splitlines()).encode(),
        "".join(f"[1;31m{line}[0m\n" for line in TEXT.splitlines()).encode(),
        "".join(f"{line[at : at + 80]}\n" for line in TEXT.splitlines() for at in range(0, len(line), 80)).encode(),
        ("2026-11-29 10:00:00 " + TEXT.replace("\n", "\n2026-11-29 10:00:01 | ")).encode(),
    ],
    ids=[
        "windows",
        "old mac",
        "bom",
        "powershell",
        "utf-16-be",
        "colours",
        "binary end",
        "utf-16 without a mark",
        "colours of an old console",
        "pasted colours",
        "80 columns",
        "with times",
    ],
)
def test_every_spelling_of_a_log_says_the_same(raw):
    assert [finding.name for finding in explain(raw).findings] == LOGS["patching of 190 seconds"].names


def test_names_in_any_letters_are_read():
    text = LOGS["a lora without effect on nf4"].text.replace("style", "风格")
    for raw in (text.encode(), b"\xff\xfe" + text.encode("utf-16-le"), text.encode("gbk")):
        assert explain(raw).findings[0].said.facts["files"] == "风格.safetensors"


def test_a_lora_is_judged_by_the_model_that_was_loaded_last():
    first = start() + "K-Model Created: {'storage_dtype': torch.bfloat16, 'computation_dtype': torch.bfloat16}\n"
    second = "K-Model Created: {'storage_dtype': 'nf4', 'computation_dtype': torch.bfloat16}\n"
    names = [
        [one.name for one in explain(text.encode()).findings]
        for text in (first + second + loaded(), second + first + loaded())
    ]
    assert names == [["rounded"], []]


@pytest.mark.parametrize(
    "raw", [b"", b"\n\n", bytes(range(256)) * 50, "一只猫\n".encode() * 9, b"<html>no log</html>", b"\x00" * 10_000, b"\xff\xfe\x00"]
)  # fmt: skip
def test_what_is_no_log_says_so(raw):
    found = explain(raw)
    assert (found.findings, found.ours, found.host) == ([], [], None)
    assert found.answer().startswith("Nothing of a LoRA or of memory in it (")


@pytest.mark.parametrize(
    "line",
    ["[LORA] Loaded " * 1500, "Trying to free " * 2000, "ERROR lora " + "x " * 9000, "9" * 20_000 + "s/it", "by PyTorch, and" + "9" * 19_000, "Mismatch " * 2000, "%|" * 9000],
)  # fmt: skip
def test_lines_made_to_be_slow_are_not(line):
    with CpuTime(1):
        explain((line + "\n").encode() * 10)


def test_a_log_of_many_megabytes_is_read_at_both_ends():
    middle = b"Patching LoRA weights out of memory. Retrying by offloading models.\n"
    filler = b"x" * 199 + b"\n"
    head, tail = start().encode(), LOGS["a lora without effect on nf4"].text.encode()
    raw = head + filler * (HEAD_BYTES // 200) + middle + filler * (TAIL_BYTES // 200) + tail
    found = explain(raw)
    assert [finding.name for finding in found.findings] == ["rounded"]
    assert "RTX 3060" in str(found.host)
    assert len(raw) > HEAD_BYTES + TAIL_BYTES


def test_names_of_folders_are_not_repeated():
    for one in LOGS.values():
        found = explain(one.text.encode())
        text = " ".join(str(part) for finding in found.findings for part in (finding.said, finding.do))
        assert "Users" not in text
        assert "/home/" not in text


def test_a_first_step_that_is_slow_is_no_finding():
    text = NEO + "  5%|5         | 1/20 [00:06<02:00,  6.30s/it]\n 10%|#  | 2/20 [00:07<00:30,  1.7s/it]\n"
    assert explain(text.encode()).findings == []


@pytest.mark.parametrize("last", ["[10:00:01] Killed", "2026-11-29 | Killed "])
def test_a_killed_program_is_seen_behind_a_time(last):
    assert [one.name for one in explain(f"Loading Model: {{}}\n{last}\n".encode()).findings] == ["ram_death"]


def test_an_error_that_stopped_the_program_is_not_called_full_memory():
    text = (
        start()
        + "Loading Model: {}\nTraceback (most recent call last):\nKeyError: 'x'\nPress any key to continue . . .\n"
    )
    assert explain(text.encode()).findings == []


def test_the_merge_of_another_error_is_not_called_out_of_memory():
    text = "ERROR lora a.weight shape '[3072, 128]' is invalid for input of size 7\nPatching LoRA weights out of memory. Retrying by offloading models.\n"
    (found,) = explain(text.encode()).findings
    assert (found.name, found.said.facts["layers"]) == ("merge_failed", 1)
    assert "shape '[3072, 128]' is invalid" in found.said


def test_a_model_in_16_bit_loses_nothing():
    text = (
        start() + "K-Model Created: {'storage_dtype': torch.bfloat16, 'computation_dtype': torch.bfloat16}\n" + loaded()
    )
    assert explain(text.encode()).findings == []


OURS = """[LoRA Guard] 0.2.0 in place of Forge's LoRA patcher
[LoRA Guard] warning: LG-L01: style.safetensors NOT applied: made for SDXL, this is Flux; use a LoRA for Flux, or load a SDXL model
[LoRA Guard] warning: LG-L01: style.safetensors NOT applied: made for SDXL, this is Flux; use a LoRA for Flux, or load a SDXL model
[LoRA Guard] KModel: fine.safetensors strength 0.8: 304 keys used
"""


def test_our_own_warnings_are_repeated_once():
    found = explain(OURS.encode())
    assert found.ours == [
        "LG-L01: style.safetensors NOT applied: made for SDXL, this is Flux; use a LoRA for Flux, or load a SDXL model"
    ]
    assert found.has_guard
    assert explain("[LoRA Guard] 0.2.0 已接管 Forge Neo 的 LoRA 补丁功能\n".encode()).has_guard
    assert found.answer() == "Nothing went wrong in the WebUI; LoRA Guard itself warns 1 times (below)"


def test_every_rule_is_shown_by_a_log():
    shown = {finding.name for one in LOGS.values() for finding in explain(one.text.encode()).findings}
    others = {
        "memory_error": "numpy.core._exceptions._ArrayMemoryError: Unable to allocate 2.25 GiB for an array",
        "crashed": "Windows fatal exception: access violation",
        "oom": "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "ram_oom": "RuntimeError: [enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 75497472 bytes.",
        "moving_slow": "Moving model(s) has taken 221.23 seconds",
        "damaged": "safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge",
        "not_loaded": "lora key not loaded lora_te_x.alpha",
        "shape": "WARNING SHAPE MISMATCH a.weight WEIGHT NOT MERGED torch.Size([4]) != torch.Size([5])",
        "odd_patch": "patch type not recognized fooocus a.weight",
        "all_weights": "[Low VRAM Warning] You just set Forge to use 100% GPU memory (12287.00 MB) to load model weights.",
        "nan": "modules.devices.NansException: A tensor with NaNs was produced in Unet.",
        "vae_tiled": "Warning: Ran out of memory when regular VAE decoding, retrying with tiled VAE decoding.",
        "attention_sliced": "scaled_dot_product_attention OOMed: switched to slice attention",
        "removed_flag": "Arg --medvram is removed in Forge.",
        "no_expandable": "UserWarning: expandable_segments not supported on this platform (Triggered internally at ..)",
        "merge_failed": "ERROR lora a.weight shape '[3072, 128]' is invalid",
    }
    for name, line in others.items():
        assert [finding.name for finding in explain(line.encode()).findings] == [name]
    assert shown | set(others) == {rule.name for rule in RULES}
    assert len({line.name for line in LINES}) > 40


def test_lines_of_progress_bars_are_apart():
    assert lines_of(b" 10%|a\r 20%|b\r\n\x1b[1;31mred\x1b[0m\n\n  \nend") == [" 10%|a", " 20%|b", "red", "end"]


def test_the_command_reads_a_file_and_a_pipe(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = LOGS["patching of 190 seconds"].text
    (tmp_path / "log.txt").write_text(text)
    assert cli.main(["explain", str(tmp_path / "log.txt")]) == 0
    page = capsys.readouterr().out
    assert page.startswith("What happened: patching the LoRAs into the model took 190 s (1 times that long)")
    assert page.count("patching the LoRAs") == 1
    assert page.splitlines()[1].startswith("To do: set 'Diffusion in Low Bits' to 'Automatic (fp16 LoRA)'")
    assert page.index("\n2. style.safetensors was merged") < page.index("\n3. ") < page.index("Alarming and harmless:")
    monkeypatch.setattr(command.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    assert cli.main(["explain", "-", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in document["findings"]] == LOGS["patching of 190 seconds"].names
    assert (document["schema"], document["guard_says"]) == ("lora-guard/explain/1", [])
    big = tmp_path / "big.txt"
    big.write_bytes(start().encode() + b"x" * (HEAD_BYTES + TAIL_BYTES) + b"\n" + text.encode())
    assert cli.main(["explain", str(big)]) == 0
    assert "took 190 s" in capsys.readouterr().out
    assert cli.main(["explain", str(tmp_path)]) == 1
    assert "this is a folder" in capsys.readouterr().err


def test_a_log_that_is_missing_is_in_no_list_to_refresh(tmp_path, capsys, monkeypatch):
    for language, end in (
        ("en", ": no such file; check its name and folder\n"),
        ("zh", "文件不存在；请检查文件名与所在文件夹\n"),
    ):
        monkeypatch.setattr(page, "users_language", lambda language=language: language)
        assert cli.main(["explain", str(tmp_path / "none.txt")]) == 1
        assert capsys.readouterr().err.endswith(end)
