"""fp8 as checkpoints hold it: two dtypes, without a scale, with one, with one a row, in any dtype."""

import pytest
import torch
from support.measure import same_bits

from lib_lora_guard.errors import FileFormatError
from lib_lora_guard.weights import ScaledFp8Codec

# Written by hand. e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; e5m2: 5 (bias 15), 2.
BYTES = torch.tensor([[0x38, 0x39, 0xC0], [0x01, 0x7E, 0x00]], dtype=torch.uint8)
VALUES = {
    torch.float8_e4m3fn: torch.tensor([[1.0, 1.125, -2.0], [2.0**-9, 448.0, 0.0]]),
    torch.float8_e5m2: torch.tensor([[0.5, 0.625, -2.0], [2.0**-16, float("nan"), 0.0]]),
}

each = pytest.mark.parametrize("dtype", VALUES, ids=str)
SCALES = {
    "none": (None, [[1.0], [1.0]]),
    "number": (torch.tensor(0.5), [[0.5], [0.5]]),
    "one": (torch.tensor([0.5]), [[0.5], [0.5]]),
    "one by one": (torch.tensor([[0.5]]), [[0.5], [0.5]]),
    "a row": (torch.tensor([0.5, 2.0**-14]), [[0.5], [2.0**-14]]),
    "a row, column": (torch.tensor([[0.5], [2.0**-14]]), [[0.5], [2.0**-14]]),
    "half": (torch.tensor([0.5], dtype=torch.float16), [[0.5], [0.5]]),
    "bf16": (torch.tensor([0.5, 2.0], dtype=torch.bfloat16), [[0.5], [2.0]]),
    "fp64": (torch.tensor([0.5, 2.0], dtype=torch.float64), [[0.5], [2.0]]),
}


@each
@pytest.mark.parametrize("scale", SCALES)
def test_values_and_rows(dtype, scale):
    given, factor = SCALES[scale]
    parts = {"data": BYTES.view(dtype)} | ({} if given is None else {"scale": given})
    wanted = VALUES[dtype] * torch.tensor(factor)
    codec = ScaledFp8Codec()
    for out in (torch.float32, torch.bfloat16, torch.float16):
        decoded = codec.decode(parts, out)
        assert decoded.dtype == out
        assert torch.equal(decoded.nan_to_num(7.0), wanted.to(out).nan_to_num(7.0))
        for row in (0, 1):
            assert same_bits(codec.decode_rows(parts, row, 1, out), decoded[row : row + 1])
    assert codec.decode_rows(parts, 2, 0, torch.float32).shape == (0, 3)
    assert codec.shape_of(parts) == (2, 3)
    assert codec.bytes_of((2, 3)) == 6


def test_a_scale_above_fp16_is_not_lost_on_the_way_to_fp16():
    data = torch.tensor([[0x01]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    parts = {"data": data, "scale": torch.tensor([2.0**20])}
    assert ScaledFp8Codec().decode(parts, torch.float16).tolist() == [[2.0**11]]


def test_scales_that_are_no_numbers_are_passed_on():
    parts = {"data": BYTES[:1].view(torch.float8_e4m3fn), "scale": torch.tensor(float("nan"))}
    assert ScaledFp8Codec().decode(parts, torch.float32).isnan().all()


@pytest.mark.parametrize(
    "scale", [torch.ones(3), torch.ones(1, 3), torch.ones(2, 3), torch.ones(0)], ids=lambda s: str(list(s.shape))
)
def test_scales_of_other_shapes_are_refused(scale):
    parts = {"data": BYTES.view(torch.float8_e4m3fn), "scale": scale}
    with pytest.raises(FileFormatError, match=r"fp8: expected a scale of 1 value or of 2 \(one a row\), found \["):
        ScaledFp8Codec().decode(parts, torch.float32)


def test_data_that_is_not_fp8_is_refused():
    with pytest.raises(FileFormatError, match=r"fp8: expected a matrix of a float8 dtype, found \[2, 3\] uint8"):
        ScaledFp8Codec().decode({"data": BYTES}, torch.float32)
