import logging

import pytest
from support.webui import Lines, Web


@pytest.fixture
def web(tmp_path, monkeypatch):
    return Web(tmp_path, monkeypatch)


@pytest.fixture
def lines():
    logger, handler = logging.getLogger("lib_lora_guard"), Lines()
    logger.addHandler(handler)
    logger.setLevel("INFO")
    return handler
