"""The address beside gradio itself, whose logins it has to respect. Runs where gradio is installed: in Forge's own Python."""

import http.cookiejar
import json
import os
import urllib.error
import urllib.parse
import urllib.request

import pytest

if os.environ.get("LORA_GUARD_GRADIO") != "required":
    pytest.importorskip("gradio", reason="needs gradio, which comes with Forge")
from support.face_server import free_port
from support.standalone import Standalone

from lib_lora_guard.ui import tab
from lib_lora_guard.ui.panel import Panel
from lib_lora_guard.ui.route import PATH, add_route

pytestmark = pytest.mark.filterwarnings("ignore")  # gradio's and its own dependencies'


@pytest.fixture(params=[None, [("me", "secret")]], ids=["open", "login"])
def app(request, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    ((blocks, title, element),) = tab.build()
    with gradio.Blocks(analytics_enabled=False) as demo, gradio.Tab(title, elem_id=element):
        blocks.render()
    port = free_port()
    app, _, _ = demo.launch(
        auth=request.param, server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True,
        show_api=False,
    )  # fmt: skip
    host = Standalone()
    host.log.info("said to those who may hear it")
    add_route(app, Panel(host.status, lambda: (host.language, None), lambda: host.ring))
    yield f"http://127.0.0.1:{port}", request.param is not None
    demo.close()


def test_gradios_login_is_ours(app):
    url, login = app
    with_cookies = urllib.request.build_opener(
        urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar(policy=_Trusting()))
    )

    def ask():
        try:
            with with_cookies.open(url + PATH, timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    if login:
        assert ask() == (401, {"error": "not logged in"})
        for password, status in (("wrong", 401), ("secret", 200)):
            form = urllib.parse.urlencode({"username": "me", "password": password}).encode()
            try:
                with_cookies.open(url + "/login", form, timeout=10).close()
            except urllib.error.HTTPError as error:
                error.close()
            assert ask()[0] == status
    status, told = ask()
    assert status == 200
    assert told["lines"][0]["text"] == "said to those who may hear it"
    with with_cookies.open(url + "/config", timeout=10) as answer:
        assert "lora_guard_panel" in answer.read().decode()


class _Trusting(http.cookiejar.DefaultCookiePolicy):
    """gradio marks one of its two cookies as for https only; Python's jar is strict about dots in names of hosts."""

    def return_ok_domain(self, cookie, request):
        return True
