"""Who may ask: the WebUI's own page and this machine's programs. Everything here is a harmless request."""

import asyncio
import json
import types

import pytest

pytest.importorskip("fastapi", reason="needs fastapi (in the extra `test`)")
from support.standalone import Standalone

from lib_lora_guard.hosts.webui.flags import credentials_of, is_for_other_sites, is_opened
from lib_lora_guard.ui.access import Asker, refusal
from lib_lora_guard.ui.rest import ROOT, add_rest
from lib_lora_guard.ui.route import PATH, add_route

HOME = {"host": "localhost:7860"}
CLOSED, OPEN = False, True
PAGE = {"sec-fetch-site": "same-origin", "x-lora-guard": "1", "origin": "http://localhost:7860"}


@pytest.mark.parametrize(
    ("headers", "address", "opened", "answered"),
    [
        (HOME, "127.0.0.1", CLOSED, True),
        ({"host": "127.0.0.1:7860"}, "127.0.0.1", CLOSED, True),
        ({"host": "[::1]:7860"}, "::1", CLOSED, True),
        ({"host": "forge.localhost"}, "::ffff:127.0.0.1", CLOSED, True),
        ({"host": "LOCALHOST:1"}, "127.0.0.1", CLOSED, True),
        # A name that another site has pointed to this machine.
        ({"host": "evil.example:7860"}, "127.0.0.1", CLOSED, False),
        ({"host": "evil.example:7860", "sec-fetch-site": "same-origin"}, "127.0.0.1", CLOSED, False),
        ({"host": "localhost.evil.example"}, "127.0.0.1", CLOSED, False),
        ({"host": "localhost@evil.example"}, "127.0.0.1", CLOSED, False),
        ({"host": "192.168.1.5:7860"}, "127.0.0.1", CLOSED, False),
        ({"host": ""}, "127.0.0.1", CLOSED, False),
        ({}, "127.0.0.1", CLOSED, False),
        ({"host": "[::1"}, "127.0.0.1", CLOSED, False),
        ({"host": "[zz]:7860"}, "127.0.0.1", CLOSED, False),
        # Another machine, over plain http, without a browser's mark.
        (HOME, "192.168.1.7", CLOSED, False),
        (HOME, None, CLOSED, False),
        (HOME, "no address", CLOSED, False),
        ({**HOME, "sec-fetch-site": "same-origin"}, "192.168.1.7", CLOSED, True),
        # A page of another site, whatever the flags.
        ({**HOME, "sec-fetch-site": "cross-site"}, "127.0.0.1", CLOSED, False),
        ({**HOME, "sec-fetch-site": "cross-site"}, "127.0.0.1", OPEN, False),
        # Opened by the user.
        ({"host": "forge.example"}, "192.168.1.7", OPEN, True),
    ],
)
def test_who_gets_an_answer(headers, address, opened, answered):
    assert (refusal(Asker(headers, address), opened) is None) is answered


def test_https_from_another_machine_needs_no_mark():
    assert refusal(Asker(HOME, "192.168.1.7", is_https=True), CLOSED) is None


@pytest.mark.parametrize(
    ("headers", "answered"),
    [
        ({**HOME, **PAGE}, True),
        ({**HOME, "x-lora-guard": "1"}, True),
        (HOME, False),
        ({**HOME, **PAGE, "origin": "http://evil.example"}, False),
        ({**HOME, **PAGE, "origin": "http://localhost:7861"}, False),
        ({**HOME, **PAGE, "origin": "null"}, False),
        ({**HOME, **PAGE, "origin": "http://["}, False),
        ({**HOME, **PAGE, "sec-fetch-site": "same-site"}, False),
    ],
)
@pytest.mark.parametrize("opened", [CLOSED, OPEN])
def test_what_changes_something_needs_the_pages_own_header(headers, answered, opened):
    assert (refusal(Asker(headers, "127.0.0.1", changes=True), opened) is None) is answered


