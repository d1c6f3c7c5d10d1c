"""Which package may import which: the pure packages know neither gradio nor a host, and only hosts/ speaks to Forge."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lib_lora_guard"
FORGE = {"backend", "modules", "modules_forge", "networks", "packages_3rdparty"}
GROUND = {"messages", "errors", "version"}
"""Free to all."""
PURE = {
    "messages": set(),
    "files": set(),
    "memory": set(),
    "weights": set(),
    "recorder": set(),
    "adapters": {"files"},
    "models": {"adapters", "files"},
    "planning": {"adapters", "weights"},
    "reporting": {"planning", "weights", "adapters", "files"},
    "patching": {"files", "memory", "weights", "recorder", "adapters", "models", "planning", "reporting"},
    "checkpoints": {"files", "weights", "adapters", "models", "planning"},
    "baking": {"files", "weights", "adapters", "models", "checkpoints", "patching"},
    "replay": {"weights", "planning"},
}
"""What each pure package may import beside itself and the ground."""


def imported(file):
    """`(top-level module, package inside lib_lora_guard or None)` of every import in a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], None
        elif isinstance(node, ast.ImportFrom):
            where = file.relative_to(PACKAGE.parent).parts[: -node.level]
            target = (*where, *(node.module or "").split(".")) if node.module else where
            yield "lib_lora_guard", target[1] if len(target) > 1 else None


def place_of(file):
    return file.relative_to(PACKAGE).parts[0]


def test_only_hosts_import_forge_and_only_ui_imports_gradio():
    strays = []
    for file in sorted(PACKAGE.rglob("*.py")):
        tops = {top for top, _ in imported(file)}
        forbidden = (set() if place_of(file) == "hosts" else FORGE) | (set() if place_of(file) == "ui" else {"gradio"})
        strays += [f"{file.relative_to(PACKAGE)} imports {top}" for top in sorted(tops & forbidden)]
    assert strays == []


def test_pure_packages_import_only_what_lies_below_them():
    strays = []
    for package, below in PURE.items():
        for file in sorted((PACKAGE / package).rglob("*.py")):
            inside = {sub for top, sub in imported(file) if top == "lib_lora_guard" and sub is not None}
            strays += [
                f"{file.relative_to(PACKAGE)} imports {sub}" for sub in sorted(inside - below - GROUND - {package})
            ]
    assert strays == []


def test_importing_the_package_loads_neither_torch_nor_a_host():
    code = "import sys, lib_lora_guard; print(sorted({'torch', 'gradio', 'backend'} & {m.split('.')[0] for m in sys.modules}))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
