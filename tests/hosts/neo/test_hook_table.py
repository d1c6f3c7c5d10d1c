"""The table of replaced functions: one row a function, and the list in the docs is the table."""

import re
from collections import Counter
from pathlib import Path

from lib_lora_guard.hosts.neo.hook_table import HOOKS, LATER, SAVING, START
from lib_lora_guard.hosts.webui.takeover import HOOKS as WEB

DOCS = Path(__file__).parents[3] / "docs" / "neo.md"


def names(rows):
    return [f"{row.module}.{row.path}" for row in rows]


def test_every_function_has_one_row():
    assert [name for name, count in Counter(names(HOOKS)).items() if count > 1] == []
    assert sorted(names(HOOKS)) == sorted(names((*START, *LATER, *WEB, *SAVING)))


def test_the_list_in_the_docs_is_the_table():
    text = DOCS.read_text(encoding="utf-8")
    section = text.partition("## What the takeover replaces in Forge Neo")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(listed) == sorted(names((*START, *LATER, *SAVING)))
