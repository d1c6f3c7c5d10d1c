import logging

import pytest
from support.webui import Lines


@pytest.fixture
def lines():
    logger, handler = logging.getLogger("lib_lora_guard"), Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)
