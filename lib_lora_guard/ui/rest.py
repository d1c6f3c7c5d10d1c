"""The documented API below `/lora-guard/v1`, for programs: only where the WebUI offers its own API, with its credentials.

Texts come in the language of the Accept-Language header, or as the setting says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from secrets import compare_digest
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from .access import is_of_other_site, is_own_name
from .panel import Panel
from .route import Doings, FitAnswer

ROOT = "/lora-guard/v1"
_TAGS = ["LoRA Guard"]
_LARGEST = (1 << 53) - 1
_MOST_LORAS, _NAME_CHARACTERS = 32, 300
FREE = ("vram", "ram")


def add_rest(
    app: FastAPI,
    panel: Panel,
    doings: Doings,
    credentials: Mapping[str, str] | None = None,
    is_for_other_sites: bool = False,
    is_opened: bool = False,
) -> None:
    """Adds the addresses to `app`, once.

    Args:
        app: The WebUI's.
        panel: Answers.
        doings: Carries out what is asked.
        credentials: Passwords by user; None if the WebUI's own API has none.
        is_for_other_sites: True if the user has opened the API to pages of other sites (CORS).
        is_opened: True if the user has opened the WebUI to other machines by its own flags.
    """
    if any(getattr(route, "path", "").startswith(ROOT) for route in app.routes):
        return
    guards = [] if is_for_other_sites else [Depends(_own_site)]
    if credentials is not None:
        guards.append(Depends(_login(credentials)))
    elif not is_opened:
        guards.append(Depends(_own_name))

    def add(path: str, answer: Callable[..., Any], method: str = "GET") -> None:
        summary, _, description = (answer.__doc__ or "").partition("\n\n")
        app.add_api_route(
            ROOT + path,
            answer,
            methods=[method],
            tags=list(_TAGS),
            summary=summary.strip(),
            description=" ".join(description.split()) or summary.strip(),
            dependencies=guards,
            response_class=JSONResponse,
            response_model=None,
        )

    def language(request: Request) -> str:
        return panel.reader(request.headers.get("accept-language"))

    def status(request: Request) -> dict[str, Any]:
        """What is going on, what is loaded, and how full the memory is."""
        return panel.status(language(request))

    def log(request: Request, since: Annotated[int, Query(ge=0, le=_LARGEST)] = 0) -> dict[str, Any]:
        """The lines of the log after line `since`, at most 500.

        `more` is true if there are more of them: ask again with the number of the last line. `boot` changes when the WebUI
        is started again, and the numbers begin anew.
        """
        return panel.log(since, language(request))

    def plan(
        request: Request,
        checkpoint: Annotated[str, Query(min_length=1, max_length=_NAME_CHARACTERS)],
        lora: Annotated[Sequence[str], Query(max_length=_MOST_LORAS)] = (),
    ) -> FitAnswer:
        """Whether a checkpoint and LoRAs fit on this machine, by the names that the WebUI lists them under."""
        return doings.will_it_fit(checkpoint, [name[:_NAME_CHARACTERS] for name in lora], language(request))

    def diagnostics() -> dict[str, str]:
        """Versions, card, settings and the log, as for a bug report: no prompts, names of files or paths."""
        return {"text": doings.report()}

    def free(request: Request, what: Annotated[str, Query(pattern="^(vram|ram)$")] = "vram") -> dict[str, str | None]:
        """Frees VRAM (moves every model into RAM) or RAM (gives back kept files and copies); not while an image is made."""
        return {"text": doings.do(f"free_{what}", language(request))}

    add("/status", status)
    add("/log", log)
    add("/plan", plan)
    add("/diagnostics", diagnostics)
    add("/free", free, "POST")


def _own_site(request: Request) -> None:
    """Refuses what a page of another site makes the user's browser ask."""
    if is_of_other_site(request.headers):
        raise HTTPException(403, "only for the WebUI's own page; --cors-allow-origins opens the API to others")


def _own_name(request: Request) -> None:
    """Refuses what comes under a name that another site may have pointed to this machine (DNS rebinding).

    A page under that name has no password: where the API asks for one, the name does not matter.
    """
    if not is_own_name(request.headers.get("host", "")):
        raise HTTPException(403, "only under the name of this machine; --api-auth or --listen opens the API to others")


def _login(credentials: Mapping[str, str]) -> Callable[..., bool]:
    """Returns what asks for a user and a password, as the WebUI's own API does."""

    def check(given: Annotated[HTTPBasicCredentials, Depends(HTTPBasic())]) -> bool:
        expected = credentials.get(given.username)
        if expected is not None and compare_digest(given.password.encode(), expected.encode()):
            return True
        raise HTTPException(401, "Incorrect username or password", {"WWW-Authenticate": "Basic"})

    return check
