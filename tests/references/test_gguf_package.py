"""Our GGUF decoders against the gguf package, on blocks of random bytes."""

import pytest
import torch
from support.measure import same_bits

from lib_lora_guard.weights import GGUF_DECODERS

gguf = pytest.importorskip("gguf", exc_type=ImportError)
np = pytest.importorskip("numpy", exc_type=ImportError)

# Where the fp16 numbers of a block lie: random bytes there would be NaN or infinite one time in 32.
HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
}


@pytest.mark.parametrize("name", GGUF_DECODERS)
def test_random_blocks(name):
    decoder, kind = GGUF_DECODERS[name], gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (decoder.block, decoder.block_bytes)
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (16, 8, decoder.block_bytes), dtype=np.uint8)
    if decoder.block > 1:
        for offset in HALVES.get(name, (0,)):
            scales = rng.normal(0, 0.1, (16, 8, 1)).astype(np.float16)
            blocks[..., offset : offset + 2] = scales.view(np.uint8)
    else:
        dense = torch.from_numpy(rng.normal(0, 1, (16, 8))).to(decoder.dtype)
        blocks = dense.view(torch.uint8).numpy()
    data = blocks.reshape(16, -1)
    wanted = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32))
    # Exact: products are exact in fp32 on both sides, and the one sum is rounded the same way.
    assert same_bits(decoder.decode({"data": torch.from_numpy(data)}, torch.float32) + 0.0, wanted + 0.0)
    assert torch.isfinite(wanted).all()
