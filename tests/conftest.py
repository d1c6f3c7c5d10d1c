import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_threads_and_seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def nothing_of_others():
    """What other tests left behind is not among `gc.get_objects()`: it may go at any time, and a count with it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
