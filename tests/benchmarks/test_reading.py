"""What `benchmarks/reading.py` promises, on a file of the real size."""

import sys

import pytest
import reading
from support import warm
from support.machine_speed import assert_within


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes, /proc")
def test_a_checkpoint_of_22_gb_chosen_as_lora_costs_its_header(tmp_path):
    path = reading.write_sparse(tmp_path / "flux.safetensors", reading.flux_shapes())
    assert path.stat().st_size > 22e9
    found = reading.refusal(path, warm.run)
    assert found["said"].startswith("flux.safetensors: no LoRA keys found among 780 tensors (first: ")
    assert found["said"].endswith("; load a checkpoint as the model, else download the file again")
    assert_within(found["cpu_seconds"], reading.MOST_SECONDS)
    assert found["mb"] < reading.MOST_MB


def test_the_lora_that_is_read_has_494_modules():
    assert len(reading.lora_shapes(14)) == 2 * 494
