"""Tells Forge of the settings section, the tab and the tab's address. `start.run_script` calls `register`."""

from __future__ import annotations

import sys
from typing import Any

from ...recorder.crash import Crash
from ...reporting.timeline import Timeline
from ...runtime import installed
from ...runtime.status import InForce, Machine, collect
from ...settings import Language, read
from ...ui import settings_section, tab
from ...ui.language import reader_language
from ...ui.panel import Panel
from ...ui.rest import add_rest
from ...ui.route import add_route
from . import of_process, xyz_axes
from .doings import HostDoings
from .flags import Flags, credentials_of, has_api, is_for_other_sites, is_opened
from .infotext import fill_in_mode
from .work import work_of_host


class Face:
    """Adds the guard's settings and the HTTP address that the tab asks. `options` is None where the guard is not at work here: then
    there are no settings, and the tab says so."""

    def __init__(self, options: InForce | None) -> None:
        self._options = options
        machine = Machine()
        self._panel = Panel(
            lambda: collect(installed.installed(), options, machine, work_of_host(), _timeline(), _crash()),
            _language,
            timeline=_timeline,
        )

    def add_settings(self) -> None:
        from modules import shared

        if self._options is None:
            return
        made = settings_section.options(shared, reader_language(*_language()), self._options.apply)
        for name, info in shared.options_section((*settings_section.SECTION, "sd"), made).items():
            shared.opts.add_option(name, info)

    def app_started(self, demo: Any, app: Any) -> None:
        """Adds the address that the tab asks, and begins what may be done ahead."""
        from modules import shared

        flags: Flags = shared.cmd_opts
        doings = HostDoings(self._options)
        # Without a web UI there is no tab, and a user who gave the API a password does not want the log beside it.
        if demo is not None or not flags.api_auth:
            add_route(app, self._panel, doings, lambda: is_opened(flags))
        if has_api(flags):
            add_rest(
                app, self._panel, doings, credentials_of(flags.api_auth), is_for_other_sites(flags), is_opened(flags)
            )
        takeover = installed.installed()
        if takeover is not None:
            takeover.app_started()


def register(options: InForce | None) -> None:
    """Adds the settings at once (so that they are there with --nowebui too), tab and address when Forge asks for them.

    Called at each execution of the script: "Reload UI" forgets all callbacks, the settings stay and get their texts anew.
    Where a host forgets none there is one tab all the same.
    """
    from modules import script_callbacks

    face = Face(options)
    face.add_settings()
    for callback in (tab.build, _complete_infotext, _add_axes):
        script_callbacks.remove_callbacks_for_function(callback)
    script_callbacks.on_ui_tabs(tab.build)
    script_callbacks.on_app_started(face.app_started)
    script_callbacks.on_infotext_pasted(_complete_infotext)
    # A script that adds axes to the plot may run before or after the plot's own.
    script_callbacks.on_before_ui(_add_axes)


def _complete_infotext(infotext: str, fields: dict[str, object]) -> None:
    from modules import shared

    fill_in_mode(fields, read(dict(shared.opts.data))[0].mode)


def _add_axes() -> None:
    if installed.installed() is not None:
        xyz_axes.add(sys.modules)


def _timeline() -> Timeline | None:
    return None if of_process.journal is None else of_process.journal.timeline


def _crash() -> Crash | None:
    return None if of_process.journal is None else of_process.journal.crash


def _language() -> tuple[Language, str | None]:
    """The setting, and the name of the WebUI's own localization."""
    from modules import shared

    return read(dict(shared.opts.data))[0].language, getattr(shared.opts, "localization", None)
