"""Docs that say what is true: links lead somewhere, generated tables are there, versions agree."""

import re
import string
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import bars

from lib_lora_guard.messages.catalogue import TEXTS
from lib_lora_guard.version import __version__

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "README.zh-CN.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if not t.startswith(("http", "../../"))]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(
        r"`((?:lib_lora_guard|tests|benchmarks|docs|scripts|adapters|weights|planning|patching|hosts|reporting)/[\w/.]+\.\w+)`",
        text,
    )
    assert [n for n in named if not ((ROOT / n).exists() or (ROOT / "lib_lora_guard" / n).exists())] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_generated_tables_are_not_empty(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- end of (.+?) -->", text):
        inside = re.search(rf"<!-- {name} -->\n(.*?)<!-- end of {name} -->", text, re.DOTALL)
        assert inside is not None
        assert inside[1].count("\n|") > 3, f"{page.name}: the {name} is empty"


def test_the_version_is_in_the_changelog_and_in_the_readme():
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for readme in ("README.md", "README.zh-CN.md"):
        assert f"[LoRA Guard] {__version__} in place" in (ROOT / readme).read_text(encoding="utf-8"), readme


def test_both_readmes_have_the_same_sections_commands_and_links():
    """The Chinese page is a translation: what is not prose is the same."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    chinese = chinese.replace("除 [docs/low-vram.zh-CN.md](docs/low-vram.zh-CN.md) 外，", "")
    chinese = chinese.replace("docs/low-vram.zh-CN.md", "docs/low-vram.md")
    for what in (
        r"^(#+) ",
        r"^    ((?:python3|\.\\lora-guard|set|webui-user\.bat) .*)$",
        r"^```(\w*)$",
        r"\]\(([\w/-]+\.md)(?<!README\.md)(?<!CN\.md)",
    ):
        found = [re.findall(what, page, re.MULTILINE) for page in (english, chinese)]
        assert found[0] != []
        assert found[0] == found[1], what


def test_the_batch_file_runs_the_package_with_a_webuis_python():
    lines = (ROOT / "lora-guard.bat").read_bytes().decode("ascii").split("\r\n")
    assert lines[-2] == '"%WEBUI_PYTHON%" -m lib_lora_guard %*'
    for place in (r"..\..\venv\Scripts\python.exe", r"..\..\..\system\python\python.exe"):
        assert f'"%~dp0{place}"' in lines[4]
    assert not any("\n" in line for line in lines)


def test_the_bars_of_the_readmes_are_those_of_the_table():
    """Drawn anew from docs/gpu.md; two numbers are looked up by hand, so that the reader of the table is tested too."""
    table = bars.rows((ROOT / "docs/gpu.md").read_text(encoding="utf-8"))
    assert table["12 GB fp8, queue", "automatic"] == ("0.1", "10.76", "10.31")
    assert table["12 GB nf4, queue", "guard"] == ("100.0", "0.06", "0.00")
    for name, language in bars.FILES.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == bars.picture(table, language), name


PAGES_FOR_LITTLE_MEMORY = [("low-vram.md", "en"), ("low-vram.zh-CN.md", "zh")]


@pytest.mark.parametrize(("name", "language"), PAGES_FOR_LITTLE_MEMORY)
def test_the_lines_of_the_log_in_the_page_for_little_memory_are_in_the_catalogue(name, language):
    """With numbers in place of the placeholders; the number of a rule before the sentence is left out."""
    sentences = [
        [(word, bool(name)) for word, name, _, _ in string.Formatter().parse(texts[language])]
        for texts in TEXTS.values()
        if len(texts["en"]) > 30
    ]

    def is_known(line):
        """Makes patterns of those sentences only whose words are all in the line: most are not, and patterns cost."""
        like_it = (parts for parts in sentences if all(word in line for word, _ in parts))
        patterns = (
            "".join(re.escape(word) + (".+" if has_fact else "") for word, has_fact in parts) for parts in like_it
        )
        return any(re.fullmatch(r"(LG-R\d\d(?:: |：))?" + pattern, line) for pattern in patterns)

    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    shown = [
        line for cell in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for line in re.findall(r"`([^`]+)`", cell)
    ]
    assert len(shown) == 12
    of_cards = re.findall(r"^- (?:The log: |日志：)`([^`]+)`", page, re.MULTILINE)
    assert len(of_cards) == len(re.findall(r"^### \d+ GB$", page, re.MULTILINE)) == 4
    shown += of_cards
    assert [line for line in shown if not is_known(line)] == []


def test_both_pages_for_little_memory_have_the_same_numbers_and_links():
    english, chinese = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name, _ in PAGES_FOR_LITTLE_MEMORY)
    numbers = [sorted(re.findall(r"\d[\d.,]*\d|\d", re.sub(r"\]\([^)]*\)", "", page))) for page in (english, chinese)]
    assert numbers[0] == numbers[1]
    links = [re.findall(r"\]\(((?:http|replay|memory)[^)]*)\)", page) for page in (english, chinese)]
    assert len(links[0]) == 5
    assert links[0] == links[1]
