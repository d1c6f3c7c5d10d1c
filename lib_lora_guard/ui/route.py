"""The tab's addresses below `/lora-guard/panel`, restricted to users who may see the WebUI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypedDict

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from .access import Asker, refusal
from .panel import Panel

PATH = "/lora-guard/panel"
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_NUMBERS = 1 << 53
"""JavaScript's integers are exact up to here."""
_LONGEST = 4000
"""Characters of a query."""


class FitAnswer(TypedDict):
    """The answer of "will it fit?"."""

    fits: bool | None
    """None if it is not known."""
    lines: list[str]
    """Sentences, the answer first."""


class Doings(Protocol):
    """What the tab's buttons do. Texts come in the language asked for."""

    def do(self, name: str, language: str) -> str | None:
        """Carries out a button; returns what came of it, or None if there is no such button."""
        ...

    def report(self) -> str:
        """Returns the text for a bug report."""
        ...

    def files(self) -> dict[str, list[str]]:
        """Returns the names of checkpoints and LoRAs."""
        ...

    def will_it_fit(self, checkpoint: str, loras: list[str], language: str) -> FitAnswer:
        """Returns the answer of `plan` in words."""
        ...


def add_route(
    app: FastAPI,
    panel: Panel,
    doings: Doings | None = None,
    is_opened: Callable[[], bool] = lambda: False,
) -> None:
    """Adds the addresses to `app`, once.

    Args:
        app: The WebUI's.
        panel: Answers.
        doings: The buttons; None for a page without.
        is_opened: Returns True if the WebUI was opened to other machines by its own flags.
    """
    if any(getattr(route, "path", None) == PATH for route in app.routes):
        return

    def add(path: str, answer: Callable[[Request], Any], method: str = "GET") -> None:
        def guarded(request: Request) -> JSONResponse:
            refused = refuse(app, request, is_opened())
            return refused or JSONResponse(answer(request), headers=_HEADERS)

        app.add_api_route(path, guarded, methods=[method], include_in_schema=False, response_model=None)

    def told(request: Request) -> dict[str, Any]:
        query = request.query_params
        return panel.answer(
            since=number(query.get("since", "")),
            sample=number(query.get("sample", "")),
            boot=query.get("boot", ""),
            language=query.get("language", ""),
            accepted=request.headers.get("accept-language"),
        )

    def language(request: Request) -> str:
        return panel.reader(request.headers.get("accept-language"))

    add(PATH, told)
    if doings is None:
        return

    def do(request: Request) -> dict[str, Any]:
        return {"text": doings.do(request.path_params["name"], language(request))}

    def fit(request: Request) -> FitAnswer:
        query = request.query_params
        loras = [name for name in query.getlist("lora") if name]
        return doings.will_it_fit(query.get("checkpoint", ""), loras, language(request))

    add(f"{PATH}/do/{{name}}", do, "POST")
    add(f"{PATH}/report", lambda request: {"text": doings.report()})
    add(f"{PATH}/files", lambda request: doings.files())
    add(f"{PATH}/fit", fit)


def refuse(app: Any, request: Request, is_opened: bool) -> JSONResponse | None:
    """Returns the answer for a request that gets no other; None if it may have one."""
    asker = Asker(
        request.headers,
        None if request.client is None else request.client.host,
        request.url.scheme == "https",
        request.method != "GET",
    )
    if (why := refusal(asker, is_opened)) is not None:
        return JSONResponse({"error": why}, 403, _HEADERS)
    if not may_see(app, request):
        return JSONResponse({"error": "not logged in"}, 401, _HEADERS)
    if len(request.url.query) > _LONGEST:
        return JSONResponse({"error": "the question is too long"}, 400, _HEADERS)
    return None


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


def number(text: str) -> int:
    """Returns the number of a log line; 0 for anything else."""
    return min(int(text), _NUMBERS) if text.isascii() and text.isdigit() and len(text) < 20 else 0
