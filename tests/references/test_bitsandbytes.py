"""Our decoder of 4-bit weights against bitsandbytes' own, where that can be imported (numbers it made: tests/weights)."""

import pytest
import torch
from support.make import rand

from lib_lora_guard.weights.bnb4 import from_file_parts, from_quant_state

functional = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)


@pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
@pytest.mark.parametrize("shape", [(24, 96), (7, 40), (130, 256)], ids=str)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantised_weights(kind, block, shape, nested):
    weight = rand(*shape, seed=1) * 0.02
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        data, state = functional.quantize_4bit(
            weight.to(dtype), blocksize=block, compress_statistics=nested, quant_type=kind
        )
        wanted = functional.dequantize_4bit(data, state)
        decoder, parts = from_quant_state(data, state)
        # Exact: level times absmax in fp32 on both sides, rounded once.
        assert torch.equal(decoder.decode(parts, dtype), wanted)
        assert torch.equal(decoder.decode_rows(parts, 2, 3, dtype), wanted[2:5])
        stored = {f"x.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        decoder, parts = from_file_parts({"x.weight": data, **stored}, "x.weight")
        assert torch.equal(decoder.decode(parts, dtype), wanted)
