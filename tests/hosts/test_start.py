"""Start-up in Forge: flags, folders of any name, hosts that do not fit. preload.py is run the way Forge runs it."""

import argparse
import compileall
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from support import warm

from lib_lora_guard.hosts import start
from lib_lora_guard.hosts.forge import takeover as forge
from lib_lora_guard.hosts.webui import of_process
from lib_lora_guard.reporting import log as reporting_log
from lib_lora_guard.runtime.journal import Journal
from lib_lora_guard.runtime.live_settings import LiveSettings
from lib_lora_guard.version import __version__

ROOT = Path(__file__).parent.parent.parent
DOUBLE = ROOT / "tests" / "forge_double"

FORGE_LIKE = """
import argparse, importlib.util, sys
extension, flags = sys.argv[1], sys.argv[2:]
sys.argv = ["launch.py", *flags]
def load(path):
    spec = importlib.util.spec_from_file_location("preload.py", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
parser = argparse.ArgumentParser()
parser.add_argument("--port")
parser.add_argument("--api", action="store_true")
load(extension + "/preload.py").preload(parser)
options = parser.parse_args()
sys.path.insert(0, extension)  # Forge does this around scripts
for _ in range(2):  # and runs them again at Reload UI
    load(extension + "/scripts/lora_guard.py")
import backend.patcher.lora as lora
print("HOOKED", hasattr(lora.LoraLoader.refresh, "lora_guard_hook"))
"""