@pytest.mark.parametrize(
    ("flags", "opened"),
    [
        ({}, False),
        ({"listen": False, "server_name": None, "share": False, "api": True}, False),
        ({"listen": True}, True),
        ({"share": True}, True),
        ({"server_name": "forge.example"}, True),
        ({"server_name": "127.0.0.1"}, False),
        ({"ngrok": "token"}, True),
        ({"subpath": "forge"}, True),
    ],
)
def test_the_webui_is_opened_by_its_own_flags(flags, opened, monkeypatch):
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    assert is_opened(types.SimpleNamespace(**flags)) is opened
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    assert is_opened(types.SimpleNamespace(**flags)) is True


def test_credentials_are_read_as_the_webui_reads_them():
    assert credentials_of(None) is credentials_of("") is None
    assert credentials_of("me:secret,you:other") == {"me": "secret", "you": "other"}


def ask(app, path, method="GET", client=("127.0.0.1", 1), **headers):
    """Calls the app without a server; returns the status and the JSON."""
    path, _, query = path.partition("?")
    sent, coming = [], [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive():
        # Then the client waits for its answer: older Starlettes ask again and again for what is at hand.
        return coming.pop() if coming else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    headers = {"host": "localhost:7860", **headers}
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "scheme": "http", "headers": raw,
        "client": client, "server": ("localhost", 7860),
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(body)


@pytest.fixture
def host():
    return Standalone()


def test_each_address_of_the_panel_is_guarded(host):
    for path in (PATH, PATH + "/report", PATH + "/files", PATH + "/fit?checkpoint=sdxl"):
        assert ask(host.app, path)[0] == 200
        assert ask(host.app, path, client=("10.0.0.5", 1))[0] == 403
        assert ask(host.app, path, sec_fetch_site="cross-site")[0] == 403
    assert ask(host.app, PATH + "/do/free_vram", "POST") == (403, {"error": "only for the WebUI's own page"})
    assert host.done == []
    assert ask(host.app, PATH + "/do/free_vram", "POST", x_lora_guard="1") == (200, {"text": "free_vram was done"})
    assert host.done == ["free_vram"]
    assert ask(host.app, PATH + "/fit?" + "lora=x&" * 2000)[0] == 400


def test_an_opened_webui_answers_other_machines():
    from fastapi import FastAPI

    host, app, flags = Standalone(), FastAPI(), types.SimpleNamespace(listen=True)
    add_route(app, host.panel, host, lambda: is_opened(flags))
    assert ask(app, PATH, client=("10.0.0.5", 1))[0] == 200
    flags.listen = False
    assert ask(app, PATH, client=("10.0.0.5", 1))[0] == 403


LOGIN = "Basic bWU6c2VjcmV0"  # me:secret


@pytest.fixture(params=[None, {"me": "secret"}], ids=["open", "login"])
def api(request, host):
    from fastapi import FastAPI

    app = FastAPI()
    for _ in range(2):
        add_rest(app, host.panel, host, request.param)
    app.with_login = request.param is not None
    return app


def test_the_api_is_documented_and_asks_for_the_webuis_credentials(api):
    paths = api.openapi()["paths"]
    assert {path: list(about) for path, about in paths.items()} == {
        ROOT + "/status": ["get"],
        ROOT + "/log": ["get"],
        ROOT + "/plan": ["get"],
        ROOT + "/diagnostics": ["get"],
        ROOT + "/free": ["post"],
    }
    for about in paths.values():
        (one,) = about.values()
        assert one["tags"] == ["LoRA Guard"]
        assert one["summary"].endswith(".")
        assert ("security" in one) is api.with_login
    login = {"authorization": LOGIN} if api.with_login else {}
    if api.with_login:
        for wrong in ({}, {"authorization": "Basic bWU6d3Jvbmc="}, {"authorization": "Basic eW91OnNlY3JldA=="}):
            assert ask(api, ROOT + "/status", **wrong)[0] == 401
    assert ask(api, ROOT + "/status", **login)[1]["headline"]["level"] == "good"


def test_the_api_answers_within_bounds(api, host):
    login = {"authorization": LOGIN} if api.with_login else {}
    for number in range(502):
        host.log.info("line %d", number)
    status, told = ask(api, ROOT + "/log", **login)
    assert (status, len(told["lines"]), told["more"]) == (200, 500, True)
    rest = ask(api, ROOT + f"/log?since={told['lines'][-1]['number']}", **login)[1]
    assert rest["more"] is False
    for wrong in (
        "log?since=-1",
        "log?since=x",
        f"log?since={1 << 60}",
        "plan",
        "plan?checkpoint=",
        "plan?checkpoint=a&" + "lora=b&" * 40,
    ):
        assert ask(api, f"{ROOT}/{wrong}", **login)[0] == 422, wrong
    assert ask(api, ROOT + "/plan?checkpoint=sdxl&lora=style&lora=pose_xl", **login)[1] == {
        "fits": True, "lines": ["sdxl with style, pose_xl"]
    }  # fmt: skip
    assert set(ask(api, ROOT + "/diagnostics", **login)[1]) == {"text"}
    assert ask(api, ROOT + "/free?what=ram", "POST", **login) == (200, {"text": "free_ram was done"})
    assert ask(api, ROOT + "/free?what=everything", "POST", **login)[0] == 422
    assert host.done == ["free_ram"]


def test_the_api_answers_pages_of_other_sites_only_where_the_user_has_opened_it(host):
    from fastapi import FastAPI

    for flags, status in (({}, 403), ({"cors_allow_origins": "https://mine.example"}, 200)):
        app = FastAPI()
        add_rest(app, host.panel, host, None, is_for_other_sites(types.SimpleNamespace(**flags)))
        assert ask(app, ROOT + "/free?what=vram", "POST", sec_fetch_site="cross-site")[0] == status
        assert ask(app, ROOT + "/status", sec_fetch_site="same-origin")[0] == 200
        # Over plain http in a local network browsers send no mark, but they name the page's site.
        assert ask(app, ROOT + "/free", "POST", origin="http://evil.example")[0] == status
        assert ask(app, ROOT + "/status", origin="http://localhost:7860")[0] == 200
    assert host.done == ["free_vram"] * 2


EVIL = {"host": "evil.example:7860", "origin": "http://evil.example:7860", "sec_fetch_site": "same-origin"}
"""A page of another site under a name that the site has pointed to this machine: for the browser they are one site."""


@pytest.mark.parametrize(
    ("credentials", "opened", "headers", "status"),
    [
        (None, CLOSED, EVIL, 403),
        (None, CLOSED, {"host": "localhost.evil.example"}, 403),
        (None, CLOSED, {"host": ""}, 403),
        (None, CLOSED, {"host": "127.0.0.1:7860"}, 200),
        (None, CLOSED, {"host": "[::1]:7860"}, 200),
        (None, OPEN, {"host": "forge.example"}, 200),
        # Where a password is asked for, the page under the other name has none.
        ({"me": "secret"}, CLOSED, EVIL, 401),
        ({"me": "secret"}, CLOSED, {"host": "forge.example", "authorization": LOGIN}, 200),
    ],
)
@pytest.mark.parametrize("for_other_sites", [False, True])
def test_the_api_answers_under_names_of_this_machine(host, credentials, opened, headers, status, for_other_sites):
    from fastapi import FastAPI

    app = FastAPI()
    add_rest(app, host.panel, host, credentials, for_other_sites, opened)
    for path, method in (("/status", "GET"), ("/diagnostics", "GET"), ("/free", "POST")):
        assert ask(app, ROOT + path, method, **headers)[0] == status, path
    assert len(host.done) == (status == 200)
