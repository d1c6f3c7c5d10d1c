"""The demo end to end on a small model: the claims of its table, measured, not the numbers of one machine."""

import io
import re
import subprocess
import sys

import pytest
from rich.console import Console

from lib_lora_guard import cli
from lib_lora_guard.demo import run
from lib_lora_guard.demo.model import FluxShape
from lib_lora_guard.demo.run import CODECS, run_demo

SMALL = FluxShape(hidden=256, heads=4, double=1, single=1, context=64, vector=64, channels=16)


@pytest.fixture(scope="module")
def shown():
    console = Console(file=io.StringIO(), width=80)
    rows = run_demo(console, shape=SMALL)
    return rows, console.file.getvalue()


def test_every_format_is_run_both_ways_and_restored_bit_for_bit(shown):
    rows, _ = shown
    assert [(r.format, r.way) for r in rows] == [(f, w) for f in CODECS for w in ("guard", "merging")]
    assert all(r.restored for r in rows)


def test_the_guard_keeps_the_lora_and_merging_loses_it_in_four_bits(shown):
    rows, _ = shown
    for row in rows:
        if row.way == "guard":
            # 64 probe tokens in fp32: the projection is exact to about 1e-4.
            assert abs(row.share - 1) < 1e-3
            assert abs(row.share_changed - 1) < 1e-3
        elif row.format in ("NF4", "GGUF Q4_0"):
            assert row.share < 0.5


def test_the_table_fits_a_console_of_80_columns(shown):
    _, text = shown
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert "exact: weights restored bit for bit" in " ".join(text.split())


def test_the_last_thing_said_is_the_result_in_a_sentence(shown):
    rows, text = shown
    merging = next(row for row in rows if (row.format, row.way) == ("NF4", "merging"))
    said = " ".join(text.split())
    assert re.search(
        r"On NF4 a change of the LoRA takes 0\.\d{3} s instead of \d+\.\d s and \d+ MB of RAM instead of \d+ MB, and 100 % of the LoRA "
        rf"reach the model instead of {100 * merging.share:.0f} %\.$",
        said,
    )


def test_markdown_goes_to_stdout(shown, capsys, monkeypatch):
    measured, _ = shown
    monkeypatch.setattr(run, "_run_format", lambda name, *_: [row for row in measured if row.format == name])
    run_demo(Console(file=io.StringIO()), markdown=True, shape=SMALL)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| format | way |")
    assert len([line for line in lines if line.startswith("|")]) == 2 + 2 * len(CODECS)


def test_both_names_of_the_command_say_what_they_are():
    shown = subprocess.run(
        [sys.executable, "-m", "lib_lora_guard", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("LoRA Guard 0.")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0


def test_an_error_is_one_line_and_an_exit_code(monkeypatch, capsys):
    from lib_lora_guard.errors import LoraFileError

    def fail(*args, **kwargs):
        raise LoraFileError("style.safetensors: planted")

    monkeypatch.setattr("lib_lora_guard.demo.run.run_demo", fail)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "lora-guard: style.safetensors: planted\n"
    with pytest.raises(LoraFileError):
        cli.main(["--debug", "demo"])
