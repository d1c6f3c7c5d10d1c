"""Docs that say what is true: links lead somewhere, generated tables are there, versions agree."""

import re
from pathlib import Path

import pytest

from lib_lora_guard.version import __version__

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(
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
    assert f"[LoRA Guard] {__version__} in place" in (ROOT / "README.md").read_text(encoding="utf-8")
