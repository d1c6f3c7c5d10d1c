"""A size that the log has named is named again only where it is another situation."""

import gc
import logging

import pytest
import torch

from lib_lora_guard.runtime.told_sizes import ToldSizes
from lib_lora_guard.units import MB


@pytest.mark.parametrize(
    ("sizes", "news"),
    [
        ((64, 1, 65, 1), [0, 0, 1, 0]),
        ((160, 151, 160, 151), [1, 0, 0, 0]),
        ((300, 1500, 300, 1500), [1, 1, 0, 0]),
        ((2000, 2200, 2201), [1, 0, 1]),
        ((300, 364, 365, 1), [1, 0, 1, 0]),
    ],
)
def test_a_size_like_one_named_before_is_for_who_looks_for_detail(sizes, news):
    told, model = ToldSizes(), torch.nn.Module()
    levels = [told.level(model, "memory.shrunk", size * MB) for size in sizes]
    assert levels == [logging.INFO if new else logging.DEBUG for new in news]


def test_another_model_and_another_line_are_news_and_a_model_takes_its_sizes_with_it():
    told, model = ToldSizes(), torch.nn.Module()
    asked = [(model, "a"), (torch.nn.Module(), "a"), (model, "b"), (model, "a")]
    assert [told.level(*one, 500 * MB) for one in asked] == [logging.INFO] * 3 + [logging.DEBUG]
    del model, asked
    gc.collect()
    assert len(told._told) == 0
