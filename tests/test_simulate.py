"""`lora-guard simulate`: the table, one configuration, JSON, and the page that is docs/replay.md."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lib_lora_guard import cli
from lib_lora_guard.commands.simulate import simulate, simulate_document
from lib_lora_guard.commands.simulate_page import COMMAND, page
from lib_lora_guard.commands.simulate_text import print_detail, print_overview
from lib_lora_guard.planning.field_cases import Outcome
from lib_lora_guard.planning.replay import GuardOutcome
from lib_lora_guard.version import __version__

ROOT = Path(cli.__file__).parent.parent


def run(capsys, *words):
    assert cli.main(["simulate", *words]) == 0
    return capsys.readouterr().out


def test_docs_replay_is_what_the_command_gives(capsys, tmp_path):
    kept = (ROOT / "docs" / "replay.md").read_bytes().replace(b"\r\n", b"\n")
    target = tmp_path / "replay.md"
    assert run(capsys, "--markdown", "--write", str(target)) == ""
    assert target.read_bytes() == kept, f"docs/replay.md is old: {COMMAND}"
    assert run(capsys, "--markdown").encode() == kept


def test_the_page_says_what_it_was_made_from_and_what_the_huge_number_means(capsys):
    text = run(capsys, "--markdown")
    assert f"LoRA Guard {__version__}" in text
    assert "`dfdcbab6`" in text
    assert "54 configurations, 17 of them with numbers and a known formula: 62 of 62 numbers come out" in text
    assert '"Trying to free 953674316406250018963456.00 MB"' in text
    assert "means: unload everything. It is no miscalculation." in text
    assert "| 25 | model: Remaining | -16185.96 MB | -16185.95 | within rounding | free - model - inference |" in text


def test_the_overview_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = run(capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for number in range(1, 55):
        assert any(row.split()[:1] == [str(number)] for row in text.splitlines())
    assert "953674316406250018963456.00 MB" in text
    assert "with the guard" not in text


def test_one_configuration_with_its_numbers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run(capsys, "--row", "25")
    assert "model: Trying to free 32585.18 MB; the formula gives 32585.17: within rounding" in text
    assert (
        "picture behind the VAE's request: 24300.03 latent pixels, so 24300: 1080x1440 (solved for, not counted)"
        in text
    )
    assert "https://github.com/lllyasviel/stable-diffusion-webui-forge/issues/1575" in text


def test_one_configuration_without_a_formula_says_why(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run(capsys, "--row", "54")
    assert "Nothing to recompute: ComfyUI's own memory model, not Forge's." in text
    assert "reserved: 12636" in text


def test_the_json_document_has_stable_names(capsys):
    found = json.loads(run(capsys, "--json"))
    assert list(found) == [
        "schema", "version", "host_commit", "configurations", "reproduced_configurations", "reproduced_numbers", "numbers",
        "elsewhere", "sentinel",
    ]  # fmt: skip
    assert found["schema"] == "lora-guard/simulate/1"
    assert (found["reproduced_configurations"], found["reproduced_numbers"], found["numbers"]) == (17, 62, 62)
    third = found["configurations"][2]
    assert list(third) == [
        "row", "gpu", "vram_total_mb", "vram_free_mb", "ram_mb", "system", "torch", "host", "model", "loras", "outcome",
        "threads", "logged", "is_reproduced", "lines", "reason_if_none", "guard",
    ]  # fmt: skip
    assert (third["row"], third["gpu"], third["outcome"], third["guard"]) == (3, None, "oom in merge", None)
    assert third["lines"][2] == {
        "name": "model: Remaining", "seen": 2502.53, "computed": 2502.53, "unit": "MB", "is_reproduced": True,
        "formula": "free - model - inference", "assumed": None,
    }  # fmt: skip
    assert found["sentinel"]["bytes"] == 1e30
    (one,) = json.loads(run(capsys, "--json", "--row", "13"))["configurations"]
    assert one["row"] == 13
    assert one["reason_if_none"].startswith("no number of memory")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--row", "0"], "expected the number of a configuration from 1 to 54, found '0'"),
        (["--row", "55"], "expected the number of a configuration from 1 to 54, found '55'"),
        (["--row", "x"], "expected the number of a configuration from 1 to 54, found 'x'"),
        (["--write", "x.md"], "argument --write: give --markdown with it"),
        (["--markdown", "--row", "3"], "argument --markdown: the page is whole, leave --row and --json out"),
        (["--markdown", "--json"], "argument --markdown: the page is whole, leave --row and --json out"),
    ],
)
def test_wrong_usage_is_code_2(capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        cli.main(["simulate", *words])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_one_line(capsys, tmp_path):
    assert cli.main(["simulate", "--markdown", "--write", str(tmp_path / "none" / "x.md")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("lora-guard: ")
    assert shown.count("\n") == 1


def test_the_guards_column_appears_where_there_is_a_guard():
    def guard(case):
        return None if case.number == 1 else GuardOutcome(Outcome.OK, f"bypass for {case.number}", {"peak": 2.5})

    replays = simulate(guard=guard)
    text = page(replays)
    assert "| recomputed | thread | with the guard |" in text
    assert "| ok: bypass for 54 |" in text
    assert "The guard was asked about 53 of them and changes the outcome of 50." in text
    written = io.StringIO()
    console = Console(file=written, width=120)
    print_overview(console, replays)
    print_detail(console, replays[2])
    shown = written.getvalue()
    assert "with the guard" in shown
    assert "With the guard: ok. bypass for 3" in shown
    assert "peak: 2.50" in shown
    assert simulate_document(replays)["configurations"][2]["guard"] == {
        "outcome": "ok", "why": "bypass for 3", "numbers": {"peak": 2.5},
    }  # fmt: skip


def test_neither_help_nor_the_table_needs_torch():
    code = (
        "import sys\nfrom lib_lora_guard import cli\n"
        "try: cli.main(['simulate', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'rich'} & set(sys.modules)))\n"
        "cli.main(['simulate', '--json'])\nprint('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "[]" in shown.stdout.splitlines()
    assert shown.stdout.splitlines()[-1] == "False"
