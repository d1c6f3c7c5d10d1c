import contextlib
import functools
import gc
import importlib.machinery
import logging
from pathlib import Path

import pytest
import torch

from lib_lora_guard.files import header

# Collecting imports all of torch and of the libraries: a million objects that all stay.
gc.disable()

# The environment of a real host, for the contract suite, has no hypothesis.
with contextlib.suppress(ModuleNotFoundError):
    from hypothesis import settings

    # How long an example takes shows what else the machine does.
    settings.register_profile("any machine", settings(), deadline=None)
    settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _same_threads_and_seed():
    # Not torch.manual_seed: for every kind of GPU there could be, that one writes down where it was called from.
    torch.default_generator.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _logger_as_it_was():
    """Where the guard starts, it sets the package's logger up. The next test finds it as this one did."""
    logger = logging.getLogger("lib_lora_guard")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


WRITTEN_ONCE = [
    Path(__file__).parent / name
    for name in (
        "adapters",
        "baking",
        "models",
        "references",
        "hosts/plain/test_large_factors.py",
        "hosts/plain/test_stack_argument.py",
        "hosts/plain/test_what_files_say.py",
    )
]


@pytest.fixture(scope="module", autouse=True)
def _no_wait_for_the_clock(request):
    """Tests in `WRITTEN_ONCE` write no file again that was read: none has to be older than a step of the clock for that."""
    with pytest.MonkeyPatch.context() as patch:
        if not {request.path, *request.path.parents}.isdisjoint(WRITTEN_ONCE):
            patch.setattr(header, "CLOCK_STEP_NS", 0)
        yield


@pytest.fixture
def nothing_of_others():
    """What other tests left behind is not among `gc.get_objects()`: it may go at any time, and a count with it."""
    put_aside()


def put_aside():
    """Takes everything that lives by now out of the garbage collector's way.

    torch and the libraries are a million objects; a test that collects garbage would look at all of them each time.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    # pytest looks after each logger that does not propagate, three times a test; torch has forty of them.
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and not logger.name.startswith("lib_lora_guard"):
            logger.propagate = True
    put_aside()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    result = yield
    if nextitem is not None and nextitem.path != item.path:
        # What the module has imported, and what a fixture of it has put back.
        put_aside()
    return result


# Most tests import the double of Forge anew; it has to be compiled once.
_compiled = functools.cache(importlib.machinery.SourceFileLoader.source_to_code)


def _source_to_code(loader, data, path, *, _optimize=-1):
    return _compiled(None, bytes(data), path, _optimize=_optimize)


importlib.machinery.SourceFileLoader.source_to_code = _source_to_code
