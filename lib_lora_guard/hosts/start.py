"""Start-up inside Forge: the two flags, and one line that says what came of it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import version
from ..errors import HostError, named
from ..messages import say
from ..reporting import log as reporting_log
from ..runtime.corrections import keep_calibration
from ..runtime.data_folder import look_over
from ..runtime.installed import installed
from .forge import takeover as forge
from .neo import takeover as neo
from .neo.api import is_neo_like
from .recognise import explain
from .webui import of_process
from .webui.options import GuardOptions

log = logging.getLogger(__name__)

JOURNAL_FOLDER = Path(__file__).resolve().parent.parent.parent / "data"
"""In the extension's own folder: an update leaves it alone, and removing the extension removes it."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the guard's flags to Forge's own parser (or to any other)."""
    parser.add_argument(
        "--lora-guard-off", action="store_true", help="LoRA Guard: leave Forge's own LoRA patcher in place"
    )
    parser.add_argument(
        "--lora-guard-as-trained",
        action="store_true",
        help="LoRA Guard: DoRA as its trainer means it, where Forge differs",
    )
    parser.add_argument(
        "--lora-guard-log-level",
        choices=reporting_log.LEVELS,
        default=None,
        help="LoRA Guard: how much is written to the console (instead of what the settings page says)",
    )


def say_installed_twice(folder: Path) -> None:
    """Says that the extension lies in two folders; what is at work stays so.

    Args:
        folder: Of the copy that came second.
    """
    _second_copies.add(folder)
    say(log, logging.WARNING, "host.installed_twice", first=str(JOURNAL_FOLDER.parent), second=str(folder))


def start(arguments: Sequence[str]) -> bool:
    """Installs the takeover unless the flags say no; True when it is in place.

    Forge has not parsed its command line yet, so the guard's two flags are read here. Never raises: an extension
    must not keep Forge from starting.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_flags(parser)
    try:
        flags = parser.parse_known_args(
            [a for a in arguments if a.startswith("--lora-guard") or not a.startswith("-")]
        )[0]
        level, off, as_trained = flags.lora_guard_log_level or "info", flags.lora_guard_off, flags.lora_guard_as_trained
    except SystemExit:
        # A wrong level: Forge's own parser is about to say so.
        level, off, as_trained = "info", False, False
    reporting_log.set_up(level)
    if off:
        say(log, logging.INFO, "host.switched_off", version=version.__version__)
        return False
    try:
        is_neo = is_neo_like()
        takeover = neo.install() if is_neo else forge.install()
        takeover.settings.as_trained = as_trained
    except HostError as error:
        say(log, logging.WARNING, "host.does_not_fit", version=version.__version__, why=explain(error))
        return False
    except Exception:
        say(log, logging.ERROR, "host.could_not_start", exc_info=True, version=version.__version__)
        return False
    look_over(JOURNAL_FOLDER)
    keep_calibration(JOURNAL_FOLDER)
    try:
        of_process.keep_journal(takeover.journal, JOURNAL_FOLDER)
    except Exception as error:
        # Everything else works without it.
        say(log, logging.WARNING, "flight.not_kept", exc_info=True, folder=str(JOURNAL_FOLDER), error=named(error))
    say(log, logging.INFO, "neo.in_place" if is_neo else "host.in_place", version=version.__version__)
    return True


def run_script(extension_root: Path) -> None:
    """Called each time Forge runs the extension's scripts: Forge's own extensions and options are loaded by then, and the
    guard's files may be newer than what is loaded of them."""
    if extension_root in _second_copies:
        return
    on_disk = (extension_root / "lib_lora_guard" / "version.py").read_text(encoding="utf-8")
    if f'"{version.__version__}"' not in on_disk:
        # What runs is the old version, all of it; the page that is being built anew gets its old tab.
        say(log, logging.WARNING, "host.updated", version=version.__version__)
    else:
        takeover = installed()
        for misfit in () if takeover is None else takeover.install_in_webui():
            say(log, logging.WARNING, "everyday.partly_fits", reason=misfit)
    options = _options()
    if options is not None:
        options.apply()
    if "modules.script_callbacks" in sys.modules:
        try:
            from .webui import ui

            ui.register(options)
        except Exception:
            say(log, logging.WARNING, "everyday.no_tab", exc_info=True)


def script_class() -> type | None:
    """Returns the class that Forge looks for in a scripts file; None outside a WebUI."""
    # Switched off on the settings page it may be switched on again without another look at this.
    if "modules.scripts" not in sys.modules or (installed() is None and _guard_options is None):
        return None
    from .webui.script import LoraGuardScript

    return LoraGuardScript


def _options() -> GuardOptions | None:
    """The settings in Forge's options; None where the guard is not in Forge, switched off by its flag, or does not fit."""
    global _guard_options
    call_queue, shared = sys.modules.get("modules.call_queue"), sys.modules.get("modules.shared")
    if _guard_options is None and installed() is not None and call_queue is not None and shared is not None:
        level = getattr(shared.cmd_opts, "lora_guard_log_level", None)
        device = sys.modules["backend.memory_management"].get_torch_device()
        _guard_options = GuardOptions(shared.opts.data, call_queue.queue_lock, device, level)
    return _guard_options


_guard_options: GuardOptions | None = None
_second_copies: set[Path] = set()
