"""The flags that the WebUI was started with, as far as its addresses are concerned.

Source: `modules/cmd_args.py`, `modules/initialize_util.py` (`gradio_server_name`), `modules/api/api.py` of Forge and Forge Neo.
"""

from __future__ import annotations

import os
from typing import Protocol

from ...ui.access import is_own_name


class Flags(Protocol):
    """`modules.shared.cmd_opts`."""

    api: bool
    nowebui: bool
    api_auth: str | None
    listen: bool
    share: bool
    server_name: str | None
    ngrok: str | None
    subpath: str | None
    cors_allow_origins: str | None
    cors_allow_origins_regex: str | None


_OPENING = ("listen", "share", "ngrok", "subpath")
"""With one of these, or a server of another name, other machines reach the WebUI, or it has a name that is not known here."""


def has_api(flags: Flags) -> bool:
    """Returns True if the WebUI offers its own API."""
    given = vars(flags)
    return bool(given.get("api") or given.get("nowebui"))


def is_for_other_sites(flags: Flags) -> bool:
    """Returns True if the user has opened the API to pages of other sites."""
    given = vars(flags)
    return bool(given.get("cors_allow_origins") or given.get("cors_allow_origins_regex"))


def is_opened(flags: Flags) -> bool:
    """Returns True if the user has opened the WebUI to other machines, or to a name of a proxy's."""
    given = vars(flags)
    # gradio reads its variable where the WebUI names no server.
    names = (given.get("server_name"), os.environ.get("GRADIO_SERVER_NAME"))
    return any(given.get(name) for name in _OPENING) or any(name and not is_own_name(name) for name in names)


def credentials_of(api_auth: str | None) -> dict[str, str] | None:
    """Returns the passwords of the API by user, as the WebUI reads them ("me:secret,you:other"); None without any."""
    if not api_auth:
        return None
    pairs = (pair.partition(":") for pair in api_auth.split(","))
    return {user: password for user, colon, password in pairs if colon}
