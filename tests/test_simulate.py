"""`lora-guard simulate`: the table, one configuration, JSON, and the page that is docs/replay.md."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lib_lora_guard import cli
from lib_lora_guard.commands.simulate import simulate, simulate_document
from lib_lora_guard.commands.simulate_page import COMMAND, page
from lib_lora_guard.commands.simulate_text import print_detail, print_overview
from lib_lora_guard.replay.field_cases import Outcome
from lib_lora_guard.replay.replay import GuardOutcome
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
    assert (
        "With the guard, predicted, not measured: 38 of 54 have an outcome, 21 of them computed and 17 unchanged because the cause "
        "lies elsewhere; 18 end otherwise (oom in merge to ok 6, slow to ok 6, ram death to refused with a message 2, crash to ok 1, "
        "oom elsewhere to slow 1, oom in merge to slow 1, ram death to ok 1)."
    ) in text
    assert "| recomputed | thread | with the guard (predicted, not measured) |" in text
    assert "| not predicted: no VRAM known |" in text
    assert "## With the guard: predicted, not measured" in text
    assert "In 15, 19, 23, 34, 38 the guard copies more weights a step than Forge" in text
    assert "Close calls: in 1, 16, 17 Forge lacks less than 512 MB of RAM by this arithmetic." in text
    assert "| 25 | model: Remaining | -16185.96 MB | -16185.95 | within rounding | free - model - inference |" in text


def test_the_overview_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = run(capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for number in range(1, 55):
        assert any(row.split()[:1] == [str(number)] for row in text.splitlines())
    assert "953674316406250018963456.00 MB" in text
    assert "With the guard, predicted, not measured: 38 of 54" in " ".join(text.split())


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
    assert "With the guard (predicted): slow. unchanged: ComfyUI: the guard does not run there" in text
    assert "With the guard: not predicted: no VRAM known." in run(capsys, "--row", "35")


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
        "threads", "logged", "is_reproduced", "lines", "reason_if_none", "guard", "guard_reason_if_none",
    ]  # fmt: skip
    assert (third["row"], third["gpu"], third["outcome"], third["guard_reason_if_none"]) == (
        3,
        None,
        "oom in merge",
        None,
    )
    assert third["guard"]["outcome"] == "ok"
    assert third["guard"]["numbers"]["LoRA factors"] == 330.9
    fourteenth = found["configurations"][13]
    assert fourteenth["guard"] is None
    assert fourteenth["guard_reason_if_none"] == "neither the model's storage nor the RAM that ran out is known"
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
    assert "| ok: bypass for 54 |" in text
    assert "| not predicted: not asked |" in text
    assert (
        "53 of 54 have an outcome, 53 of them computed and 0 unchanged because the cause lies elsewhere; 50 end otherwise ("
        in text
    )
    assert "| of | peak |" in text
    assert "with the guard" not in page(simulate()).replace("replay guard", "")
    written = io.StringIO()
    console = Console(file=written, width=120)
    print_overview(console, replays)
    print_detail(console, replays[2])
    shown = written.getvalue()
    assert "with the guard" in shown
    assert "With the guard (predicted): ok. bypass for 3" in shown
    assert "peak: 2.50 MB" in shown
    assert simulate_document(replays)["configurations"][2]["guard"] == {
        "outcome": "ok", "why": "bypass for 3", "numbers": {"peak": 2.5},
    }  # fmt: skip
