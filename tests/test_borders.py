"""The imports that are allowed: the pure packages know neither gradio nor a host, and only hosts/ speaks to Forge."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lib_lora_guard"
HOSTS = {"backend", "modules", "modules_forge", "networks", "packages_3rdparty"}
GROUND = {
    "messages",
    "errors",
    "version",
    "units",
    "settings",
    "lazy_torch",
    "private_files",
    "inference_mode",
    "cached_property",
    "locks",
    "large_pages",
}
"""Free to all."""
PURE = {"files", "memory", "weights", "kernels", "recorder", "adapters", "models", "planning", "reporting", "patching"}
BELOW = {
    "messages": set(),
    "files": set(),
    "memory": set(),
    "weights": set(),
    "kernels": {"weights"},
    "recorder": set(),
    "adapters": {"files"},
    "models": {"adapters", "files"},
    "planning": {"adapters", "weights"},
    "reporting": {"planning", "weights", "adapters", "files"},
    "patching": {"files", "memory", "weights", "kernels", "recorder", "adapters", "models", "planning", "reporting"},
    "checkpoints": {"files", "weights", "adapters", "models", "planning"},
    "baking": {"files", "weights", "recorder", "adapters", "models", "checkpoints", "patching"},
    "replay": {"weights", "planning"},
    "explaining": {"files"},
    "ui": {"files", "memory", "weights", "planning", "reporting"},
    "demo": {*PURE, "hosts/plain"},
    "commands": {*PURE, "checkpoints", "baking", "replay", "explaining", "demo", "hosts/plain"},
    "cli": {*PURE, "commands", "checkpoints", "replay", "explaining", "demo", "baking"},
    "__main__": {"cli"},
    "__init__": {"hosts/plain"},
}
"""What each pure package may import beside itself and the ground."""
ABOVE = {
    "runtime": {*PURE, "ui"},
    "hosts/probing.py": set(),
    "hosts/recognise.py": {"files", "reporting", "hosts/probing.py"},
    "hosts/webui": {*PURE, "checkpoints", "ui", "runtime", "commands", "hosts/probing.py"},
    "hosts/forge": {*PURE, "ui", "runtime", "hosts/webui", "hosts/probing.py"},
    "hosts/neo": {*PURE, "ui", "runtime", "hosts/webui", "hosts/probing.py"},
    "hosts/plain": {*PURE, "runtime"},
    "hosts/start.py": {*PURE, "ui", "runtime", "hosts/webui", "hosts/forge", "hosts/neo", "hosts/recognise.py"},
    "hosts/__init__.py": set(),
}
"""The same for what works inside a host. A host imports downwards only; `hosts/start.py` chooses the host."""


@functools.cache
def imports(file):
    """`(top-level module, file or folder inside lib_lora_guard or None)` of every import in a file."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.module.split(".")[0], None))
        elif isinstance(node, ast.ImportFrom):
            folder = file.parents[node.level - 1]
            target = folder.joinpath(*(node.module or "").split("."))
            for alias in node.names:
                found.append(("lib_lora_guard", next(path for path in modules(target, alias.name) if path.exists())))
    return found


def modules(target, name):
    return target / f"{name}.py", target / name / "__init__.py", target.with_suffix(".py"), target / "__init__.py"


def place_of(file):
    return file.relative_to(PACKAGE).parts[0]


def package_of(file):
    """ "models", "hosts/forge", "hosts/start.py"."""
    parts = file.relative_to(PACKAGE).parts
    return "/".join(parts[:2]) if parts[0] == "hosts" else parts[0].removesuffix(".py")


def files_of(package):
    folder = PACKAGE / package
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{package.removesuffix('.py')}.py"]


def strays(package, below):
    for file in files_of(package):
        inside = {package_of(path) for top, path in imports(file) if path is not None} - {package, "__init__"}
        yield from (f"{file.relative_to(PACKAGE)} imports {sub}" for sub in sorted(inside - below - GROUND))


def test_only_hosts_import_a_host_and_only_ui_imports_gradio():
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        tops = {top for top, _ in imports(file)}
        forbidden = (set() if place_of(file) == "hosts" else HOSTS) | (set() if place_of(file) == "ui" else {"gradio"})
        found += [f"{file.relative_to(PACKAGE)} imports {top}" for top in sorted(tops & forbidden)]
    assert found == []


def test_pure_packages_import_only_what_lies_below_them():
    assert [line for package, below in BELOW.items() for line in strays(package, below)] == []


def test_runtime_imports_no_host_webui_no_other_host_and_a_host_only_what_lies_below_it():
    assert [line for package, below in ABOVE.items() for line in strays(package, below)] == []


def test_every_package_and_every_host_has_a_row():
    places = {package_of(file) for file in PACKAGE.rglob("*.py")}
    assert sorted(places - BELOW.keys() - ABOVE.keys() - GROUND) == []


def test_no_file_imports_in_a_circle():
    graph = {
        file: {path for _, path in imports(file) if path is not None and path != file}
        for file in sorted(PACKAGE.rglob("*.py"))
    }
    while leaves := [file for file, below in graph.items() if not below & graph.keys()]:
        for file in leaves:
            del graph[file]
    assert [str(file.relative_to(PACKAGE)) for file in graph] == []


def test_importing_the_package_loads_neither_torch_nor_a_host():
    code = "import sys, lib_lora_guard; print(sorted({'torch', 'gradio', 'backend'} & {m.split('.')[0] for m in sys.modules}))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
