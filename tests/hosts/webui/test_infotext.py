"""What a pasted infotext says of the mode."""

import pytest

from lib_lora_guard.hosts.webui.infotext import fill_in_mode
from lib_lora_guard.settings import LoraMode


@pytest.mark.parametrize(
    ("fields", "as_set", "mode"),
    [
        ({"LoRA Guard mode": "Merge", "LoRA Guard": "Merge, 3 merge"}, "Automatic", "Merge"),
        ({"LoRA Guard mode": "Merge"}, "Merge", ""),
        ({"LoRA Guard": "fp16 LoRA, 120 bypass"}, "Automatic", "fp16 LoRA"),
        ({"LoRA Guard": "Automatic, 3 bypass, without x"}, "Merge", "Automatic"),
        ({"LoRA Guard": "Automatic, 3 bypass"}, "Automatic", ""),
        ({"LoRA Guard mode": "<img src=x>"}, "Automatic", ""),
        ({"LoRA Guard mode": "merge "}, "Automatic", "Merge"),
        ({}, "Merge", ""),
    ],
)
def test_the_mode_of_the_picture_or_that_of_the_settings(fields, as_set, mode):
    pasted = {"Steps": "20", **fields}
    fill_in_mode(pasted, LoraMode(as_set))
    assert pasted == {"Steps": "20", **fields, "LoRA Guard mode": mode}