def start_forge(extension, *flags, path=None, code=FORGE_LIKE, cold=False):
    """`cold`: in a process that has imported nothing yet."""
    paths = [str(DOUBLE), str(ROOT / "tests")] if path is None else path
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    if cold:
        command = [sys.executable, "-c", code, str(extension), *flags]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=extension.parent)
    return warm.run(code, extension, *flags, env=env, cwd=extension.parent)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The extension's files, compiled: every copy of them would have to be otherwise."""
    folder = tmp_path_factory.mktemp("compiled") / "extension"
    for name in ("lib_lora_guard", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("preload.py", "install.py"):
        shutil.copy(ROOT / name, folder)
    assert compileall.compile_dir(folder, quiet=1)
    return folder


@pytest.fixture
def extension(tmp_path, compiled):
    """The extension as a user has it: a copy, in a folder with a name of their own."""
    return copy_of(compiled, tmp_path / "my LoRA things (2)")


def copy_of(folder, target):
    """The files are links, which take a tenth of the time; not that one which a test writes to."""

    def copy(source, target):
        if not source.endswith("version.py"):
            with contextlib.suppress(OSError):
                return os.link(source, target)
        return shutil.copy2(source, target)

    return shutil.copytree(folder, target, copy_function=copy)


def test_it_takes_over_from_a_folder_of_any_name_and_says_so_once(extension):
    shown = start_forge(extension, "--port", "7860", "--api", cold=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [f"[LoRA Guard] {__version__} in place of Forge's LoRA patcher", "HOOKED True"]


def test_off_leaves_everything_and_says_so(extension):
    shown = start_forge(extension, "--lora-guard-off")
    assert shown.stdout.splitlines() == [
        f"[LoRA Guard] {__version__} is switched off by --lora-guard-off; Forge's own LoRA patcher is in place",
        "HOOKED False",
    ]


def test_the_log_level_is_a_flag(extension):
    assert start_forge(extension, "--lora-guard-log-level", "warning").stdout.splitlines() == ["HOOKED True"]
    assert start_forge(extension, "--lora-guard-log-level=error").stdout.splitlines() == ["HOOKED True"]
    wrong = start_forge(extension, "--lora-guard-log-level", "loud")
    assert "invalid choice: 'loud'" in wrong.stderr


@pytest.mark.parametrize(
    ("file", "old", "new", "probe"),
    [
        ("patcher/lora.py", "def refresh(self, lora_patches,", "def refresh(self, patches,", "backend.patcher.lora.LoraLoader.refresh has no parameter lora_patches"),
        ("patcher/lora.py", "def merge_lora_to_weight(patches, weight,", "def merge_lora_to_weight(weight, patches,", "backend.patcher.lora.merge_lora_to_weight does not take Forge's patches"),
        ("memory_management.py", "sys.modules[__name__]", "MemoryManagement.load_models_gpu = lambda self, models: None\nsys.modules[__name__]", "backend.memory_management.load_models_gpu has no parameter hard_memory_preservation"),
        ("operations.py", "class ForgeOperationsGGUF(", "class Renamed(", "name 'ForgeOperationsGGUF' is not defined|backend.operations.ForgeOperationsGGUF is missing"),
        ("operations.py", "from backend.patcher.lora import merge_lora_to_weight", "def merge_lora_to_weight(): pass", "backend.operations.merge_lora_to_weight is not the one"),
    ],
)  # fmt: skip
def test_a_host_that_does_not_fit_is_left_alone_with_the_probe_in_one_line(extension, tmp_path, file, old, new, probe):
    host = tmp_path / "host"
    shutil.copytree(DOUBLE, host, ignore=shutil.ignore_patterns("__pycache__"))
    source = (host / "backend" / file).read_text(encoding="utf-8")
    assert old in source
    source = source.replace(old, new).replace("operations or (ForgeOperationsGGUF if", "operations or (Renamed if")
    (host / "backend" / file).write_text(source, encoding="utf-8")
    shown = start_forge(extension, path=[str(host), str(ROOT / "tests")])
    assert shown.returncode == 0, shown.stderr
    line, hooked = shown.stdout.splitlines()
    assert line.startswith(f"[LoRA Guard] warning: {__version__} does not fit this program, so nothing is changed: ")
    assert any(part in line for part in probe.split("|"))
    assert hooked == "HOOKED False"


def test_a_forge_from_before_force_refresh_is_taken_over(extension, tmp_path):
    """Forge got the parameter on 2025-01-28."""
    host = tmp_path / "host"
    shutil.copytree(DOUBLE, host, ignore=shutil.ignore_patterns("__pycache__"))
    lora = host / "backend" / "patcher" / "lora.py"
    source = lora.read_text(encoding="utf-8")
    assert ", force_refresh=False" in source
    lora.write_text(source.replace(", force_refresh=False", "").replace(" and not force_refresh", ""), encoding="utf-8")
    shown = start_forge(extension, path=[str(host), str(ROOT / "tests")])
    assert shown.stdout.splitlines() == [f"[LoRA Guard] {__version__} in place of Forge's LoRA patcher", "HOOKED True"]


def test_without_any_forge_nothing_happens_but_a_line(extension):
    code = FORGE_LIKE.replace(
        "import backend.patcher.lora as lora", "class lora: LoraLoader = type('L', (), {'refresh': None})"
    )
    shown = start_forge(extension, path=[str(ROOT / "tests")], code=code)
    assert shown.returncode == 0, shown.stderr
    assert (
        "does not fit this program, so nothing is changed: backend.memory_management cannot be imported" in shown.stdout
    )
    assert "HOOKED False" in shown.stdout


def test_a_second_copy_of_the_extension_says_that_there_are_two(extension, tmp_path):
    other = copy_of(extension, tmp_path / "second")
    code = FORGE_LIKE.replace(
        "options = parser.parse_args()",
        f"options = None\nfor name in [n for n in sys.modules if n.startswith('lib_lora_guard')]: del sys.modules[name]\nsys.path.remove(extension)\nload({str(other)!r} + '/preload.py').preload(argparse.ArgumentParser())",
    )
    shown = start_forge(extension, code=code)
    assert shown.returncode == 0, shown.stderr
    assert "another copy of LoRA Guard is installed already; keep one folder in extensions/" in shown.stdout


def test_two_copies_that_start_one_after_the_other_are_one_line_and_work_as_one(extension, tmp_path):
    other = copy_of(extension, tmp_path / "second")
    second = "load(" + repr(str(other)) + " + '/{}')"
    code = FORGE_LIKE.replace(
        "options = parser.parse_args()",
        f"{second.format('preload.py')}.preload(parser)\noptions = parser.parse_args()",
    ).replace(
        '    load(extension + "/scripts',
        f"    {second.format('scripts/lora_guard.py')}\n" + '    load(extension + "/scripts',
    )
    shown = start_forge(extension, code=code)
    assert shown.returncode == 0, shown.stderr
    begun, twice, end = shown.stdout.splitlines()
    assert (begun, end) == (f"[LoRA Guard] {__version__} in place of Forge's LoRA patcher", "HOOKED True")
    assert twice.startswith("[LoRA Guard] warning: LoRA Guard is installed twice; the copy in ")
    assert twice.endswith(f" is at work, delete the one in {other} or the other way round, and restart")


def test_an_update_without_restart_asks_for_one(extension):
    code = FORGE_LIKE.replace(
        "options = parser.parse_args()",
        "options = None\nopen(extension + '/lib_lora_guard/version.py', 'w').write('__version__ = \"9.9.9\"')",
    )
    shown = start_forge(extension, code=code)
    assert (
        f"warning: LoRA Guard was updated; restart Forge to use the new version ({__version__} is still running)"
        in shown.stdout
    )
    assert "HOOKED True" in shown.stdout


def test_install_py_installs_nothing_and_says_nothing(extension):
    shown = subprocess.run([sys.executable, str(extension / "install.py")], capture_output=True, text=True, check=True)
    assert (shown.stdout, shown.stderr) == ("", "")


def test_an_unexpected_error_at_start_does_not_keep_forge_from_starting(monkeypatch, capsys):
    def fail():
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(forge, "install", fail)
    assert start.start([]) is False
    assert (
        f"error: {__version__} could not start, so nothing is changed (ZeroDivisionError: planted)"
        in capsys.readouterr().out
    )


@pytest.mark.skipif(os.name != "posix", reason="no pipes of this kind")
def test_a_foreign_thing_in_its_folder_does_not_keep_forge_from_starting(monkeypatch, capsys, tmp_path):
    (tmp_path / "calibration.json").mkdir()
    os.mkfifo(tmp_path / "flight-7-7.ring")
    journal = Journal(lambda: None)
    takeover = types.SimpleNamespace(settings=LiveSettings(), journal=journal)
    monkeypatch.setattr(forge, "install", lambda: takeover)
    monkeypatch.setattr(of_process, "close_at_the_end", lambda journal: None)
    monkeypatch.setattr(start, "JOURNAL_FOLDER", tmp_path)
    monkeypatch.setattr(start, "keep_calibration", lambda folder: None)
    assert start.start([]) is True
    assert journal.is_open
    journal.close()
    line, in_place = capsys.readouterr().out.splitlines()
    assert "2 things have the names of LoRA Guard's own files" in line
    assert "(calibration.json: a folder)" in line
    assert in_place == f"[LoRA Guard] {__version__} in place of Forge's LoRA patcher"


def test_the_flags_have_help():
    parser = argparse.ArgumentParser()
    start.add_flags(parser)
    assert "leave Forge's own LoRA patcher in place" in " ".join(parser.format_help().split())


def test_the_logger_has_one_handler_and_tracebacks_are_for_debug(capsys):
    reporting_log.set_up("info")
    logger = reporting_log.set_up("info")
    assert len([h for h in logger.handlers if getattr(h, "lora_guard", False)]) == 1
    handler = next(h for h in logger.handlers if getattr(h, "lora_guard", False))
    for level, traceback in (("info", False), ("debug", True)):
        reporting_log.set_up(level)
        try:
            raise ValueError("planted")
        except ValueError:
            record = logger.makeRecord(logger.name, logging.ERROR, "f", 1, "applying %s failed", ("x",), sys.exc_info())
        text = handler.format(record)
        assert text.startswith("[LoRA Guard] error: applying x failed (ValueError: planted)")
        assert ("Traceback" in text) is traceback
