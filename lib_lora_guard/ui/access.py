"""Decides who may ask the panel's addresses. Pure: headers in, a refusal or nothing out.

A page of another site may make the user's browser ask a server on the user's machine, under the server's own name or under a
name that it has pointed there (DNS rebinding). So the Host header has to be one of this machine, and the browser's own
marks (W3C "Fetch Metadata", `Origin`) have to say that the WebUI's page asks. Where the user has opened the WebUI to others
by its flags, names and addresses are not known in advance: then these marks and the login decide alone.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

OWN_HEADER = "x-lora-guard"
"""The page sends it with everything that changes something. A page of another site cannot, unless CORS allows it."""

_SAME_SITE = ("same-origin", "none")
"""Values of Sec-Fetch-Site: the WebUI's own page, and what the user has typed."""
_OWN_NAMES = ("localhost",)


@dataclass(frozen=True)
class Asker:
    """One request."""

    headers: Mapping[str, str]
    """By lower-case name."""
    address: str | None
    """Of the other end; None if the server does not know it."""
    is_https: bool = False
    changes: bool = False
    """True if the request changes something."""


def refusal(asker: Asker, is_opened: bool) -> str | None:
    """Returns why a request gets no answer; None if it may have one.

    Args:
        asker: The request.
        is_opened: True if the user has opened the WebUI to other machines by its own flags.
    """
    site, host = asker.headers.get("sec-fetch-site"), asker.headers.get("host", "")
    if is_of_other_site(asker.headers):
        return "only for the WebUI's own page"
    if not is_opened:
        if not is_own_name(host):
            return "only under the name of this machine"
        if site is None and not asker.is_https and not _is_loopback(asker.address):
            return "only for this machine; start the WebUI with --listen to open it"
    if asker.changes and (OWN_HEADER not in asker.headers or not _is_own_origin(asker.headers.get("origin"), host)):
        return "only for the WebUI's own page"
    return None


def is_of_other_site(headers: Mapping[str, str]) -> bool:
    """True if a browser says that the page of another site asks.

    Over plain http in a local network it sends no Sec-Fetch-Site, and an Origin for all that another site may read or change.
    """
    site = headers.get("sec-fetch-site")
    if site is None:
        return not _is_own_origin(headers.get("origin"), headers.get("host", ""))
    return site not in _SAME_SITE


def is_own_name(host: str) -> bool:
    """True for a name of this machine that leads nowhere else, with or without a port."""
    try:
        name = urlsplit(f"//{host}").hostname if _is_plain(host) else None
    except ValueError:
        return False  # brackets without an IPv6 address between them
    return name is not None and (name in _OWN_NAMES or name.endswith(".localhost") or _is_loopback(name))


def _is_plain(host: str) -> bool:
    return bool(host) and host.isascii() and host.isprintable() and not set(host) & set("/\\@?# ")


def _is_loopback(address: str | None) -> bool:
    try:
        found = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def _is_own_origin(origin: str | None, host: str) -> bool:
    """True without an Origin: browsers send one with every POST."""
    try:
        return origin is None or urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False  # brackets without an IPv6 address between them
