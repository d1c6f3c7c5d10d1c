"""The table of replaced functions: one row a function, and the list in the docs is the table."""

import re
from collections import Counter
from pathlib import Path

from lib_lora_guard.hosts.forge.hook_table import HOOKS

DOCS = Path(__file__).parents[3] / "docs" / "hosts.md"


def names():
    return [f"{row.module}.{row.path}" for row in HOOKS]


def test_every_function_has_one_row():
    assert [name for name, count in Counter(names()).items() if count > 1] == []


def test_the_list_in_the_docs_is_the_table():
    section = (
        DOCS.read_text(encoding="utf-8").partition("## What the takeover replaces in Forge")[2].partition("\n## ")[0]
    )
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(listed) == sorted(names())
