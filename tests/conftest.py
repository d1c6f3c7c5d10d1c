import pytest
import torch


@pytest.fixture(autouse=True)
def _same_threads_and_seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)
