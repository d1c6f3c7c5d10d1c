"""The stand-alone page behind a real server on the loopback, and a browser to look at it."""

import asyncio
import importlib
import json
import os
import shutil
import socket
import threading
import urllib.error
import urllib.request

import pytest

from support.waiting import wait_until

fastapi = pytest.importorskip("fastapi", reason="needs fastapi (in the extra `test`)")
uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn (in the extra `test`)")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Server(uvicorn.Server):
    """Looks every few milliseconds, not ten times a second, whether it is to end."""

    async def main_loop(self):
        await self.on_tick(0)
        while not self.should_exit:
            await asyncio.sleep(0.005)


class Served:
    """`with Served(app) as server: server.get("/path")`. The same port may be served again by another app afterwards."""

    def __init__(self, app, port=None):
        self.app, self.port = app, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        config = uvicorn.Config(
            self.app,
            host="127.0.0.1",
            port=self.port,
            log_config=None,
            lifespan="off",
            timeout_graceful_shutdown=1,
            ws="none",
        )
        self.server = _Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started, "the server did not start", step_seconds=0.002)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()

    def get(self, path, **headers):
        """`(status, headers, body as JSON)`."""
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.headers, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, json.load(error)


def chromium():
    """The path of a browser; skips where there is none, unless LORA_GUARD_BROWSER=required."""
    required = os.environ.get("LORA_GUARD_BROWSER") == "required"
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None and not required:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    assert path is not None, "LORA_GUARD_BROWSER=required, but there is no chromium"
    return path


def playwright():
    """playwright.sync_api."""
    return package("playwright.sync_api")


def package(name):
    """A package of the extra `test`; skips where it is not installed, unless LORA_GUARD_BROWSER=required."""
    if os.environ.get("LORA_GUARD_BROWSER") == "required":
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"needs {name} (in the extra `test`)")
