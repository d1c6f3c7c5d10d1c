"""The tab's address, `GET /lora-guard/panel`, restricted to users who may see the WebUI."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from .panel import Panel

PATH = "/lora-guard/panel"
_SAME_SITE = (None, "same-origin", "none")
"""Accepted values of Sec-Fetch-Site (W3C "Fetch Metadata"): our own page and tools. Pages of other sites are refused,
whatever CORS rules the host was started with.
"""
_NUMBERS = 1 << 53
"""JavaScript's integers are exact up to here."""


def add_route(app: FastAPI, panel: Panel) -> None:
    """Adds the address to `app`, once."""
    if any(getattr(route, "path", None) == PATH for route in app.routes):
        return

    def answer(request: Request) -> JSONResponse:
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        if request.headers.get("sec-fetch-site") not in _SAME_SITE:
            return JSONResponse({"error": "only for the WebUI's own page"}, 403, headers)
        if not may_see(app, request):
            return JSONResponse({"error": "not logged in"}, 401, headers)
        query = request.query_params
        return JSONResponse(
            panel.answer(
                since=_number(query.get("since", "")),
                sample=_number(query.get("sample", "")),
                boot=query.get("boot", ""),
                language=query.get("language", ""),
                accepted=request.headers.get("accept-language"),
            ),
            headers=headers,
        )

    app.add_api_route(PATH, answer, methods=["GET"], include_in_schema=False, response_model=None)


def may_see(app: Any, request: Request) -> bool:
    """True if no login is required, or if the request belongs to a logged-in user.

    gradio 4.40 keeps its logins on the app (`auth`, `auth_dependency`, `tokens`, `cookie_id`; routes.py). If it
    requires a login and these are missing, the answer is False.
    """
    dependency = getattr(app, "auth_dependency", None)
    if dependency is not None:
        return dependency(request) is not None
    if getattr(app, "auth", None) is None:
        return True
    tokens, cookie = getattr(app, "tokens", {}), getattr(app, "cookie_id", "")
    given = (request.cookies.get(f"{name}-{cookie}") for name in ("access-token", "access-token-unsecure"))
    return any(token is not None and tokens.get(token) is not None for token in given)


def _number(text: str) -> int:
    """Returns the number of a log line; 0 for anything else."""
    return min(int(text), _NUMBERS) if text.isascii() and text.isdigit() and len(text) < 20 else 0
