"""Numbers in the 22 dtypes of safetensors."""

import torch

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
FP8 = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
INTEGERS = {
    "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16, "U32": torch.uint32,
    "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Those that torch has no tensors of."""
ALL = (*FLOATS, *FP8, *INTEGERS, *BITS)
assert len(ALL) == 22


def encoded(tensor, dtype, rng):
    """`(bytes, the numbers in float64 that they mean, or None)`. Values that have no whole bytes in `dtype` become fp32."""
    if dtype in BITS:
        bits = tensor.numel() * BITS[dtype]
        if bits % 8 == 0:
            return dtype, rng.randbytes(bits // 8), None
        dtype = "F32"
    as_torch = FLOATS.get(dtype) or FP8.get(dtype) or INTEGERS[dtype]
    if dtype in INTEGERS and dtype not in ("BOOL", "C64"):
        tensor = (tensor.double() * 30).round()
        tensor = (tensor.abs() if dtype[0] == "U" else tensor).to(torch.int64)
    value = tensor.to(as_torch)
    raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return dtype, raw, value.double() if dtype in FLOATS or dtype in ("F8_E4M3", "F8_E5M2") else None
