import logging

import pytest
from support.webui import Lines


@pytest.fixture
def lines():
    logger, handler = logging.getLogger("lib_lora_guard"), Lines()
    logger.addHandler(handler)
    logger.setLevel("INFO")
    return handler
