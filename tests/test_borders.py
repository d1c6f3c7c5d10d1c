"""Who may import whom: the pure packages know neither gradio nor a host, and only hosts/ speaks to Forge."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lib_lora_guard"
FORGE = {"backend", "modules", "modules_forge", "networks", "packages_3rdparty"}
PURE = ("files", "adapters", "weights", "models", "memory", "planning", "patching", "reporting", "baking")
BELOW = {
    "weights": {"weights"},
    "files": {"files"},
    "memory": {"memory"},
    "adapters": {"adapters", "files"},
    "models": {"models", "adapters", "files"},
    "planning": {"planning", "adapters", "weights"},
    "reporting": {"reporting", "planning", "weights", "adapters", "files"},
    "patching": set(PURE) - {"baking"},
    "baking": {*PURE, "commands"},
}
"""Which of our packages each one may import; errors, version and the sentences for users are free to all."""


def imported(file):
    """`(top-level module, path inside lib_lora_guard or None)` of every import in a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], None
        elif isinstance(node, ast.ImportFrom):
            where = file.relative_to(PACKAGE.parent).parts[: -node.level]
            target = (*where, *(node.module or "").split(".")) if node.module else where
            is_messages = target[1:] == ("reporting", "messages")
            yield "lib_lora_guard", "messages" if is_messages else target[1] if len(target) > 1 else None


def files(*folders):
    return [f for folder in folders for f in sorted((PACKAGE / folder).rglob("*.py"))]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_only_hosts_imports_forge_and_only_ui_imports_gradio(file):
    place = file.relative_to(PACKAGE).parts[0]
    tops = {top for top, _ in imported(file)}
    assert place == "hosts" or not tops & FORGE
    assert place == "ui" or "gradio" not in tops


@pytest.mark.parametrize("file", files(*PURE), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_pure_packages_import_only_what_lies_below_them(file):
    place = file.relative_to(PACKAGE).parts[0]
    inside = {sub for top, sub in imported(file) if top == "lib_lora_guard"} - {None, "errors", "messages", "version"}
    assert inside <= BELOW[place]


def test_importing_the_package_loads_neither_torch_nor_a_host():
    code = "import sys, lib_lora_guard; print(sorted({'torch', 'gradio', 'backend'} & {m.split('.')[0] for m in sys.modules}))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
